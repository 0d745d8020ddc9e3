"""What the stepper knows: every value on a prompt's way through a model, and where one stands among them."""

from dataclasses import dataclass

import numpy as np

from ...llama import Llama
from ...ops import softmax
from .kinds import KINDS

MOST_COLUMNS = 256  # of a heat-map: a cell of a pixel or two can still be seen
SAYS = 5  # tokens that the model would say, of a layer


@dataclass(frozen=True)
class Map:
    """Numbers as a heat-map; the rows are the tokens."""

    values: np.ndarray  # float32 [n_rows, n_columns], NaN where there is no number
    axis: str  # the columns' name; "" where they are the tokens, too
    per_cell: int  # numbers along a row that a cell stands for; the one farthest from 0 is shown
    is_share: bool  # whether they are shares from 0 to 1


class Walk:
    """A prompt that has been through a model.

    Attributes:
        pieces: the prompt's tokens, as text.
        names: every step, in the order in which it is computed: "layers.0.attention.q".
        at: the index of the step one stands at.
        head, position: which head and which token are looked at.
    """

    def __init__(self, llama: Llama, prompt: str):
        tokens = llama.tokens(prompt)
        self.config, self._llama, self._lens = llama.config, llama, {}
        self._taps = llama.trace(tokens)
        llama.check(self._taps["logits"], tokens)
        self.pieces, self.names = [llama.tokenizer.piece(token) for token in tokens], list(self._taps)
        self.at, self.head, self.position = 0, 0, len(tokens) - 1

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
        if self.position not in self._lens:
            rows = [self._taps[f"layers.{n}.residual"][self.position] for n in range(self.config.n_layers)]
            self._lens[self.position] = [self._likeliest(row) for row in self._llama.unembed(np.stack(rows))]
        done = [name for name in self.names[: self.at + 1] if name.endswith(".residual")]
        return self._lens[self.position][: len(done)]

    def _likeliest(self, logits: np.ndarray) -> list[tuple[str, float]]:
        probs = softmax(logits)
        best = np.argsort(-probs, kind="stable")[:SAYS]
        return [(self._llama.tokenizer.piece(int(token)), float(probs[token])) for token in best]


def _farthest(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Of neighbouring columns the value farthest from 0, so that at most MOST_COLUMNS are left."""
    n_rows, n_columns = values.shape
    per_cell = -(-n_columns // MOST_COLUMNS)
    padded = np.pad(values, ((0, 0), (0, -n_columns % per_cell))).reshape(n_rows, -1, per_cell)
    farthest = np.abs(padded).argmax(axis=-1)
    return np.take_along_axis(padded, farthest[..., None], axis=-1)[..., 0], per_cell
