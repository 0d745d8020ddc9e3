"""The same prompt through two backends, step by step: is a kernel right, and how much faster is it?

The forward pass runs once, on a table whose every operation is done by both backends **on the same
inputs**; the first one's result goes on. So an error is that of its step alone and doesn't pile up, and
the step whose error leaves its limit is the step that is wrong. Afterwards the second backend runs by
itself, which tells whether the small errors together change the next token.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import OPERATIONS, Backend, get_backend, one_blas_thread
from ..machine.download import find
from ..errors import TinyllamaError
from ..formats import open_checkpoint
from ..memory import memory_needed, stays_in_file
from ..model import build, forward
from ..machine.limits import require_memory
from ..tokenizer import make_tokenizer

#: Mean squared error of a step, as a fraction of its mean square, that is explained by how it computes:
#: float32 sums in another order; keys and values in half precision, or products in bf16; activations as int8
#: with a scale for 32 (3e-5 for normally distributed ones, more where outliers coarsen their block).
FLOAT_LIMIT, HALF_LIMIT, INT8_LIMIT = 1e-9, 1e-5, 5e-4

#: What each operation of a layer computes, in the order of `model.forward`: the names of its taps.
LAYER_STEPS = (
    ("attention.norm",),
    ("attention.q", "attention.k", "attention.v"),
    ("attention.q_rope",),
    ("attention.k_rope",),
    ("attention.heads",),
    ("attention.output",),
    ("feed_forward.norm",),
    ("feed_forward.gate", "feed_forward.up"),
    ("feed_forward.hidden",),
    ("feed_forward.output",),
)


@dataclass
class Step:
    """One value of the forward pass, computed twice from the same inputs.

    Attributes:
        name: as a tap has it, "layers.3.attention.q".
        mean_error: mean squared difference, as a fraction of the first one's mean square.
        largest_error: largest difference, as a fraction of the first one's root mean square.
        limit: what mean_error may be.
        milliseconds: of the first and second backend; values of one call share its time.
    """

    name: str
    mean_error: float
    largest_error: float
    limit: float
    milliseconds: tuple[float, float]

    @property
    def is_within(self) -> bool:
        return self.mean_error <= self.limit


@dataclass
class Comparison:
    """Two backends on one prompt.

    Attributes:
        backends: their names.
        steps: in the order of the forward pass.
        next_tokens: what each thinks most likely after the prompt: (piece, probability).
        kl: Kullback-Leibler divergence of their expectations after each token, mean, in nats.
    """

    backends: tuple[str, str]
    steps: list[Step]
    next_tokens: tuple[tuple[str, float], tuple[str, float]]
    kl: float

    @property
    def first_wrong(self) -> Step | None:
        """The first step that leaves its limit, None if all are right."""
        return next((step for step in self.steps if not step.is_within), None)

    @property
    def agree(self) -> bool:
        return self.next_tokens[0][0] == self.next_tokens[1][0]


def compare_backends(
    model: str | Path = "small",
    prompt: str = "Once upon a time",
    backends: tuple[str, str] = ("numpy", "c"),
    threads: int | None = None,
) -> Comparison:
    """Run a prompt through two backends in step.

    Raises TinyllamaError where there is no such model or backend.
    """
    checkpoint = open_checkpoint(find(model))
    tokenizer, config = make_tokenizer(checkpoint.vocabulary), checkpoint.config
    tables = [get_backend(name, threads) for name in backends]
    steps = _Steps(config.n_layers)
    both = _in_step(*tables, steps)
    copies = [not stays_in_file(checkpoint, table.name) for table in tables]
    tokens = tokenizer.encode(prompt, special=True)
    for table, copy in zip(tables, copies, strict=True):
        needed = memory_needed(checkpoint, table.name, len(tokens), len(tokens))
        require_memory(sum(needed.values()) - (not copy) * needed["weights"], f"{model} with this prompt")
    loaded = build(config, checkpoint.tensors, partial(both.prepare, copies=copies))
    with one_blas_thread():
        first = forward(loaded, both, tokens, 0, both.new_cache(config, len(tokens)))
        alone = _only_second(tables[1])
        second = forward(loaded, alone, tokens, 0, alone.new_cache(config, len(tokens)))
    for table, logits in zip(tables, (first, second), strict=True):
        if not np.isfinite(logits).all():
            raise TinyllamaError(f"{checkpoint.path}: backend {table.name} computes NaN or infinity from it")
    logs = [_log_softmax(logits) for logits in (first, second)]
    kl = float(np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)))
    best = [(tokenizer.piece(int(log[-1].argmax())), float(np.exp(log[-1].max()))) for log in logs]
    return Comparison((tables[0].name, tables[1].name), steps.done, (best[0], best[1]), kl)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """[n_tokens, vocab_size] in float64: divergences are differences of nearly equal numbers."""
    logits = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# --- a table of two ---------------------------------------------------------------------------------


@dataclass
class _Pair:
    """A weight or cache as each backend wants it."""

    first: Any
    second: Any

    @property
    def shape(self):
        return self.first.shape


def _take(arguments: tuple, side: str) -> list:
    return [getattr(argument, side) if isinstance(argument, _Pair) else argument for argument in arguments]


def _in_step(first: Backend, second: Backend, steps: "_Steps") -> Backend:
    """A backend each of whose operations runs on both and goes on with the first one's result."""

    def paired(name: str):
        one, other = getattr(first, name), getattr(second, name)

        def run(*arguments):
            started = time.perf_counter()
            result = one(*_take(arguments, "first"))
            between = time.perf_counter()
            again = other(*_take(arguments, "second"))
            seconds = between - started, time.perf_counter() - between
            steps.record(name, arguments, _as_list(result), _as_list(again), seconds)
            return result

        return run

    return replace(
        first,
        prepare=lambda tensor, copies: _Pair(
            first.prepare(tensor, copies[0]), second.prepare(tensor, copies[1])
        ),
        new_cache=lambda *a: _Pair(first.new_cache(*a), second.new_cache(*a)),
        **{name: paired(name) for name in OPERATIONS},
    )


