"""The same prompt through two backends, step by step: is a kernel right, and how much faster is it?

The forward pass runs once, on a backend whose every operation is done by both **on the same inputs**; the
first one's result goes on. So an error is that of its step alone and doesn't pile up, and the step whose
error leaves its limit is the step that is wrong. Afterwards the second backend runs by itself, which tells
whether the small errors together change the next token.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

from ..backends import OPERATIONS, Backend, get_backend
from ..config import Config
from ..errors import require
from ..formats import open_checkpoint
from ..machine.places import default_model
from ..model import Model, build, forward, tap_shapes
from ..ops import KVCache
from ..texts.perplexity import log_softmax
from ..tokenizer import make_tokenizer
from .outputs import save_picture
from .printing import columns


@dataclass
class Step:
    """One value of the forward pass, computed twice from the same inputs."""

    name: str  # as a tap has it, "layers.3.attention.q"
    mean_error: float  # mean squared difference, as a fraction of the first one's mean square
    largest_error: float  # largest difference, as a fraction of the first one's root mean square
    limit: float  # what mean_error may be
    milliseconds: tuple[float, float]  # of the first and second backend; values of one call share its time


@dataclass
class Comparison:
    """Two backends on one prompt."""

    backends: tuple[str, str]  # their names
    steps: list[Step]  # in the order of the forward pass
    next_tokens: tuple[tuple[str, float], tuple[str, float]]  # each one's likeliest: (piece, probability)
    kl: float  # Kullback-Leibler divergence of their expectations after each token, mean, in nats
    first_wrong: str | None = field(init=False)  # the first step that leaves its limit
    agree: bool = field(init=False)  # on the likeliest token

    def __post_init__(self):
        self.first_wrong = next((step.name for step in self.steps if step.mean_error > step.limit), None)
        self.agree = self.next_tokens[0][0] == self.next_tokens[1][0]

    def kinds(self) -> dict[str, list[Step]]:
        """The steps of all layers by their names in each, "attention.q"."""
        found: dict[str, list[Step]] = {}
        for step in self.steps:
            found.setdefault(re.sub(r"^layers\.\d+\.", "", step.name), []).append(step)
        return found


def compare_backends(
    model: str | Path | None = None, prompt="Once upon a time", backends=("numpy", "c"), threads=None
) -> Comparison:
    """Run a prompt through two backends in step; model and threads as `load` takes them.

    Raises TinyllamaError where there is no such model or backend, or not the memory for both.
    """
    model = default_model() if model is None else model
    sides, checkpoint = [get_backend(name, threads) for name in backends], open_checkpoint(model)
    config, tensors, path = checkpoint.config, checkpoint.tensors, checkpoint.path
    tokenizer = make_tokenizer(checkpoint.vocabulary, path)
    tokens, models, logs = tokenizer.encode(prompt, special=True), [], []
    with sides[0].running():
        for side in sides:
            mapped = side.keeps_in_file(tensors)
            needed = side.memory(config, tensors, len(tokens), len(tokens))
            side.require_load(Path(f"{model} with this prompt"), needed, mapped)
            models.append(build(config, tensors, partial(side.prepare, copy=not mapped)))
        both = InStep(sides, models)
        for side, ops, weights in zip(sides, (both, sides[1]), models, strict=True):
            logits = forward(weights, ops, tokens, ops.new_cache(config, len(tokens)))
            require(np.isfinite(logits).all(), f"{path}: backend {side.name} computes NaN or infinity")
            logs.append(log_softmax(logits))
    kl = float(np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)))
    best = [(tokenizer.piece(int(log[-1].argmax())), float(np.exp(log[-1].max()))) for log in logs]
    return Comparison((sides[0].name, sides[1].name), both.steps, tuple(best), kl)


class InStep(Backend):
    """Each operation runs on two backends, on the same inputs, and gives the first one's result.

    It is handed the first one's weights and cache, and knows the second one's by them. What comes of it is
    appended to `steps`.
    """

    def __init__(self, sides: list[Backend], models: list[Model]):
        super().__init__(sides[0].threads)
        self.steps: list[Step] = []
        self._sides, self._names = sides, cycle(_step_names(models[0].config))
        one, other = models
        pairs = [(getattr(one, name), getattr(other, name)) for name in ("tok_embeddings", "norm", "output")]
        for ours, theirs in zip(one.layers, other.layers, strict=True):
            pairs += zip(ours.values(), theirs.values(), strict=True)
        self._twins = {id(ours): theirs for ours, theirs in pairs}
        self.array, self.to_numpy, self.concatenate = sides[0].array, sides[0].to_numpy, sides[0].concatenate
        self._freqs = [None, None]  # RoPE's, of each
        for operation in OPERATIONS:
            setattr(self, operation, partial(self._run, operation))

    def new_cache(self, config: Config, n_ctx: int) -> KVCache:
        ours, theirs = (side.new_cache(config, n_ctx) for side in self._sides)
        theirs.ids = ours.ids
        self._twins[id(ours)] = theirs
        return ours

    def rope_freqs(self, *what):
        self._freqs = [side.rope_freqs(*what) for side in self._sides]
        return self._freqs[0]

    def _for_other(self, argument):
        """What the second backend takes in an argument's place."""
        if argument is self._freqs[0] is not None:
            return self._freqs[1]
        if id(argument) in self._twins or getattr(argument, "ndim", 0) < 2:
            return self._twins.get(id(argument), argument)
        return self._sides[1].array(self.to_numpy(argument))

    def _run(self, operation: str, *ours):
        both, seconds, limits, found = (ours, [*map(self._for_other, ours)]), [], [], []
        for side, arguments in zip(self._sides, both, strict=True):
            started = time.perf_counter()
            result = getattr(side, operation)(*arguments)
            arrays = [side.to_numpy(array) for array in (result if isinstance(result, list) else [result])]
            seconds.append(time.perf_counter() - started)
            limits.append(side.tolerance(operation, [a.type for a in arguments if hasattr(a, "type")]))
            found.append((result, arrays))
        (goes_on, expected), (_, got) = found
        milliseconds = (1000 * seconds[0] / len(got), 1000 * seconds[1] / len(got))
        for x, y in zip(expected, got, strict=True):
            square = float(np.mean(x.astype(np.float64) ** 2)) or 1.0
            difference = np.abs(y.astype(np.float64) - x)
            mean, largest = float(np.mean(difference**2)) / square, float(difference.max()) / square**0.5
            self.steps.append(Step(next(self._names), mean, largest, max(limits), milliseconds))
        return goes_on


