"""The loop: read the prompt, then choose a token, run it through the model, choose the next, ...

(The module isn't called generate: that is the function `tinyllama.generate`.)
"""

import math
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np

from .errors import Cancelled
from .sampling import Settings, Stage, sample
from .tokenizer import TextStream, Tokenizer

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
    prob: float  # how likely the model thought it, before temperature and the other stages
    stages: tuple[Stage, ...] = ()  # what each stage of sampling kept and removed, if that was asked for

    @property
    def surprise(self) -> float:
        """-log2 of its probability, in bits: 0 of the only one possible, 1 of heads or tails."""
        return -math.log2(self.prob) if self.prob else math.inf


@dataclass
class Timings:
    """Seconds that the steps took, and the tokens they took them for."""

    load: float = 0.0
    prompt: float = 0.0
    n_prompt: int = 0
    sample: float = 0.0
    predict: float = 0.0
    n_predict: int = 0  # runs of the model on one token: all but the last, unless the model ended the text
    total: float = 0.0
    pack: float = 0.0  # in the background since the model was loaded; see `backends.packing`
    n_packed: int = 0  # weights
    n_left: int = 0  # weights that still lie in their file, where products with them take longer

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
    def seed(self) -> int:
        """The seed that was really used."""
        return self.settings["seed"]

    def call(self) -> str:
        """The Python call that gives exactly this text, of the settings only those that it needs."""
        used, usual = dict(self.settings), asdict(Settings()) | {"seed": None, "n_predict": None}
        prompt, used["stages"] = used.pop("prompt"), usual["stages"]
        if self.stop_reason in ("cancelled", None):
            used["n_predict"] = len(self.tokens)
        needed = {name: value for name, value in used.items() if name not in usual or value != usual[name]}
        arguments = [repr(prompt), *(f"{name}={value!r}" for name, value in needed.items())]
        return f"tinyllama.generate({', '.join(arguments)})"


class Generation:
    """One run: an iterator over pieces of text; pieces never split a character.

    Attributes:
        prompt_ids: the prompt's tokens.
        n_read: how many of them have been through the model.
        tokens: a Token for each token so far.
        seed: the seed that is really used.
        stop_reason: why it ended, None before that; see Completion.
        timings: a Timings, up to date after every piece.
        origin: what `Completion.settings` says beside the settings: prompt, model, backend, threads.
        warnings: what about prompt or ctx_size will worsen the text.
    """

    def __init__(
        self, run, tokenizer: Tokenizer, cache, prompt_ids, settings, origin=None, doubts=(), door=nullcontext
    ):
        """Args:
        run: sends tokens through a model, behind those in a cache: the last one's logits, [1, vocab_size].
        cache: empty, with room for the prompt at least.
        door: a context in which `finish` runs, so that a token needn't open it for itself.
        """
        self.tokenizer, self.prompt_ids, self.n_read = tokenizer, prompt_ids, 0
        self.settings, self.origin, self.warnings = settings, origin or {}, list(doubts)
        self.seed = settings.seed if settings.seed >= 0 else secrets.randbits(32)
        self.tokens: list[Token] = []
        self.stop_reason: str | None = None
        self.timings = Timings(n_prompt=len(prompt_ids))
        self._text: list[str] = []
        self._door, self._run, self._cache = door, run, cache
        self._pieces = filter(None, self._make_pieces())

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self.timings.adding_to("total"):
            self._text.append(next(self._pieces))
        return self._text[-1]

    def finish(self) -> Completion:
        """Run to the end and return the whole text."""
        with self._door():
            for _ in self:
                pass
        return self.completion()

    def completion(self) -> Completion:
        """The text so far, with all that is known about it."""
        text = Completion("".join(self._text))
        text.tokens, text.timings = list(self.tokens), replace(self.timings)
        text.stop_reason = self.stop_reason
        used = asdict(self.settings) | {"seed": self.seed, "ctx_size": self._cache.n_ctx}
        text.settings = self.origin | used
        return text

    def _make_pieces(self) -> Iterator[str]:
        """The text up to a stop string; what may turn out to begin one is held back."""
        stop, held = self.settings.stop, ""
        for piece in self._texts():
            held += piece
            found = [at for at in map(held.find, stop) if at >= 0]
            if found:
                self.stop_reason, held = "stop", held[: min(found)]
                break
            begun = [n for text in stop for n in range(len(text)) if held.endswith(text[:n])]
            end = len(held) - max(begun, default=0)
            yield held[:end]
            held = held[end:]
        yield held

    def _texts(self) -> Iterator[str]:
        text = TextStream(self.tokenizer)
        try:
            for token in self._ids():
                yield text.feed(token)
        except Cancelled:
            self.stop_reason = "cancelled"
        yield text.flush()

    def _ids(self) -> Iterator[int]:
        """Choose tokens until something ends the text."""
        if self.settings.n_predict == 0:
            self.stop_reason = "length"
            return
        rng, logits = np.random.default_rng(self.seed), self._read_prompt()
        while (token := self._choose(logits, rng)) not in self.tokenizer.stop_ids:
            yield token
            if len(self.tokens) == self.settings.n_predict or len(self._cache) == self._cache.n_ctx:
                enough = len(self.tokens) == self.settings.n_predict
                self.stop_reason = "length" if enough else "context"
                return
            with self.timings.adding_to("predict"):
                logits = self._run([token], self._cache)[0]
            self.timings.n_predict += 1
        self.stop_reason = "eos"

    def _read_prompt(self) -> np.ndarray:
        """Run the prompt in batches: the logits that follow it, [vocab_size]."""
        size = self.settings.batch_size
        with self.timings.adding_to("prompt"):
            for start in range(0, len(self.prompt_ids), size):
                logits = self._run(self.prompt_ids[start : start + size], self._cache)
                self.n_read = len(self._cache)
        return logits[0]

    def _choose(self, logits: np.ndarray, rng: np.random.Generator) -> int:
        """Sample a token and note it in `tokens`, unless it ends the text."""
        with self.timings.adding_to("sample"):
            stages: list[Stage] | None = [] if self.settings.stages else None
            token = sample(logits, self.settings, self._cache.ids, rng, stages, self.tokenizer.unused_ids)
            if token not in self.tokenizer.stop_ids:
                self.tokens.append(token_of(self.tokenizer, token, logits, stages or ()))
        return token


def token_of(tokenizer: Tokenizer, token: int, logits: np.ndarray, stages: Iterable[Stage]) -> Token:
    """A Token that was chosen by logits [vocab_size]."""
    highest = logits.max()
    prob = float(np.exp(logits[token] - highest) / np.exp(logits - highest).sum())
    return Token(token, tokenizer.piece(token), prob, tuple(stages))
