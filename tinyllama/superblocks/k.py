"""The K types."""

import numpy as np

from ..block_type import BlockType
from . import search
from .planes import packed, unpacked

AT_ONCE = 128  # blocks that are searched together, so that they stay in the L2 cache


class SuperBlock(BlockType):
    """256 weights in parts of 16 or 32. A part has a small integer as its scale, and all of them share `d`."""

    block = 256
    part = 16  # weights that share a small scale
    zero = 0  # what is subtracted from the unsigned integers
    planes: tuple[tuple[str, int, int], ...] = ()  # (field, bits, width) of the integers, lowest bits first

    def _pack(self, x, blocks):
        x, blocks = x.reshape(-1, self.block), blocks.reshape(-1)
        for start in range(0, len(x), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            q = self._fill(np.ascontiguousarray(x[some].reshape(-1, self.part).T), blocks[some])
            q = np.ascontiguousarray(q.T, np.uint8).reshape(-1, self.block)
            for field, bits, width in self.planes:
                blocks[field][some] = packed(q, bits, width)
                q >>= np.uint8(bits)

    def _fill(self, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Fill the scales of blocks [n_blocks] from x [part, n_parts]; returns the integers of x, from 0 on."""
        raise NotImplementedError

    def _again(self, x, blocks, q, top: int) -> np.ndarray:
        """q again, nearest to x with the scales that are stored now. Where the scale is 0, q stays."""
        scale, minimum = self.factors(blocks)
        scale, shifted = scale.ravel(), x if minimum is None else x + minimum.ravel()
        q = np.where(scale != 0, search.steps(shifted / scale, -self.zero, top - self.zero), q)
        return q + self.zero

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
        return x if minimum is None else np.subtract(x, minimum[..., None], out=x)


class _WithMinimum(SuperBlock):
    """(d * scale) * q - (dmin * minimum)."""

    top, codes = 15, 63  # the largest q, the largest small scale
    trials = -1.0, 21, False  # of search.affine

    def _fill(self, x, blocks):
        scales, minima, q = search.affine(x, self._weights(x), self.top, *self.trials)
        small = []
        for name, values in (("d", scales), ("dmin", -minima)):
            values = values.reshape(len(blocks), -1)
            peak = np.fmax.reduce(values, axis=1, initial=0, keepdims=True) + np.float32(0)
            small.append(search.nearest(np.where(peak > 0, np.float32(self.codes) / peak, 0) * values))
            blocks[name] = peak[:, 0] / np.float32(self.codes)
        self._store(blocks, *(integers.astype(np.uint8) for integers in small))
        return self._again(x, blocks, q, self.top)

    def _weights(self, x):
        """How much an error counts: the root mean square of the part, and the magnitude of the weight itself."""
        return np.sqrt(search.total(x * x) / np.float32(self.part)) + np.abs(x)

    def factors(self, blocks):
        scales, minima = self._small(blocks)
        d, dmin = (blocks[name].astype(np.float32)[..., None] for name in ("d", "dmin"))
        return d * scales.astype(np.float32), dmin * minima.astype(np.float32)


class _Symmetric(SuperBlock):
    """(d * scale) * (q - zero)."""

    codes = -32, 31  # the smallest and the largest small scale

    def _fill(self, x, blocks):
        scales, q = self._search(x)
        nothing = self._nothing(x, scales)
        scales[nothing], q[:, nothing] = 0, -self.zero
        scales = scales.reshape(len(blocks), -1)
        peak = search.largest(scales.T)
        inverse = np.float32(self.codes[0]) / peak
        small = np.minimum(search.nearest(inverse[:, None] * scales), 127).astype(np.int8)
        self._store(blocks, np.clip(small, *self.codes))
        blocks["d"] = np.float32(1) / inverse
        blocks[peak == 0] = np.zeros((), blocks.dtype)
        return self._again(x, blocks, q, 2 * self.zero - 1)

    def _nothing(self, x, scales) -> np.ndarray:
        """Which parts have no scale."""
        return np.abs(x).max(0) < search.TINY

    def factors(self, blocks):
        return blocks["d"].astype(np.float32)[..., None] * self._small(blocks).astype(np.float32), None


class Q2_K(_WithMinimum):
    """Parts of 16: 16 bytes, each a scale (low nibble) and a minimum (high); 64 bytes of bit pairs; f16 d, dmin."""

    fields = (("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2"))
    gguf_id, file_type, planes = 10, 10, (("qs", 2, 32),)
    top, codes, trials = 3, 15, (-0.5, 16, True)

    def _weights(self, x):
        """The magnitude alone."""
        return np.abs(x)

    def _store(self, blocks, scales, minima):
        blocks["scales"] = scales | minima << 4

    def _small(self, blocks):
        return blocks["scales"] & 15, blocks["scales"] >> 4


class Q3_K(_Symmetric):
    """Parts of 16: 32 bytes of third bits, 64 of bit pairs, 12 of scales (nibbles, then bit pairs), f16 d."""

    fields = (("qh", "u1", 32), ("qs", "u1", 64), ("scales_l", "u1", 8), ("scales_h", "u1", 4), ("d", "<f2"))
    gguf_id, file_type, planes, zero = 11, 11, (("qs", 2, 32), ("qh", 1, 32)), 4

    def _search(self, x):
        return search.descent(x, -4, 3)

    def _store(self, blocks, scales):
        codes = (scales + np.int8(32)).view(np.uint8)
        blocks["scales_l"], blocks["scales_h"] = packed(codes, 4, 8), packed(codes >> 4, 2, 4)

    def _small(self, blocks):
        low, high = unpacked(blocks["scales_l"], 4, 8), unpacked(blocks["scales_h"], 2, 4)
        return (low | high << 4).view(np.int8) - np.int8(32)


class Q4_K(_WithMinimum):
    """Parts of 32: f16 d, dmin, 12 bytes of scales and minima, 128 of nibbles."""

    fields = (("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128))
    gguf_id, file_type, planes, part = 12, 14, (("qs", 4, 32),), 32

    def _store(self, blocks, scales, minima):
        scales, minima = np.minimum(scales, 63), np.minimum(minima, 63)
        first = np.concatenate([scales[:, :4], minima[:, :4]], axis=1)
        last = np.concatenate([scales[:, 4:], minima[:, 4:]], axis=1)
        blocks["scales"][:, :8] = first | last >> 4 << 6
        blocks["scales"][:, 8:] = scales[:, 4:] & 15 | minima[:, 4:] << 4

    def _small(self, blocks):
        first, second, third = np.split(blocks["scales"], 3, axis=-1)
        scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
        minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
        return scales, minima


class Q5_K(Q4_K):
    """As q4_k, with 32 bytes of fifth bits before the nibbles."""

    fields = (*Q4_K.fields[:3], ("qh", "u1", 32), ("qs", "u1", 128))
    gguf_id, file_type, planes = 13, 16, (("qs", 4, 32), ("qh", 1, 32))
    top, trials = 31, (-0.5, 16, False)


class Q6_K(_Symmetric):
    """Parts of 16: 128 bytes of nibbles, 64 of bit pairs, 16 scales of 8 bits, f16 d."""

    fields = (("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2"))
    gguf_id, file_type, planes, zero, prepared = 14, 18, (("ql", 4, 64), ("qh", 2, 32)), 32, "q8_0"
    codes = -128, 127

    def _search(self, x):
        """Weights x²."""
        w, peak = x * x, search.largest(x)
        trials = (np.float32(i) * np.float32(0.1) for i in (0, *range(-9, 0), *range(1, 10)))
        return search.symmetric(
            x,
            (-(np.float32(32) + trial) / peak for trial in trials),
            lambda v: search.steps(v, -32, 31),
            lambda q: (search.total(w * x * q), search.total(w * q * q)),
        )

    def _nothing(self, x, scales):
        """All of a block where its largest scale is as small as weights that are taken for zeros."""
        peaks = np.fmax.reduce(np.abs(scales).reshape(-1, 16), axis=1, initial=0)
        return super()._nothing(x, scales) | np.repeat(peaks < search.TINY, 16)

    def _store(self, blocks, scales):
        blocks["scales"] = scales

    def _small(self, blocks):
        return blocks["scales"]
