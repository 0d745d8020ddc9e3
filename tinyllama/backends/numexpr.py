"""The NumPy table with its element-wise entries fused and threaded by numexpr.

NumPy evaluates `gate / (1 + exp(-gate)) * up` as four passes over memory with three temporaries;
numexpr compiles the expression and runs it in one, in blocks that stay in cache, on several threads.
"""

from dataclasses import replace
from functools import partial

import numexpr
import numpy as np

from .. import ops

#: Below this many elements a call of numexpr costs more than it saves.
WORTH_IT = 2**15


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """As ops.rms_norm."""
    if x.size < WORTH_IT:
        return ops.rms_norm(x, weight, eps)
    mean_square = np.vecdot(x, x)[:, None] / np.float32(x.shape[-1])
    scale = 1 / np.sqrt(mean_square + np.float32(eps))
    return numexpr.evaluate("x * scale * weight", {"x": x, "scale": scale, "weight": weight})


def softmax(x: np.ndarray) -> np.ndarray:
    """As ops.softmax."""
    if x.size < WORTH_IT:
        return ops.softmax(x)
    highest = x.max(axis=-1, keepdims=True)
    e = numexpr.evaluate("exp(x - highest)", {"x": x, "highest": highest})
    total = e.sum(axis=-1, keepdims=True)
    return numexpr.evaluate("e / total", {"e": e, "total": total}, out=e)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """As ops.swiglu."""
    if gate.size < WORTH_IT:
        return ops.swiglu(gate, up)
    return numexpr.evaluate("gate / (1 + exp(-gate)) * up", {"gate": gate, "up": up})


def numexpr_backend(numpy_backend):
    """The NumPy backend with these entries in place of its own."""
    numexpr.set_num_threads(min(numpy_backend.threads, numexpr.detect_number_of_cores()))
    return replace(
        numpy_backend,
        name="numexpr",
        rms_norm=rms_norm,
        attention=partial(ops.attention, softmax=softmax),
        swiglu=swiglu,
    )
