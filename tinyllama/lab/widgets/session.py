"""What the playground knows and does, without a widget: runs of models, and their history.

A `Session` starts runs in a thread of its own and keeps what came of them. Whoever shows it gives it a
function that is called when something has changed, from that thread too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...config import Config
from ...generation import Generation
from ...llama import Llama
from ...texts import templates
from ...texts.chat import Chat
from ...texts.completion import Completion, Token
from ...tokenizer import TextStream, Tokenizer
from .attention import attention
from .worker import Worker

#: Of Simon Willison's "Running LLaMA 7B and 13B on a 64GB M2 MacBook Pro with llama.cpp" (March 2023).
PROMPTS = (
    "The first man on the moon was",
    "Step by step guide to raise the dead:",
    "def open_and_return_content(filename):",
    "Great pun names for a coffee shop run by otters:",
)

MESSAGES = ("Hi! Who are you, and what is the capital of France?", "Give me three names for an otter.")

LAYER_WORK, FEWEST = 2**34, 16  # multiply-adds that Stop may wait for; tokens that are worth a batch
ROLES = ("user", "assistant")  # who speaks first in a chat, and who answers
HISTORY = 30  # runs that are kept; a token's record of its sampling takes about 4 kB


@dataclass(eq=False)
class Run:
    """One run: what went in, and what has come out so far. In a chat it is one answer."""

    prompt: str  # in a chat, what the user said
    origin: tuple  # the model, backend and threads that `load` takes
    prompt_tokens: Sequence[Token] = ()  # their probabilities are None until `Session.select` asks for them
    taken: Sequence[Token] = ()  # from an earlier run that this one continues
    changed: int | None = None  # the index of a token that was picked in place of another
    number: int = 0  # 1 for the first
    name: str = ""  # that somebody gave it
    system: str | None = None  # what the model of a chat is told before it; None: this is no chat
    before: "Run | None" = None  # the answer to which the user says this
    turn: object = field(default_factory=object)  # the same for all answers to one message
    continued: "Run | None" = None  # the run that this one goes on with, all of it
    warnings: Sequence[str] = ()  # what will worsen the text
    memory: tuple[int, int] = (0, 0)  # bytes of the model's weights, and of texts: this one and remembered
    can_chat: bool = False  # the model is made for chats
    tokenizer: Tokenizer | None = None  # of its model
    generation: Generation | None = None  # while it goes on: a history of models would fill the memory
    _completion: Completion | None = None

    def begin(self, number: int, llama: Llama, generation: Generation) -> None:
        """The model is there, and the first token is about to be chosen."""
        self.number, self.name, self.tokenizer = number, "", llama.tokenizer
        self.generation, self.warnings = generation, generation.warnings
        self.origin = llama.name, llama.backend.name, llama.backend.threads
        self.can_chat = bool(llama.checkpoint.template) and templates.available()
        if not self.prompt_tokens:
            ids = generation.prompt_ids
            self.prompt_tokens = [Token(token, self.tokenizer.piece(token), None) for token in ids]

    def end(self, llama: Llama) -> None:
        """Keep what was written and let the model go."""
        weights = llama.backend.memory(llama.config, llama.checkpoint.tensors, 1, mmap=llama.mapped)
        self.memory = weights["weights"], llama.remembered.nbytes
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
    def answer(self) -> str:
        """What stands behind the prompt, up to a stop string."""
        first = len(self.prompt_tokens)
        return "".join(self.texts()[first : first + len(self.taken)]) + self.completion

    @property
    def text(self) -> str:
        """Prompt and completion, or the whole chat, as one would paste them somewhere."""
        if self.system is None:
            return self.prompt + "".join(self.texts()[len(self.prompt_tokens) :])
        return "\n\n".join(f"{said['role'].capitalize()}: {said['content']}" for said in self.messages)

    @property
    def path(self) -> list["Run"]:
        """The answers of a chat up to this one, and it."""
        found: list[Run] = [self]
        while before := found[0].before:
            found.insert(0, before)
        return found

    @property
    def messages(self) -> list[dict]:
        """All that was said in a chat up to this answer, and it."""
        said = [(run.prompt, run.answer) for run in self.path]
        chat = [
            {"role": role, "content": text} for both in said for role, text in zip(ROLES, both, strict=True)
        ]
        return [{"role": "system", "content": self.system}] * bool(self.system) + chat


class Session:
    """Runs, one at a time, and what has become of them.

    Attributes:
        worker: the thread in which they are made; stops it, and knows why the last one failed.
        runs: the last HISTORY ones, oldest first.
        run: the one that is shown, or None.
        selected: the index of the token that is looked at, or None.
        attends: whether it is asked for what this token's pass attended to.
        chatting: whether it shows chats, not texts.
        chat: of the chat that is shown, the last answer; None: nothing has been said yet.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None):
        self.worker = Worker(changed)
        self.runs: list[Run] = []
        self.run: Run | None = None
        self.selected: int | None = None
        self.attends = False
        self.chatting, self.chat = False, None
        self._changed, self._number = changed, 0
        self._attended: tuple = (None, None, None)  # run, index, and what `attention` found

    def generate(self, prompt: str, model="small", backend=None, threads=None, **settings) -> bool:
        """Start a run; says whether it was started, which it isn't while another one goes on."""
        return self._start(Run(prompt, (model, backend, threads)), settings)

    def ask(
        self, message: str, model="small", backend=None, threads=None, system="", instead=None, **settings
    ) -> bool:
        """Say something in the chat that is shown, and start the answer.

        Args:
            system: what the model is told before the chat.
            instead: an answer of this chat. The message takes the place of the one to which it is; if that
                is the same, this is another answer beside it.
        """
        run = Run(
            message, (model, backend, threads), system=system, before=instead.before if instead else self.chat
        )
        if instead and instead.prompt == message:
            run.turn = instead.turn
        return self._start(run, settings)

    def edit(self, run: Run, answer: str, **settings) -> bool:
        """Put other words into the model's mouth, beside this answer; it isn't asked to go on."""
        ids = run.tokenizer.encode(answer, bos=False)
        taken = [Token(token, run.tokenizer.piece(token), None) for token in ids]
        return self._start(
            replace(run, taken=taken, changed=None, continued=None), settings | {"n_predict": 0}
        )

    def take(self, run: Run) -> None:
        """Let the chat go on from this answer, or show what was said after it, the last time."""
        self.run, self.selected = run, None
        self.chat = next((later for later in reversed(self.runs) if run in later.path), run)
        self._changed()

    def turns(self) -> list[list[Run]]:
        """The chat that is shown: of each message its answers, oldest first."""
        return [self.answers(run) for run in (self.chat.path if self.chat else ())]

    def answers(self, run: Run) -> list[Run]:
        """This answer and those beside it, but for those that another one of them goes on with."""
        found = [*(one for one in self.runs if one.turn is run.turn and one is not run), run]
        continued = [one.continued for one in found]
        return sorted(
            (one for one in found if one is run or one not in continued), key=lambda one: one.number
        )

    def resume(self, **settings) -> bool:
        """Go on where the shown run ended, with other settings if wanted."""
        if (run := self.run) is None:
            return False
        taken = run.tokens[len(run.prompt_tokens) :]
        return self._start(replace(run, taken=taken, continued=run), settings)

    def resume_with(self, index: int, token_id: int, **settings) -> bool:
        """Go on from a token of the shown run with another one in its place, one that its stages list."""
        if (run := self.run) is None or not (old := run.tokens[index]).stages:
            return False
        before, first = run.tokens[:index], old.stages[0]
        prob = dict(zip(first.kept.tolist(), first.probs.tolist(), strict=True))[token_id]
        picked = replace(old, id=token_id, piece=run.tokenizer.piece(token_id), prob=prob)
        new = replace(run, prompt_tokens=run.prompt_tokens[:index], changed=index, continued=None)
        new.taken = [*before[len(new.prompt_tokens) :], picked]
        if index < len(run.prompt_tokens):
            new.prompt = run.tokenizer.decode(token.id for token in before)
        return self._start(new, settings)

    def clear(self) -> None:
        """Show no run, begin a new chat, and forget the last error. The history stays."""
        self.worker.error, self.chat = "", None
        self.show(0)

    def switch(self, chatting: bool) -> None:
        """Show the chat, or the last text."""
        self.chatting, self.selected = chatting, None
        texts = [run for run in self.runs if run.system is None]
        self.run = self.chat if chatting else texts[-1] if texts else None
        self._changed()

    def show(self, number: int) -> None:
        """Show a run of the history; 0 shows none."""
        self.selected, self.run = None, self.find(number)
        if self.run:
            self.chatting = self.run.system is not None
            self.chat = self.run if self.chatting else self.chat
        self._changed()

    def find(self, number: int) -> Run | None:
        """The run of this number, if it is still known."""
        return next((run for run in self.runs if run.number == number), None)

    def select(self, index: int, run: Run | None = None) -> None:
        """Look at a token, of another run if wanted. What isn't known about it is computed."""
        self.run = run = run or self.run
        self.selected = index if run and index < len(run.tokens) else None
        self._look()

    def attend(self, wanted: bool) -> None:
        """Whether it is asked for what the pass that chose the selected token attended to."""
        self.attends = wanted
        self._look()

    @property
    def attention(self) -> np.ndarray | None:
        """Of the selected token, [n_layers, n_past], as `attention` gives it; None where it isn't known."""
        run, index, found = self._attended
        return found if self.attends and (run, index) == (self.run, self.selected) else None

    def _look(self) -> None:
        if self.selected and self._lacking(self.run, self.selected):
            self.worker.start(self._explain)
        self._changed()

    def _lacking(self, run: Run, index: int) -> str:
        """What isn't known about a token; the first has nothing before it."""
        if not run.tokens[index].stages:
            return "probability"
        return "attention" if self.attends and self._attended[:2] != (run, index) else ""

    def _start(self, run: Run, settings: dict) -> bool:
        started = self.worker.start(lambda: self._generate(run, settings))
        self._changed()
        return started

    def _generate(self, run: Run, settings: dict) -> None:
        llama = self.worker.load(*run.origin)
        settings = {"batch_size": batch_size(llama.config), "stages": True} | settings
        known = [token.id for token in (*run.prompt_tokens, *run.taken)]
        if known or run.system is None:
            generation = llama.stream(known or run.prompt, **settings)
        else:
            said = run.before.messages if run.before else []
            said = [message for message in said if message["role"] in ROLES]
            generation = Chat(llama, system=run.system, messages=said).stream(run.prompt, **settings)
        self._number += 1
        run.begin(self._number, llama, generation)
        self.selected, self.run, self.runs = None, run, [*self.runs, run][-HISTORY:]
        self.chatting, self.chat = run.system is not None, self.chat if run.system is None else run
        try:
            for _ in generation:
                self.worker.tell()
        finally:
            run.end(llama)

    def _explain(self) -> None:
        """Find out what isn't known about the selected token, and about one that is selected meanwhile."""
        while (index := self.selected) and (lacking := self._lacking(run := self.run, index)):
            llama = self.worker.load(*run.origin)
            if lacking == "probability":
                self._score(run, llama)
            else:
                self.worker.doing = "Reading the text once more, for what this token's pass attended to"
                ids = [token.id for token in run.tokens[:index]]
                self._attended = run, index, attention(llama, ids, batch_size(llama.config))

    def _score(self, run: Run, llama: Llama) -> None:
        self.worker.doing = "Reading the prompt once more, for the probabilities of its tokens"
        n, known = len(run.prompt_tokens), [*run.prompt_tokens, *run.taken]
        scored = llama.score([token.id for token in known], batch_size=batch_size(llama.config))
        known = [old if old.stages else new for old, new in zip(known, scored, strict=True)]
        run.prompt_tokens, run.taken = known[:n], known[n:]


def batch_size(config: Config) -> int:
    """Tokens of a prompt that are computed at once, so few that a layer takes a fraction of a second.

    A flag is looked at between two layers; benchmarks/stop.py measures how long one waits.
    """
    tokens = LAYER_WORK // sum(map(math.prod, config.layer_shapes().values()))
    return 1 << min(max(tokens, FEWEST), 512).bit_length() - 1