def _only_second(table: Backend) -> Backend:
    """The second backend by itself, on the weights of the pair."""

    def unpaired(operation):
        return lambda *arguments: operation(*_take(arguments, "second"))

    return replace(table, **{name: unpaired(getattr(table, name)) for name in OPERATIONS})


def _as_list(result) -> list[np.ndarray]:
    return result if isinstance(result, list) else [result]


class _Steps:
    """Names the results of the operations as they come."""

    def __init__(self, n_layers: int):
        self.done: list[Step] = []
        layers = [
            tuple(f"layers.{i}.{name}" for name in names) for i in range(n_layers) for names in LAYER_STEPS
        ]
        self._names = iter([("embedding",), *layers, ("norm",), ("logits",)])

    def record(self, operation: str, arguments: tuple, results: list, again: list, seconds) -> None:
        milliseconds = tuple(1000 * s / len(results) for s in seconds)
        for name, expected, got in zip(next(self._names), results, again, strict=True):
            square = float(np.mean(expected.astype(np.float64) ** 2)) or 1.0
            difference = np.abs(got.astype(np.float64) - expected)
            mean, largest = float(np.mean(difference**2)) / square, float(difference.max()) / square**0.5
            self.done.append(Step(name, mean, largest, _limit(operation, arguments), milliseconds))


def _limit(operation: str, arguments: tuple) -> float:
    if operation == "attention":
        return HALF_LIMIT
    if operation != "matmul":
        return FLOAT_LIMIT
    types = [_take((weight,), side)[0].type for weight in arguments[1:] for side in ("first", "second")]
    if any(type.startswith("q") for type in types):
        return INT8_LIMIT
    return HALF_LIMIT if _multiplies_bf16() else FLOAT_LIMIT


def _multiplies_bf16() -> bool:
    """Whether the C backend takes weights and activations of a prompt as bf16, whatever their type."""
    native = sys.modules.get("tinyllama._native")
    return native is not None and native.level() == "amx"


# --- showing it -------------------------------------------------------------------------------------


def table(comparison: Comparison) -> str:
    """One line for each kind of step: its worst layer, and its time in all layers together."""
    first, second = comparison.backends
    head = ("step", "mean error", "largest", "limit", "where", f"{first} ms", f"{second} ms", "faster")
    rows = [head, *_rows(comparison)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([line.rstrip() for line in lines] + ["", *_verdict(comparison)])


def _rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    kinds: dict[str, list[Step]] = {}
    for step in comparison.steps:
        kinds.setdefault(_kind(step.name), []).append(step)
    for kind, steps in kinds.items():
        worst = max(steps, key=lambda step: step.mean_error / step.limit)
        first, second = (sum(step.milliseconds[i] for step in steps) for i in (0, 1))
        where = worst.name.split(".")[1] if worst.name.startswith("layers.") else ""
        yield (
            kind,
            f"{worst.mean_error:.1e}",
            f"{worst.largest_error:.1e}",
            f"{worst.limit:.0e}" + ("" if worst.is_within else " !"),
            where and f"layer {where}",
            f"{first:.1f}",
            f"{second:.1f}",
            f"{first / second:.1f} x",
        )


def _kind(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _verdict(comparison: Comparison) -> Iterator[str]:
    wrong = comparison.first_wrong
    yield f"First step outside its limit: {wrong.name}." if wrong else "Every step stays within its limit."
    (one, p), (two, q) = comparison.next_tokens
    agree = "Both expect" if comparison.agree else "They disagree:"
    yield (
        f"{agree} {one!r} ({p:.1%})"
        + (f" and {q:.1%}" if comparison.agree else f" and {two!r} ({q:.1%})")
        + "."
    )
    yield f"Divergence of what they expect after a token: {comparison.kl:.1e} nats on average."


def as_json(comparison: Comparison) -> dict:
    """All of it as plain dicts and lists, every step of every layer included."""
    wrong = comparison.first_wrong
    return asdict(comparison) | {"first_wrong": wrong and wrong.name, "agree": comparison.agree}


def plot(comparison: Comparison, path: str | Path) -> None:
    """Save a picture: each kind of step's error over the layers."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    kinds: dict[str, list[float]] = {}
    for step in comparison.steps:
        if step.name.startswith("layers."):
            kinds.setdefault(_kind(step.name), []).append(max(step.mean_error, 1e-18))
    for number, (kind, errors) in enumerate(kinds.items()):
        axes.plot(errors, marker="os^vDPX*"[number % 8], label=kind)
    axes.set(yscale="log", xlabel="layer", ylabel="mean squared error / mean square")
    axes.set_title(f"{comparison.backends[1]} against {comparison.backends[0]}, each step on the same inputs")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.legend(fontsize="small", loc="outside right upper")
    axes.figure.savefig(path)
