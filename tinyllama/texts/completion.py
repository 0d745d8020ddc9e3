"""What a text that a model wrote knows about itself."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np

from ..sampling import Stage
from ..settings import Settings
from ..tokenizer import Tokenizer
from .choosing import probability

#: Why a text ended.
STOP_REASONS = {
    "length": "as many tokens as asked for",
    "eos": "the model ended the text",
    "stop": "a stop string was found",
    "context": "the context is full",
    "cancelled": "interrupted",
}


@dataclass(frozen=True)
class Token:
    """A token of a text."""

    id: int  # its number in the vocabulary
    piece: str  # its text, as `Tokenizer.piece` shows it
    prob: float | None  # how likely the model thought it, before temperature and the other stages; if known
    stages: tuple[Stage, ...] = ()  # what each stage of sampling kept and removed, if that was asked for
    drafted: bool = False  # it had been guessed before the model chose it
    #: By the names that `taps` asked for, the values that chose it: weights [n_heads, n_past], norm [dim].
    taps: dict[str, np.ndarray] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return (
            f"Token({self.id}, {self.piece!r}, prob={self.prob if self.prob is None else f'{self.prob:.3g}'})"
        )

    def as_dict(self) -> dict:
        """All that is known about it, as JSON takes it."""
        arrays = ("kept", "probs", "removed")
        stages = [vars(stage) | {a: getattr(stage, a).tolist() for a in arrays} for stage in self.stages]
        taps = {name: np.where(np.isfinite(a), a, None).tolist() for name, a in self.taps.items()}
        return vars(self) | {"stages": stages, "taps": taps}

    @property
    def surprise(self) -> float:
        """-log2 of its probability, in bits: 0 of the only one possible, 1 of heads or tails; or NaN."""
        return math.nan if self.prob is None else -math.log2(self.prob) if self.prob else math.inf


def token_of(tokenizer: Tokenizer, token: int, logits: np.ndarray, stages: Iterable[Stage]) -> Token:
    """A Token that was chosen by logits [vocab_size]."""
    return Token(token, tokenizer.piece(token), probability(logits, token), tuple(stages))


@dataclass
class Timings:
    """Seconds that the steps took, and the tokens they took them for."""

    load: float = 0.0
    prompt: float = 0.0
    n_prompt: int = 0
    n_remembered: int = 0  # of these, how many the cache of another text had
    sample: float = 0.0
    predict: float = 0.0
    n_predict: int = 0  # tokens that these runs chose: all but the first
    n_drafted: int = 0  # guesses that went through the model
    n_accepted: int = 0  # and those that were right
    total: float = 0.0
    pack: float = 0.0  # in the background since the model was loaded; see `backends.packing`
    n_packed: int = 0  # weights
    n_left: int = 0  # weights that still lie in their file, where products with them take longer

    def as_dict(self) -> dict:
        """As JSON takes it."""
        return asdict(self)

    @contextmanager
    def adding_to(self, step: str) -> Iterator[None]:
        """Add the seconds that are spent inside to a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, step, getattr(self, step) + time.perf_counter() - started)


class Completion(str):
    """A text that a model wrote: a str that also knows how it came about."""

    tokens: list[Token]  # without the token that ended the text, but with those of a stop string
    stop_reason: str | None  # a key of STOP_REASONS; None: it goes on
    settings: dict  # `tinyllama.generate(**settings)` writes it again, with the seed that was really used
    timings: Timings

    @property
    def ids(self) -> list[int]:
        """The id of each token."""
        return [token.id for token in self.tokens]

    @property
    def probs(self) -> list[float]:
        """The probability that the model gave each token."""
        return [token.prob for token in self.tokens]

    @property
    def prompt(self) -> str | list:
        """What is continued: a text, ids, or messages of a chat."""
        return self.settings["prompt"]

    @property
    def seed(self) -> int:
        """The seed that was really used."""
        return self.settings["seed"]

    def as_dict(self) -> dict:
        """All that is known about it, as JSON takes it."""
        about = {"text": str(self), "prompt": self.prompt, "stop_reason": self.stop_reason, "seed": self.seed}
        tokens = [token.as_dict() for token in self.tokens]
        return about | {"tokens": tokens, "settings": self.settings, "timings": asdict(self.timings)}

    def call(self) -> str:
        """The Python call that gives exactly this text, of the settings only those that it needs."""
        used, usual = dict(self.settings), asdict(Settings()) | {"seed": None, "n_predict": None}
        prompt, used["stages"] = used.pop("prompt"), usual["stages"]
        if self.stop_reason in ("cancelled", None):
            used["n_predict"] = len(self.tokens)
        needed = {name: value for name, value in used.items() if name not in usual or value != usual[name]}
        arguments = [repr(prompt), *(f"{name}={value!r}" for name, value in needed.items())]
        return f"tinyllama.generate({', '.join(arguments)})"
