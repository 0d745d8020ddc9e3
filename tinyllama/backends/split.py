"""A model that doesn't fit on the GPU: its first layers run there, embedding, other layers and output in C.

Nothing but the residual stream goes from one side to the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..config import Config
from ..errors import require
from ..machine.gpu import ON_METAL, compute, noting
from ..machine.limits import require_memory
from ..ops import KVCache
from ..tensor import Tensor
from .mlx import Cache, Mlx
from .native import Native
from .numpy import Backend


class SplitCache(Cache):
    """Keys and values of the first layers on the GPU, those of the others in NumPy."""

    def __init__(self, *what, gpu_layers: int):
        self._n = gpu_layers
        super().__init__(*what)

    def new(self, layer: int, room: int):
        """As KVCache's."""
        return super().new(layer, room) if layer < self._n else KVCache.new(self, layer, room)

    def compute(self) -> None:
        """As Cache's."""
        compute(self.keys[: self._n], self.values[: self._n])


class Split(Native):
    """The table of C, which leaves the first layers to MLX's; options as `get_backend` says."""

    name = "mlx"

    def __init__(self, threads: int, gpu_layers: int, dtype: str = "float16", inexact_as: str = "8-bit"):
        super().__init__(threads)
        require(dtype == self.cache_type, f"gpu_layers needs dtype {self.cache_type}: C's cache has no other")
        self._gpu, self._n, self._c = Mlx(threads, dtype, inexact_as), gpu_layers, Native(threads)

    def _side(self, tensor: Tensor) -> Backend:
        """Who has a weight."""
        words = tensor.name.split(".")
        return self._gpu if words[0] == "layers" and int(words[1]) < self._n else self._c

    def stages(self, n_layers: int) -> list[tuple[Backend, int, int]]:
        """As Backend's."""
        return [(self._gpu, 0, self._n), (self, self._n, n_layers)]

    @contextmanager
    def running(self, cancel=None) -> Iterator[None]:
        """As Backend's."""
        with super().running(cancel), noting():
            yield

    def array(self, x) -> np.ndarray:
        """As Backend's."""
        return super().array(self.to_numpy(x))

    def to_numpy(self, x) -> np.ndarray:
        """As Backend's."""
        return self._gpu.to_numpy(x)

    def prepare(self, tensor: Tensor, copy: bool):
        """As Backend's."""
        return self._side(tensor).prepare(tensor, copy)

    def new_cache(self, config: Config, n_ctx: int, model=None) -> SplitCache:
        """As Backend's."""
        return SplitCache(config, n_ctx, self.cache_type, model, gpu_layers=self._n)

    def begins_in_file(self, tensors: dict[str, Tensor]) -> bool:
        """As Backend's: no weights are packed later."""
        return False

    def prepared_bytes(self, tensor: Tensor) -> int:
        """As Backend's."""
        return self._side(tensor).prepared_bytes(tensor)

    def memory(self, config: Config, tensors: dict[str, Tensor], *how, **more) -> dict[str, int]:
        """As Backend's; the weights on the GPU have a figure of their own."""
        needed = super().memory(config, tensors, *how, **more)
        gpu = sum(self.prepared_bytes(t) for t in tensors.values() if self._side(t) is self._gpu)
        return needed | {"weights": needed["weights"] - gpu, "gpu_weights": gpu}

    def require_load(self, path: Path, needed: dict[str, int], mapped: bool) -> None:
        """As Backend's; each side has its memory, but on a Mac, where both share it."""
        layers = f"{path}: {self._n} layers on the GPU"
        require_memory(needed["gpu_weights"], layers, self._gpu.free_memory())
        super().require_load(path, needed if ON_METAL else needed | {"gpu_weights": 0}, mapped)

    @property
    def title(self) -> str:
        """As Backend's."""
        return f"{self._gpu.title}, with the first {self._n} layers; else {self._c.title}"
