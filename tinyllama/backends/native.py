"""The NumPy table with its entries replaced by C: `tinyllama._native`, built from ext/.

A weight is repacked when it is prepared (ext/README.md draws the layout) and multiplied as it lies. One that
stays in its mapped file is repacked strip by strip whenever it is multiplied, with the same result. The KV
cache is the definition's, in half precision, so a tapped attention can run in NumPy on the same cache.
"""

import mmap
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from .. import ops, quant
from ..blocks import TYPES
from ..config import Config
from ..machine.mapped import owner
from ..quant import Tensor
from ..machine.limits import human

try:
    from .. import _native
except ImportError as error:
    raise ImportError(f"its extension was not built or doesn't load ({error})") from error

#: What a weight of a file's type is prepared as. Q6_K's scales of 16 fit no kernel here; as q8_0 it changes
#: by a fifth of its own error.
PREPARED = {
    "q4_0_2023": "q4_0",
    "q4_0_2023_planar": "q4_0",
    "q4_1_2023": "q4_1",
    "q6_k": "q8_0",
}

HUGE_PAGE = 2**21
SLAB = 32 * HUGE_PAGE
CACHE_LINE = 64

STRIP, TOGETHER = 32, 12  # of ext/kernels.h: rows that lie side by side, tokens that are quantized together

#: Ctrl-C waits for one call of C: for so many bytes from a slow disk, or so many multiply-adds.
PORTION, AT_ONCE = 2**25, 2**36


class Arena:
    """Memory in huge pages: reading through 4 GB of weights by 4 KB pages would cost a tenth of the speed.

    Slabs live for as long as an array lies in them.
    """

    def __init__(self):
        self._free = np.empty(0, np.uint8)

    def take(self, n_bytes: int) -> np.ndarray:
        """Zeros, uint8 [n_bytes], that begin on a cache line."""
        size = -(-n_bytes // CACHE_LINE) * CACHE_LINE
        if size > SLAB // 2:
            return _huge_pages(size)[:n_bytes]
        if size > len(self._free):
            self._free = _huge_pages(SLAB)
        taken, self._free = self._free[:n_bytes], self._free[size:]
        return taken


def _huge_pages(n_bytes: int) -> np.ndarray:
    """Fresh memory that begins at a huge page, of which the system has as many as it likes to give."""
    private = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, n_bytes + HUGE_PAGE, **private)
    except OSError:
        raise MemoryError(f"the system gave no {human(n_bytes)} for weights") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % HUGE_PAGE
    return array[start : start + n_bytes]


