"""Where the values inside two models differ: the error of each step of each layer, on the same tokens.

Each model goes on from its own values, so errors add up from layer to layer, as they do when the model runs.
(commands/compare.py feeds both the same inputs: there an error is that of its step alone.)

The first token of a window isn't counted: in many models it gets values a hundred times as large as all
others, of which a difference would say nothing about those.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..config import Config
from ..model import tap_shapes
from ..ops import INNER, KVCache
from ..taps.names import INPUTS

AT_ONCE = 32  # tokens whose values are in memory: of all layers
SAMPLE = 128  # tokens of which the inputs of weights are kept

#: What the error of a step may be: its mean squared difference as a fraction of the mean square.
LIMITS = {
    "rounding": (
        1e-3,
        "the same weights in 16 or 32 bits, or two backends: rounding adds up to less",
    ),
    "8-bit": (1e-2, "weights of 8 bits: they cost less than a tenth of a value's size"),
    "4-bit": (0.25, "weights of fewer bits: values are half as wrong as they are large"),
}


@dataclass(frozen=True)
class Step:
    """One value of the forward pass in two models."""

    name: str  # as a tap has it, "layers.3.attention.q"
    error: float  # mean squared difference, as a fraction of the first model's mean square
    largest: float  # largest difference, as a fraction of the first model's root mean square
    rms: float  # the first model's root mean square

    @property
    def layer(self) -> int | None:
        """The layer that it is in, if it is in one."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def kind(self) -> str:
        """Its name in every layer, "attention.q"."""
        return re.sub(r"^layers\.\d+\.", "", self.name)


class Sums:
    """What is added up of one step, token by token."""

    def __init__(self):
        self.squares = self.differences = self.largest = 0.0
        self.n = 0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Values of the first and second model, of any shape; minus infinity, of scores, doesn't count.

        One of them may attend to a window of tokens, and the other to all.
        """
        finite = np.isfinite(ours) & np.isfinite(theirs)
        ours, theirs = ours[finite].astype(np.float64), theirs[finite].astype(np.float64)
        difference = np.abs(ours - theirs)
        self.n += ours.size
        self.squares += float(np.sum(ours**2))
        self.differences += float(np.sum(difference**2))
        self.largest = max(self.largest, float(difference.max(initial=0)))

    def step(self, name: str) -> Step:
        """What they come to."""
        rms = (self.squares / max(self.n, 1)) ** 0.5
        scale = self.squares or 1.0
        return Step(name, self.differences / scale, self.largest / (rms or 1.0), rms)


def is_comparable(a: Config, b: Config) -> bool:
    """Whether two models compute values of the same shapes under the same names."""
    return tap_shapes(a, 1) == tap_shapes(b, 1)


def batches(n_tokens: int) -> range:
    """Where the batches of `run_steps` begin."""
    return range(0, n_tokens, AT_ONCE)


def step_caches(a, b, n_tokens: int) -> list[KVCache]:
    """What both models need to run so many tokens; raises TinyllamaError where there isn't the memory."""
    shapes = tap_shapes(a.config, n_tokens)
    kept = 4 * sum(map(math.prod, shapes.values())) * AT_ONCE // n_tokens  # bytes, of one model
    computed = {"at_once": AT_ONCE, "n_logits": AT_ONCE, "n_bytes": kept, "tapped": True}
    return [llama.new_cache(n_tokens, **computed) for llama in (a, b)]


def run_steps(a, b, tokens: np.ndarray, starts: Iterable[int]) -> tuple[list[Step], dict[str, np.ndarray]]:
    """Run the same tokens through two models, and compare all that they compute on the way.

    Args:
        a, b: `Llama`s with the same values, see `is_comparable`.
        tokens: of one text, [n_tokens].
        starts: `batches`, wrapped in a bar.
    Returns:
        the steps in the order of the forward pass, and values of the first model that go into weights, "norm"
        and those in INPUTS of each layer: [n_inputs, n_in], of at most SAMPLE tokens.
    """
    shapes, caches = tap_shapes(a.config, len(tokens)), step_caches(a, b, len(tokens))
    sums, inputs, wanted = {name: Sums() for name in shapes}, {}, set(_inputs(a.config.n_layers))
    for start in starts:
        ours, some, skipped = {}, tokens[start : start + AT_ONCE], 0 if start else 1

        def keep(name, array, ours=ours, start=start, skipped=skipped):
            ours[name] = array.copy()
            if name in wanted and start < SAMPLE:
                inputs.setdefault(name, []).append(ours[name][skipped:])

        def compare(name, array, ours=ours, skipped=skipped):
            rows = np.s_[:, skipped:] if name.endswith(INNER) else np.s_[skipped:]
            sums[name].add(ours.pop(name)[rows], array[rows])

        for llama, cache, tap in zip((a, b), caches, (keep, compare), strict=True):
            llama.forward(some, cache, taps={name: partial(tap, name) for name in shapes})
    steps = [sums[name].step(name) for name in shapes]
    return steps, {name: np.concatenate(found)[:SAMPLE] for name, found in inputs.items()}


def _inputs(n_layers: int) -> Iterator[str]:
    """The values of all layers that weights are multiplied with."""
    for layer in range(n_layers):
        yield from (f"layers.{layer}.{name}" for name in INPUTS.values())
    yield "norm"
