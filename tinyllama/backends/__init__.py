"""Backends: tables of operations. `model.forward` runs on one, and so do `convert` and `quantize`.

`numpy.Backend` is the definition (`ops.py`). Every other one is that class with entries replaced, so it works
from its first entry on, and each entry is tested against its definition.
"""

import os
from importlib import import_module

from ..errors import TinyllamaError, require
from ..machine.limits import default_threads
from .numpy import INT8_LIMIT, Backend, over_forks
from .packing import Packing

__all__ = ["BACKENDS", "INT8_LIMIT", "OPERATIONS", "Backend", "Packing"]
__all__ += ["available", "get_backend", "over_forks"]

#: The entries that `model.forward` runs.
OPERATIONS = ("embedding", "rms_norm", "matmul", "rope", "attention", "swiglu")

#: The module and class of each backend, fastest first, as benchmarks/speed.py finds: numexpr saves memory
#: traffic, but NumPy has the faster exp.
BACKENDS = {"c": ("native", "Native"), "numpy": ("numpy", "Backend"), "numexpr": ("numexpr", "Numexpr")}

MOST_THREADS = 1024


def _make(name: str, threads: int) -> Backend:
    """Raises ImportError where the backend can't run here."""
    module, backend = BACKENDS[name]
    return getattr(import_module(f".{module}", __name__), backend)(threads)


def available() -> dict[str, str | None]:
    """Every backend's name, with None where it can run here, else the reason why not."""
    found: dict[str, str | None] = dict.fromkeys(BACKENDS)
    for name in BACKENDS:
        try:
            _make(name, default_threads())
        except ImportError as missing:
            found[name] = str(missing)
    return found


def get_backend(name: str | None = None, threads: int | None = None) -> Backend:
    """Make a backend.

    Args:
        name: "c", "numexpr", "numpy", or "auto" for the fastest that runs here. None: what the environment
            variable TINYLLAMA_BACKEND says, else "auto".
        threads: None for as many as there are cores.
    Raises:
        TinyllamaError: there is no such backend, or it can't run here.
    """
    name = name or os.environ.get("TINYLLAMA_BACKEND") or "auto"
    threads = default_threads() if threads is None else threads
    right = isinstance(threads, int) and 1 <= threads <= MOST_THREADS
    require(right, f"threads must be a whole number from 1 to {MOST_THREADS}, not {threads!r:.80}")
    require(name in ("auto", *BACKENDS), f"no backend {name!r}: there are auto, {', '.join(BACKENDS)}")
    reasons = []
    for candidate in BACKENDS if name == "auto" else [name]:
        try:
            return _make(candidate, threads)
        except ImportError as missing:
            reasons.append(f"backend {candidate!r} can't run here: {missing}")
    raise TinyllamaError("; ".join(reasons))
