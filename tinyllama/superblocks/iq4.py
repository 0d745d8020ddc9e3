"""Nibbles that are looked up in a table."""

import numpy as np

from ..block_type import BlockType
from .k import _Symmetric
from .planes import unpacked

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


class IQ4_NL(BlockType):
    """f16 d, 16 bytes of nibbles."""

    fields, gguf_id, file_type = (("d", "<f2"), ("qs", "u1", 16)), 20, 25

    def integers(self, blocks):
        return LEVELS[unpacked(blocks["qs"], 4, 16)]


class IQ4_XS(_Symmetric):
    """Parts of 32: f16 d, 2 bytes of bit pairs and 4 of nibbles that are the scales, 128 bytes of nibbles."""

    fields = (("d", "<f2"), ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128))
    gguf_id, file_type, part = 23, 30, 32

    def integers(self, blocks):
        return LEVELS[unpacked(blocks["qs"], 4, 16)]

    def small(self, blocks):
        low, high = unpacked(blocks["scales_l"], 4, 1), unpacked(blocks["scales_h"], 2, 1)
        return (low | high << 4).view(np.int8) - np.int8(32)
