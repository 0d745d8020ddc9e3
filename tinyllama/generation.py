"""The loop: read the prompt, then choose a token, run it through the model, choose the next, ..."""

import math
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from numbers import Integral

import numpy as np

from .errors import Cancelled, TinyllamaError
from .sampling import Sampling, Stage, sample, stage
from .tokenizer import TextStream

#: What each reason means why a text ended.
STOP_REASONS = {
    "length": "as many tokens as asked for",
    "eos": "the model ended the text",
    "stop": "a stop string was found",
    "context": "the context is full",
    "cancelled": "interrupted",
}


@dataclass(frozen=True)
class Settings(Sampling):
    """How a text is continued; the fields of `Sampling`, and these.

    Attributes:
        n_predict: stop after this many tokens; -1 goes on until the model ends or the context is full.
        seed: of the random numbers; -1 takes a new one. The same seed gives the same text.
        stop: end before the first of these strings.
        batch_size: tokens of the prompt that go through the model at once.
        ctx_size: room for prompt and text together, in tokens; None: 2048 or the model's own limit.
        stages: record what every stage of sampling did to every token.
    """

    n_predict: int = 128
    seed: int = -1
    stop: tuple[str, ...] = ()
    batch_size: int = 512
    ctx_size: int | None = None
    stages: bool = False

    def __post_init__(self):
        super().__post_init__()
        stop = (self.stop,) if isinstance(self.stop, str | int | float | None) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise TinyllamaError(f"stop must be strings that aren't empty, not {self.stop!r}")
        for name, least in (("n_predict", -1), ("seed", -1), ("batch_size", 1), ("ctx_size", 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and value >= least):
                raise TinyllamaError(f"{name} must be a whole number of at least {least}, not {value!r}")


@dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
        id: its number in the vocabulary.
        piece: its spelling there.
        prob: how likely the model thought it, before temperature and the other stages.
        stages: what each stage of sampling kept and removed, if that was asked for.
    """

    id: int
    piece: str
    prob: float
    stages: tuple[Stage, ...] = ()

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
    n_predict: int = 0  # runs of the model on one token; the last token of a text isn't run
    total: float = 0.0


class Completion(str):
    """A text that a model wrote: a str that also knows how it came about.

    Attributes:
        tokens: a Token for each token, the one that ended the text not among them.
        stop_reason: one of STOP_REASONS.
        settings: everything that `tinyllama.generate(**settings)` needs to write it again, with the seed
            that was really used.
        timings: a Timings.
    """

    tokens: list[Token]
    stop_reason: str
    settings: dict
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
        warnings: what about the prompt will quietly worsen the text.
    """

    def __init__(self, llama, prompt, *, cancel=None, **settings):
        self.llama, self.prompt, self.cancel = llama, prompt, cancel
        self.settings = Settings(**settings)
        self.n_ctx = self.settings.ctx_size or llama.default_ctx_size()
        self._check_length()
        self.prompt_ids, self.n_read = llama.tokens(prompt), 0
        if len(self.prompt_ids) > self.n_ctx:
            raise TinyllamaError(
                f"the context is full: the prompt has {len(self.prompt_ids)} tokens, ctx_size is {self.n_ctx}"
            )
        llama.check_memory(self.n_ctx, min(self.settings.batch_size, len(self.prompt_ids)))
        self.seed = self.settings.seed if self.settings.seed >= 0 else secrets.randbits(32)
        self.warnings = list(self._warnings())
        self.tokens: list[Token] = []
        self.stop_reason: str | None = None
        self.timings = Timings(load=llama.load_seconds, n_prompt=len(self.prompt_ids))
        self._text: list[str] = []
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def completion(self) -> Completion:
        """The text so far, with all that is known about it."""
        text = Completion("".join(self._text))
        text.tokens, text.timings = list(self.tokens), replace(self.timings)
        text.stop_reason = self.stop_reason
        backend = self.llama.backend
        origin = {"model": self.llama.name, "backend": backend.name, "threads": backend.threads}
        used = asdict(self.settings) | {"seed": self.seed, "ctx_size": self.n_ctx}
        text.settings = {"prompt": self.prompt} | origin | used
        return text

    def _check_length(self) -> None:
        """Refuse a text that is too long however it is cut: cutting takes a second a megabyte."""
        if isinstance(self.prompt, str | bytes) and len(self.prompt) > self.n_ctx:
            longest = max(map(len, self.llama.tokenizer.vocabulary.pieces))
            if len(self.prompt) > self.n_ctx * longest:
                raise TinyllamaError(
                    f"the context is full: the prompt has {len(self.prompt)} characters, "
                    f"ctx_size is {self.n_ctx} tokens, and none stands for more than {longest}"
                )

    def _warnings(self) -> Iterator[str]:
        bos = self.llama.tokenizer.bos_id
        if bos is not None and self.prompt_ids[:2] == [bos, bos]:
            yield "the prompt starts with bos, and another one is put before it: leave yours out"
        if isinstance(self.prompt, str) and self.prompt.endswith(" "):
            yield "the prompt ends in a space, but words begin with theirs: the text gets better without it"
        if self.n_ctx > self.llama.config.max_seq_len:
            yield f"the model was trained on {self.llama.config.max_seq_len} tokens, ctx_size is {self.n_ctx}"

    def _run(self) -> Iterator[str]:
        started = time.perf_counter()
        text, held = TextStream(self.llama.tokenizer), _StopStrings(self.settings.stop)
        try:
            for token in self._ids():
                piece, found = held.feed(text.feed(token))
                if found:
                    self.stop_reason = "stop"
                yield from self._emit(piece, started)
                if found:
                    return
        except Cancelled:
            self.stop_reason = "cancelled"
        yield from self._emit(held.feed(text.flush())[0] + held.flush(), started)

    def _emit(self, piece: str, started: float) -> Iterator[str]:
        self.timings.total = time.perf_counter() - started
        if piece:
            self._text.append(piece)
            yield piece

    def _ids(self) -> Iterator[int]:
        """Choose tokens until something ends the text."""
        cache = self.llama.new_cache(self.n_ctx)
        rng, context = np.random.default_rng(self.seed), list(self.prompt_ids)
        if self.settings.n_predict == 0:
            self.stop_reason = "length"
            return
        logits = self._read_prompt(cache)
        while True:
            token = self._choose(logits, context, rng)
            if token in self.llama.tokenizer.stop_ids:
                self.stop_reason = "eos"
                return
            context.append(token)
            yield token
            if len(self.tokens) == self.settings.n_predict:
                self.stop_reason = "length"
                return
            if len(context) > self.n_ctx:
                self.stop_reason = "context"
                return
            logits = self._predict(token, len(context) - 1, cache)

    def _read_prompt(self, cache) -> np.ndarray:
        """Run the prompt in batches: the logits that follow it, [vocab_size]."""
        started, size = time.perf_counter(), self.settings.batch_size
        try:
            for start in range(0, len(self.prompt_ids), size):
                batch = self.prompt_ids[start : start + size]
                logits = self.llama.forward(batch, start, cache, last=True, cancel=self.cancel)
                self.n_read = start + len(batch)
        finally:
            self.timings.prompt = time.perf_counter() - started
        return logits[0]

    def _predict(self, token: int, pos: int, cache) -> np.ndarray:
        """Run one token: the logits that follow it, [vocab_size]."""
        started = time.perf_counter()
        logits = self.llama.forward([token], pos, cache, cancel=self.cancel)
        self.timings.predict += time.perf_counter() - started
        self.timings.n_predict += 1
        return logits[0]

    def _choose(self, logits: np.ndarray, context: list[int], rng) -> int:
        """Sample a token and note it in `tokens`, unless it ends the text."""
        started = time.perf_counter()
        stages: list[Stage] | None = [] if self.settings.stages else None
        token = sample(logits, self.settings, context, rng, stages)
        if token not in self.llama.tokenizer.stop_ids:
            self.tokens.append(_token(self.llama, token, logits, stages or ()))
        self.timings.sample += time.perf_counter() - started
        return token


def _token(llama, token: int, logits: np.ndarray, stages: Iterable[Stage]) -> Token:
    highest = logits.max()
    prob = float(np.exp(logits[token] - highest) / np.exp(logits - highest).sum())
    return Token(token, llama.tokenizer.piece(token), prob, tuple(stages))


def score(llama, prompt: str | list[int], *, batch_size: int = 512, cancel=None) -> list[Token]:
    """How likely a model thinks each token of a prompt, given those before it.

    Returns:
        A Token for each, whose one stage, "logits", says what the model expected there. The first has
        nothing before it: its probability is NaN.
    Raises:
        Cancelled: the flag is set.
        TinyllamaError: it doesn't fit into memory.
    """
    if batch_size < 1:
        raise TinyllamaError(f"batch_size must be at least 1, not {batch_size}")
    ids = llama.tokens(prompt)
    at_once = min(batch_size, len(ids))
    llama.check_memory(len(ids), at_once, n_logits=2 * at_once, n_scored=len(ids))  # of two batches
    cache, tokens = llama.new_cache(len(ids)), [Token(ids[0], llama.tokenizer.piece(ids[0]), math.nan)]
    for start in range(0, len(ids) - 1, batch_size):
        batch = ids[start : min(start + batch_size, len(ids) - 1)]
        for logits in llama.forward(batch, start, cache, cancel=cancel):
            tokens.append(_token(llama, ids[len(tokens)], logits, [stage("logits", logits)]))
    return tokens


@dataclass
class _StopStrings:
    """Holds text back for as long as it may turn out to begin a stop string."""

    stop: tuple[str, ...]
    held: str = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Text that can be shown now, and whether a stop string was found behind it."""
        self.held += piece
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        if found:
            return self.flush()[: min(found)], True
        end = len(self.held) - max(map(self._overlap, self.stop), default=0)
        shown, self.held = self.held[:end], self.held[end:]
        return shown, False

    def _overlap(self, string: str) -> int:
        """The longest beginning of a stop string that the held text ends with."""
        for length in range(min(len(string) - 1, len(self.held)), 0, -1):
            if self.held.endswith(string[:length]):
                return length
        return 0

    def flush(self) -> str:
        """What is still held back when the text ends."""
        held, self.held = self.held, ""
        return held
