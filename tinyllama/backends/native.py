"""The NumPy table with its entries replaced by C: `tinyllama._native`, built from ext/.

A weight is repacked (ext/README.md draws the layout) when it is prepared, or later when it is settled. Until
then it stays in its mapped file and is repacked strip by strip whenever it is multiplied; the results are the
same. The KV cache is the definition's, in half precision, so a tapped attention can run in NumPy on it.
"""

import mmap
import time
from collections.abc import Iterable
from contextlib import contextmanager

import numpy as np

from .. import ops, quant
from ..errors import check_cancelled, require
from ..machine.files import MappedFile
from ..machine.limits import require_memory
from ..quant import TYPES
from ..tensor import Piece, Tensor
from .numpy import FLOAT_LIMIT, HALF_LIMIT, INT8_LIMIT, Backend, one_blas_thread

try:
    from .. import _native
except ImportError as error:
    raise ImportError(f"its extension was not built or doesn't load ({error})") from error

#: What is done between two looks at the flag that stops it: bytes that are packed, 0.1 s of a slow disk;
#: multiply-adds, 0.1 s of two cores with AVX2, or of a matrix unit, which wants many tokens at a time.
PORTION, AT_ONCE, AT_ONCE_IN_TILES = 2**25, 13 * 10**9, 2**36
SMALL = 2**27  # bytes of weights that are packed in less than 0.1 s
SPARE = 2**26  # bytes of memory that packing leaves to others


