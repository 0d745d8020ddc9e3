"""Small integers in bytes: how 2, 4 or 8 of them share one.

A *plane* is a field of a block that holds some bits of each integer. Its bytes come in groups of `width`, and
byte l of a group holds the integers l, l + width, l + 2 width, ..., the first of them in its lowest bits.
With 2 bits and a width of 32, for example:

    bits of byte l:     7 6    5 4    3 2    1 0
    integer:           l+96   l+64   l+32     l

So a register full of bytes, shifted and masked, is a register full of neighbours. Integers of 3, 5 or 6 bits
lie in two planes: their lowest bits in one, the others in another. Here planes are ((field, bits, width),
...), those of the lowest bits first.

Elements are copied here as groups of `width` bytes, and computed with in long arrays: a loop of NumPy's over
the 16 or 32 bytes of one block takes ten times as long as what it does.
"""

import numpy as np


def store(blocks: np.ndarray, planes: tuple[tuple[str, int, int], ...], q: np.ndarray) -> None:
    """Put integers, uint8 [n_blocks, n], into fields of blocks [n_blocks]."""
    for field, bits, width in planes:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
        groups = (q & np.uint8((1 << bits) - 1)).reshape(len(q), -1, 8 // bits, width) << shifts
        blocks[field] = np.bitwise_or.reduce(groups, axis=-2).reshape(len(q), -1)
        q = q >> np.uint8(bits)


def load(blocks: np.ndarray, planes: tuple[tuple[str, int, int], ...]) -> np.ndarray:
    """The integers, uint8 [..., n], in fields of blocks [...]."""
    q, below = np.uint8(0), 0
    for field, bits, width in planes:
        data, mask = together(blocks[field]), (1 << bits) - 1
        if bits == width == 1:
            groups = np.unpackbits(data, axis=-1, bitorder="little")
        else:
            parts = [(data >> shift & mask).view(f"V{width}") for shift in range(0, 8, bits)]
            groups = np.stack(parts, axis=-1).reshape(*data.shape[:-1], -1).view(np.uint8)
        q = q | groups << below if below else groups
        below += bits
    return q


def together(field: np.ndarray) -> np.ndarray:
    """A field of blocks, [..., n] bytes, without what lies between them: uint8 [..., n]."""
    return np.ascontiguousarray(field.view(f"V{field.shape[-1]}")).view(np.uint8)
