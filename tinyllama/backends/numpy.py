"""The table of operations in NumPy: `ops.py` with threads, and what it takes of memory.

What bounds it: a model that stays in its file is dequantized for every pass, whatever the number of tokens. A
core of 3.5 GHz with AVX2 does 1.2 billion weights of q4_0 a second, 0.8 of q4_k and 0.7 of q6_k, and 36
billion multiply-adds in its BLAS. So one token waits for weights alone; with 32 at once, both take as long;
of longer prompts the products are what takes time.

A backend answers for itself: what its cache holds, what its weights take, how exact it is.
"""

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from .. import ops, quant
from ..config import Config
from ..errors import check_cancelled
from ..machine.forks import at_fork, over_forks
from ..machine.interrupts import interruptible
from ..machine.limits import available_memory, human, keep_freed_memory, require_memory
from ..tensor import Tensor

#: Mean squared error of a step, as a fraction of its mean square, that is explained by how it computes:
#: float32 sums in another order; keys and values in half precision, or products in bf16; activations as int8
#: with a scale for 32 (3e-5 for normally distributed ones, more where outliers coarsen their block).
FLOAT_LIMIT, HALF_LIMIT, INT8_LIMIT = 1e-9, 1e-5, 5e-4

#: A model of fewer bytes in float32 is dequantized once, when it is loaded.
UNPACK_BELOW = 2 * 2**30


