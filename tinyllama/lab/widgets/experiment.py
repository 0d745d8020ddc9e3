"""What if? A model with something changed inside, another prompt or another model, beside the one as it is.

A `Side` is all that it takes to get an answer: prompt, model, and changes. `run` gets it; `likeliest` and
`differences` hold two of them against each other; `code` says it in Python.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial, reduce

import numpy as np

from ...config import Config
from ...errors import require
from ...llama import Llama, load
from ...ops import softmax
from ...taps.interventions import Edit, ablate, patch, scale
from ...texts.completion import Completion
from ...tokenizer import Tokenizer

#: Changes nothing, but attention runs step by step in NumPy, as in a trace: then what differs between two
#: sides, or from the stepper's own numbers, is what was changed, and not how kernels round.
STEP_BY_STEP = "layers.*.attention.weights", 1.0  # as `scale` takes it

#: Values that have heads; the others are all of a layer's at once.
WITH_HEADS = ("q", "k", "v", "q_rope", "k_rope", "scores", "weights", "heads")


@dataclass(frozen=True)
class Change:
    """A value inside a model, or a part of it, that is replaced while the model runs.

    By `value`, unless `times` or `prompt` is given.
    """

    at: str  # a name or pattern, as `Llama.edit` takes it
    heads: Sequence[int] | None = None
    dims: Sequence[int] | None = None  # numbers along the last axis
    positions: Sequence[int] | None = None  # of tokens in their text; None: of all
    value: float | str = 0.0  # what takes its place: a number, or "mean"
    times: float | None = None  # or what it is multiplied by
    prompt: str | None = None  # or the prompt whose value takes its place; tokens are counted from the end

    def keywords(self) -> dict:
        """`change(**keywords)` makes it again; only what isn't as usual."""
        usual = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    def edit(self, llama: Llama, n_tokens: int) -> Edit:
        """As `Llama.edit` takes it, for a prompt of n_tokens."""
        beyond = [one for one in self.positions or [] if one >= n_tokens]
        require(not beyond, f"this prompt has {count(n_tokens)}: there is no token {max(beyond, default=0)}")
        if self.prompt is not None:
            taps = llama.trace(self.prompt, self.at)
            return patch(taps, positions=self._pairs(n_tokens, len(llama.tokens(self.prompt))))
        part = {"heads": self.heads, "dims": self.dims, "positions": self.positions}
        if self.times is not None:
            return scale(self.at, self.times, **part)
        return ablate(self.at, **part, value=self.value)

    def code(self, llama: Llama, n_tokens: int) -> str:
        """The call that makes this edit."""
        if self.prompt is not None:
            pairs = self._pairs(n_tokens, len(llama.tokens(self.prompt)))
            return _call("tinyllama.patch", f"llama.trace({self.prompt!r}, {self.at!r})", positions=pairs)
        part = {"heads": self.heads, "dims": self.dims, "positions": self.positions}
        if self.times is not None:
            return _call("tinyllama.scale", repr(self.at), repr(self.times), **part)
        return _call("tinyllama.ablate", repr(self.at), **part, value=self.value or None)

    def _pairs(self, n_here: int, n_there: int) -> Sequence[int] | dict[int, int] | None:
        """Which token takes its value from which of the other prompt: the one as far from the end."""
        if n_here == n_there:
            return self.positions
        wanted = range(max(0, n_here - n_there), n_here) if self.positions is None else self.positions
        pairs = {here: here - n_here + n_there for here in wanted}
        none = "none is as far from its end as the one to be patched"
        require(min(pairs.values()) >= 0, f"the second prompt has {count(n_there)}: {none}")
        return pairs

    def words(self, llama: Llama, n_tokens: int) -> str:
        """What is done to a prompt of n_tokens, with the tokens that are patched if not all of them are."""
        n_there = n_tokens if self.prompt is None else len(llama.tokens(self.prompt))
        if n_there == n_tokens:
            return str(self)
        pairs = self._pairs(n_tokens, n_there)
        return f"{self}: {_span(pairs)} from its {_span(pairs.values())}"

    @property
    def part(self) -> str:
        """What is replaced, in words."""
        parts = {"head": self.heads, "dim": self.dims, "token": self.positions}
        named = [f"{name} {', '.join(map(str, numbers))}" for name, numbers in parts.items() if numbers]
        return ", ".join([self.at, *named])

    def __str__(self) -> str:
        if self.prompt is not None:
            return f"{self.part} as after “{self.prompt}”"
        if self.times is not None:
            return f"{self.part} × {self.times:g}"
        return f"{self.part} = {self.value if isinstance(self.value, str) else f'{self.value:g}'}"


