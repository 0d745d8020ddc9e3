"""The device that MLX computes on, and its memory."""

import sys

from mlx import core as mx

from .limits import available_memory

ON_METAL, ON_GPU = mx.metal.is_available(), mx.default_device().type == mx.gpu
if sys.platform == "darwin" and not ON_METAL:
    raise ImportError("this Mac has no GPU that Metal can use")


def free_memory() -> int:
    """Bytes: of what Metal recommends as a limit, the rest; what CUDA says is free; of a CPU, the system."""
    info, free = mx.device_info(), available_memory()
    most = info.get("max_recommended_working_set_size")
    return min(free, most - mx.get_active_memory()) if most else info.get("free_memory", free)


def device() -> str:
    """Its name and kind, for people."""
    kind = "Metal" if ON_METAL else "CUDA" if ON_GPU else "CPU"
    return f"{mx.device_info().get('device_name', kind)}, {kind}"
