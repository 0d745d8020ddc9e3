"""Which tokens of which texts go through the model together.

A pass reads all weights, whether it computes one token or sixteen. So the texts that are being written take
their steps together, up to `ops.FEW` tokens in a pass, which gives each the bits that it would have alone.
Prompts are read one after the other, a piece between two steps of the others: nobody waits for longer than a
piece takes, and each prompt finds read what it has in common with those before it.

    waiting --(there is memory for its cache)--> its prompt is read --> written, with all others --> ended

A model that lies on several machines has as many passes under way, each of other texts: one on each machine.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

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
        run: sends Steps through the model together: of each the logits, [n_logits, vocab_size], or what its
            `choose` made of them. Where several passes are under way, it returns a function that waits.
        room: bytes that the caches of texts may take that are written at the same time.
        at_once: how many are written at the same time, at most; None: AT_ONCE.
        depth: how many passes are under way at the same time.

    Attributes:
        pieces: what texts have been continued by: (text, piece), in the order in which it was written.
    """

    def __init__(self, run: Callable, room: int, at_once: int | None = None, depth: int = 1):
        self._run, self._room, self._at_once, self._depth = run, room, at_once or AT_ONCE, depth
        self._under_way: deque[tuple[list, float, object]] = deque()
        self._waiting: deque[tuple[Generation, int]] = deque()
        self._running: dict[Generation, int] = {}  # -> bytes of its cache once it is full
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

    def add(self, text: Generation, n_bytes: int) -> None:
        """Have a text written once there is room for so many bytes and its drafts', or nothing else runs."""
        self._waiting.append((text, n_bytes + text.drafts.cache_bytes(text.most)))

    def turn(self) -> None:
        """Compute a piece of the first prompt that isn't read, and a step of every text that is.

        Raises Cancelled where `run` does. Texts that had their step before that keep it.
        """
        self._admit()
        for text in [text for text in self._running if text.reads_many][: self._depth]:
            self._wait_for(text)
            if text.reads_many:
                self._begin([(text, text.step())])
        group: list[tuple[Generation, Step]] = []
        texts = [text for text in self._running if text.stop_reason is None and not text.reads_many]
        n_together = -(-len(texts) // self._depth)  # texts in a pass
        for text in texts:
            self._wait_for(text)
            if text.stop_reason is not None:
                continue
            step = text.step(len(texts))
            if sum(len(other.tokens) for _, other in group) + len(step.tokens) > FEW:
                self._begin(group)
                group = []
            group.append((text, step))
            if len(group) == n_together:  # before the next text is waited for
                self._begin(group)
                group = []
        if group:
            self._begin(group)

    def _admit(self) -> None:
        for text in self._all():
            if text.cancelled and self._wait_for(text).stop_reason is None:
                self.pieces.append((text, text.end("cancelled")))
        self._running = {text: n_bytes for text, n_bytes in self._running.items() if text.stop_reason is None}
        while self._waiting and len(self._running) < self._at_once:
            text, n_bytes = self._waiting[0]
            if self._running and sum(self._running.values()) + n_bytes > self._room:
                break
            self._waiting.popleft()
            if text.stop_reason is None:
                self._running[text] = n_bytes

    def _begin(self, group: list[tuple[Generation, Step]]) -> None:
        """Begin a pass, and end the oldest ones if there are enough."""
        self._under_way.append((group, time.perf_counter(), self._run([step for _, step in group])))
        while len(self._under_way) >= self._depth:
            self._end()

    def _wait_for(self, text: Generation) -> Generation:
        """A text none of whose steps is under way."""
        while any(text is other for group, *_ in self._under_way for other, _ in group):
            self._end()
        return text

    def _end(self) -> None:
        """Wait for the oldest pass, and give each of its texts what it computed."""
        group, started, found = self._under_way.popleft()
        try:
            found = found() if callable(found) else found
        except BaseException:
            self._under_way.clear()
            raise
        seconds, n_tokens = time.perf_counter() - started, sum(len(step.tokens) for _, step in group)
        for (text, step), made in zip(group, found, strict=True):
            text.timings.total += seconds
            with text.timings.adding_to("total"):
                piece = text.feed(made, seconds, n_tokens - len(step.tokens))
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
        depth = llama.backend.depth
        run = llama.start if depth > 1 else llama.run
        super().__init__(partial(run, cancel=cancel), room, at_once, depth)
        self._llama, self._cancel = llama, cancel

    def begin(self, prompt: str | list[int], wanted: Settings, bias: dict | None = None) -> Generation:
        """Have a prompt continued; what becomes of it doesn't depend on the others.

        bias: what is added to the logits of tokens, by their ids.

        Raises TinyllamaError where it is empty or too long, or its cache doesn't fit into memory even alone.
        """
        llama, n = self._llama, self._llama.config.vocab_size
        for token in bias or {}:
            require(token < n, f"token id {token} is not in 0..{n - 1}")
        recall = partial(llama.remembered.recall, whole=False)
        text = llama.begin(prompt, wanted, recall, self._cancel)
        n_bytes = llama.backend.cache_bytes(llama.config, text.most) + kept_bytes(text)
        if n_bytes > self._room:
            llama.backend.require_run(llama.config, text.most, n_bytes=kept_bytes(text))
        text.bias = bias or {}
        self.add(text, n_bytes)
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