def change(keywords: dict) -> Change:
    """A `Change` that somebody has written down."""
    names = [field.name for field in fields(Change)]
    fits = isinstance(keywords, dict) and "at" in keywords and set(keywords) <= set(names)
    require(fits, f"a change is a dict with at, and some of {', '.join(names[1:])}, not {keywords!r:.80}")
    return Change(**keywords)


def count(n_tokens: int) -> str:
    """In words."""
    return f"{n_tokens} token{'s' * (n_tokens != 1)}"


def _span(numbers) -> str:
    first, last = min(numbers), max(numbers)
    return f"token {first}" if first == last else f"tokens {first} to {last}"


def _call(function: str, *arguments: str, **keywords) -> str:
    named = [f"{name}={value!r}" for name, value in keywords.items() if value is not None]
    return f"{function}({', '.join([*arguments, *named])})"


@dataclass(frozen=True)
class Here:
    """Where one stands in a model, and what can be changed there."""

    prompt: str | list[int]
    model: str
    backend: str
    config: Config
    name: str  # of the value that is looked at
    layer: int  # that is looked at, or was the last time
    head: int
    position: int

    def head_off(self) -> Change:
        """The head finds nothing, for any token."""
        return Change(f"layers.{self.layer}.attention.heads", heads=[self.head])

    def part_off(self, part: str) -> Change:
        """All that a layer's "attention" or "feed_forward" adds is nothing."""
        return Change(f"layers.{self.layer}.{part}.output")

    def change(self, everywhere: bool, dim: int | None = None, **how) -> Change:
        """Of the value that is looked at: the head and the token, or all tokens; `how` as of Change."""
        kind, config, heads = self.name.rpartition(".")[2], self.config, None
        if kind in WITH_HEADS and "prompt" not in how:
            has = config.n_kv_heads if kind in ("k", "v", "k_rope") else config.n_heads
            heads = [self.head * has // config.n_heads]
        dims = None if dim is None else [dim]
        return Change(self.name, heads, dims, None if everywhere else [self.position], **how)


@dataclass(frozen=True)
class Side:
    """All that it takes to get an answer."""

    prompt: str | list[int]
    model: str = "small"
    backend: str = "auto"
    changes: tuple[Change, ...] = ()
    n_predict: int = 16


@dataclass(frozen=True)
class Outcome:
    """What came of a side."""

    side: Side
    tokenizer: Tokenizer
    pieces: list[str]  # the prompt's tokens
    text: Completion  # always the likeliest token
    logits: np.ndarray  # of what follows the prompt, [vocab_size]
    residuals: np.ndarray  # [n_layers, n_tokens, dim]
    changes: list[str]  # what was changed, in words
    code: str  # the lines of Python that write this text

    @property
    def probs(self) -> np.ndarray:
        """[vocab_size]"""
        return softmax(self.logits)


def run(side: Side, load: Callable[[str, str], Llama] = load) -> Outcome:
    """Run a prompt through a model with its changes, and let it go on with the likeliest tokens.

    Raises TinyllamaError where a change names what isn't there, or isn't possible.
    """
    llama = load(side.model, side.backend)
    ids = llama.tokens(side.prompt)
    with llama.edit(edit(side.changes, llama, len(ids))):
        residuals, logits = _read(llama, ids)
        text = llama.generate(side.prompt, n_predict=side.n_predict, temp=0)
    pieces = [llama.tokenizer.piece(token) for token in ids]
    changes = [one.words(llama, len(ids)) for one in side.changes]
    return Outcome(side, llama.tokenizer, pieces, text, logits, residuals, changes, code(side, llama))


def _read(llama: Llama, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A prompt's residual streams [n_layers, n_tokens, dim], and logits of what follows [vocab_size]."""
    residuals = np.empty((llama.config.n_layers, len(ids), llama.config.dim), np.float32)

    def keep(layer: int, residual: np.ndarray) -> None:
        residuals[layer] = residual

    taps = {f"layers.{layer}.residual": partial(keep, layer) for layer in range(len(residuals))}
    cache = llama.new_cache(len(ids), at_once=len(ids), n_bytes=residuals.nbytes, tapped=True)
    return residuals, llama.forward(ids, cache, last=True, taps=taps)[0]


def edit(changes: Sequence[Change], llama: Llama, n_tokens: int) -> Edit:
    """All changes to a prompt of n_tokens, in their order, as `Llama.edit` takes them."""
    return reduce(operator.or_, (one.edit(llama, n_tokens) for one in changes), scale(*STEP_BY_STEP))


def code(side: Side, llama: Llama) -> str:
    """The lines of Python that give a side's text, as `text`."""
    n_tokens = len(llama.tokens(side.prompt))
    lines = [
        "import tinyllama",
        f"llama = tinyllama.load({side.model!r}, {side.backend!r})",
        "# The first edit changes nothing: with it, attention runs step by step, as in the stepper.",
        f"edit = {_call('tinyllama.scale', *map(repr, STEP_BY_STEP))}",
        *(f"edit |= {one.code(llama, n_tokens)}" for one in side.changes),
        "with llama.edit(edit):",
        f"    text = llama.generate({side.prompt!r}, n_predict={side.n_predict}, temp=0)",
    ]
    return "\n".join(lines)


# --- two of them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A token that could follow, on both sides; None where a model doesn't have it."""

    piece: str
    probs: tuple[float | None, float | None]
    change: float | None  # of its logit, from the left side to the right one; None of another vocabulary


def likeliest(left: Outcome, right: Outcome, n: int = 10) -> list[Row]:
    """The n tokens that are likeliest on either side, the left side's likeliest first."""
    sides = left, right
    best = [np.argsort(-side.logits, kind="stable")[:n].tolist() for side in sides]
    pieces = dict.fromkeys(
        side.tokenizer.piece(token) for side, ids in zip(sides, best, strict=True) for token in ids
    )
    found = [_by_piece(side, pieces) for side in sides]
    is_one_scale = len(left.logits) == len(right.logits)
    rows = [_row(piece, *(some.get(piece) for some in found), is_one_scale) for piece in pieces]
    rows = sorted(rows, key=lambda row: -max(prob or 0 for prob in row.probs))[:n]
    return sorted(rows, key=lambda row: -(row.probs[0] or 0))


def _by_piece(side: Outcome, pieces) -> dict[str, tuple[float, float]]:
    """(probability, logit) of tokens by their text, of those that a model has."""
    probs, found = side.probs, {}
    for token in np.argsort(-side.logits, kind="stable").tolist():
        piece = side.tokenizer.piece(token)
        if piece in pieces and piece not in found:
            found[piece] = float(probs[token]), float(side.logits[token])
            if len(found) == len(pieces):
                break
    return found


def _row(piece: str, left: tuple | None, right: tuple | None, is_one_scale: bool) -> Row:
    change = right[1] - left[1] if left and right and is_one_scale else None
    return Row(piece, (left and left[0], right and right[0]), change)


def differences(left: Outcome, right: Outcome) -> np.ndarray | None:
    """How far apart the residual streams are: |left - right| / |left|, [n_layers, n_aligned].

    Tokens are held against each other from the end on. None where models have other layers or widths.
    """
    a, b = left.residuals, right.residuals
    if (len(a), a.shape[-1]) != (len(b), b.shape[-1]):
        return None
    n = min(a.shape[1], b.shape[1])
    a, b = a[:, -n:], b[:, -n:]
    return np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(a, axis=-1), 1e-12)
