"""What the pass that chose a token attended to."""

from functools import partial

import numpy as np

from ...llama import Llama
from ...model import Step


def attention(llama: Llama, ids: list[int], batch_size: int = 512) -> np.ndarray:
    """How much the last of these tokens attends to itself and to each before it: the mean over heads.

    Only that token's pass is tapped, over a cache of the others, so the weights of all pairs are never kept.

    Returns:
        [n_layers, n_past]
    """
    *past, last = ids
    cache = llama.new_cache(len(ids), at_once=min(batch_size, len(ids)))
    cache = llama.remembered.recall(ids, cache)
    for start in range(len(cache), len(past), batch_size):
        llama.run([Step(past[start : start + batch_size], cache, 0)])
    found = np.empty((llama.config.n_layers, len(ids)), np.float32)

    def keep(layer: int, weights: np.ndarray) -> None:
        found[layer] = weights[:, -1].mean(axis=0)  # of [n_heads, 1, n_past]

    taps = {f"layers.{n}.attention.weights": partial(keep, n) for n in range(len(found))}
    llama.run([Step([last], cache, 0, taps)])
    return found
