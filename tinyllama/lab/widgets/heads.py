"""The attention of all heads together: which looks from here to there most, and all of them as small maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

LOOKS = 10  # heads in a ranking
SIDE = 48  # cells along a small map: more can't be seen
MOST_BYTES = 2**21  # of all small maps together


@dataclass(frozen=True)
class Look:
    """A head that looks at a token."""

    layer: int
    head: int
    looks_at: int  # the token's position
    weight: float


def looks(weights: Sequence[np.ndarray], position: int, looks_at: int | None = None) -> list[Look]:
    """The heads that look from one token to another most, the strongest first.

    Args:
        weights: of each layer [n_heads, n_tokens, n_past].
        looks_at: the position of the other. None: any but the token itself and the first, at which heads
            look that find nothing.
    """
    first, end = (1, max(1, position)) if looks_at is None else (looks_at, looks_at + 1)
    rows = np.stack([layer[:, position, first:end] for layer in weights])
    best = np.argsort(-rows, axis=None, kind="stable")[:LOOKS]
    places = np.stack(np.unravel_index(best, rows.shape), axis=-1).tolist()
    return [Look(layer, head, first + at, float(rows[layer, head, at])) for layer, head, at in places]


def sheet(weights: Sequence[np.ndarray]) -> np.ndarray:
    """All heads as small maps, in bytes: 255 times the root of a weight, so that small weights are seen, too.

    Args:
        weights: of each layer [n_heads, n_tokens, n_past].
    Returns:
        uint8 [n_layers, n_heads, side, side]. Where a prompt has more tokens than a map has cells, a cell
        shows the largest of several weights.
    """
    n_heads, n_tokens, _ = weights[0].shape
    side = min(n_tokens, SIDE, isqrt(MOST_BYTES // (len(weights) * n_heads)))
    cells = np.arange(0, n_tokens, -(-n_tokens // side))  # where each begins
    maps = []
    for layer in weights:
        largest = np.maximum.reduceat(np.maximum.reduceat(layer, cells, axis=1), cells, axis=2)
        maps.append(np.rint(255 * np.sqrt(np.clip(largest, 0, 1))).astype(np.uint8))
    return np.stack(maps)