def _step_names(config: Config) -> Iterator[str]:
    """What operations compute, in the order of `model.forward`: the names of its taps."""
    for name in tap_shapes(config, 1):
        if name.endswith("q_rope") and "attention.q_norm" in config.layer_shapes():
            yield from (name.replace("q_rope", norm) for norm in ("q_norm", "k_norm"))
        if not name.endswith(
            ("scores", "weights", "residual", "residual_mid")
        ):  # inside attention, or no operation's result
            yield name


def table(comparison: Comparison) -> str:
    """One line for each kind of step: its worst layer, and its time in all layers together."""
    times = (f"{name} ms" for name in comparison.backends)
    rows = [("step", "mean error", "largest", "limit", "layer", *times, "faster")]
    for kind, steps in comparison.kinds().items():
        worst = max(steps, key=lambda step: step.mean_error / step.limit)
        where = worst.name.split(".")[1] if worst.name != kind else ""
        errors = f"{worst.mean_error:.1e}", f"{worst.largest_error:.1e}"
        limit = f"{worst.limit:.0e}" + " !" * (worst.mean_error > worst.limit)
        ours, theirs = (sum(step.milliseconds[i] for step in steps) for i in (0, 1))
        rows.append((kind, *errors, limit, where, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.1f} x"))
    wrong = comparison.first_wrong
    verdict = f"First step outside its limit: {wrong}." if wrong else "Every step stays within its limit."
    (one, p), (two, q) = comparison.next_tokens
    ours, theirs = comparison.backends
    expect = f"Both expect {one!r} next, {ours} with {p:.1%} and {theirs} with {q:.1%}."
    if not comparison.agree:
        expect = f"They disagree on the next token: {ours} {one!r} ({p:.1%}), {theirs} {two!r} ({q:.1%})."
    kl = f"Divergence of what they expect after a token: {comparison.kl:.1e} nats on average."
    return "\n".join([*columns(rows, "<" * 8, indent=""), "", verdict, expect, kl])


def plot(comparison: Comparison, path: str | Path) -> None:
    """Save a picture: each kind of step's error over the layers."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    layers = {kind: steps for kind, steps in comparison.kinds().items() if steps[0].name != kind}
    for number, (kind, steps) in enumerate(layers.items()):
        errors = [max(step.mean_error, 1e-18) for step in steps]
        axes.plot(errors, marker="os^vDPX*"[number % 8], label=kind)
    title = f"{comparison.backends[1]} against {comparison.backends[0]}, each step on the same inputs"
    axes.set(yscale="log", xlabel="layer", ylabel="mean squared error / mean square", title=title)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.legend(fontsize="small", loc="outside right upper")
    save_picture(axes.figure, path)
