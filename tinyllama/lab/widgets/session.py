"""What the playground knows and does, without a widget: runs of models, and their history.

A `Session` starts runs in a thread of its own and keeps what came of them. Whoever shows it gives it a
function that is called when something has changed, from that thread too.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...errors import Cancelled
from ...generation import Completion, Generation, Token
from ...llama import Llama, load
from ...tokenizer import TextStream, Tokenizer
from .worker import Worker, batch_size

#: Of Simon Willison's "Running LLaMA 7B and 13B on a 64GB M2 MacBook Pro with llama.cpp" (March 2023).
PROMPTS = (
    "The first man on the moon was",
    "Step by step guide to raise the dead:",
    "def open_and_return_content(filename):",
    "Great pun names for a coffee shop run by otters:",
)

HISTORY = 30  # runs that are kept; a token's record of its sampling takes about 4 kB


@dataclass
class Run:
    """One run: what went in, and what has come out so far.

    Attributes:
        prompt: what was typed.
        origin: the model, backend and threads that `load` takes.
        prompt_tokens: the prompt's; their probabilities are NaN until `Session.select` asks for them.
        taken: tokens of an earlier run that this one continues.
        changed: the index of a token that was picked in place of another, or None.
        number: 1 for the first; 0 before its model is loaded.
        tokenizer: of its model.
        generation: while it goes on. It holds the model, and a history of models would fill the memory.
    """

    prompt: str
    origin: tuple
    prompt_tokens: list[Token] = field(default_factory=list)
    taken: list[Token] = field(default_factory=list)
    changed: int | None = None
    number: int = 0
    tokenizer: Tokenizer | None = None
    generation: Generation | None = None
    _completion: Completion | None = None
    _stream: TextStream | None = None
    _texts: list[str] = field(default_factory=list)

    def begin(self, number: int, generation: Generation) -> None:
        """The model is there, and the first token is about to be chosen."""
        self.number, self.generation, self.tokenizer = number, generation, generation.llama.tokenizer
        piece = self.tokenizer.piece
        self.prompt_tokens = self.prompt_tokens or [
            Token(token, piece(token), math.nan) for token in generation.prompt_ids
        ]

    def end(self) -> None:
        """Keep what was written and let the model go."""
        self._completion, self.generation = self.completion, None

    @property
    def completion(self) -> Completion:
        """What this run itself has written so far."""
        generation = self.generation  # `end` may be taking it away
        return self._completion if generation is None else generation.completion()

    @property
    def tokens(self) -> list[Token]:
        """All of them: the prompt's, those taken from an earlier run, and the new ones."""
        return [*self.prompt_tokens, *self.taken, *self.completion.tokens]

    def texts(self) -> list[str]:
        """What each token adds to the text; the beginning of a character adds nothing, its end all of it."""
        tokens = self.tokens
        self._stream = self._stream or TextStream(self.tokenizer, strip_prefix=True)
        self._texts += [self._stream.feed(token.id) for token in tokens[len(self._texts) :]]
        return self._texts[: len(tokens)]

    @property
    def text(self) -> str:
        """Prompt and completion, as one would paste them somewhere."""
        return self.prompt + "".join(self.texts()[len(self.prompt_tokens) :])


