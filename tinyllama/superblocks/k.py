"""q2_k to q6_k: 256 weights to a block, in parts of 16 or 32.

A part has its own scale s, and in some types a minimum m, but they are integers of 4 to 8 bits; what they
count is d (and dmin), one float16 for the whole block. So no outlier makes the steps of weights far from it
coarse, and a scale costs its part 4 to 8 bits instead of 16. From the first byte to the last:

    type  bytes  part   bytes of each field                      a weight is            bits a weight
    q2_k    84    16    scales 16, qs 64, d 2, dmin 2            (d s) q - (dmin m)         2.625
    q3_k   110    16    qh 32, qs 64, scales_l 8,                (d (s - 32)) (q - 4)       3.4375
                        scales_h 4, d 2
    q4_k   144    32    d 2, dmin 2, scales 12, qs 128           (d s) q - (dmin m)         4.5
    q5_k   176    32    d 2, dmin 2, scales 12, qh 32, qs 128    (d s) q - (dmin m)         5.5
    q6_k   210    16    ql 128, qh 64, scales 16, d 2            (d s) (q - 32)             6.5625

planes.py says how q lies in qs (or ql) and qh. Layouts and quantizers are those of ggml-quants.c. A quantizer
takes three steps: for each part it searches the float scale that errs least (search.py); it rounds these
scales to integers, in a unit in which the largest of the block is 15, 31, 63 or 128; and it rounds each
weight anew, with the scales that a reader will see. With an importance matrix (importance.py) errors count as
it says, and the unit of the second step is searched, too, but for q6_k and iq4_xs.
"""

import numpy as np

from ..block_type import BlockType, each
from . import planes, search
from .importance import AT_ONCE, FINE, portions


