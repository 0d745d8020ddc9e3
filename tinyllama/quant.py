"""Quantization: weights to blocks and back, in NumPy; what every faster way must give to the byte.

A block is 32 small integers `q` with a scale `d` and, of the `_1` types, a minimum `m` (blocks.py says where
they lie). What comes back is

    q4_0, q5_0, q8_0:   (q - zero) * d           q4_1, q5_1:   q * d + m

Every quantizer here gives the bytes that ggml's gives: of March 2023 for the `_2023` types, else of today.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .blocks import BLOCK, TYPES
from .errors import TinyllamaError

# --- a weight -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """A weight as its file holds it: blocks, their type, and the shape of what they stand for.

    Attributes:
        name: Meta's name, "layers.0.attention.wq.weight".
        type: a key of TYPES.
        shape: [n_out, n_in] or, of a norm, [dim].
        parts: one array of blocks (see BlockType.view) for each part of the checkpoint; usually one.
        split: the axis of `shape` along which the parts follow each other: 0 for rows, 1 for columns.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    parts: tuple[np.ndarray, ...]
    split: int = 0

    @classmethod
    def from_array(cls, name: str, array: np.ndarray, type: str = "f32") -> "Tensor":
        """Quantize float weights [n_out, n_in]."""
        return cls(name, type, array.shape, (quantize(array, type),))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dequantize(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop as float32, [stop - start, n_in]."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        pieces = [dequantize(blocks, self.type) for blocks in self._blocks(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.split)

    def is_finite(self) -> bool:
        """As `quant.is_finite`, of all parts."""
        return all(is_finite(part, self.type) for part in self.parts)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Some rows, in any order, as float32 [len(rows), n_in]."""
        if len(self.parts) > 1 and self.split == 0:
            return np.concatenate([self.dequantize(row, row + 1) for row in rows])
        return np.concatenate([dequantize(part[rows], self.type) for part in self.parts], axis=1)

    def _blocks(self, start: int, stop: int):
        """The pieces of each part that make up rows start:stop."""
        first = 0
        for part in self.parts:
            if self.split == 1:
                yield part[start:stop]
            elif start < first + len(part) and first < stop:
                yield part[max(start - first, 0) : stop - first]
            first += len(part)


#: The bits of an exponent, which in infinities and NaN are all ones.
_EXPONENTS = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}
_ROWS = 256  # looked at together: few enough for the cache


def is_finite(blocks: np.ndarray, type: str) -> bool:
    """Whether there is no NaN and no infinity among numbers or, of blocks, their scales and minima."""
    fields = [blocks[name] for name in ("d", "m") if name in (blocks.dtype.names or ())] or [blocks]
    exponent = _EXPONENTS.get(type) or _EXPONENTS["f16" if fields[0].dtype == "<f2" else "f32"]
    for numbers in fields:
        bits = numbers.view(f"<u{numbers.itemsize}")
        rows = range(0, len(bits), _ROWS)
        if any((bits[row : row + _ROWS] & exponent).max() == exponent for row in rows):
            return False
    return True


# --- to blocks ------------------------------------------------------------------------------------


def quantize(x: np.ndarray, type: str) -> np.ndarray:
    """Float weights [n_rows, n_cols] -> blocks of a type, laid out as BlockType.view says.

    Raises TinyllamaError where a row doesn't divide into blocks or the type can't be written.
    """
    kind = TYPES[type]
    if x.shape[-1] % kind.block:
        raise TinyllamaError(f"{type} needs rows of a multiple of {kind.block} weights, not {x.shape[-1]}")
    if type not in _QUANTIZERS:
        raise TinyllamaError(f"quantizing to {type} isn't supported")
    if kind.block == 1:
        return _QUANTIZERS[type](x)
    x = np.ascontiguousarray(x, dtype=np.float32)
    blocks = kind.empty(len(x), x.shape[-1])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # of what `_steps` sets to 0
        _QUANTIZERS[type](x.reshape(len(x), -1, BLOCK), blocks)
    return blocks


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """The upper half of a float32, rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2")


def _steps(x: np.ndarray, d: np.ndarray, offset: float = 0) -> np.ndarray:
    """x / d + offset by a product with 1 / d; of a block of zeros, offset.

    0 where d or 1 / d is infinite: that is what x86 makes of the integers that then aren't any.
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
    """The element of largest magnitude of each block with its sign; of two equals the first. Of zeros, +0."""
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
    """C's roundf, to int8. Doubling a number is exact, and so is halving an even integer."""
    doubled = (v + v).astype(np.int16)
    return ((doubled + (doubled > 0)) >> 1).astype(np.int8)


def _halves(q: np.ndarray) -> np.ndarray:
    """Nibbles as GGUF packs them: byte j holds elements j (low) and j+16 (high)."""
    return q[..., :16] | q[..., 16:] << 4


def _neighbours(q: np.ndarray) -> np.ndarray:
    """Nibbles as 2023 packed them: byte j holds elements 2j (low) and 2j+1 (high)."""
    pairs = q.view("<u2")
    return (pairs | pairs >> 4).astype(np.uint8)


def _quantize_symmetric(x: np.ndarray, blocks: np.ndarray, zero: int) -> np.ndarray:
    """q = min(2 zero - 1, trunc(x / d + zero + 0.5)), where d maps the largest element to -zero."""
    d = _largest(x) / np.float32(-zero)
    blocks["d"] = d
    return np.minimum(_steps(x, d, zero + 0.5).astype(np.uint8), 2 * zero - 1)


def _quantize_affine(x: np.ndarray, blocks: np.ndarray, top: int) -> np.ndarray:
    """q = min(top, trunc((x - m) / d + 0.5)), where m is the smallest element."""
    m = _smallest(x)
    d = np.abs(_reduce(np.maximum, x) - m) / np.float32(top)  # of zeros of either sign, +0
    blocks["d"], blocks["m"] = d, m
    return np.minimum(_steps(x - m[..., None], d, 0.5).astype(np.uint8), top)


def _quantize_q4_0(x, blocks):
    blocks["qs"] = _halves(_quantize_symmetric(x, blocks, zero=8))


def _quantize_q4_1(x, blocks):
    blocks["qs"] = _halves(_quantize_affine(x, blocks, top=15))


def _quantize_q5_0(x, blocks):
    q = _quantize_symmetric(x, blocks, zero=16)
    blocks["qs"], blocks["qh"] = _halves(q & 15), np.packbits(q >> 4, axis=-1, bitorder="little")


def _quantize_q5_1(x, blocks):
    q = _quantize_affine(x, blocks, top=31)
    blocks["qs"], blocks["qh"] = _halves(q & 15), np.packbits(q >> 4, axis=-1, bitorder="little")


def _quantize_q8_0(x, blocks):
    d = _reduce(np.maximum, np.abs(x)) / np.float32(127)
    blocks["d"] = d
    blocks["qs"] = _round_half_away(_steps(x, d))


def _quantize_q4_0_2023(x, blocks):
    d = _reduce(np.maximum, np.abs(x)) / np.float32(7)
    blocks["d"] = d
    q = _round_half_away(_steps(x, d)) + np.int8(8)
    blocks["qs"] = _neighbours(q.view(np.uint8))


def _quantize_q4_1_2023(x, blocks):
    # Its search for the maximum started at FLT_MIN, the smallest positive float, not at -FLT_MAX.
    high = np.maximum(_reduce(np.maximum, x), np.finfo(np.float32).tiny)
    m = _smallest(x)
    d = (high - m) / np.float32(15)
    blocks["d"], blocks["m"] = d, m
    q = _round_half_away(_steps(x - m[..., None], d))
    blocks["qs"] = _neighbours(q.view(np.uint8))


_QUANTIZERS: dict[str, Callable] = {
    "f32": lambda x: np.asarray(x, dtype="<f4"),
    "f16": lambda x: np.asarray(x, dtype="<f2"),
    "bf16": _to_bf16,
    "q4_0": _quantize_q4_0,
    "q4_1": _quantize_q4_1,
    "q5_0": _quantize_q5_0,
    "q5_1": _quantize_q5_1,
    "q8_0": _quantize_q8_0,
    "q4_0_2023": _quantize_q4_0_2023,
    "q4_0_2023_planar": _quantize_q4_0_2023,
    "q4_1_2023": _quantize_q4_1_2023,
}


# --- and back -------------------------------------------------------------------------------------


def dequantize(blocks: np.ndarray, type: str) -> np.ndarray:
    """Blocks of a type -> float32 weights [n_rows, n_cols] (plain numbers keep their shape)."""
    kind = TYPES[type]
    if kind.block == 1:
        return {"f32": np.asarray, "f16": _from_f16, "bf16": _from_bf16}[type](blocks)
    with np.errstate(over="ignore", invalid="ignore"):  # a file may hold infinite scales: 0 of them are NaN
        x = _from_q6_k(blocks) if type == "q6_k" else _from_small(blocks, type)
    return x.reshape(len(blocks), -1)


def _from_f16(x: np.ndarray) -> np.ndarray:
    """As astype, but six times as fast: move the bits to where float32 has them, then bias the exponent."""
    bits = x.view(np.int16).astype(np.int32) << 13
    bits &= -0x70000001  # between the sign and the exponent, shifting has put three copies of the sign
    top = 0x7C00 << 13  # the exponent of infinity and NaN: no bias turns it into float32's
    if (bits & top == top).any():
        return x.astype(np.float32)
    y = bits.view(np.float32)
    y *= np.float32(2.0**112)
    return y


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _from_small(blocks: np.ndarray, type: str) -> np.ndarray:
    """(q - zero) * d, or q * d + m: [n_rows, n_blocks, 32]."""
    x = integers(blocks, type).astype(np.float32)
    x *= blocks["d"].astype(np.float32)[..., None]
    if "m" in blocks.dtype.names:
        x += blocks["m"].astype(np.float32)[..., None]
    return x


def integers(blocks: np.ndarray, type: str) -> np.ndarray:
    """The small integers of blocks, int8 [n_rows, n_blocks, 32]; centred on 0 where there is no minimum."""
    qs = blocks["qs"]
    if type == "q8_0":
        return qs
    q = np.empty((*qs.shape[:-1], BLOCK), np.int8)
    low, high = (slice(0, None, 2), slice(1, None, 2)) if "2023" in type else (slice(0, 16), slice(16, 32))
    q[..., low], q[..., high] = qs & 15, qs >> 4
    if "qh" in blocks.dtype.names:
        q |= np.unpackbits(blocks["qh"], axis=-1, bitorder="little").view(np.int8) << 4
    if "m" not in blocks.dtype.names:
        q -= 16 if "qh" in blocks.dtype.names else 8
    return q


def _from_q6_k(blocks: np.ndarray) -> np.ndarray:
    """Each half of 128 weights: four groups of 32 from 64 bytes of nibbles and 32 bytes of bit pairs."""
    lead = blocks.shape
    ql, qh = blocks["ql"].reshape(*lead, 2, 64), blocks["qh"].reshape(*lead, 2, 1, 32)
    low = np.concatenate([ql & 15, ql >> 4], axis=-1).reshape(*lead, 2, 4, 32)
    high = (qh >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    q = (low | high << 4).astype(np.float32) - 32
    scale = blocks["scales"].astype(np.float32) * blocks["d"].astype(np.float32)[..., None]
    return q.reshape(*lead, 16, 16) * scale[..., None]


# --- from one type to another ---------------------------------------------------------------------


def cast(blocks: np.ndarray, type: str, to: str) -> np.ndarray:
    """Weights of one type, [n_rows, n_cols], as another type; both lie as BlockType.view says.

    Raises OverflowError for NaN, and for what the numbers or scales of the other type can't hold.
    """
    x = dequantize(blocks, type)
    has_f32_scale = to == "f32" or "2023" in to
    largest = np.finfo(np.float32 if has_f32_scale else np.float16).max
    if not np.abs(x).max(initial=0) <= largest:
        raise OverflowError(f"NaN or numbers too large for {to}")
    return quantize(x, to)


# --- what it costs --------------------------------------------------------------------------------


def bits_per_weight(type: str) -> float:
    """Storage of one weight in bits, its share of scales included: 4.5 for q4_0."""
    return 8 * TYPES[type].block_bytes / TYPES[type].block


def error(x: np.ndarray, type: str) -> float:
    """Root mean square error of quantizing x, as a fraction of x's own root mean square."""
    x = np.asarray(x, dtype=np.float32)
    difference = dequantize(quantize(x, type), type) - x
    return float(np.sqrt(np.mean(difference**2) / np.mean(x**2)))
