"""The K types."""

import numpy as np

from ..block_type import BlockType
from .planes import packed, unpacked


class SuperBlock(BlockType):
    """256 weights in parts of 16 or 32. A part has a small integer as its scale, and all of them share `d`."""

    block = 256
    part = 16  # weights that share a small scale
    zero = 0  # what is subtracted from the unsigned integers
    planes: tuple[tuple[str, int, int], ...] = ()  # (field, bits, width) of the integers, lowest bits first

    def integers(self, blocks):
        q, shift = np.zeros((*blocks.shape, self.block), np.uint8), 0
        for field, bits, width in self.planes:
            q |= unpacked(blocks[field], bits, width) << np.uint8(shift)
            shift += bits
        return q.view(np.int8) - np.int8(self.zero)

    def factors(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale and the minimum of each part, float32 [..., n_parts]; the minimum may be 0."""
        raise NotImplementedError

    def _unpack(self, blocks):
        """scale * q - minimum: [n_rows, n_blocks, n_parts, part]."""
        scale, minimum = self.factors(blocks)
        x = self.integers(blocks).astype(np.float32).reshape(*blocks.shape, -1, self.part)
        x *= scale[..., None]
        if minimum is not None:
            x -= minimum[..., None]
        return x


class _WithMinimum(SuperBlock):
    """(d * scale) * q - (dmin * minimum)."""

    def factors(self, blocks):
        scales, minima = self.small(blocks)
        d, dmin = (blocks[name].astype(np.float32)[..., None] for name in ("d", "dmin"))
        return d * scales.astype(np.float32), dmin * minima.astype(np.float32)


class _Symmetric(SuperBlock):
    """(d * scale) * (q - zero)."""

    def factors(self, blocks):
        return blocks["d"].astype(np.float32)[..., None] * self.small(blocks).astype(np.float32), None


class Q2_K(_WithMinimum):
    """Parts of 16: 16 bytes, each a scale (low nibble) and a minimum (high); 64 bytes of bit pairs; f16 d, dmin."""

    fields = (("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2"))
    gguf_id, file_type, planes = 10, 10, (("qs", 2, 32),)

    def small(self, blocks):
        return blocks["scales"] & 15, blocks["scales"] >> 4


class Q3_K(_Symmetric):
    """Parts of 16: 32 bytes of third bits, 64 of bit pairs, 12 of scales (nibbles, then bit pairs), f16 d."""

    fields = (("qh", "u1", 32), ("qs", "u1", 64), ("scales_l", "u1", 8), ("scales_h", "u1", 4), ("d", "<f2"))
    gguf_id, file_type, planes, zero = 11, 11, (("qs", 2, 32), ("qh", 1, 32)), 4

    def small(self, blocks):
        low, high = unpacked(blocks["scales_l"], 4, 8), unpacked(blocks["scales_h"], 2, 4)
        return (low | high << 4).view(np.int8) - np.int8(32)


class Q4_K(_WithMinimum):
    """Parts of 32: f16 d, dmin, 12 bytes of scales and minima, 128 of nibbles."""

    fields = (("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128))
    gguf_id, file_type, planes, part = 12, 14, (("qs", 4, 32),), 32

    def small(self, blocks):
        first, second, third = np.split(blocks["scales"], 3, axis=-1)
        scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
        minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
        return scales, minima


class Q5_K(Q4_K):
    """As q4_k, with 32 bytes of fifth bits before the nibbles."""

    fields = (*Q4_K.fields[:3], ("qh", "u1", 32), ("qs", "u1", 128))
    gguf_id, file_type, planes = 13, 16, (("qs", 4, 32), ("qh", 1, 32))


class Q6_K(_Symmetric):
    """Parts of 16: 128 bytes of nibbles, 64 of bit pairs, 16 scales of 8 bits, f16 d."""

    fields = (("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2"))
    gguf_id, file_type, planes, zero, prepared = 14, 18, (("ql", 4, 64), ("qh", 2, 32)), 32, "q8_0"

    def small(self, blocks):
        return blocks["scales"]