class Native(Backend):
    """NumPy's table with its entries in C."""

    name = "c"
    cache_type = "float16"
    makes_scores = uses_blas = False

    def prepare(self, tensor: Tensor, copy: bool):
        """As ops.prepare, but a matrix becomes a `_native.Weight`: a repacked copy, or where it lies."""
        if len(tensor.shape) == 1:
            return ops.prepare(tensor, copy)
        weight = _native.Weight(TYPES[tensor.type].prepared, *tensor.shape, _factor(tensor), mapped=not copy)
        row = col = 0
        advise = _advise if copy else lambda *_: None
        for piece in tensor.pieces:
            n_rows, n_cols = piece.shape
            step = max(1, PORTION // piece.row_bytes // _native.STRIP) * _native.STRIP if copy else n_rows
            for start in range(0, n_rows, step):
                check_cancelled()
                stop = min(start + step, n_rows)
                advise(piece, start, stop, mmap.MADV_WILLNEED)  # several threads will read it
                data = np.ascontiguousarray(piece.blocks(start, stop)).reshape(-1).view(np.uint8)
                _native.pack(tensor.type, data, stop - start, n_cols, weight, row + start, col, self.threads)
                advise(piece, start, stop, mmap.MADV_DONTNEED)  # it would be in memory twice
            row, col = (row, col + n_cols) if tensor.axis == 1 else (row + n_rows, col)
        return weight

    def settle(self, weight, tensor: Tensor) -> None:
        """Give a weight that `prepare` left in its file memory of its own. Products wait for it at most.

        Raises TinyllamaError where the memory isn't there; the weight stays in its file then.
        """
        require_memory(self.prepared_bytes(tensor) + SPARE, f"packing {tensor.name}")
        _native.settle(weight, self.threads)
        for piece in tensor.pieces:
            _advise(piece, 0, piece.shape[0], mmap.MADV_DONTNEED)  # it would be in memory twice

    def keeps_in_file(self, tensors: dict[str, Tensor], mmap: bool = False) -> bool:
        """If somebody asks for that: a copy is as large as the file, and twice as fast."""
        return mmap

    def begins_in_file(self, tensors: dict[str, Tensor]) -> bool:
        """All but small models, which are packed before anybody notices."""
        return sum(tensor.nbytes for tensor in tensors.values()) >= SMALL

    def _fill(self, out: np.ndarray, function, *inputs) -> np.ndarray:
        function(*inputs, out, self.threads)
        return out

    def embedding(self, table, tokens: np.ndarray) -> np.ndarray:
        """As ops.embedding."""
        out = np.empty((len(tokens), table.shape[1]), np.float32)
        _native.rows(table, np.ascontiguousarray(tokens, np.int64), out)
        return out

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """As ops.rms_norm."""
        return self._fill(np.empty_like(x), _native.rms_norm, x, weight, eps)

    def matmul(self, x: np.ndarray, *weights):
        """As ops.matmul."""
        outs = tuple([np.empty((len(x), weight.shape[0]), np.float32) for weight in weights])
        if len(x) <= _native.FEW:
            _native.matmul(x, weights, outs, self.threads)
        else:
            at_once = AT_ONCE_IN_TILES if self.level in ("amx", "accelerate") else AT_ONCE
            n_weights = sum(weight.shape[0] * weight.shape[1] for weight in weights)
            step = max(1, at_once // (n_weights * _native.FEW)) * _native.FEW
            starts = range(0, len(x) - _native.FEW, step)  # no piece of a few is left: their bits are others
            for start in starts:
                check_cancelled()
                some = slice(start, None if start == starts[-1] else start + step)
                _native.matmul(x[some], weights, tuple([out[some] for out in outs]), self.threads)
        return list(outs) if len(outs) > 1 else outs[0]

    def rope(self, x: np.ndarray, freqs: np.ndarray) -> np.ndarray:
        """As ops.rope."""
        return self._fill(np.empty_like(x), _native.rope, x, freqs)

    def attention(self, q, k, v, cache, layer, taps=None, window=0) -> np.ndarray:
        """As ops.attention, which it is where the attention weights are to be looked at."""
        if taps:
            with one_blas_thread():
                return ops.attention(q, k, v, cache, layer, taps, window)
        out = np.empty((len(q), q[0].size), np.float32)
        keys, values = cache.room(layer, len(q))
        window = min(window, keys.shape[1])
        _native.attention(q, k, v, keys, values, len(cache), out, self.threads, window)
        return out

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """As ops.swiglu."""
        return self._fill(np.empty_like(gate), _native.swiglu, gate, up)

    def cast(
        self, blocks: np.ndarray, type: str, to: str, importance: np.ndarray | None = None
    ) -> np.ndarray:
        """As quant.cast, in the calling thread; blocks become float32 first, as there."""
        if TYPES[type].block > 1:
            blocks, type = quant.dequantize(blocks, type), "f32"
        out = np.empty(TYPES[to].nbytes(blocks.shape), np.uint8)
        _native.cast(type, blocks, to, out, *([] if importance is None else [importance]))
        return TYPES[to].view(out, blocks.shape)

    def prepared_bytes(self, tensor: Tensor) -> int:
        """What a copied weight takes."""
        return TYPES[TYPES[tensor.type].prepared].nbytes(tensor.shape)

    def tolerance(self, operation: str, types: Iterable[str] = ()) -> float:
        """Keys and values are halves, activations int8 where weights are blocks, all bf16 at level amx."""
        product = HALF_LIMIT if self.level == "amx" else FLOAT_LIMIT
        product = INT8_LIMIT if any(TYPES[type].block > 1 for type in types) else product
        return {"attention": HALF_LIMIT, "matmul": product}.get(operation, FLOAT_LIMIT)

    level = property(lambda self: _native.level(), doc="The instruction set that is used.")

    @contextmanager
    def at_level(self, name: str):
        """Inside, another instruction set is used. Raises TinyllamaError where this CPU hasn't it."""
        before, known = _native.level(), _native.levels()
        require(name in known, f"this computer has no level {name!r}: there are {', '.join(known)}")
        _native.use_level(name)
        try:
            yield
        finally:
            _native.use_level(before)

    def read_speed(self, weights: list) -> float:
        """Bytes a second at which memory is read: all of prepared weights, and nothing else."""
        started = time.perf_counter()
        _native.read_all(tuple(weights), self.threads)
        return sum(weight.bytes_read for weight in weights) / (time.perf_counter() - started)

    def multiply_speed(self) -> float:
        """Products a second of registers, without any memory."""
        rounds, products, seconds = 1000, 0.0, 0.0
        while seconds < 0.03:  # long enough for threads to have woken
            started = time.perf_counter()
            products = _native.multiply_all(rounds, self.threads)
            seconds, rounds = time.perf_counter() - started, rounds * 4
        return products / seconds


def _advise(piece: Piece, start: int, stop: int, advice: int) -> None:
    """Of some rows in a mapped file, tell the system what comes of them."""
    if isinstance(piece.data, MappedFile) and piece.order is None:
        first = -(-(piece.offset + start * piece.row_bytes) // mmap.PAGESIZE)
        last = (piece.offset + stop * piece.row_bytes) // mmap.PAGESIZE
        if last > first:
            piece.data.madvise(advice, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def _factor(tensor: Tensor) -> float:
    """A power of two that brings float32 scales into half precision's range: the largest to about 2^10, where
    one 2^-24 of it still keeps all its bits."""
    if "2023" not in tensor.type:
        return 1.0
    names = [name for name in ("d", "m") if name in TYPES[tensor.type].dtype.names]
    highest = max(float(np.abs(p.blocks()[name]).max(initial=0)) for p in tensor.pieces for name in names)
    return 2.0 ** (np.floor(np.log2(highest)) - 10) if 0 < highest < np.inf else 1.0
