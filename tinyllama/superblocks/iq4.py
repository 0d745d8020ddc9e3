"""iq4_nl and iq4_xs: nibbles that stand for 16 levels of a table, which are denser around 0."""

import numpy as np

from ..block_type import BlockType
from . import planes, search
from .importance import AT_ONCE, portions
from .k import SuperBlock

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)

#: Which level is nearest to v, by floor(2 v) from -256 to 255: half way between two levels, which is a whole
#: number when doubled, the upper one begins. NumPy counts negative places from the end: the second half is of
#: negative v.
_HALFWAY = LEVELS[1:].astype(int) + LEVELS[:-1]
_NEAREST = np.searchsorted(_HALFWAY, np.r_[0:256, -256:0], side="right").astype(np.uint8)
_NEAREST_LEVEL = LEVELS[_NEAREST].astype(np.float32)


def _places(v: np.ndarray) -> np.ndarray:
    """Of float32 numbers in the tables above; NaN counts as above all levels."""
    return np.fmax(np.fmin(np.floor(v + v), np.float32(255)), np.float32(-256)).astype(np.intp)


def _scales(x: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    """The scale of each part, [n_parts], of x [32, n_parts]. An error counts as much as `counts` says, or x².

    The trials: the weight of largest magnitude becomes 127, or one of -134 to -120 (which all mean -127).
    """
    w, peak = x * x if counts is None else counts, search.largest(x)
    trials = [np.float32(1) / (peak / np.float32(127)), *(np.float32(i) / peak for i in range(-134, -119))]
    scale, _ = search.symmetric(
        x,
        trials,
        lambda v: _NEAREST_LEVEL[_places(v)],
        lambda q: (search.total(w * q * x), search.total(w * q * q)),
    )
    return np.where(np.abs(peak) < search.TINY, np.float32(0), scale)


def _indices(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Of the levels nearest to x / scale: uint8 [32, n_parts]."""
    return _NEAREST[_places(np.where(scale != 0, np.float32(1) / scale, np.float32(0)) * x)]


class IQ4_NL(BlockType):
    """4.5 bits a weight, blocks of 32: d, then 16 bytes of nibbles; a weight is d * LEVELS[nibble]."""

    fields, gguf_id, file_type = (("d", "<f2"), ("qs", "u1", 16)), 20, 25
    planes = (("qs", 4, 16),)

    def _pack(self, x, blocks, importance):
        for parts, counts, some in portions(x, blocks, importance, 2, 32, AT_ONCE * 8):
            some["d"] = scale = _scales(parts, counts)
            planes.store(some, self.planes, _indices(parts, scale).T)

    def integers(self, blocks):
        return LEVELS[planes.load(blocks, self.planes)]


class IQ4_XS(SuperBlock):
    """4.25 bits a weight, blocks of 256 in parts of 32: d, 2 + 4 bytes of scales s (0 to 63, in two planes),
    then 128 bytes of nibbles; a weight is d * (s - 32) * LEVELS[nibble]."""

    fields = (("d", "<f2"), ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128))
    gguf_id, file_type, part, planes = 23, 30, 32, (("qs", 4, 16),)
    scale_planes = (("scales_l", 4, 1), ("scales_h", 2, 1))

    def _fill(self, x, blocks, counts):
        """Unlike a K type's, its nibbles are those nearest with the `d` that isn't rounded yet."""
        scales = _scales(x, counts).reshape(len(blocks), -1)
        d = search.largest(scales.T)[:, None] / np.float32(-32)
        small = search.nearest(np.where(d != 0, np.float32(1) / d, np.float32(0)) * scales).clip(-32, 31)
        blocks["d"] = d[:, 0]
        planes.store(blocks, self.scale_planes, (small + 32).astype(np.uint8))
        return _indices(x, (d * small.astype(np.float32)).ravel())

    def integers(self, blocks):
        return LEVELS[planes.load(blocks, self.planes)]

    def factors(self, blocks):
        small = planes.load(blocks, self.scale_planes).astype(np.float32) - 32
        return blocks["d"].astype(np.float32)[..., None] * small, None
