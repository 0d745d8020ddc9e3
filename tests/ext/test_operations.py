"""Everything but products, on every level, against the definition."""

import numpy as np
import pytest

pytest.importorskip("tinyllama._native", reason="the C backend is not built")

from tinyllama import ops
from tinyllama.backends import native
from tinyllama.config import Config
from tinyllama.quant import Tensor

CLOSE = 2e-6  # a few float32 roundings of values near 1
HALF = 2e-3  # keys and values are kept in half precision, 11 bits, and a score is a sum of up to 128 of them
BF16 = 8e-3  # half a unit in the last of 8 bits of a value between 2 and 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 100), (20, 576), (600, 4096)])
def test_rms_norm_computes_its_definition(shape, level):
    x, weight = normal(*shape), normal(shape[1])
    got = native.rms_norm(x, weight, 1e-6, threads=2)
    np.testing.assert_allclose(got, ops.rms_norm(x, weight, 1e-6), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("n", [1, 15, 160, 70000])
def test_swiglu_computes_its_definition(n, level):
    gate, up = normal(1, n) * 10, normal(1, n, seed=1)
    got = native.swiglu(gate, up, threads=2)
    np.testing.assert_allclose(got, ops.swiglu(gate, up), rtol=2 * CLOSE, atol=CLOSE)


def test_swiglu_survives_large_gates(level):
    gate = np.array([[-1e4, -90, 0, 90, 1e4]], np.float32)
    got = native.swiglu(gate, np.ones_like(gate), threads=1)
    np.testing.assert_allclose(got, [[0, 0, 0, 90, 1e4]], rtol=CLOSE, atol=1e-30)


@pytest.mark.parametrize("n_tokens", [1, 70])
def test_rope_computes_its_definition(n_tokens, level):
    config = Config(dim=576, n_layers=1, n_heads=9, vocab_size=8, hidden_dim=8, n_kv_heads=3)
    x, freqs = normal(n_tokens, 9, 64), ops.rope_freqs(config, 5, n_tokens)
    np.testing.assert_allclose(native.rope(x, freqs, threads=2), ops.rope(x, freqs), rtol=0, atol=2 * CLOSE)


def attend(backend, config, tokens_at_a_time, n_ctx):
    """The outputs of attention over random heads, in calls of the given numbers of tokens."""
    cache, pos, outputs = backend.new_cache(config, n_ctx), 0, []
    for n_tokens in tokens_at_a_time:
        shape = n_tokens, config.n_heads, config.head_dim
        kv_shape = n_tokens, config.n_kv_heads, config.head_dim
        q, k, v = normal(*shape, seed=pos), normal(*kv_shape, seed=pos + 1), normal(*kv_shape, seed=pos + 2)
        options = {"threads": 2} if backend is native else {}
        outputs.append(backend.attention(q, k, v, cache, config.n_layers - 1, pos, **options))
        pos += n_tokens
    return np.concatenate(outputs)


@pytest.mark.parametrize("head_dim", [16, 20, 48, 64, 80, 128])
@pytest.mark.parametrize("shared", [1, 3, 8])
def test_attention_computes_its_definition(head_dim, shared, level):
    n_heads = 2 * shared
    config = Config(n_heads * head_dim, 2, n_heads, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    calls = [1, 1, 5, 1, 33, 70, 1, 300, 1]
    got, expected = attend(native, config, calls, 500), attend(ops, config, calls, 500)
    np.testing.assert_allclose(got, expected, rtol=0, atol=BF16 if level == "amx" else HALF)
    assert np.mean((got - expected) ** 2) < 1e-5 * np.mean(expected**2)


def test_attention_in_one_call_is_attention_token_by_token(level):
    config = Config(128, 1, 2, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    cache, q, k, v = native.new_cache(config, 64), *(normal(64, 2, 64, seed=i) for i in range(3))
    together = native.attention(q, k, v, cache, 0, 0, threads=2)
    cache = native.new_cache(config, 64)
    for i in range(64):
        at = slice(i, i + 1)
        one = native.attention(q[at], k[at], v[at], cache, 0, i, threads=2)
        np.testing.assert_allclose(one, together[at], rtol=0, atol=BF16 if level == "amx" else 5 * CLOSE)


def test_attention_survives_scores_that_rise_and_fall_steeply(level):
    config = Config(64, 1, 1, vocab_size=8, hidden_dim=8, n_kv_heads=1)
    k = normal(300, 1, 64) * np.linspace(-40, 40, 300, dtype=np.float32)[:, None, None]
    q, v = normal(300, 1, 64, seed=1) * 10, normal(300, 1, 64, seed=2)
    half = k.astype(np.float16).astype(np.float32)
    got = native.attention(q, k, v, native.new_cache(config, 300), 0, 0, threads=2)
    expected = ops.attention(q, half, v, ops.new_cache(config, 300), 0, 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5 * HALF)


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_nan_in_attention_shows_in_its_outputs(bits, which, n_tokens, level):
    """At every position that sees it, of every head that shares it."""
    config = Config(4 * 32, 1, 4, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    arrays = {name: normal(n_tokens, 4 if name == "q" else 2, 32, seed=ord(name)) for name in "qkv"}
    arrays[which][n_tokens // 2, -1, 5] = np.array(bits, np.uint32).view(np.float32)
    cache = native.new_cache(config, 64)
    before = [normal(20, n_heads, 32) for n_heads in (4, 2, 2)]
    native.attention(*before, cache, 0, 0, threads=1)
    got = native.attention(*arrays.values(), cache, 0, 20, threads=1).reshape(n_tokens, 4, 32)
    heads, features = (
        (slice(3, 4) if which == "q" else slice(2, 4)),
        slice(5, 6) if which == "v" else slice(None),
    )
    seen = slice(n_tokens // 2, n_tokens // 2 + 1 if which == "q" else None)
    assert np.isnan(got[seen, heads, features]).all()


@pytest.mark.parametrize("calls", [[200], [600, 1, 1]])
def test_any_number_of_threads_gives_the_same_bits(calls, level):
    config = Config(192, 1, 6, vocab_size=8, hidden_dim=8, n_kv_heads=3)

    def run(threads):
        cache, pos = native.new_cache(config, 700), 0
        for n in calls:
            out = native.attention(
                normal(n, 6, 32), normal(n, 3, 32), normal(n, 3, 32), cache, 0, pos, threads=threads
            )
            pos += n
        return out

    for threads in (2, 5):
        np.testing.assert_array_equal(run(threads), run(1))


@pytest.mark.parametrize("n_tokens", [1, 17, 50])
def test_what_an_earlier_call_left_in_memory_does_not_matter(n_tokens, level):
    """Every buffer is filled with NaN, which no zero beside it in a tile or a vector would make harmless."""
    config = Config(6 * 20, 1, 6, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    weight = Tensor.from_array("", normal(70, 72), "f16")
    weight = native.prepare(weight, True, arena=native.Arena(), threads=2)

    def run(n, scale):
        cache = native.new_cache(config, 200)
        q, k, v = normal(n, 6, 20) * scale, normal(n, 2, 20) * scale, normal(n, 2, 20) * scale
        attended = native.attention(q, k, v, cache, 0, 0, threads=2)
        return attended, native.matmul(normal(n, 72) * scale, weight, threads=2)

    before = run(n_tokens, 1)
    run(190, np.float32("nan"))
    for got, expected in zip(run(n_tokens, 1), before, strict=True):
        np.testing.assert_array_equal(got, expected)
        assert np.isfinite(got).all()


def test_a_tapped_attention_is_the_definition_on_the_same_cache(level):
    config = Config(64, 1, 2, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    cache, seen = native.new_cache(config, 8), {}
    first, second = normal(4, 2, 32), normal(1, 2, 32, seed=1)
    native.attention(first, first, first, cache, 0, 0, threads=2)
    tapped = native.attention(second, second, second, cache, 0, 4, seen.__setitem__, threads=2)
    fast = native.attention(second, second, second, cache, 0, 4, threads=2)
    np.testing.assert_allclose(tapped, fast, rtol=0, atol=HALF)
    np.testing.assert_allclose(seen["weights"].sum(-1), 1, rtol=0, atol=CLOSE)