def prepare(
    tensor: Tensor, copy: bool, suspect: Callable[[str], None] | None = None, *, arena: Arena, threads: int
):
    """As ops.prepare, but a matrix becomes a `_native.Weight`: a repacked copy, or where it lies."""
    if len(tensor.shape) == 1:
        if suspect and not tensor.is_finite():
            suspect(tensor.name)
        return ops.as_numbers(tensor)
    n_out, n_in = tensor.shape
    type = PREPARED.get(tensor.type, tensor.type)
    memory = arena.take(_native.weight_bytes(type, n_out, n_in)) if copy else None
    weight = _native.Weight(type, n_out, n_in, _factor(tensor), memory)
    row, col, finite = 0, 0, True
    for part in tensor.parts:
        n_rows, n_cols = len(part), tensor.shape[1] // (len(tensor.parts) if tensor.split == 1 else 1)
        step = max(1, PORTION * n_rows // part.nbytes // STRIP) * STRIP if copy else n_rows
        for start in range(0, n_rows, step):
            rows = part[start : start + step]
            if copy:
                _advise(rows, "MADV_WILLNEED")
            data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
            _native.pack(tensor.type, data, len(rows), n_cols, weight, row + start, col, threads)
            if copy:
                finite = finite and quant.is_finite(rows, tensor.type)  # here, while its pages are in memory
                _advise(rows, "MADV_DONTNEED")
        row, col = (row, col + n_cols) if tensor.split == 1 else (row + n_rows, col)
    if suspect and not finite:
        suspect(tensor.name)
    return weight


def _advise(part: np.ndarray, advice: str) -> None:
    """Of a mapped file, tell the system what comes of a part.

    MADV_WILLNEED: it is about to be read, by several threads at once. MADV_DONTNEED: it has been copied, and
    would take memory twice; the system reads a page again if it is looked at again.
    """
    file = owner(part)
    if not isinstance(file, mmap.mmap) or not hasattr(mmap, advice):
        return
    if memoryview(file).readonly:  # memory that isn't a file's would be lost
        start = part.ctypes.data - np.frombuffer(file, np.uint8).ctypes.data
        first, last = -(-start // mmap.PAGESIZE), (start + part.nbytes) // mmap.PAGESIZE
        if last > first:
            file.madvise(getattr(mmap, advice), first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def _factor(tensor: Tensor) -> float:
    """A power of two by which float32 scales come into the middle of half precision's range.

    The largest becomes about 2^10, so that one 2^-24 of it still keeps all its bits.
    """
    if "2023" not in tensor.type:
        return 1.0
    fields = [part[name] for part in tensor.parts for name in ("d", "m") if name in part.dtype.names]
    highest = max(float(np.abs(field).max(initial=0)) for field in fields)
    return 2.0 ** (np.floor(np.log2(highest)) - 10) if 0 < highest < np.inf else 1.0


def new_cache(config: Config, n_ctx: int) -> ops.KVCache:
    """As ops.new_cache, in half precision."""
    shape = (config.n_layers, config.n_kv_heads, n_ctx, config.head_dim)
    return ops.KVCache(np.zeros(shape, np.float16), np.zeros(shape, np.float16))


def embedding(table, tokens: np.ndarray) -> np.ndarray:
    """As ops.embedding."""
    out = np.empty((len(tokens), table.shape[1]), np.float32)
    _native.rows(table, np.ascontiguousarray(tokens, np.int64), out)
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, *, threads: int) -> np.ndarray:
    """As ops.rms_norm."""
    out = np.empty_like(x)
    _native.rms_norm(x, weight, eps, out, threads)
    return out


def matmul(x: np.ndarray, *weights, threads: int):
    """As ops.matmul."""
    outs = tuple([np.empty((len(x), weight.shape[0]), np.float32) for weight in weights])
    if len(x) <= TOGETHER:
        _native.matmul(x, weights, outs, threads)
    else:
        n_weights = sum(weight.shape[0] * weight.shape[1] for weight in weights)
        step = max(1, AT_ONCE // (n_weights * TOGETHER)) * TOGETHER
        for some in (slice(start, start + step) for start in range(0, len(x), step)):
            _native.matmul(x[some], weights, tuple([out[some] for out in outs]), threads)
    return list(outs) if len(outs) > 1 else outs[0]


def rope(x: np.ndarray, freqs: np.ndarray, *, threads: int) -> np.ndarray:
    """As ops.rope."""
    out = np.empty_like(x)
    _native.rope(x, freqs, out, threads)
    return out


def attention(q, k, v, cache, layer, pos, tap=None, *, threads: int) -> np.ndarray:
    """As ops.attention, which it is where the attention weights are to be looked at."""
    if tap:
        return ops.attention(q, k, v, cache, layer, pos, tap)
    n_tokens, n_heads, head_dim = q.shape
    out = np.empty((n_tokens, n_heads * head_dim), np.float32)
    _native.attention(q, k, v, cache.keys[layer], cache.values[layer], pos, out, threads)
    return out


def swiglu(gate: np.ndarray, up: np.ndarray, *, threads: int) -> np.ndarray:
    """As ops.swiglu."""
    out = np.empty_like(gate)
    _native.swiglu(gate, up, out, threads)
    return out


def cast(blocks: np.ndarray, type: str, to: str) -> np.ndarray:
    """As quant.cast, in the calling thread; blocks of integers the definition casts."""
    if TYPES[type].block > 1:
        return quant.cast(blocks, type, to)
    kind, shape = TYPES[to], blocks.shape
    out = np.empty(kind.nbytes(shape), np.uint8)
    _native.cast(type, blocks, to, out)
    return kind.view(out, shape)


def native_backend(numpy_backend):
    """The NumPy backend with these entries in place of its own."""
    threads = numpy_backend.threads
    threaded = {
        entry.__name__: partial(entry, threads=threads)
        for entry in (rms_norm, matmul, rope, attention, swiglu)
    }
    return replace(
        numpy_backend,
        name="c",
        prepare=partial(prepare, arena=Arena(), threads=threads),
        new_cache=new_cache,
        embedding=embedding,
        cast=cast,
        **threaded,
    )
