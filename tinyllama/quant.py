"""Quantization: how weights lie in memory, byte by byte, and how they get there and back.

Quantization cuts each row of a weight into blocks of 32 and stores, for a block, one scale `d` (and for the
`_1` types a minimum `m`) beside 32 small integers `q`. What comes back is

    q4_0, q5_0, q8_0:   (q - zero) * d           q4_1, q5_1:   q * d + m

superblocks/ has the types whose scales are quantized, too. A type is a class, which registers itself in
TYPES: its layout, quantizer, dequantizer, numbers in files, and what the C backend prepares it as. This is
the definition: quantizers give ggml's bytes, and faster ones the same. The `_2023` types are llama.cpp's of
March 2023 (commits 26c084662 of the 10th, planar, and f1eaff472 of the 12th), the others today's.
"""

import numpy as np

from .block_type import BLOCK, TYPES, BlockType
from .superblocks import planes, searched  # and all its types, which register themselves

# --- plain numbers --------------------------------------------------------------------------------


class F32(BlockType):
    """float32."""

    fields, block, gguf_id, file_type, exponent = (("x", "<f4"),), 1, 0, 0, 0x7F800000

    def quantize(self, x, importance=None):
        return np.asarray(x, dtype="<f4")

    def dequantize(self, blocks):
        return np.asarray(blocks)


class F16(BlockType):
    """float16."""

    fields, block, gguf_id, file_type = (("x", "<f2"),), 1, 1, 1

    def quantize(self, x, importance=None):
        return np.asarray(x, dtype="<f2")

    def dequantize(self, blocks):
        """As astype, in a sixth of its time: move the bits to where float32 has them, bias the exponent."""
        bits = blocks.view(np.int16).astype(np.int32) << 13
        bits &= -0x70000001  # between the sign and the exponent, shifting has put three copies of the sign
        top = 0x7C00 << 13  # the exponent of infinity and NaN: no bias turns it into float32's
        if (bits & top == top).any():
            return blocks.astype(np.float32)
        x = bits.view(np.float32)
        x *= np.float32(2.0**112)
        return x


class BF16(BlockType):
    """The upper half of a float32."""

    fields, block, gguf_id, file_type, exponent = (("x", "<u2"),), 1, 30, 32, 0x7F80

    def quantize(self, x, importance=None):
        """Rounded to nearest even."""
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2")

    def dequantize(self, blocks):
        return (blocks.astype(np.uint32) << 16).view(np.float32)


# --- blocks of 32 ---------------------------------------------------------------------------------


class _Nibbles(BlockType):
    """Byte j holds elements j (low nibble) and j + 16 (high); a fifth bit of element j is bit j of `qh`."""

    bits, planes = 4, (("qs", 4, 16),)

    def _pack(self, x, blocks, importance):
        plain = _affine if "m" in blocks.dtype.names else _symmetric
        q = plain(x, blocks, self.bits) if importance is None else searched(x, blocks, self.bits, importance)
        planes.store(blocks.reshape(-1), self.planes, q.reshape(-1, BLOCK))

    def integers(self, blocks):
        q = planes.load(blocks, self.planes).view(np.int8)
        if "m" not in blocks.dtype.names:
            q -= 1 << (self.bits - 1)
        return q


class Q4_0(_Nibbles):
    """f16 d, 16 bytes of nibbles."""

    fields, gguf_id, file_type = (("d", "<f2"), ("qs", "u1", 16)), 2, 2


