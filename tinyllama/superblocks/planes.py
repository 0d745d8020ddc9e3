"""Small integers in bytes: how 2, 4 or 8 of them share one.

A *plane* holds some bits of every integer. Its bytes come in groups of `width`, and a group holds
8 / bits * width integers: byte l has the integers l, l + width, l + 2 width, ... of them, the first in its lowest
bits. With 2 bits and a width of 32, for example:

    bits of byte l:     7 6    5 4    3 2    1 0
    integer:           l+96   l+64   l+32     l

So a register full of bytes, masked and shifted, is a register full of neighbours. Integers of 3, 5 or 6 bits lie
in two planes, their low bits in one and their high bits in the other.
"""

import numpy as np


def packed(q: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The lowest bits of uint8 [n, n_integers] -> bytes [n, n_integers * bits / 8]."""
    groups = (q & ((1 << bits) - 1)).reshape(len(q), -1, 8 // bits, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(groups << shifts, axis=-2).reshape(len(q), -1)


def unpacked(bytes_: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Bytes [..., n_bytes] -> uint8 [..., n_bytes * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = bytes_.reshape(*bytes_.shape[:-1], -1, 1, width) >> shifts
    return (groups & np.uint8((1 << bits) - 1)).reshape(*bytes_.shape[:-1], -1)
