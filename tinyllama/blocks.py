"""Block formats: how quantized weights lie in memory, byte by byte.

Quantization cuts each row of a weight into blocks of 32 and stores, for a block, one scale `d` (and
for the `_1` types a minimum `m`) beside 32 small integers `q`. Two generations of the 4-bit blocks exist,
and the same name means different bytes:

| Type               | Bytes | Layout of a block                  | nibbles of byte j         |
|--------------------|-------|------------------------------------|---------------------------|
| `q4_0_2023`        | 20    | f32 d, 16 bytes                    | elements 2j and 2j+1      |
| `q4_1_2023`        | 24    | per row: all f32 m, all f32 d, all bytes | elements 2j and 2j+1 |
| `q4_0_2023_planar` | 20    | per row: all f32 d, all bytes      | elements 2j and 2j+1      |
| `q4_0`             | 18    | f16 d, 16 bytes                    | elements j and j+16       |
| `q4_1`             | 20    | f16 d, f16 m, 16 bytes             | elements j and j+16       |
| `q5_0`             | 22    | f16 d, u32 fifth bits, 16 bytes    | elements j and j+16       |
| `q5_1`             | 24    | f16 d, f16 m, u32 fifth bits, 16 bytes | elements j and j+16   |
| `q8_0`             | 34    | f16 d, 32 signed bytes             |                           |
| `q6_k`             | 210   | per 256: 4 low bits, 2 high bits, 16 i8 scales, f16 d | read only |

The `_2023` types are those of llama.cpp's ggml files of March 2023 (`_planar`: commit 26c084662 of
10 March; the others f1eaff472 of 12 March); the rest are GGUF's (ggml-quants.c of today's ggml).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK = 32  # weights that share a scale


@dataclass(frozen=True)
class BlockType:
    """How the weights of one type lie in memory.

    `fields` are NumPy (name, dtype, length) of one block. A planar row stores all values of the first
    field, then all of the second, ...; otherwise whole blocks follow each other. Either way an array
    made by `view` gives `array["d"]` the shape [n_rows, n_blocks].
    """

    name: str
    fields: tuple[tuple, ...]
    block: int = BLOCK
    planar: bool = False
    gguf_id: int | None = None

    @property
    def block_bytes(self) -> int:
        return _record(self.fields).itemsize

    def row_bytes(self, n_cols: int) -> int:
        return n_cols // self.block * self.block_bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this type, [n_rows, n_cols] or [n_cols]."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])

    def view(self, buffer, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """The bytes of a whole tensor as an array, without copying them.

        Args:
            buffer: anything with the buffer protocol.
            shape: of the weights, [n_rows, n_cols] or [n_cols].
        Returns:
            [n_rows, n_blocks] of blocks, [n_rows] of planar rows, or plain numbers of the given shape.
        """
        *rows, n_cols = shape
        n_blocks = n_cols // self.block
        if len(self.fields) == 1:
            dtype, layout = np.dtype(self.fields[0][1]), shape
        elif self.planar:
            dtype, layout = self._planar_row(n_blocks), tuple(rows)
        else:
            dtype, layout = _record(self.fields), (*rows, n_blocks)
        return np.frombuffer(buffer, dtype, math.prod(layout), offset).reshape(layout)

    def _planar_row(self, n_blocks: int) -> np.dtype:
        return _record(tuple((name, dtype, (n_blocks, *length)) for name, dtype, *length in self.fields))

    def empty(self, n_rows: int, n_cols: int) -> np.ndarray:
        """Room for `n_rows` rows of blocks to be filled field by field."""
        return self.view(bytearray(n_rows * self.row_bytes(n_cols)), (n_rows, n_cols))


@lru_cache
def _record(fields: tuple[tuple, ...]) -> np.dtype:
    """Made once: NumPy drops every other Ctrl-C that comes while it makes a dtype with sub-arrays."""
    return np.dtype(list(fields))


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("f32", (("x", "<f4"),), block=1, gguf_id=0),
        BlockType("f16", (("x", "<f2"),), block=1, gguf_id=1),
        BlockType("bf16", (("x", "<u2"),), block=1, gguf_id=30),
        BlockType("q4_0", (("d", "<f2"), ("qs", "u1", 16)), gguf_id=2),
        BlockType("q4_1", (("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)), gguf_id=3),
        BlockType("q5_0", (("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)), gguf_id=6),
        BlockType("q5_1", (("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)), gguf_id=7),
        BlockType("q8_0", (("d", "<f2"), ("qs", "i1", 32)), gguf_id=8),
        BlockType(
            "q6_k", (("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")), 256, gguf_id=14
        ),
        BlockType("q4_0_2023", (("d", "<f4"), ("qs", "u1", 16))),
        BlockType("q4_0_2023_planar", (("d", "<f4"), ("qs", "u1", 16)), planar=True),
        BlockType("q4_1_2023", (("m", "<f4"), ("d", "<f4"), ("qs", "u1", 16)), planar=True),
    )
}