class Session:
    """Runs, one at a time, and what has become of them.

    Attributes:
        state: "idle", "loading", "reading" the prompt, "writing" or "scoring" it.
        loaded: the share of a model that has been loaded, 0 to 1.
        runs: the last HISTORY ones, oldest first.
        run: the one that is shown, or None.
        selected: the index of the token that is looked at, or None.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None):
        self.worker = Worker(changed)
        self.state, self.loaded = "idle", 0.0
        self.runs: list[Run] = []
        self.run: Run | None = None
        self.selected: int | None = None
        self._changed, self._number = changed, 0

    @property
    def error(self) -> str:
        """Why the last run failed, in plain words; "" if it didn't."""
        return self.worker.error

    def generate(self, prompt: str, model="small", backend=None, threads=None, **settings) -> bool:
        """Start a run; says whether it was started, which it isn't while another one goes on."""
        return self._start(Run(prompt, (model, backend, threads)), prompt, settings)

    def resume(self, **settings) -> bool:
        """Go on where the shown run ended, with other settings if wanted."""
        if (run := self.run) is None:
            return False
        taken = run.tokens[len(run.prompt_tokens) :]
        new = Run(run.prompt, run.origin, run.prompt_tokens, taken, run.changed)
        return self._start(new, [token.id for token in run.tokens], settings)

    def resume_with(self, index: int, token_id: int, **settings) -> bool:
        """Go on from a token of the shown run with another one in its place, one that its stages list."""
        if (run := self.run) is None or not run.tokens[index].stages:
            return False
        tokens, n_prompt = [*run.tokens[:index], _instead(run, index, token_id)], len(run.prompt_tokens)
        prompt = run.prompt
        if index < n_prompt:
            n_prompt, prompt = index, run.tokenizer.decode(token.id for token in tokens[:index])
        new = Run(prompt, run.origin, tokens[:n_prompt], tokens[n_prompt:], index)
        return self._start(new, [token.id for token in tokens], settings)

    def stop(self) -> None:
        """Stop what is going on; it ends before the model's next operation."""
        self.worker.stop()

    def clear(self) -> None:
        """Show no run, and forget the last error. The history stays."""
        self.run, self.selected, self.worker.error = None, None, ""
        self._changed()

    def show(self, number: int) -> None:
        """Show a run of the history; 0 shows none."""
        self.run, self.selected = self.find(number), None
        self._changed()

    def find(self, number: int | None) -> Run | None:
        """The run of this number, if it is still known."""
        return next((run for run in self.runs if run.number == number), None)

    def select(self, index: int | None) -> None:
        """Look at a token. The first time that it is one of the prompt, the prompt is scored for it."""
        run = self.run
        is_there = run is not None and index is not None and 0 <= index < len(run.tokens)
        self.selected = index if is_there else None
        if is_there and index > 0 and not run.tokens[index].stages:
            self.worker.start(lambda: self._score(run))
        self._changed()

    # --- in the thread ------------------------------------------------------------------------------

    def _start(self, run: Run, prompt: str | list[int], settings: dict) -> bool:
        return self.worker.start(lambda: self._generate(run, prompt, settings))

    def _generate(self, run: Run, prompt: str | list[int], settings: dict) -> None:
        llama = self._load(run.origin)
        settings = {"batch_size": batch_size(llama.config)} | settings
        generation = llama.stream(prompt, cancel=self.worker, stages=True, **settings)
        self._number += 1
        run.begin(self._number, generation)
        run.origin = llama.name, llama.backend.name, llama.backend.threads
        self.runs, self.run, self.selected = [*self.runs, run][-HISTORY:], run, None
        try:
            with self._state("reading"):
                for _ in generation:
                    self.state = "writing"
        finally:
            run.end()

    def _score(self, run: Run) -> None:
        llama = self._load(run.origin)
        with self._state("scoring"):
            ids = [token.id for token in run.prompt_tokens]
            run.prompt_tokens = llama.score(ids, batch_size=batch_size(llama.config), cancel=self.worker)

    def _load(self, origin: tuple) -> Llama:
        self.loaded = 0.0
        with self._state("loading"):
            return load(*origin, progress=self._progress)

    def _progress(self, names: list[str]) -> Iterator[str]:
        for number, name in enumerate(names):
            if self.worker.is_set():
                raise Cancelled("cancelled")
            self.loaded = number / len(names)
            yield name

    @contextmanager
    def _state(self, state: str) -> Iterator[None]:
        self.state = state
        self._changed()
        try:
            yield
        finally:
            self.state = "idle"


def _instead(run: Run, index: int, token_id: int) -> Token:
    """A token that could have come in the place of another: what is known about that place stays the same."""
    stages = run.tokens[index].stages
    listed = dict(zip(stages[0].kept.tolist(), stages[0].probs.tolist(), strict=True))
    return Token(token_id, run.tokenizer.piece(token_id), listed[token_id], stages)
