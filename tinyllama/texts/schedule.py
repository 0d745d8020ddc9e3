"""Which tokens of which texts go through the model together.

A pass reads all weights, whether it computes one token or sixteen. So the texts that are being written take
their steps together, up to `ops.FEW` tokens in a pass, which gives each the bits that it would have alone.
Prompts are read one after the other, a piece between two steps of the others: nobody waits for longer than a
piece takes, and each prompt finds read what it has in common with those before it.

    waiting --(there is memory for its cache)--> its prompt is read --> written, with all others --> ended
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import Cancelled, require
from ..generation import Generation
from ..model import Step
from ..ops import FEW
from ..settings import Settings
from ..taps.watch import kept_bytes
from .completion import Completion

AT_ONCE = 32  # texts that are written together; of more, each would be slower and all together no faster


class Schedule:
    """Texts that share a model. One thread takes the turns; any may add texts, or have one `cancelled`.

    Args:
        run: sends Steps through the model together: of each the logits, [n_logits, vocab_size].
        room: bytes that the caches of texts may take that are written at the same time.
        at_once: how many are written at the same time, at most; None: AT_ONCE.

    Attributes:
        pieces: what texts have been continued by: (text, piece), in the order in which it was written.
    """

    def __init__(self, run: Callable, room: int, at_once: int | None = None):
        self._run, self._room, self._at_once = run, room, at_once or AT_ONCE
        self._waiting: deque[tuple[Generation, int]] = deque()
        self._running: dict[Generation, int] = {}  # -> bytes of its cache once it is full
        self._biases: WeakKeyDictionary[Generation, np.ndarray] = WeakKeyDictionary()
        self.pieces: deque[tuple[Generation, str]] = deque()

    def __len__(self) -> int:
        """How many texts have not ended."""
        return sum(text.stop_reason is None for text in self._all())

    @property
    def n_running(self) -> int:
        """How many texts are being written."""
        return sum(text.stop_reason is None for text in [*self._running])

    def _all(self) -> list[Generation]:
        return [*self._running, *(text for text, _ in [*self._waiting])]

    def add(self, text: Generation, n_bytes: int, bias: np.ndarray | None = None) -> None:
        """Have a text written once there is room for so many bytes and its drafts', or nothing else runs.

        bias: what is added to its logits, [vocab_size].
        """
        if bias is not None:
            self._biases[text] = bias
        self._waiting.append((text, n_bytes + text.drafts.cache_bytes(text.most)))

    def turn(self) -> None:
        """Compute a piece of the first prompt that isn't read, and a step of every text that is.

        Raises Cancelled where `run` does. Texts that had their step before that keep it.
        """
        self._admit()
        reading = [text for text in self._running if text.reads_many]
        if reading:
            self._compute([(reading[0], reading[0].step())])
        group: list[tuple[Generation, Step]] = []
        texts = [text for text in self._running if text.stop_reason is None and not text.reads_many]
        for text in texts:
            step = text.step(len(texts))
            if sum(len(other.tokens) for _, other in group) + len(step.tokens) > FEW:
                self._compute(group)
                group = []
            group.append((text, step))
        if group:
            self._compute(group)

    def _admit(self) -> None:
        for text in self._all():
            if text.cancelled and text.stop_reason is None:
                self.pieces.append((text, text.end("cancelled")))
        self._running = {text: n_bytes for text, n_bytes in self._running.items() if text.stop_reason is None}
        while self._waiting and len(self._running) < self._at_once:
            text, n_bytes = self._waiting[0]
            if self._running and sum(self._running.values()) + n_bytes > self._room:
                break
            self._waiting.popleft()
            if text.stop_reason is None:
                self._running[text] = n_bytes

    def _compute(self, group: list[tuple[Generation, Step]]) -> None:
        """One pass."""
        started = time.perf_counter()
        found = self._run([step for _, step in group])
        seconds, n_tokens = time.perf_counter() - started, sum(len(step.tokens) for _, step in group)
        for (text, step), logits in zip(group, found, strict=True):
            if text in self._biases:
                logits = logits + self._biases[text]
            text.timings.total += seconds
            with text.timings.adding_to("total"):
                piece = text.feed(logits, seconds, n_tokens - len(step.tokens))
            self.pieces.append((text, piece))


class Together(Schedule):
    """A Schedule of texts of one model, which may come one by one.

    Args:
        llama: the model.
        batch_size: the most tokens of a prompt that will be computed at once.
        cancel: as of `Llama.stream`.
        at_once: as of Schedule.
    """

    def __init__(self, llama, batch_size: int = Settings.batch_size, cancel=None, at_once: int | None = None):
        room = llama.backend.cache_room(llama.config, batch_size)
        super().__init__(partial(llama.run, cancel=cancel), room, at_once)
        self._llama, self._cancel = llama, cancel

    def begin(self, prompt: str | list[int], wanted: Settings, bias: dict | None = None) -> Generation:
        """Have a prompt continued; what becomes of it doesn't depend on the others.

        bias: what is added to the logits of tokens, by their ids.

        Raises TinyllamaError where it is empty or too long, or its cache doesn't fit into memory even alone.
        """
        llama, added = self._llama, np.zeros(self._llama.config.vocab_size, np.float32)
        for token, logit in (bias or {}).items():
            require(token < len(added), f"token id {token} is not in 0..{len(added) - 1}")
            added[token] = logit
        recall = partial(llama.remembered.recall, whole=False)
        text = llama.begin(prompt, wanted, recall, self._cancel)
        n_bytes = llama.backend.cache_bytes(llama.config, text.most) + kept_bytes(text)
        if n_bytes > self._room:
            llama.backend.require_run(llama.config, text.most, n_bytes=kept_bytes(text))
        self.add(text, n_bytes, added if bias else None)
        return text


class Texts:
    """Several texts while they are written together: an iterator over (index, piece).

    Attributes:
        generations: each of the texts.
        seconds: how long they have been computed.
    """

    def __init__(self, generations: list[Generation], schedule: Schedule, door: Callable):
        self.generations, self.seconds = generations, 0.0
        self._schedule, self._door = schedule, door
        self._numbers = {text: number for number, text in enumerate(generations)}

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        pieces, piece = self._schedule.pieces, ""
        while not piece:
            if not pieces and not len(self._schedule):
                raise StopIteration
            if not pieces:
                self._take_turn()
            text, piece = pieces.popleft() if pieces else (None, "")
        return self._numbers[text], piece

    def _take_turn(self) -> None:
        started = time.perf_counter()
        try:
            with self._door():
                self._schedule.turn()
        except Cancelled:
            self.stop()
        self.seconds += time.perf_counter() - started

    def stop(self, index: int | None = None) -> None:
        """End one text, or all of them, before their next steps; what they have so far stays theirs."""
        for text in self.generations if index is None else [self.generations[index]]:
            text.cancelled = True

    def finish(self) -> list[Completion]:
        """Run to the end and return all texts."""
        with self._door():
            for _ in self:
                pass
        return [text.completion() for text in self.generations]
