"""What the playground knows and does, without a widget: runs of models, and their history.

A `Session` starts runs in a thread of its own and keeps what came of them. Whoever shows it gives it a
function that is called when something has changed, from that thread too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...config import Config
from ...generation import Generation
from ...llama import Llama
from ...texts.completion import Completion, Token
from ...tokenizer import TextStream, Tokenizer
from .worker import Worker

#: Of Simon Willison's "Running LLaMA 7B and 13B on a 64GB M2 MacBook Pro with llama.cpp" (March 2023).
PROMPTS = (
    "The first man on the moon was",
    "Step by step guide to raise the dead:",
    "def open_and_return_content(filename):",
    "Great pun names for a coffee shop run by otters:",
)

LAYER_WORK, FEWEST = 2**34, 16  # multiply-adds that Stop may wait for; tokens that are worth a batch
HISTORY = 30  # runs that are kept; a token's record of its sampling takes about 4 kB


@dataclass(eq=False)
class Run:
    """One run: what went in, and what has come out so far."""

    prompt: str
    origin: tuple  # the model, backend and threads that `load` takes
    prompt_tokens: Sequence[Token] = ()  # their probabilities are NaN until `Session.select` asks for them
    taken: Sequence[Token] = ()  # from an earlier run that this one continues
    changed: int | None = None  # the index of a token that was picked in place of another
    number: int = 0  # 1 for the first
    tokenizer: Tokenizer | None = None  # of its model
    generation: Generation | None = None  # while it goes on: a history of models would fill the memory
    _completion: Completion | None = None

    def begin(self, number: int, llama: Llama, generation: Generation) -> None:
        """The model is there, and the first token is about to be chosen."""
        self.number, self.generation, self.tokenizer = number, generation, llama.tokenizer
        self.origin = llama.name, llama.backend.name, llama.backend.threads
        if not self.prompt_tokens:
            ids = generation.prompt_ids
            self.prompt_tokens = [Token(token, self.tokenizer.piece(token), math.nan) for token in ids]

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
        stream = TextStream(self.tokenizer, strip_prefix=True)
        return [stream.feed(token.id) for token in self.tokens]

    @property
    def text(self) -> str:
        """Prompt and completion, as one would paste them somewhere."""
        return self.prompt + "".join(self.texts()[len(self.prompt_tokens) :])


class Session:
    """Runs, one at a time, and what has become of them.

    Attributes:
        worker: the thread in which they are made; stops it, and knows why the last one failed.
        runs: the last HISTORY ones, oldest first.
        run: the one that is shown, or None.
        selected: the index of the token that is looked at, or None.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None):
        self.worker = Worker(changed)
        self.runs: list[Run] = []
        self.run: Run | None = None
        self.selected: int | None = None
        self._changed, self._number = changed, 0

    def generate(self, prompt: str, model="small", backend=None, threads=None, **settings) -> bool:
        """Start a run; says whether it was started, which it isn't while another one goes on."""
        return self._start(Run(prompt, (model, backend, threads)), settings)

    def resume(self, **settings) -> bool:
        """Go on where the shown run ended, with other settings if wanted."""
        if (run := self.run) is None:
            return False
        return self._start(replace(run, taken=run.tokens[len(run.prompt_tokens) :]), settings)

    def resume_with(self, index: int, token_id: int, **settings) -> bool:
        """Go on from a token of the shown run with another one in its place, one that its stages list."""
        if (run := self.run) is None or not (old := run.tokens[index]).stages:
            return False
        before, first = run.tokens[:index], old.stages[0]
        prob = dict(zip(first.kept.tolist(), first.probs.tolist(), strict=True))[token_id]
        picked = replace(old, id=token_id, piece=run.tokenizer.piece(token_id), prob=prob)
        new = replace(run, prompt_tokens=run.prompt_tokens[:index], changed=index)
        new.taken = [*before[len(new.prompt_tokens) :], picked]
        if index < len(run.prompt_tokens):
            new.prompt = run.tokenizer.decode(token.id for token in before)
        return self._start(new, settings)

    def clear(self) -> None:
        """Show no run, and forget the last error. The history stays."""
        self.worker.error = ""
        self.show(0)

    def show(self, number: int) -> None:
        """Show a run of the history; 0 shows none."""
        self.selected, self.run = None, self.find(number)
        self._changed()

    def find(self, number: int) -> Run | None:
        """The run of this number, if it is still known."""
        return next((run for run in self.runs if run.number == number), None)

    def select(self, index: int) -> None:
        """Look at a token. The first time that it is one of the prompt, the prompt is scored for it."""
        run = self.run
        self.selected = index if run and index < len(run.tokens) else None
        if self.selected and not run.tokens[index].stages:  # the first has nothing before it
            self.worker.start(lambda: self._score(run))
        self._changed()

    def _start(self, run: Run, settings: dict) -> bool:
        started = self.worker.start(lambda: self._generate(run, settings))
        self._changed()
        return started

    def _generate(self, run: Run, settings: dict) -> None:
        llama = self.worker.load(*run.origin)
        settings = {"batch_size": batch_size(llama.config)} | settings
        known = [token.id for token in (*run.prompt_tokens, *run.taken)]
        generation = llama.stream(known or run.prompt, stages=True, **settings)
        self._number += 1
        run.begin(self._number, llama, generation)
        self.selected, self.run, self.runs = None, run, [*self.runs, run][-HISTORY:]
        try:
            for _ in generation:
                self.worker.tell()
        finally:
            run.end()

    def _score(self, run: Run) -> None:
        llama = self.worker.load(*run.origin)
        self.worker.doing = "Reading the prompt once more, for the probabilities of its tokens"
        ids = [token.id for token in run.prompt_tokens]
        run.prompt_tokens = llama.score(ids, batch_size=batch_size(llama.config))


def batch_size(config: Config) -> int:
    """Tokens of a prompt that are computed at once, so few that a layer takes a fraction of a second.

    A flag is looked at between two layers; benchmarks/stop.py measures how long one waits.
    """
    tokens = LAYER_WORK // sum(map(math.prod, config.layer_shapes().values()))
    return 1 << min(max(tokens, FEWEST), 512).bit_length() - 1
