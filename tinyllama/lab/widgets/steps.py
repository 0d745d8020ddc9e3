"""What the stepper knows: every value on a prompt's way through a model, and where one stands among them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...errors import require
from ...llama import Llama
from ...ops import softmax
from ...texts.doubts import require_finite
from . import heads
from .kinds import KINDS
from .lens import Lens

MOST_COLUMNS = 256  # of a heat-map: a cell of a pixel or two can still be seen
LIKELIEST = 10  # tokens that could follow


@dataclass(frozen=True)
class Map:
    """Numbers as a heat-map; the rows are the tokens."""

    values: np.ndarray  # float32 [n_rows, n_columns], NaN where there is no number
    axis: str  # the columns' name; "" where they are the tokens, too
    per_cell: int  # numbers along a row that a cell stands for; the one farthest from 0 is shown
    is_share: bool  # whether they are shares from 0 to 1


@dataclass(frozen=True)
class Next:
    """A token that could follow."""

    id: int
    piece: str
    logit: float
    prob: float


class Walk:
    """A prompt that has been through a model.

    Attributes:
        tokens, pieces: the prompt's ids, and as text.
        text: the prompt as one would type it; `is_text` says whether that gives the same ids.
        names: every step, in the order in which it is computed: "layers.0.attention.q".
        at: the index of the step one stands at.
        head, position: which head and which token are looked at.
        looks_at: the token that `looks` asks about: which head looks from `position` there? None: anywhere.
        lens: what the model would say after every layer and token.
    """

    def __init__(self, llama: Llama, prompt: str | list[int]):
        self.tokens, self.config, self._llama = llama.tokens(prompt), llama.config, llama
        self._taps = llama.trace(self.tokens)
        require_finite(llama, self._taps["logits"], self.tokens)
        self.pieces, self.names = self.pieces_of(self.tokens), list(self._taps)
        self.text = self.text_of(self.tokens)
        self.is_text = bool(self.text) and llama.tokens(self.text) == self.tokens
        self.at, self.head, self.position, self.looks_at = 0, 0, len(self.tokens) - 1, None
        self.lens = Lens(llama, self._of_layers("residual"))

    def _of_layers(self, kind: str) -> list[np.ndarray]:
        return [self._taps[f"layers.{layer}.{kind}"] for layer in range(self.config.n_layers)]

    @property
    def name(self) -> str:
        """The step's name, as its tap has it."""
        return self.names[self.at]

    @property
    def layer(self) -> int | None:
        """The layer's number, None before the first and after the last."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def kind(self) -> str:
        """The step's name without its layer."""
        return self.name.split(".", 2)[2] if self.layer is not None else self.name

    def go(self, layer=None, kind=None, head=None, position=None, steps: int = 0) -> None:
        """Go to a layer, a kind of step, a head, a token, or so many steps on; what isn't given stays."""
        if layer is not None or kind:
            kind = kind or (self.kind if self.layer is not None else "attention.norm")
            layer = self.layer or 0 if layer is None else layer
            self.at = self.names.index(kind if kind in self.names else f"layers.{layer}.{kind}")
        self.at = min(max(self.at + steps, 0), len(self.names) - 1)
        self.head = self.head if head is None else head
        self.position = self.position if position is None else min(position, len(self.pieces) - 1)
        if self.looks_at is not None and self.looks_at > self.position:
            self.looks_at = None  # no token sees what comes after it

    def open(self, layer=None, kind="embedding", head=0, position=None, looks_at=None) -> None:
        """Go to a place that somebody has written down; position None is the last token.

        Raises TinyllamaError if this model or prompt has no such place.
        """
        require(kind in KINDS, f"no kind of step is named {kind!r}: there are {', '.join(KINDS)}")
        position = len(self.tokens) - 1 if position is None else position
        ends = {"layer": self.config.n_layers, "head": self.config.n_heads, "position": len(self.tokens)}
        given = {"layer": layer or 0, "head": head, "position": position, "looks_at": looks_at or 0}
        for name, end in (ends | {"looks_at": position + 1}).items():
            require(given[name] in range(end), f"{name} is {given[name]!r}, but must be in 0..{end - 1}")
        self.go(layer, kind, head, position)
        self.looks_at = looks_at

    def follow(self, other: "Walk") -> None:
        """Stand where one stood in an earlier walk, at the same token if it is of the same prompt."""
        layer = min(other.layer or 0, self.config.n_layers - 1)
        is_same = self.pieces == other.pieces
        self.go(layer, other.kind, other.head % self.config.n_heads, other.position if is_same else None)
        self.looks_at = other.looks_at if is_same else None

    def call(self, model: str, backend: str = "auto", **more) -> str:
        """The line of Python that opens the stepper here; of the arguments only those that it needs.

        Args: more: further arguments of `stepper`.
        """
        last, prompt = len(self.tokens) - 1, self.text if self.is_text else self.tokens
        place = {"layer": self.layer, "kind": self.kind, "head": self.head, "position": self.position}
        usual = {"backend": "auto", "layer": None, "kind": "embedding", "head": 0, "position": last}
        usual |= {"looks_at": None}
        given = {"model": model, "backend": backend, **place, "looks_at": self.looks_at, **more}
        needed = {name: value for name, value in given.items() if name not in usual or value != usual[name]}
        return f"tinyllama.stepper({prompt!r}, {', '.join(f'{n}={v!r}' for n, v in needed.items())})"

    def shape(self) -> str:
        """The axes of the step's value and their sizes."""
        sizes = ", ".join(map(str, self._taps[self.name].shape))
        return f"[{', '.join(KINDS[self.kind].axes)}] = [{sizes}]"

    def map(self) -> Map:
        """The step's numbers: a row for each token, of the head that is looked at."""
        values, axes = self._taps[self.name], KINDS[self.kind].axes
        if axes[-1] == "n_past":
            values = values[self.head]
            seen = np.isfinite(values) & (np.tri(len(values)) > 0)
            return Map(np.where(seen, values, np.nan), "", 1, self.kind == "attention.weights")
        if len(axes) == 3:
            values = values[:, self.head * values.shape[1] // self.config.n_heads]
        pooled, per_cell = _farthest(values)
        return Map(pooled, axes[-1], per_cell, False)

    def has_heads(self) -> bool:
        """Whether the step's value has an axis of heads."""
        return len(KINDS[self.kind].axes) == 3

    def says(self) -> list[list[tuple[str, float]]]:
        """What the model would say after each layer so far if it stopped there: its likeliest five tokens."""
        done = [name for name in self.names[: self.at + 1] if name.endswith(".residual")]
        return self.lens.column(self.position)[: len(done)]

    def likeliest(self) -> list[Next]:
        """The ten tokens that are likeliest to follow the one that is looked at."""
        logits = self.lens.logits(self.config.n_layers - 1, self.position)
        probs = softmax(logits)
        best = np.argsort(-logits, kind="stable")[:LIKELIEST].tolist()
        return [
            Next(token, self._llama.tokenizer.piece(token), float(logits[token]), float(probs[token]))
            for token in best
        ]

    def pieces_of(self, tokens) -> list[str]:
        """Ids as text for people to read."""
        return [self._llama.tokenizer.piece(int(token)) for token in tokens]

    def text_of(self, tokens: list[int]) -> str:
        """Ids as one would type them: control tokens by name, without the bos that comes first anyway."""
        tokenizer = self._llama.tokenizer
        tokens = tokens[1:] if tokenizer.add_bos and tokens[0] == tokenizer.bos_id else tokens
        data = [
            tokenizer.piece(token).encode() if tokenizer.is_control(token) else tokenizer.token_bytes(token)
            for token in tokens
        ]
        return b"".join(data).removeprefix(tokenizer.prefix).decode("utf-8", errors="replace")

    def followed_by(self, token: int) -> list[int]:
        """The prompt up to the token that is looked at, and another one behind it."""
        return [*self.tokens[: self.position + 1], token]

    def looks(self) -> list[heads.Look]:
        """The heads that look from `position` to `looks_at` most, or anywhere."""
        return heads.looks(self._of_layers("attention.weights"), self.position, self.looks_at)

    @cached_property
    def sheet(self) -> np.ndarray:
        """The attention of all heads as small maps, as `heads.sheet` makes them."""
        return heads.sheet(self._of_layers("attention.weights"))


def _farthest(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Of neighbouring columns the value farthest from 0, so that at most MOST_COLUMNS are left."""
    n_rows, n_columns = values.shape
    per_cell = -(-n_columns // MOST_COLUMNS)
    padded = np.pad(values, ((0, 0), (0, -n_columns % per_cell))).reshape(n_rows, -1, per_cell)
    farthest = np.abs(padded).argmax(axis=-1)
    return np.take_along_axis(padded, farthest[..., None], axis=-1)[..., 0], per_cell
