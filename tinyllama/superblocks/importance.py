"""What an error in each weight counts, where an importance matrix says so.

The error that a wrong weight makes in a product is its own error times the input that it meets. An importance
matrix holds, of each column of a matrix of weights, the mean square of that input over some text (`tinyllama
imatrix` collects them, llama.cpp's llama-imatrix as well). So an error in weight x of a column counts

    importance * sqrt(spread * mean(x²) + x²)

where the mean is over the row or the block. The root makes larger weights count more, as all searches do: a
text is a sample, and says nothing about inputs that it happens not to have.
"""

import numpy as np

from . import search

AT_ONCE = 256  # blocks of 256 that are searched together: few enough to stay in the L2 cache
FINE = -0.9, 37, False, 0.05  #: the trials of search.affine with an importance matrix, of all types


def counts(x: np.ndarray, importance: np.ndarray, spread: int) -> np.ndarray:
    """What an error in each of x counts; means are over the last axis. With a spread of 0, the importance.

    [n_rows, n_means, n], [n_cols] -> [n_rows, n_means, n]
    """
    importance = np.broadcast_to(importance.reshape(1, -1, x.shape[2]), x.shape)
    if not spread:
        return importance
    squares = x * x
    sums = np.add.accumulate(squares, axis=2)[..., -1:]  # one after the other
    return importance * np.sqrt(np.float32(spread) * sums / np.float32(x.shape[2]) + squares)


def portions(x, blocks, importance, spread: int, part: int, n: int):
    """n blocks at a time: their parts and what errors in them count, or None, [part, n_parts]; the blocks.

    x: [n_rows, n_blocks, n_in_block]; blocks: [n_rows, n_blocks]; importance: [n_cols] or None.
    """
    counted = [x] if importance is None else [x, counts(x, importance, spread)]
    counted, blocks = [a.reshape(-1, x.shape[2]) for a in counted], blocks.reshape(-1)
    for some in (slice(start, start + n) for start in range(0, len(blocks), n)):
        parts = [np.ascontiguousarray(a[some].reshape(-1, part).T) for a in counted]
        yield parts[0], parts[1] if len(parts) > 1 else None, blocks[some]


def searched(x: np.ndarray, blocks: np.ndarray, bits: int, importance: np.ndarray) -> np.ndarray:
    """Fill the scales of q4_0, q4_1, q5_0 or q5_1 from x [n_rows, n_blocks, 32]; returns q, uint8 like x."""
    weights = counts(x.reshape(len(x), 1, -1), importance, 1)
    parts, weights = (np.ascontiguousarray(a.reshape(-1, x.shape[2]).T) for a in (x, weights))
    if "m" in blocks.dtype.names:
        d, m, q = search.affine(parts, weights, (1 << bits) - 1, *FINE)
        blocks["m"] = m.reshape(blocks.shape)
    else:
        zero = 1 << (bits - 1)
        d, q = search.signed(parts, weights, zero)
        q += zero
    blocks["d"] = d.reshape(blocks.shape)
    return q.T.astype(np.uint8)
