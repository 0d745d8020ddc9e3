"""A weight: where its bytes lie, and the numbers they stand for.

This one value goes from the reader of a file through `convert` to the C kernel. Nothing is read until
somebody asks for rows.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .quant import TYPES, BlockType, quantize


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of weights in a file, or in memory."""

    data: object  # the mapped file, or another buffer
    offset: int  # the byte of it at which they begin
    type: str  # a key of TYPES
    shape: tuple[int, ...]  # [n_rows, n_cols] or, of a vector, [n_cols]
    #: Row i (of a vector, element i) is row order[i] of the file; None: they lie in order. `halves_order`.
    order: np.ndarray | None = None

    @property
    def kind(self) -> BlockType:
        """The type itself."""
        return TYPES[self.type]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.kind.nbytes(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.kind.row_bytes(self.shape[-1])

    def rows(self, start: int, stop: int) -> "Piece":
        """Some of its rows, as a piece; of a vector, all of it."""
        if len(self.shape) == 1:
            return self
        shape = (stop - start, self.shape[1])
        if self.order is not None:
            return replace(self, shape=shape, order=self.order[start:stop])
        return replace(self, offset=self.offset + start * self.row_bytes, shape=shape)

    def blocks(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop as BlockType.view lays them out: without a copy where they lie in order."""
        return self._stored[start:stop] if self.order is None else self._stored[self.order[start:stop]]

    @cached_property
    def _stored(self) -> np.ndarray:
        """What the file has from `offset` on: with an order, up to the last row that is meant."""
        n_rows = self.shape[0] if self.order is None else int(self.order.max(initial=-1)) + 1
        return self.kind.view(self.data, (n_rows, *self.shape[1:]), self.offset)


def turned_order(name: str, n_rows: int, head_dim: int) -> np.ndarray | None:
    """`halves_order` of what RoPE turns and of what makes it; None for other weights, by Meta's name."""
    turned = set(name.split(".")) & {"wq", "wk", "q_norm", "k_norm"}
    return halves_order(n_rows // head_dim, head_dim) if turned else None


def halves_order(n_heads: int, head_dim: int) -> np.ndarray:
    """The `Piece.order` of wq, wk, their biases and norms in files that lie as Hugging Face's do.

    RoPE turns pairs of numbers. In Meta's rows pair j of a head is (2j, 2j + 1), which is what `ops.rope`
    expects; in Hugging Face's it is (j, head_dim / 2 + j): one of the first half, one of the second.

    Returns [n_heads * head_dim]: for a head of 6, [0, 3, 1, 4, 2, 5].
    """
    rows = np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A weight as its file holds it."""

    name: str  # Meta's, "layers.0.attention.wq.weight"
    shape: tuple[int, ...]  # [n_out, n_in] or, of a norm, [dim]
    pieces: tuple[Piece, ...]  # one, or of a checkpoint that was cut for several GPUs one in each part
    axis: int = 0  # of `shape`, along which the pieces follow each other: 0 for rows, 1 for columns

    @classmethod
    def from_array(cls, name: str, array: np.ndarray, type: str = "f32") -> "Tensor":
        """Float weights [n_out, n_in] as any type; of a vector [dim] as "f32" or "f16"."""
        return cls.from_blocks(name, array.shape, type, quantize(array, type))

    @classmethod
    def from_blocks(cls, name: str, shape: tuple[int, ...], type: str, blocks: np.ndarray) -> "Tensor":
        """Of blocks in memory, laid out as BlockType.view says."""
        data = np.ascontiguousarray(blocks).reshape(-1).view(np.uint8)
        return cls(name, tuple(shape), (Piece(data, 0, type, tuple(shape)),))

    @property
    def type(self) -> str:
        """The block type of all pieces."""
        return self.pieces[0].type

    @property
    def nbytes(self) -> int:
        """Bytes in its file or files."""
        return sum(piece.nbytes for piece in self.pieces)

    def dequantize(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop as float32, [stop - start, n_in]; of a vector, elements."""
        dequantize = self.pieces[0].kind.dequantize
        if len(self.pieces) == 1:
            return dequantize(self.pieces[0].blocks(start, stop))
        if self.axis == 1:
            return np.concatenate([dequantize(piece.blocks(start, stop)) for piece in self.pieces], axis=1)
        first, found, stop = 0, [], self.shape[0] if stop is None else stop
        for piece in self.pieces:
            if start < first + piece.shape[0] and first < stop:
                found.append(dequantize(piece.blocks(max(start - first, 0), stop - first)))
            first += piece.shape[0]
        return np.concatenate(found)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Some rows, in any order, as float32 [len(rows), n_in]."""
        if len(self.pieces) > 1 and self.axis == 0:
            return np.concatenate([self.dequantize(row, row + 1) for row in rows])
        kind = self.pieces[0].kind
        return np.concatenate([kind.dequantize(piece.blocks()[rows]) for piece in self.pieces], axis=1)

    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        ranges = [(row, row + 256) for row in range(0, self.shape[0], 256)]  # they stay in the cache
        blocks = (piece.blocks(*rows) for piece in self.pieces for rows in ranges if rows[0] < piece.shape[0])
        return all(map(self.pieces[0].kind.is_finite, blocks))
