"""The seam: a backend is a table of operations that `model.forward` runs on, and `convert` and `quantize`.

`numpy` is the definition (`ops.py`). Every other backend is that table with entries replaced, so it
works from its first entry on, and each entry is tested against its definition.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from weakref import WeakSet

from threadpoolctl import ThreadpoolController

from .. import ops
from ..errors import Cancelled, TinyllamaError
from ..quant import cast
from ..machine.limits import macos_number
from ..machine.threads import shared_out


@dataclass(frozen=True)
class Backend:
    """The operations of a LLaMA; `ops.py` says what each takes and gives, of `cast` `quant.py`."""

    name: str
    threads: int
    prepare: Callable
    new_cache: Callable
    embedding: Callable
    rms_norm: Callable
    matmul: Callable
    rope: Callable
    attention: Callable
    swiglu: Callable
    cast: Callable


#: The entries that `model.forward` runs.
OPERATIONS = ("embedding", "rms_norm", "matmul", "rope", "attention", "swiglu")


def stoppable(backend: Backend, cancel) -> Backend:
    """The same table, whose every operation raises Cancelled instead once `cancel.is_set()`.

    A product in Python, which takes long for large matrices, looks at the flag before each of its jobs, too.
    """

    def looking_first(operation: Callable) -> Callable:
        def run(*arguments):
            if cancel.is_set():
                raise Cancelled("cancelled")
            return operation(*arguments)

        return run

    operations = {name: getattr(backend, name) for name in OPERATIONS}
    if (share := getattr(backend.matmul, "keywords", {}).get("run")) is not None:
        operations["matmul"] = partial(
            backend.matmul, run=lambda job, *args: share(looking_first(job), *args)
        )
    return replace(backend, **{name: looking_first(operation) for name, operation in operations.items()})


def numpy_backend(threads: int) -> Backend:
    """The definition, with the rows of each matrix shared out among threads."""
    return Backend(
        name="numpy",
        threads=threads,
        prepare=ops.prepare,
        new_cache=ops.new_cache,
        embedding=ops.embedding,
        rms_norm=ops.rms_norm,
        matmul=partial(ops.matmul, run=partial(shared_out, threads)),
        rope=ops.rope,
        attention=ops.attention,
        swiglu=ops.swiglu,
        cast=cast,
    )


def numexpr_backend(threads: int) -> Backend:
    """NumPy's table with element-wise entries fused and threaded."""
    from .numexpr import numexpr_backend

    return numexpr_backend(numpy_backend(threads))


def native_backend(threads: int) -> Backend:
    """NumPy's table with its entries in C."""
    from .native import native_backend

    return native_backend(numpy_backend(threads))


CGROUP = Path("/sys/fs/cgroup")
MOST_THREADS = 1024

#: Fastest first, as benchmarks/speed.py finds; numexpr saves traffic, but NumPy has the faster exp.
BACKENDS = {"c": native_backend, "numpy": numpy_backend, "numexpr": numexpr_backend}


def available() -> dict[str, str | None]:
    """Every backend's name, with None where it can run here, else the reason why not."""
    return {name: _reason(make) for name, make in BACKENDS.items()}


def _reason(make: Callable) -> str | None:
    try:
        make(default_threads())
    except ImportError as missing:
        return str(missing)
    return None


def default_threads() -> int:
    """The cores that this process may use, less where a container gives it only a share of their time.

    Of a Mac's cores those that are slower by design don't count: the fast ones would wait for them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _container_cores() or cores, _fast_cores() or cores))


def _fast_cores() -> int | None:
    """Of a Mac's cores the fast ones, which on one with an Intel processor are all; None on other systems."""
    if sys.platform != "darwin":
        return None
    return macos_number("hw.perflevel0.physicalcpu") or macos_number("hw.physicalcpu")


def _container_cores() -> int | None:
    """The whole cores' worth of time that Linux's cgroup allows, None where it sets no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2, version 1
        try:
            words = [word for name in names for word in (CGROUP / name).read_text().split()]
        except OSError:
            continue
        quota, period = words
        return None if quota in ("max", "-1") else int(quota) // int(period)
    return None


def get_backend(name: str | None = None, threads: int | None = None) -> Backend:
    """Make a backend's table.

    Args:
        name: "c", "numexpr", "numpy", or "auto" for the fastest that runs here. None: what the environment
            variable TINYLLAMA_BACKEND says, else "auto".
        threads: None for as many as there are cores.
    Raises:
        TinyllamaError: there is no such backend, or it can't run here.
    """
    name = name or os.environ.get("TINYLLAMA_BACKEND") or "auto"
    threads = default_threads() if threads is None else threads
    if not (isinstance(threads, int) and 1 <= threads <= MOST_THREADS):
        raise TinyllamaError(f"threads must be a whole number from 1 to {MOST_THREADS}, not {threads!r:.80}")
    if name not in ("auto", *BACKENDS):
        raise TinyllamaError(f"no backend {name!r}: there are auto, {', '.join(BACKENDS)}")
    reasons = []
    for candidate in BACKENDS if name == "auto" else [name]:
        try:
            return BACKENDS[candidate](threads)
        except ImportError as missing:
            reasons.append(f"backend {candidate!r} can't run here: {missing}")
    raise TinyllamaError("; ".join(reasons))


class _User:
    """Somebody who is inside of `one_blas_thread`; forgotten with its frame, however that ended."""


class _Blas:
    """How many threads BLAS starts, which is a setting of the whole process.

    With several Python threads inside, the last one out gives it back. Every step can be repeated, since an
    interrupt may come after any of them.
    """

    def __init__(self):
        self._lock, self._inside = threading.Lock(), WeakSet()
        self._libraries, self._before = None, None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_others)

    def limit(self, user: object) -> None:
        with self._lock:
            if not self._inside:
                if self._libraries is None:  # looks through all that are loaded
                    self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
                if self._before is None:
                    self._before = [library.get_num_threads() for library in self._libraries]
                for library in self._libraries:
                    _set_threads(library, 1)
            self._inside.add(user)

    def give_back(self, user: object) -> None:
        with self._lock:
            self._inside.discard(user)
            if not self._inside and self._before is not None:
                for library, threads in zip(self._libraries, self._before, strict=True):
                    _set_threads(library, threads)
                self._before = None

    def _forget_others(self) -> None:
        """A forked child has none of the threads that were inside."""
        self._lock, self._inside = threading.Lock(), WeakSet()


def _set_threads(library, threads: int) -> None:
    """Of OpenBLAS, threadpoolctl 3.6 quietly ignores every Python thread but the first that asked."""
    getattr(library, "_real_set_num_threads", library.set_num_threads)(threads)


_blas = _Blas()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS leaves the threads to us inside: two pools would fight over the cores."""
    user = _User()
    try:
        _blas.limit(user)
        yield
    finally:
        _blas.give_back(user)
