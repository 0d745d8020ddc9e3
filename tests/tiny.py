"""Models with random weights, small enough to be made anew in every test."""

from collections.abc import Callable

import numpy as np

from tinyllama.config import Config
from tinyllama.model import tap_shapes
from tinyllama.tensor import Tensor

CONFIG = Config(dim=64, n_layers=2, n_heads=4, vocab_size=96, hidden_dim=160, n_kv_heads=2, multiple_of=32)


def tensors(config: Config = CONFIG, type: str = "f32", seed: int = 0) -> dict[str, Tensor]:
    """Weights of a scale at which every step of the model matters; norms near 1."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in config.tensor_shapes().items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        array = 1 + noise / 10 if len(shape) == 1 else noise * 2 / np.float32(shape[-1] ** 0.5)
        made[name] = Tensor.from_array(name, array, "f32" if len(shape) == 1 else type)
    return made


def all_taps(tap: Callable, config: Config = CONFIG) -> dict[str, Callable]:
    """Taps of every value, each of which calls tap(name, array)."""
    return {name: lambda array, name=name: tap(name, array) for name in tap_shapes(config, 1)}
