"""What a type of weights is: its layout in memory, its numbers in files, its way to float32 and back."""

import math
from functools import cached_property

import numpy as np

from .errors import require

BLOCK = 32  # weights that share a scale
TYPES: dict[str, "BlockType"] = {}  #: every type by its name


class BlockType:
    """How the weights of one type lie in memory; its name is the class's in lower case, ggml's."""

    name: str
    fields: tuple[tuple, ...] = ()  # NumPy's (name, dtype, length) of one block
    block = BLOCK  # weights in a block
    part = BLOCK  # weights that share a scale
    #: A row stores all values of the first field, then all of the second, ...; otherwise whole blocks follow
    #: each other. Either way `view(...)["d"]` has the shape [n_rows, n_blocks].
    planar = False
    gguf_id: int | None = None  # in GGUF's tensor infos; None: it isn't one of GGUF's types
    file_type: int | None = None  # GGUF's general.file_type where most tensors are of this type (llama_ftype)
    prepared = ""  # the type whose kernels multiply by it in C
    exponent = 0x7C00  # the bits of the exponent in a scale (or number): all set in infinities and NaN

    def __init_subclass__(cls):
        if cls.fields:  # not a class that only others derive from
            cls.name = cls.__name__.lower()
            cls.prepared = cls.__dict__.get("prepared", cls.name)
            TYPES[cls.name] = cls()

    @cached_property
    def dtype(self) -> np.dtype:
        """Of one block; of plain numbers, of one number."""
        return np.dtype(list(self.fields) if len(self.fields) > 1 else self.fields[0][1])

    @property
    def bits_per_weight(self) -> float:
        """Storage of one weight, its share of scales included: 4.5 for q4_0."""
        return 8 * self.dtype.itemsize / self.block

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row."""
        return n_cols // self.block * self.dtype.itemsize

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this type, [n_rows, n_cols] or [n_cols]."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])

    def view(self, buffer, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """The bytes of a tensor [n_rows, n_cols] or [n_cols] as an array, without copying them.

        Returns [n_rows, n_blocks] of blocks, [n_rows] of planar rows, or plain numbers of the given shape.
        """
        *rows, n_cols = shape
        n_blocks, dtype = n_cols // self.block, self.dtype
        if self.planar:
            dtype = np.dtype([(name, kind, (n_blocks, *length)) for name, kind, *length in self.fields])
        layout = tuple(rows) if self.planar else (*rows, n_blocks)
        return np.frombuffer(buffer, dtype, math.prod(layout), offset).reshape(layout)

    def quantize(self, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Float weights [n_rows, n_cols], importance of columns [n_cols] -> blocks, laid out as `view` says.

        Raises TinyllamaError where a row doesn't divide into blocks.
        """
        n_rows, n_cols = x.shape
        needs = f"{self.name} needs rows of a multiple of {self.block} weights, not {n_cols}"
        require(n_cols % self.block == 0, needs)
        x = np.ascontiguousarray(x, dtype=np.float32)
        blocks = self.view(bytearray(self.nbytes(x.shape)), x.shape)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # where 1 / d is infinite
            self._pack(x.reshape(n_rows, -1, self.block), blocks, importance)
        return blocks

    def _pack(self, x: np.ndarray, blocks: np.ndarray, importance: np.ndarray | None) -> None:
        """Fill the fields of blocks from x, [n_rows, n_blocks, block]."""
        raise NotImplementedError

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Blocks -> float32 weights [n_rows, n_cols]; plain numbers keep their shape."""
        with np.errstate(over="ignore", invalid="ignore"):  # a scale in a file may be infinite
            return self._unpack(blocks).reshape(len(blocks), -1)

    def _unpack(self, blocks: np.ndarray) -> np.ndarray:
        """(q - zero) * d, or q * d + m: [n_rows, n_blocks * 32]."""
        x = self.integers(blocks).reshape(len(blocks), -1).astype(np.float32)
        x *= each(blocks["d"], self.block)
        if "m" in blocks.dtype.names:
            x += each(blocks["m"], self.block)
        return x

    def integers(self, blocks: np.ndarray) -> np.ndarray:
        """The small integers, int8 [n_rows, n_blocks, block]; centred on 0 where there is no minimum."""
        raise NotImplementedError

    def factors(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The scale of each part and, if the type has it, the minimum: float32 [..., n_parts].

        A weight is scale * integer - minimum.
        """
        minimum = -blocks["m"].astype(np.float32) if "m" in blocks.dtype.names else None
        return blocks["d"].astype(np.float32), minimum

    def is_finite(self, blocks: np.ndarray) -> bool:
        """Whether there is no NaN and no infinity among the scales and minima, or the plain numbers."""
        names = {"d", "m", "dmin"} & set(blocks.dtype.names or ())
        fields = [blocks[name] for name in names] or [blocks]
        bits = [numbers.view(f"<u{numbers.itemsize}") & self.exponent for numbers in fields]
        return all(exponents.max() < self.exponent for exponents in bits)


def each(numbers: np.ndarray, n: int) -> np.ndarray:
    """Each number n times, [..., m] -> float32 [..., m * n]; copied by fours, as if they were one: faster."""
    fours = np.repeat(numbers.astype(np.float32), 4, axis=-1).view(np.complex128)
    return np.repeat(fours, n // 4, axis=-1).view(np.float32)
