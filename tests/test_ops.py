"""Each operation against a definition written in another way: loops, complex numbers, or torch."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny import CONFIG

from tinyllama import ops
from tinyllama.errors import TinyllamaError
from tinyllama.quant import TYPES, quantize
from tinyllama.tensor import Piece, Tensor

CLOSE = 2e-6  # a few float32 roundings of values near 1

rng = np.random.default_rng(1)


def normal(*shape) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def in_two_pieces(weight: np.ndarray, type: str, axis: int) -> Tensor:
    halves = np.split(weight, 2, axis)
    pieces = [Piece(quantize(half, type).tobytes(), 0, type, half.shape) for half in halves]
    return Tensor("", weight.shape, tuple(pieces), axis)


def test_embedding_takes_each_token_s_row():
    table = normal(10, 64)
    np.testing.assert_array_equal(
        ops.embedding(Tensor.from_array("", table), np.array([3, 0, 3])), table[[3, 0, 3]]
    )


@pytest.mark.parametrize("split", [0, 1])
def test_embedding_reads_a_table_that_lies_in_parts(split):
    table = normal(8, 64)
    tensor = in_two_pieces(table, "f32", split)
    np.testing.assert_array_equal(ops.embedding(tensor, np.array([7, 0, 4])), table[[7, 0, 4]])


def test_rms_norm_is_torch_s():
    x, weight = normal(5, 64), normal(64)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (64,), torch.tensor(weight), 1e-6)
    np.testing.assert_allclose(ops.rms_norm(x, weight, 1e-6), expected.numpy(), rtol=0, atol=CLOSE)


def test_rms_norm_of_zeros_is_zeros():
    assert not ops.rms_norm(np.zeros((2, 64), np.float32), normal(64), 1e-6).any()


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_0_2023"])
def test_matmul_multiplies_by_what_the_blocks_stand_for(type):
    x, weight = normal(3, 64), Tensor.from_array("", normal(48, 64), type)
    expected = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    np.testing.assert_allclose(ops.matmul(x, weight), expected, rtol=0, atol=64 * CLOSE)


def test_matmul_of_several_weights_is_each_one_s():
    x, weights = normal(3, 64), [Tensor.from_array("", normal(n_out, 64), "q4_0") for n_out in (32, 48, 1)]
    for together, weight in zip(ops.matmul(x, *weights), weights, strict=True):
        np.testing.assert_array_equal(together, ops.matmul(x, weight))


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("type", ["f16", "q4_0_2023", "q4_1_2023", "q4_0_2023_planar"])
def test_matmul_of_a_weight_in_two_parts_equals_that_in_one(type, split, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK", 5 * 128)  # cuts across the parts
    x, weight = normal(3, 128), normal(48, 128)
    whole = Tensor.from_array("", weight, type)
    np.testing.assert_array_equal(ops.matmul(x, in_two_pieces(weight, type, split)), ops.matmul(x, whole))


@pytest.mark.parametrize("pos", [0, 100])
def test_rope_turns_neighbouring_pairs_by_position_times_frequency(pos):
    x = normal(4, CONFIG.n_heads, CONFIG.head_dim)
    turned = ops.rope(x, ops.rope_freqs(CONFIG, pos + np.arange(4)))
    for token, head, j in np.ndindex(4, CONFIG.n_heads, CONFIG.head_dim // 2):
        angle = (pos + token) * CONFIG.rope_theta ** (-2 * j / CONFIG.head_dim)
        a, b = x[token, head, 2 * j : 2 * j + 2].astype(np.float64)
        expected = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        np.testing.assert_allclose(turned[token, head, 2 * j : 2 * j + 2], expected, rtol=0, atol=CLOSE)


def test_rope_makes_dot_products_depend_on_the_distance_alone():
    q, k = normal(1, 1, CONFIG.head_dim), normal(1, 1, CONFIG.head_dim)

    def dot(q_pos, k_pos):
        turned = (ops.rope(x, ops.rope_freqs(CONFIG, [pos])) for x, pos in ((q, q_pos), (k, k_pos)))
        return np.vdot(*turned)

    assert dot(7, 3) == pytest.approx(dot(107, 103), abs=1e-4)


def test_rope_factors_divide_the_frequencies():
    factors = np.full(CONFIG.head_dim // 2, 8.0)
    slowed = ops.rope_freqs(CONFIG, [8], factors)
    np.testing.assert_allclose(slowed, ops.rope_freqs(CONFIG, [1]), rtol=0, atol=CLOSE)


def test_softmax_survives_large_scores():
    np.testing.assert_allclose(ops.softmax(np.array([1e4, 1e4, -np.inf], np.float32)), [0.5, 0.5, 0])


@pytest.mark.parametrize("pos", [0, 3])
def test_attention_is_torch_s_with_shared_key_value_heads(pos):
    cache = ops.KVCache(CONFIG, 16)
    n_tokens, n_past = 5, pos + 5
    q = normal(n_past, CONFIG.n_heads, CONFIG.head_dim)
    k, v = (
        normal(n_past, CONFIG.n_kv_heads, CONFIG.head_dim),
        normal(n_past, CONFIG.n_kv_heads, CONFIG.head_dim),
    )
    if pos:
        ops.attention(q[:pos], k[:pos], v[:pos], cache, 1)
        cache.ids += range(pos)
    out = ops.attention(q[pos:], k[pos:], v[pos:], cache, 1)
    heads_first = (torch.tensor(x).transpose(0, 1)[None] for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    expected = expected[0].transpose(0, 1).reshape(n_past, CONFIG.dim)[-n_tokens:]
    np.testing.assert_allclose(out, expected.numpy(), rtol=0, atol=CLOSE)


def test_attention_weights_are_tapped_and_never_look_ahead():
    seen = {}
    q = normal(4, CONFIG.n_heads, CONFIG.head_dim)
    k = v = normal(4, CONFIG.n_kv_heads, CONFIG.head_dim)
    ops.attention(q, k, v, ops.KVCache(CONFIG, 8), 0, {"weights": partial(seen.__setitem__, "weights")})
    assert seen["weights"].shape == (CONFIG.n_heads, 4, 4)
    np.testing.assert_allclose(seen["weights"].sum(-1), 1, rtol=0, atol=CLOSE)
    assert not np.triu(seen["weights"], k=1).any()


@pytest.mark.filterwarnings("error")
def test_swiglu_is_torch_s_silu_times_up():
    gate, up = normal(3, 160), normal(3, 160)
    gate[0, 0] = -100  # e^100 is no float32
    expected = torch.nn.functional.silu(torch.tensor(gate)) * torch.tensor(up)
    np.testing.assert_allclose(ops.swiglu(gate, up), expected.numpy(), rtol=0, atol=CLOSE)


def test_prepare_unpacks_a_weight_once_and_leaves_its_values_alone():
    tensor = Tensor.from_array("w", normal(8, 64), "q4_0")
    unpacked = ops.prepare(tensor, copy=True)
    assert unpacked.type == "f32"
    np.testing.assert_array_equal(unpacked.dequantize(), tensor.dequantize())
    assert ops.prepare(tensor, copy=False) is tensor


def test_prepare_gives_a_norm_as_an_array():
    norm = normal(64)
    np.testing.assert_array_equal(ops.prepare(Tensor.from_array("n", norm), copy=False), norm)


def test_the_types_under_test_are_all_that_can_be_written():
    assert set(TYPES) >= {"f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"}


# --- the cache ------------------------------------------------------------------------------------


def filled(cache, n_tokens, layers=range(CONFIG.n_layers)):
    """Append n_tokens to each layer, a few at a time; returns what was stored of the keys of layer 0."""
    stored = []
    for start in range(0, n_tokens, 7):
        n_new = min(7, n_tokens - start)
        k, v = (
            normal(n_new, CONFIG.n_kv_heads, CONFIG.head_dim),
            normal(n_new, CONFIG.n_kv_heads, CONFIG.head_dim),
        )
        for layer in layers:
            cache.append(layer, k, v)
        cache.ids += range(start, start + n_new)
        stored.append(k)
    return np.concatenate(stored).swapaxes(0, 1)


def test_a_cache_takes_memory_as_it_fills_and_not_before():
    cache = ops.KVCache(CONFIG, 1_000_000)
    assert cache.nbytes == 0
    filled(cache, 100)
    in_use = 2 * CONFIG.n_layers * CONFIG.kv_dim * 4 * len(cache)
    assert in_use <= cache.nbytes <= 2 * in_use


def test_a_cache_that_grew_holds_what_was_stored():
    cache = ops.KVCache(CONFIG, 500)
    stored = filled(cache, 300)
    np.testing.assert_array_equal(cache.keys[0][:, :300], stored)


def test_a_cache_never_has_room_for_more_than_its_context():
    cache = ops.KVCache(CONFIG, 40)
    filled(cache, 40)
    assert cache.keys[0].shape[1] == 40
    one = normal(1, CONFIG.n_kv_heads, CONFIG.head_dim)
    with pytest.raises(TinyllamaError, match=r"context is full: 41 tokens, ctx_size is 40"):
        cache.append(0, one, one)


def test_a_trimmed_cache_goes_on_behind_what_is_left():
    cache = ops.KVCache(CONFIG, 100)
    stored = filled(cache, 30)
    cache.trim(10)
    k = normal(2, CONFIG.n_kv_heads, CONFIG.head_dim)
    keys, _ = cache.append(0, k, k)
    assert cache.ids == list(range(10))
    np.testing.assert_array_equal(keys, np.concatenate([stored[:, :10], k.swapaxes(0, 1)], axis=1))
