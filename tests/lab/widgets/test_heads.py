"""Which head looks from here to there most, and all of them as small maps, against loops over all weights."""

import numpy as np
import pytest

from tinyllama.lab.widgets.heads import LOOKS, MOST_BYTES, SIDE, looks, sheet


def attention(n_layers: int, n_heads: int, n_tokens: int) -> list[np.ndarray]:
    weights = np.random.default_rng(3).random((n_layers, n_heads, n_tokens, n_tokens), np.float32)
    weights *= np.tri(n_tokens, dtype=np.float32)
    return list(weights / weights.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("looks_at", [None, 0, 3, 5])
def test_the_heads_that_look_there_most_come_first(looks_at):
    weights, position = attention(4, 6, 9), 5
    columns = range(1, position) if looks_at is None else [looks_at]
    expected = sorted(
        (-weights[layer][head, position, column], layer, head, column)
        for layer in range(4)
        for head in range(6)
        for column in columns
    )
    found = [
        (-look.weight, look.layer, look.head, look.looks_at) for look in looks(weights, position, looks_at)
    ]
    assert found == expected[:LOOKS]


@pytest.mark.parametrize("position", [0, 1])
def test_the_first_two_tokens_see_no_others(position):
    assert looks(attention(2, 3, 4), position) == []


def test_a_small_map_is_a_byte_a_weight():
    weights = attention(2, 3, 7)
    maps = sheet(weights)
    assert maps.shape == (2, 3, 7, 7) and maps.dtype == np.uint8
    np.testing.assert_allclose((maps / 255.0) ** 2, np.stack(weights), atol=1 / 255)


@pytest.mark.parametrize("n_layers, n_heads, n_tokens", [(30, 9, 100), (32, 32, 61), (80, 64, 33)])
def test_all_maps_together_are_bounded_and_lose_no_strong_weight(n_layers, n_heads, n_tokens):
    weights = [np.zeros((n_heads, n_tokens, n_tokens), np.float32) for _ in range(n_layers)]
    weights[-1][-1, 30, 17] = 1
    maps = sheet(weights)
    side = maps.shape[-1]
    assert maps.nbytes <= MOST_BYTES and 12 <= side <= SIDE
    (place,) = np.argwhere(maps)
    per_cell = -(-n_tokens // side)
    assert place.tolist() == [n_layers - 1, n_heads - 1, 30 // per_cell, 17 // per_cell]
