"""The NumPy table with its element-wise entries fused and threaded by numexpr.

NumPy evaluates `gate / (1 + exp(-gate)) * up` as four passes over memory with three temporaries;
numexpr compiles the expression and runs it in one, in blocks that stay in cache, on several threads.
"""

import numexpr
import numpy as np

from .. import ops
from .numpy import Backend

#: Below this many elements a call of numexpr costs more than it saves.
WORTH_IT = 2**15


def softmax(x: np.ndarray) -> np.ndarray:
    """As ops.softmax."""
    if x.size < WORTH_IT:
        return ops.softmax(x)
    highest = x.max(axis=-1, keepdims=True)
    e = numexpr.evaluate("exp(x - highest)", {"x": x, "highest": highest})
    total = e.sum(axis=-1, keepdims=True)
    return numexpr.evaluate("e / total", {"e": e, "total": total}, out=e)


class Numexpr(Backend):
    """NumPy's table with these entries in place of its own."""

    name = "numexpr"

    def __init__(self, threads: int):
        super().__init__(threads)
        numexpr.set_num_threads(min(threads, numexpr.detect_number_of_cores()))

    def attention(self, q, k, v, cache, layer, taps=None, window=0) -> np.ndarray:
        """As ops.attention."""
        return ops.attention(q, k, v, cache, layer, taps, window, softmax)

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """As ops.swiglu."""
        if gate.size < WORTH_IT:
            return ops.swiglu(gate, up)
        return numexpr.evaluate("gate / (1 + exp(-gate)) * up", {"gate": gate, "up": up})