class SuperBlock(BlockType):
    """256 weights in parts whose scales are integers."""

    block = 256
    part = 16
    zero = 0  # what is subtracted from the integers in memory
    spread = 2  # with an importance matrix: how many mean squares are added to each square
    planes: tuple[tuple[str, int, int], ...] = ()  # where the integers lie

    def _pack(self, x, blocks, importance):
        for parts, counts, some in portions(x, blocks, importance, self.spread, self.part, AT_ONCE):
            q = self._fill(parts, some, counts)
            q = np.ascontiguousarray(q.T, np.uint8).reshape(-1, self.block)
            planes.store(some, self.planes, q)

    def _fill(self, x: np.ndarray, blocks: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
        """Fill the scales of blocks [n_blocks] from x [part, n_parts]; returns q like x, `zero` added.

        counts: with an importance matrix, what an error in each x counts.
        """
        raise NotImplementedError

    def integers(self, blocks):
        return planes.load(blocks, self.planes).view(np.int8) - np.int8(self.zero)

    def _unpack(self, blocks):
        """scale * q - minimum: [n_rows, n_blocks, 256]."""
        scale, minimum = self.factors(blocks)
        x = self.integers(blocks).astype(np.float32)
        x *= each(scale, self.part)
        return x if minimum is None else np.subtract(x, each(minimum, self.part), out=x)

    def _again(self, x, blocks, q, top: int) -> np.ndarray:
        """q anew, nearest to x with the scales that are in blocks now. Where the scale is 0, q stays."""
        scale, minimum = self.factors(blocks)
        scale, raised = scale.ravel(), x if minimum is None else x + minimum.ravel()
        return np.where(scale != 0, search.steps(raised / scale, -self.zero, top - self.zero), q) + self.zero


class _WithMinimum(SuperBlock):
    top, codes = 15, 63  # the largest q, the largest integer scale and minimum
    trials = -1.0, 21, False  # for search.affine
    #: Whether integers above `codes` are clipped, without an importance matrix and with one. A scale can be a
    #: little below 0 by rounding; as an unsigned byte its integer is then above `codes`.
    clips = True, True

    def _fill(self, x, blocks, counts):
        is_plain, small = counts is None, []
        weights, trials = (self._weights(x), self.trials) if is_plain else (counts, FINE)
        scales, minima, q = search.affine(x, weights, self.top, *trials)
        totals = search.total(weights).reshape(len(blocks), -1).T
        for name, values in (("d", scales), ("dmin", -minima)):
            values = values.reshape(len(blocks), -1).T
            step = search.fitting if is_plain else search.unsigned
            blocks[name], integers = step(values, totals, self.codes)
            integers = integers.T.astype(np.uint8)
            small.append(np.minimum(integers, self.codes) if self.clips[not is_plain] else integers)
        self._store(blocks, *small)
        return self._again(x, blocks, q, self.top)

    def _weights(self, x):
        """How much an error counts: as much as the weight is large, and as all of its part are on average."""
        return np.sqrt(search.total(x * x) / np.float32(self.part)) + np.abs(x)

    def factors(self, blocks):
        scales, minima = self._load(blocks)
        d, dmin = (blocks[name].astype(np.float32)[..., None] for name in ("d", "dmin"))
        return d * scales.astype(np.float32), dmin * minima.astype(np.float32)


class _Symmetric(SuperBlock):
    codes = -32, 31  # the smallest and the largest integer scale: the former is the largest in magnitude

    def _fill(self, x, blocks, counts):
        scales, q = self._search(x, counts)
        nothing = self._nothing(x, scales)
        scales[nothing], q[:, nothing] = 0, -self.zero
        scales = scales.reshape(len(blocks), -1).T
        blocks["d"], small = self._small(scales, counts)
        self._store(blocks, small.T.astype(np.int8))
        blocks[search.largest(scales) == 0] = np.zeros((), blocks.dtype)
        return self._again(x, blocks, q, 2 * self.zero - 1)

    def _small(self, scales, counts) -> tuple[np.ndarray, np.ndarray]:
        """`d` of each block, and the integers that its scales [n_parts, n_blocks] are in it."""
        inverse = np.float32(self.codes[0]) / search.largest(scales)
        return np.float32(1) / inverse, np.clip(search.nearest(inverse * scales), *self.codes)

    def _nothing(self, x, scales) -> np.ndarray:
        """Of which parts all weights are taken for zeros."""
        return np.abs(x).max(0) < search.TINY

    def factors(self, blocks):
        return blocks["d"].astype(np.float32)[..., None] * self._load(blocks).astype(np.float32), None


class Q2_K(_WithMinimum):
    """q are 0 to 3. A byte of `scales` is s (low nibble) and m of a part."""

    fields = (("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2"))
    gguf_id, file_type, planes = 10, 10, (("qs", 2, 32),)
    top, codes, trials, spread, clips = 3, 15, (-0.5, 16, True), 1, (False, False)

    def _weights(self, x):
        return np.abs(x)

    def _store(self, blocks, scales, minima):
        blocks["scales"] = scales | minima << 4

    def _load(self, blocks):
        return blocks["scales"] & 15, blocks["scales"] >> 4


class Q3_K(_Symmetric):
    """q are 0 to 7. s, 0 to 63, lie in two planes as well."""

    fields = (("qh", "u1", 32), ("qs", "u1", 64), ("scales_l", "u1", 8), ("scales_h", "u1", 4), ("d", "<f2"))
    gguf_id, file_type, planes, zero = 11, 11, (("qs", 2, 32), ("qh", 1, 32)), 4
    scale_planes = (("scales_l", 4, 8), ("scales_h", 2, 4))

    def _search(self, x, counts):
        return search.clipped(x, -4, 3) if counts is None else search.signed(x, counts, 4)

    def _small(self, scales, counts):
        if counts is None:
            return super()._small(scales, counts)
        return search.signed(scales, search.total(counts).reshape(scales.T.shape).T, 32)

    def _store(self, blocks, scales):
        planes.store(blocks, self.scale_planes, (scales + np.int8(32)).view(np.uint8))

    def _load(self, blocks):
        return planes.load(blocks, self.scale_planes).view(np.int8) - np.int8(32)


class Q4_K(_WithMinimum):
    """q are 0 to 15. s and m of the 8 parts, 0 to 63, share 12 bytes; for j from 0 to 3

    byte j      s[j] in the low 6 bits, above it the high 2 bits of s[j + 4]
    byte j + 4  m[j] in the low 6 bits, above it the high 2 bits of m[j + 4]
    byte j + 8  the low 4 bits of s[j + 4], above them the low 4 bits of m[j + 4]
    """

    fields = (("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128))
    gguf_id, file_type, planes, part = 12, 14, (("qs", 4, 32),), 32
    clips = True, False

    def _store(self, blocks, scales, minima):
        (s, s4), (m, m4) = (np.split(small, 2, axis=1) for small in (scales, minima))
        bytes_ = s4 >> 4 << 6 | s, m4 >> 4 << 6 | m, m4 << 4 | s4 & 15
        blocks["scales"] = np.concatenate(bytes_, axis=1)

    def _load(self, blocks):
        first, second, third = np.moveaxis(
            planes.together(blocks["scales"]).view("<u4"), -1, 0
        )  # 4 bytes at once
        scales = first & 0x3F3F3F3F, first >> 2 & 0x30303030 | third & 0x0F0F0F0F
        minima = second & 0x3F3F3F3F, second >> 2 & 0x30303030 | third >> 4 & 0x0F0F0F0F
        return [np.stack(four, axis=-1).view(np.uint8) for four in (scales, minima)]


class Q5_K(Q4_K):
    """As q4_k, but q are 0 to 31."""

    fields = (*Q4_K.fields[:3], ("qh", "u1", 32), ("qs", "u1", 128))
    gguf_id, file_type, planes = 13, 16, (("qs", 4, 32), ("qh", 1, 32))
    top, trials, clips = 31, (-0.5, 16, False), (True, True)


class Q6_K(_Symmetric):
    """q are 0 to 63, s are -128 to 127."""

    fields = (("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2"))
    gguf_id, file_type, planes, zero = 14, 18, (("ql", 4, 64), ("qh", 2, 32)), 32
    codes, spread = (-128, 127), 0

    def _search(self, x, counts):
        return search.signed(x, x * x if counts is None else counts, 32)

    def _nothing(self, x, scales):
        """All of a block, too, whose largest scale is as small as a weight that is taken for zero."""
        peaks = np.fmax.reduce(np.abs(scales).reshape(-1, 16), axis=1, initial=0)
        return super()._nothing(x, scales) | np.repeat(peaks < search.TINY, 16)

    def _store(self, blocks, scales):
        blocks["scales"] = scales

    def _load(self, blocks):
        return blocks["scales"]