class Q4_1(_Nibbles):
    """f16 d, f16 m, 16 bytes of nibbles."""

    fields, gguf_id, file_type = (("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)), 3, 3


class Q5_0(_Nibbles):
    """f16 d, u32 fifth bits, 16 bytes of nibbles."""

    fields, gguf_id, file_type = (("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)), 6, 8
    bits, planes = 5, (("qs", 4, 16), ("qh", 1, 1))


class Q5_1(_Nibbles):
    """f16 d, f16 m, u32 fifth bits, 16 bytes of nibbles."""

    fields = (("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16))
    gguf_id, file_type, bits, planes = 7, 9, 5, Q5_0.planes


class Q8_0(BlockType):
    """f16 d, 32 signed bytes."""

    fields, gguf_id, file_type = (("d", "<f2"), ("qs", "i1", 32)), 8, 7

    def _pack(self, x, blocks, importance):
        d = _reduce(np.maximum, np.abs(x)) / np.float32(127)
        blocks["d"], blocks["qs"] = d, _round_half_away(_steps(x, d))

    def integers(self, blocks):
        return planes.load(blocks, (("qs", 8, 32),)).view(np.int8)


class _Nibbles2023(_Nibbles):
    """Byte j holds elements 2j (low nibble) and 2j + 1 (high)."""

    planes, exponent = (("qs", 4, 1),), 0x7F800000

    def _store(self, x, d, blocks, zero=0):
        q = _round_half_away(_steps(x, d)).view(np.uint8) + np.uint8(zero)
        pairs = q.view("<u2")
        blocks["d"], blocks["qs"] = d, (pairs | pairs >> 4).astype(np.uint8)


class Q4_0_2023(_Nibbles2023):
    """f32 d, 16 bytes of nibbles."""

    fields, prepared = (("d", "<f4"), ("qs", "u1", 16)), "q4_0"

    def _pack(self, x, blocks, importance):
        self._store(x, _reduce(np.maximum, np.abs(x)) / np.float32(7), blocks, zero=8)


class Q4_0_2023_Planar(Q4_0_2023):
    """The same, all d of a row before all its nibbles."""

    planar, prepared = True, "q4_0"


class Q4_1_2023(_Nibbles2023):
    """All f32 m of a row, then all its f32 d, then all its nibbles."""

    fields, planar, prepared = (("m", "<f4"), ("d", "<f4"), ("qs", "u1", 16)), True, "q4_1"

    def _pack(self, x, blocks, importance):
        # Its search for the maximum started at FLT_MIN, the smallest positive float, not at -FLT_MAX.
        high = np.maximum(_reduce(np.maximum, x), np.finfo(np.float32).tiny)
        blocks["m"] = m = _smallest(x)
        self._store(x - m[..., None], (high - m) / np.float32(15), blocks)


# --- what they share ------------------------------------------------------------------------------


def _symmetric(x: np.ndarray, blocks: np.ndarray, bits: int) -> np.ndarray:
    """q = min(2 zero - 1, trunc(x / d + zero + 0.5)), where d maps the largest element to -zero."""
    zero = 1 << (bits - 1)
    d = _largest(x) / np.float32(-zero)
    blocks["d"] = d
    return np.minimum(_steps(x, d, zero + 0.5).astype(np.uint8), 2 * zero - 1)


def _affine(x: np.ndarray, blocks: np.ndarray, bits: int) -> np.ndarray:
    """q = min(top, trunc((x - m) / d + 0.5)), where m is the smallest element."""
    top = (1 << bits) - 1
    m = _smallest(x)
    d = np.abs(_reduce(np.maximum, x) - m) / np.float32(top)  # abs: -0 becomes +0
    blocks["d"], blocks["m"] = d, m
    return np.minimum(_steps(x - m[..., None], d, 0.5).astype(np.uint8), top)


def _steps(x: np.ndarray, d: np.ndarray, offset: float = 0) -> np.ndarray:
    """x / d + offset by a product with 1 / d; of a block of zeros, offset.

    0 where d or 1 / d is infinite: what x86 makes of such a number when it is converted to an integer.
    """
    inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    v = x * inverse[..., None]
    if offset:
        v += np.float32(offset)
    v[np.isinf(inverse) | np.isinf(d)] = 0
    return v


def _reduce(better: np.ufunc, x: np.ndarray) -> np.ndarray:
    """np.maximum or np.minimum over each block, by halves: five long loops beat many short ones."""
    left = x.reshape(-1)
    while left.size > x.size // BLOCK:
        left = better(left[0::2], left[1::2])
    return left.reshape(x.shape[:-1])


def _largest(x: np.ndarray) -> np.ndarray:
    """The element of largest magnitude of each block with its sign; of two equals the first; +0 of zeros."""
    high, low = _reduce(np.maximum, x), _reduce(np.minimum, x)
    largest = np.where(high >= -low, high, low)
    tied = np.nonzero((high == -low) & (high != 0))
    first = np.abs(x[tied]).argmax(-1)
    largest[tied] = x[(*tied, first)]
    return largest + np.float32(0)


def _smallest(x: np.ndarray) -> np.ndarray:
    """The smallest element of each block; of +0 and -0 the first."""
    smallest = _reduce(np.minimum, x)
    zero = np.nonzero(smallest == 0)
    first = (x[zero] == 0).argmax(-1)
    smallest[zero] = x[(*zero, first)]
    return smallest


def _round_half_away(v: np.ndarray) -> np.ndarray:
    """C's roundf, to int8: twice v, truncated; one more where it is positive; half of that, rounded down."""
    doubled = (v + v).astype(np.int16)
    return ((doubled + (doubled > 0)) >> 1).astype(np.int8)


# --- by a type's name -----------------------------------------------------------------------------


def quantize(x: np.ndarray, type: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Float weights [n_rows, n_cols] -> blocks of a type. As BlockType.quantize, which see."""
    return TYPES[type].quantize(x, importance)


def dequantize(blocks: np.ndarray, type: str) -> np.ndarray:
    """Blocks of a type -> float32 weights [n_rows, n_cols]."""
    return TYPES[type].dequantize(blocks)


def cast(blocks: np.ndarray, type: str, to: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Weights of one type, [n_rows, n_cols], as another type; importance as of BlockType.quantize.

    Raises OverflowError for NaN, and for what the numbers or scales of the other type can't hold.
    """
    x = dequantize(blocks, type)
    largest = np.finfo(np.float16 if TYPES[to].exponent == F16.exponent else np.float32).max
    if not np.abs(x).max(initial=0) <= largest:
        raise OverflowError(f"NaN or numbers too large for {to}")
    return quantize(x, to, importance)


def error(x: np.ndarray, type: str) -> float:
    """Root mean square error of quantizing x, as a fraction of x's own root mean square."""
    x = np.asarray(x, dtype=np.float32)
    difference = dequantize(quantize(x, type), type) - x
    return float(np.sqrt(np.mean(difference**2) / np.mean(x**2)))
