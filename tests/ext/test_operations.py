"""Everything but products, on every level, against the definition."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("tinyllama._native", reason="the C backend is not built")

from tinyllama import _native, ops
from tinyllama.backends import Backend
from tinyllama.backends.native import Native
from tinyllama.config import Config
from tinyllama.tensor import Tensor

CLOSE = 2e-6  # a few float32 roundings of values near 1
HALF = 2e-3  # keys and values are kept in half precision, 11 bits, and a score is a sum of up to 128 of them
BF16 = 16e-3  # half a unit in the last of 8 bits of a value between 2 and 4, and as much for its weight


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 100), (20, 576), (600, 4096)])
def test_rms_norm_computes_its_definition(shape, level):
    x, weight = normal(*shape), normal(shape[1])
    got = Native(2).rms_norm(x, weight, 1e-6)
    np.testing.assert_allclose(got, ops.rms_norm(x, weight, 1e-6), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("n", [1, 15, 160, 70000])
def test_swiglu_computes_its_definition(n, level):
    gate, up = normal(1, n) * 10, normal(1, n, seed=1)
    got = Native(2).swiglu(gate, up)
    np.testing.assert_allclose(got, ops.swiglu(gate, up), rtol=2 * CLOSE, atol=CLOSE)


def test_swiglu_survives_large_gates(level):
    gate = np.array([[-1e4, -90, 0, 90, 1e4]], np.float32)
    got = Native(1).swiglu(gate, np.ones_like(gate))
    np.testing.assert_allclose(got, [[0, 0, 0, 90, 1e4]], rtol=CLOSE, atol=1e-30)


@pytest.mark.parametrize("n_tokens", [1, 70])
def test_rope_computes_its_definition(n_tokens, level):
    config = Config(dim=576, n_layers=1, n_heads=9, vocab_size=8, hidden_dim=8, n_kv_heads=3)
    x, freqs = normal(n_tokens, 9, 64), ops.rope_freqs(config, 5 + np.arange(n_tokens))
    np.testing.assert_allclose(Native(2).rope(x, freqs), ops.rope(x, freqs), rtol=0, atol=2 * CLOSE)


def heads(n_tokens, config, seed=0):
    """q, k and v of some tokens."""
    shape, kv_shape = ((n_tokens, n, config.head_dim) for n in (config.n_heads, config.n_kv_heads))
    return normal(*shape, seed=seed), normal(*kv_shape, seed=seed + 1), normal(*kv_shape, seed=seed + 2)


def attend(table, cache, q, k, v, taps=None, window=0):
    """Attention in the first layer, behind what the cache holds, which then holds these tokens, too."""
    out = table.attention(q, k, v, cache, 0, taps, window)
    cache.ids += [0] * len(q)
    return out


def attend_in_calls(table, config, calls, window=0):
    """The outputs of attention over random heads, in calls of the given numbers of tokens."""
    cache = table.new_cache(config, sum(calls) + 20)
    each = [attend(table, cache, *heads(n, config, seed=len(cache)), window=window) for n in calls]
    return np.concatenate(each)


@pytest.mark.parametrize("head_dim", [16, 20, 48, 64, 80, 128])
@pytest.mark.parametrize("shared", [1, 3, 8])
def test_attention_computes_its_definition(head_dim, shared, level):
    n_heads = 2 * shared
    config = Config(n_heads * head_dim, 1, n_heads, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    calls = [1, 1, 5, 1, 33, 70, 1, *([300, 1] if shared < 8 else [])]  # many heads take long without BLAS
    got, expected = (attend_in_calls(table, config, calls) for table in (Native(2), Backend(1)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=BF16 if level == "amx" else HALF)
    assert np.mean((got - expected) ** 2) < 1e-5 * np.mean(expected**2)


@pytest.mark.parametrize("window", [1, 2, 37, 64, 100, 257])
@pytest.mark.parametrize("shared", [1, 3])
def test_attention_in_a_window_computes_its_definition(shared, window, level):
    config = Config(2 * shared * 20, 1, 2 * shared, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    calls = [1, 70, 1, 5, 1, 300, 1, 1, 37]
    got, expected = (attend_in_calls(table, config, calls, window) for table in (Native(2), Backend(1)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=BF16 if level == "amx" else HALF)
    np.testing.assert_array_equal(attend_in_calls(Native(5), config, calls, window), got)


def test_a_window_larger_than_the_text_changes_nothing(level):
    config, calls = Config(64, 1, 2, vocab_size=8, hidden_dim=8, n_kv_heads=1), [70, 1, 200, 1]
    whole = attend_in_calls(Native(2), config, calls)
    for window in (272, 4096, 2**62):
        np.testing.assert_array_equal(attend_in_calls(Native(2), config, calls, window), whole)


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
def test_what_lies_before_the_window_is_not_read(n_tokens, level):
    config = Config(6 * 20, 1, 6, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    (q, k, v), outputs = heads(n_tokens, config), []
    for before in (0, np.nan):
        keys, values = np.full((2, 2, 700, 20), before, np.float16)
        keys[:, 591:600], values[:, 591:600] = normal(2, 9, 20), normal(2, 9, 20, seed=5)
        outputs.append(np.empty((n_tokens, 6 * 20), np.float32))
        _native.attention(q, k, v, keys, values, 600, outputs[-1], 2, 10)
    np.testing.assert_array_equal(*outputs)


def test_attention_in_one_call_is_attention_token_by_token(level):
    config = Config(128, 1, 2, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    table, all_heads = Native(2), heads(64, config)
    together = attend(table, table.new_cache(config, 64), *all_heads)
    cache = table.new_cache(config, 64)
    for i in range(64):
        one = attend(table, cache, *(some[i : i + 1] for some in all_heads))
        np.testing.assert_allclose(
            one, together[i : i + 1], rtol=0, atol=BF16 if level == "amx" else 5 * CLOSE
        )


def test_attention_survives_scores_that_rise_and_fall_steeply(level):
    config = Config(64, 1, 1, vocab_size=8, hidden_dim=8, n_kv_heads=1)
    k = normal(300, 1, 64) * np.linspace(-40, 40, 300, dtype=np.float32)[:, None, None]
    q, v = normal(300, 1, 64, seed=1) * 10, normal(300, 1, 64, seed=2)
    half = k.astype(np.float16).astype(np.float32)
    got, expected = (
        attend(table, table.new_cache(config, 300), q, keys, v)
        for table, keys in ((Native(2), k), (Backend(1), half))
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=5 * HALF)


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_nan_in_attention_shows_in_its_outputs(bits, which, n_tokens, level):
    """At every position that sees it, of every head that shares it."""
    config = Config(4 * 32, 1, 4, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    arrays = dict(zip("qkv", heads(n_tokens, config), strict=True))
    arrays[which][n_tokens // 2, -1, 5] = np.array(bits, np.uint32).view(np.float32)
    table = Native(1)
    cache = table.new_cache(config, 64)
    attend(table, cache, *heads(20, config, seed=3))
    got = attend(table, cache, *arrays.values()).reshape(n_tokens, 4, 32)
    seen_heads, features = (
        (slice(3, 4) if which == "q" else slice(2, 4)),
        slice(5, 6) if which == "v" else slice(None),
    )
    seen = slice(n_tokens // 2, n_tokens // 2 + 1 if which == "q" else None)
    assert np.isnan(got[seen, seen_heads, features]).all()


@pytest.mark.parametrize("calls", [[200], [600, 1, 1]])
def test_any_number_of_threads_gives_the_same_bits(calls, level):
    config = Config(192, 1, 6, vocab_size=8, hidden_dim=8, n_kv_heads=3)

    one = attend_in_calls(Native(1), config, calls)
    for threads in (2, 5):
        np.testing.assert_array_equal(attend_in_calls(Native(threads), config, calls), one)


@pytest.mark.parametrize("n_tokens", [1, 17, 50])
def test_what_an_earlier_call_left_in_memory_does_not_matter(n_tokens, level):
    """Every buffer is filled with NaN, which no zero beside it in a tile or a vector would make harmless."""
    config = Config(6 * 20, 1, 6, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    table = Native(2)
    weight = table.prepare(Tensor.from_array("", normal(70, 72), "f16"), True)

    def run(n, scale):
        attended = attend(table, table.new_cache(config, 200), *(x * scale for x in heads(n, config)))
        return attended, table.matmul(normal(n, 72) * scale, weight)

    before = run(n_tokens, 1)
    run(190, np.float32("nan"))
    for got, expected in zip(run(n_tokens, 1), before, strict=True):
        np.testing.assert_array_equal(got, expected)
        assert np.isfinite(got).all()


def test_a_tapped_attention_is_the_definition_on_the_same_cache(level):
    config = Config(64, 1, 2, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    table, seen = Native(2), {}
    cache, second = table.new_cache(config, 8), heads(1, config, seed=3)
    attend(table, cache, *heads(4, config))
    tapped = attend(table, cache, *second, {"weights": partial(seen.__setitem__, "weights")})
    cache.trim(4)
    fast = attend(table, cache, *second)
    np.testing.assert_allclose(tapped, fast, rtol=0, atol=HALF)
    np.testing.assert_allclose(seen["weights"].sum(-1), 1, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
@pytest.mark.parametrize("n_past", [0, 30, 300])
def test_what_lies_behind_the_last_position_does_not_matter(n_past, n_tokens, level):
    """A cache that was trimmed, or has grown, has anything there; where it ends doesn't matter, either."""
    config = Config(6 * 20, 1, 6, vocab_size=8, hidden_dim=8, n_kv_heads=2)
    past, (q, k, v) = normal(2, n_past, 20), heads(n_tokens, config)
    outputs = []
    for room, rest in ((400, 0), (400, np.nan), (700, np.nan), (n_past + n_tokens, np.nan)):
        keys, values = np.full((2, 2, room, 20), rest, np.float16)
        keys[:, :n_past], values[:, :n_past] = past, past[::-1]
        outputs.append(np.empty((n_tokens, 6 * 20), np.float32))
        _native.attention(q, k, v, keys, values, n_past, outputs[-1], 2)
    for output in outputs:
        np.testing.assert_array_equal(output, outputs[0])
