"""The seam: a backend is a table of operations that `model.forward` runs on, and `convert` and `quantize`.

`numpy` is the definition (`ops.py`). Every other backend is that table with entries replaced, so it
works from its first entry on, and each entry is tested against its definition.
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from threadpoolctl import ThreadpoolController

from .. import ops
from ..errors import Cancelled, TinyllamaError
from ..quant import cast
from ..resources import macos_number


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
    run = ThreadPoolExecutor(threads, thread_name_prefix="tinyllama").map if threads > 1 else map
    return Backend(
        name="numpy",
        threads=threads,
        prepare=ops.prepare,
        new_cache=ops.new_cache,
        embedding=ops.embedding,
        rms_norm=ops.rms_norm,
        matmul=partial(ops.matmul, run=run),
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
    if not (isinstance(threads, int) and threads >= 1):
        raise TinyllamaError(f"threads must be a whole number of at least 1, not {threads!r}")
    if name not in ("auto", *BACKENDS):
        raise TinyllamaError(f"no backend {name!r}: there are auto, {', '.join(BACKENDS)}")
    reasons = []
    for candidate in BACKENDS if name == "auto" else [name]:
        try:
            return BACKENDS[candidate](threads)
        except ImportError as missing:
            reasons.append(f"backend {candidate!r} can't run here: {missing}")
    raise TinyllamaError("; ".join(reasons))


class _OneBlasThread:
    """A context in which BLAS leaves the threads to us: two pools would fight over the cores.

    The limit is the whole process's, so with several Python threads inside, the last one out lifts it.
    """

    def __init__(self):
        self._lock, self._inside, self._controller, self._limit = threading.Lock(), 0, None, None

    def __enter__(self):
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._controller = self._controller or ThreadpoolController()  # looks through all libraries
                self._limit = self._controller.limit(limits=1, user_api="blas")

    def __exit__(self, *_):
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


one_blas_thread = _OneBlasThread()
