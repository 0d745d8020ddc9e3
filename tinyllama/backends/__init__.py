"""Backends: tables of operations. `model.forward` runs on one, and so do `convert` and `quantize`.

`numpy.Backend` is the definition (`ops.py`). Every other one is that class with entries replaced, so it works
from its first entry on, and each entry is tested against its definition.
"""

import os
import sys
from importlib import import_module

from ..errors import TinyllamaError, require
from ..machine.forks import over_forks
from ..machine.limits import default_threads
from .numpy import INT8_LIMIT, Backend
from .packing import Packing

__all__ = ["BACKENDS", "INT8_LIMIT", "OPERATIONS", "Backend", "Packing"]
__all__ += ["available", "get_backend", "over_forks"]

#: The entries that `model.forward` runs.
OPERATIONS = ("embedding", "rms_norm", "matmul", "rope", "attention", "swiglu")

#: The module and class of each backend, fastest first, as benchmarks/speed.py finds: numexpr saves memory
#: traffic, but NumPy has the faster exp; MLX is fast on a GPU.
BACKENDS = {"c": ("native", "Native"), "numpy": ("numpy", "Backend"), "numexpr": ("numexpr", "Numexpr")}
MLX = {"mlx": ("mlx", "Mlx")}
BACKENDS = MLX | BACKENDS if sys.platform == "darwin" else BACKENDS | MLX

#: What the backend mlx can be told, see `get_backend`.
OPTIONS = ("dtype", "inexact_as", "gpu_layers")

MOST_THREADS = 1024


def _make(name: str, threads: int, **options) -> Backend:
    """Raises ImportError where the backend can't run here."""
    module, backend = ("split", "Split") if "gpu_layers" in options else BACKENDS[name]
    require(name in MLX or not options, f"backend {name!r} has no {', '.join(options)}: those are mlx's")
    made = getattr(import_module(f".{module}", __name__), backend)(threads, **options)
    made.options = options
    return made


def available() -> dict[str, str | None]:
    """Every backend's name, with None where it can run here, else the reason why not."""
    found: dict[str, str | None] = dict.fromkeys(BACKENDS)
    for name in BACKENDS:
        try:
            _make(name, default_threads())
        except ImportError as missing:
            found[name] = str(missing)
    return found


def get_backend(name: str | None = None, threads: int | None = None, **options) -> Backend:
    """Make a backend.

    Args:
        name: "mlx", "c", "numexpr", "numpy", or "auto" for the fastest that runs here: on a Mac with Metal
            mlx, else c. None: what the environment variable TINYLLAMA_BACKEND says, else "auto".
        threads: None for as many as there are cores.
        options: of mlx. dtype: "float32", "float16" or "bfloat16", of activations, scales and cache; None for
            float16 on a GPU. inexact_as: "8-bit" or "float", what becomes of types that MLX can't say
            exactly. gpu_layers: so many layers run there, the others in C; None for all.
    Raises:
        TinyllamaError: there is no such backend or option, or it can't run here.
    """
    name = name or os.environ.get("TINYLLAMA_BACKEND") or "auto"
    threads = default_threads() if threads is None else threads
    right = isinstance(threads, int) and 1 <= threads <= MOST_THREADS
    require(right, f"threads must be a whole number from 1 to {MOST_THREADS}, not {threads!r:.80}")
    require(name in ("auto", *BACKENDS), f"no backend {name!r}: there are auto, {', '.join(BACKENDS)}")
    reasons, options = [], {key: value for key, value in options.items() if value is not None}
    wrong = options.keys() - set(OPTIONS)
    require(not wrong, f"no option {min(wrong, default='')!r} of a backend: there are {', '.join(OPTIONS)}")
    layers = options.get("gpu_layers", 0)
    right = isinstance(layers, int) and not isinstance(layers, bool) and layers >= 0
    require(right, f"gpu_layers must be a whole number of at least 0, not {layers!r:.80}")
    name = "mlx" if name == "auto" and options else name  # who else has options
    for candidate in BACKENDS if name == "auto" else [name]:
        try:
            return _make(candidate, threads, **options)
        except ImportError as missing:
            reasons.append(f"backend {candidate!r} can't run here: {missing}")
    raise TinyllamaError("; ".join(reasons))
