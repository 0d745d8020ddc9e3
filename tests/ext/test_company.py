"""A token's numbers are the same bits, however many others share its call, up to FEW; on every level."""

import numpy as np
import pytest

pytest.importorskip("tinyllama._native", reason="the C backend is not built")

from tinyllama import _native
from tinyllama.backends.native import Native
from tinyllama.tensor import Tensor


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def attend(q, k, v, keys, values, pos, window, threads):
    """Attention of these tokens behind pos positions, of which keys and values are copies."""
    out = np.empty((len(q), q[0].size), np.float32)
    _native.attention(q, k, v, keys.copy(), values.copy(), pos, out, threads, min(window, keys.shape[1]))
    return out


def alone_and_together(n_tokens, n_heads, n_kv_heads, head_dim, pos, window=0, k_is=None, threads=(1, 2, 3)):
    """Outputs of n_tokens one by one, then of all in one call with each number of threads."""
    q = normal(n_tokens, n_heads, head_dim)
    k, v = normal(2, n_tokens, n_kv_heads, head_dim, seed=1)
    if k_is is not None:
        k[-1], v[-1] = k_is, k_is
    keys, values = normal(2, n_kv_heads, pos + n_tokens, head_dim, seed=2).astype(np.float16)
    for array, new in ((keys, k), (values, v)):
        array[:, pos:] = new.swapaxes(0, 1)
    alone = [
        attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], keys, values, pos + i, window, 1)
        for i in range(n_tokens)
    ]
    return np.concatenate(alone), [attend(q, k, v, keys, values, pos, window, n) for n in threads]


@pytest.mark.parametrize("pos", [0, 1, 100, 246, 256, 505, 1020])
@pytest.mark.parametrize("shape", [(2, 2, 64), (6, 2, 20), (8, 1, 48), (3, 1, 128)])
def test_attention_of_a_few_tokens_is_that_of_each_alone(shape, pos, level):
    for n_tokens in range(2, 17):
        alone, together = alone_and_together(n_tokens, *shape, pos)
        for each in together:
            np.testing.assert_array_equal(each, alone, err_msg=f"{n_tokens} tokens")


@pytest.mark.parametrize("window", [1, 2, 7, 15, 16, 100, 255, 256, 257, 512, 700])
@pytest.mark.parametrize("shape", [(2, 2, 64), (6, 2, 20)])
def test_attention_in_a_window_of_a_few_tokens_is_that_of_each_alone(shape, window, level):
    """Each token's window begins at another position, and so do the spans into which it is cut."""
    for n_tokens in (2, 3, 5, 16):
        for pos in (0, 5, 250, 600):
            alone, together = alone_and_together(n_tokens, *shape, pos, window)
            for each in together:
                np.testing.assert_array_equal(each, alone, err_msg=f"{n_tokens} tokens at {pos}")


@pytest.mark.parametrize("pos", [0, 250, 256])
def test_a_nan_in_a_later_token_does_not_show_in_those_before_it(pos, level):
    alone, together = alone_and_together(9, 4, 2, 64, pos, k_is=np.nan)
    assert np.isnan(alone[-1]).all() and np.isfinite(alone[:-1]).all()
    for each in together:
        np.testing.assert_array_equal(each, alone)


@pytest.mark.parametrize("n_in", [1, 7, 33, 256, 1025])
@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
def test_products_of_a_few_tokens_are_those_of_each_alone(type, n_in, level):
    weight = Native(1).prepare(Tensor.from_array("", normal(70, n_in), type), True)
    for n_tokens in range(2, 17):
        x = normal(n_tokens, n_in, seed=n_tokens)
        alone = np.concatenate([Native(1).matmul(x[i : i + 1], weight) for i in range(n_tokens)])
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(
                Native(threads).matmul(x, weight), alone, err_msg=f"{n_tokens} tokens"
            )


@pytest.mark.parametrize("width", [1, 5, 64, 1003])
def test_norms_rotations_and_gates_of_a_few_tokens_are_those_of_each_alone(width, level):
    """swiglu is cut into pieces of all tokens' elements, the last of which fills no whole vector."""
    for n_tokens in (2, 7, 16):
        (x, y), scale = normal(2, n_tokens, width), normal(width)
        pairs, freqs = normal(n_tokens, 3, 2 * width), normal(n_tokens, 2 * width).view(np.complex64)
        for operation, inputs in (("swiglu", (x, y)), ("rope", (pairs, freqs)), ("rms_norm", (x,))):
            rest = (scale, 1e-5) if operation == "rms_norm" else ()

            def run(threads, some, operation=operation, inputs=inputs, rest=rest):
                return getattr(Native(threads), operation)(*(array[some] for array in inputs), *rest)

            alone = np.concatenate([run(1, slice(i, i + 1)) for i in range(n_tokens)])
            for threads in (1, 2, 3):
                np.testing.assert_array_equal(run(threads, slice(None)), alone)
