"""The device that MLX computes on: its memory, and how threads share it."""

import atexit
import sys

from mlx import core as mx

from .forks import at_fork, computing
from .limits import available_memory

ON_METAL, ON_GPU = mx.metal.is_available(), mx.default_device().type == mx.gpu
if sys.platform == "darwin" and not ON_METAL:
    raise ImportError("this Mac has no GPU that Metal can use")

#: What is noted here any thread may compute, one at a time; a stream of a thread's own stays when that ends.
_stream = mx.new_thread_unsafe_stream(mx.default_device())
atexit.register(computing.acquire)  # MLX aborts where Python ends while it computes


def _renew() -> None:
    """A forked child hasn't got the thread that computes; no GPU can be used over a fork."""
    global _stream
    _stream = _stream if ON_GPU else mx.new_thread_unsafe_stream(mx.cpu)


at_fork(after_in_child=_renew)


def noting():
    """A context: what is noted inside may be computed by any thread."""
    return mx.stream(_stream)


def compute(*noted) -> None:
    """Now: arrays, or lists of them."""
    with computing:
        mx.eval(*noted)


def free_memory() -> int:
    """Bytes: of what Metal recommends as a limit, the rest; what CUDA says is free; of a CPU, the system."""
    info, free, gives_way = mx.device_info(), available_memory(), mx.get_cache_memory()
    if most := info.get("max_recommended_working_set_size"):
        return min(free + gives_way, most - mx.get_active_memory())
    return info["free_memory"] + gives_way if "free_memory" in info else free


def device() -> str:
    """Its name and kind, for people."""
    kind = "Metal" if ON_METAL else "CUDA" if ON_GPU else "CPU"
    return f"{mx.device_info().get('device_name', kind)}, {kind}"