class Backend:
    """The operations of a LLaMA in NumPy; `ops.py` says what each takes and gives, of `cast` `quant.py`.

    Its `threads` share out the rows of a matrix.
    """

    hint = ""  # why else it might compute NaN
    name = "numpy"  # by which `get_backend` makes it
    level: str | None = None  # the instruction set of the C backend
    options: ClassVar[dict] = {}  # that `get_backend` was asked for
    cache_type = "float32"  # of the numbers in its KV cache
    cache = ops.KVCache  # its class
    makes_scores = True  # the attention's scores of all heads are in memory together
    uses_blas = True  # whose threads would be in the way of ours
    depth = 1  # passes that can be under way at the same time: one on each computer

    prepare = staticmethod(ops.prepare)
    concatenate = staticmethod(np.concatenate)
    embedding = staticmethod(ops.embedding)
    rms_norm = staticmethod(ops.rms_norm)
    rope_freqs = staticmethod(ops.rope_freqs)
    rope = staticmethod(ops.rope)
    attention = staticmethod(ops.attention)
    swiglu = staticmethod(ops.swiglu)
    cast = staticmethod(quant.cast)

    def __init__(self, threads: int):
        self.threads = threads
        self._pool, self._pid = None, 0
        keep_freed_memory()

    def matmul(self, x: np.ndarray, *weights):
        """As ops.matmul, with the rows of each weight shared out among threads."""
        return ops.matmul(x, *weights, run=self._share)

    def _share(self, job: Callable, jobs: Iterable) -> tuple:
        """Do jobs on several threads, this one among them. Once it is told to stop, the rest is left."""
        from concurrent.futures import ThreadPoolExecutor, wait  # here: the C backend does without

        if self._pid != os.getpid():  # a forked child has none of the threads
            self._pool, self._pid = ThreadPoolExecutor(self.threads), os.getpid()
        left = iter(jobs)

        def work() -> None:
            for some in left:
                check_cancelled()
                job(some)

        others = [self._pool.submit(copy_context().run, work) for _ in range(self.threads - 1)]
        try:
            work()
        finally:
            wait(others)
        return tuple(other.result() for other in others)

    @property
    def title(self) -> str:
        """For people."""
        return f"backend {self.name}, {self.threads} thread{'s' * (self.threads > 1)}"

    def stages(self, n_layers: int) -> list[tuple["Backend", int, int]]:
        """Who computes which layers: (table, first, stop), one after the other."""
        return [(self, 0, n_layers)]

    def array(self, x):
        """Activations as its operations take them: from NumPy, or from another table."""
        return np.ascontiguousarray(x, np.float32)

    def to_numpy(self, x) -> np.ndarray:
        """Activations as float32, for who looks at them."""
        return x

    def new_cache(self, config: Config, n_ctx: int, model=None) -> ops.KVCache:
        """An empty KV cache for at most n_ctx tokens, of a model that is named if it may be saved."""
        return self.cache(config, n_ctx, self.cache_type, model)

    @contextmanager
    def running(self, cancel=None) -> Iterator[None]:
        """Whatever computes runs in this: Ctrl-C or `cancel` sets a flag, and BLAS leaves threads to us."""
        with interruptible(cancel), one_blas_thread() if self.uses_blas else nullcontext():
            yield

    def tolerance(self, operation: str, types: Iterable[str] = ()) -> float:
        """An error that is no mistake: mean square of the difference, relative to that of NumPy's result."""
        return FLOAT_LIMIT

    # --- memory ---------------------------------------------------------------------------------------

    def free_memory(self) -> int:
        """Bytes that models and caches can still get."""
        return available_memory()

    def keeps_in_file(self, tensors: dict[str, Tensor], mmap: bool = False) -> bool:
        """Whether weights stay in their mapped file: if somebody asks for that, or all would be too large."""
        return mmap or 4 * sum(math.prod(tensor.shape) for tensor in tensors.values()) >= UNPACK_BELOW

    def begins_in_file(self, tensors: dict[str, Tensor]) -> bool:
        """Whether weights that get memory of their own get it while the model runs (`packing`)."""
        return False

    def prepared_bytes(self, tensor: Tensor) -> int:
        """What a copied weight takes."""
        return 4 * math.prod(tensor.shape)

    def cache_bytes(self, config: Config, n_ctx: int) -> int:
        """What a full KV cache takes."""
        return int(self.cache_type[-2:]) // 8 * 2 * config.n_layers * config.kv_dim * n_ctx

    def activation_bytes(
        self, config: Config, at_once: int, n_past: int, n_logits: int = 1, tapped: bool = False
    ) -> int:
        """What `model.forward` computes on the way when `at_once` tokens run together, the last at n_past.

        Args:
            n_logits: of how many tokens the logits are there together.
            tapped: a tap looks at the attention's scores.
        """
        wide = 3 * config.hidden_dim + 6 * max(config.dim, config.q_dim)
        scores = (3 * config.n_heads + 4) * n_past if self.makes_scores or tapped else 0
        return 4 * (at_once * (wide + scores) + n_logits * config.vocab_size)

    def memory(
        self, config: Config, tensors: dict[str, Tensor], n_ctx: int, at_once: int = 512, mmap: bool = False
    ) -> dict[str, int]:
        """Upper bounds of what running a model takes: {"weights", "kv_cache", "activations", "tokenizer"}.

        Weights that stay in their file count too: without as much page cache every token reads the disk.
        """
        mapped = self.keeps_in_file(tensors, mmap)
        return {
            "weights": sum(t.nbytes if mapped else self.prepared_bytes(t) for t in tensors.values()),
            "kv_cache": self.cache_bytes(config, n_ctx),
            "activations": self.activation_bytes(config, min(at_once, n_ctx), n_ctx),
            "tokenizer": 700 * config.vocab_size,  # its pieces, as Python keeps them
        }

    def cache_room(self, config: Config, at_once: int) -> int:
        """Bytes that are free for KV caches, beside what computing so many tokens at once takes."""
        return self.free_memory() - self.activation_bytes(config, at_once, config.max_seq_len, ops.FEW)

    def has_memory(self, needed: dict[str, int]) -> bool:
        """Whether what `memory` reckons is free."""
        return sum(needed.values()) <= self.free_memory()

    def require_load(self, path: Path, needed: dict[str, int], mapped: bool) -> None:
        """Refuse to load what doesn't fit; of weights that stay in their file, warn."""
        weights = needed["weights"]
        require_memory(sum(needed.values()) - mapped * weights, str(path), self.free_memory())
        if mapped and not self.has_memory(needed):
            costs = f"{human(weights)} of weights and {human(self.free_memory())} of free memory"
            warnings.warn(f"{path}: {costs}: every token will read the disk", stacklevel=3)

    def require_run(self, config: Config, n_ctx: int, at_once: int = 0, n_bytes: int = 0, **computed) -> None:
        """Refuse a run whose KV cache, or that and what is computed of `at_once` tokens, doesn't fit.

        Args:
            n_bytes: of what else is kept.
            computed: n_logits and tapped, as `activation_bytes` takes them.
        Raises:
            TinyllamaError: names the context and the memory that is needed and that is free.
        """
        cache = self.cache_bytes(config, n_ctx)
        needed = cache + n_bytes + self.activation_bytes(config, at_once, n_ctx, **computed)
        if needed > (free := self.free_memory()):  # which is slow to find out: once where all is well
            require_memory(cache, f"a context of {n_ctx} tokens", free)
            kept = " and what is kept of them" if n_bytes else ""
            many = f"a context of {n_ctx} tokens, {at_once} of them computed at once,{kept}"
            require_memory(needed, many, free)


_lock = over_forks(threading.Lock())
_inside, _before = set(), []  # whoever is inside; (library, its threads before the first came)
at_fork(after_in_child=_inside.clear)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, BLAS uses one thread; a setting of the whole process, which the last to leave gives back."""
    me = object()
    with _lock:
        if not _inside:
            _before[:] = _before or [(library, library.get_num_threads()) for library in _blas_libraries()]
            for library, _ in _before:
                _set_threads(library, 1)
        _inside.add(me)
    try:
        yield
    finally:
        with _lock:
            _inside.discard(me)
            while _before and not _inside:
                _set_threads(*_before.pop())


@cache
def _blas_libraries() -> list:
    """All that are loaded: 7 ms to find. None without threadpoolctl: BLAS then keeps its threads."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return []
    return ThreadpoolController().select(user_api="blas").lib_controllers


def _set_threads(library, threads: int) -> None:
    """Of OpenBLAS, threadpoolctl 3.6 ignores every Python thread but the first that asked."""
    getattr(library, "_real_set_num_threads", library.set_num_threads)(threads)
