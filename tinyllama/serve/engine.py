"""One thread that computes for all who ask, and the event loop that is told what it has.

All that runs through the model runs here, one pass after the other: a step of every text that is written, or
a piece of another job (a prompt that is scored, taps). So nobody waits for longer than a pass takes.

    event loop:  write, compute ----> inbox ----> thread:  begin, turn, turn, ...
                 Job.events <---- call_soon_threadsafe <----
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import NamedTuple

from ..errors import Cancelled, TinyllamaError, cancellable
from ..generation import Generation
from ..llama import Llama
from ..settings import Settings
from ..texts.completion import Token
from ..texts.schedule import AT_ONCE, Together

WAITING = 128  # texts and other jobs that wait, at most


class Busy(TinyllamaError):
    """Too many are waiting: come back later."""


class Ending(TinyllamaError):
    """The server ends."""


class Gone(Cancelled):
    """Nobody wants it any more."""


class Failed(TinyllamaError):
    """The model can't be computed any further."""


class Event(NamedTuple):
    """A text has been continued."""

    index: int  # of the text among those of its job
    piece: str
    n_tokens: int  # that it has now
    stop_reason: str | None


class Job:
    """What is computed for a request. It belongs to the event loop, but for `tell`.

    Attributes:
        texts: those that are written, once they have begun.
        result: of another job what it gave, once it has ended.
        n_open: texts that haven't ended; of another job 1 until it has.
    """

    def __init__(self, n_open: int, ended: Callable):
        self.texts: list[Generation] = []
        self.listed, self.n_light = 0, [0] * n_open  # tokens of each text that are `_light`
        self.result: object = None
        self.n_open, self._ended, self._loop = n_open, ended, asyncio.get_running_loop()
        self.cancelled = threading.Event()
        self._events: asyncio.Queue = asyncio.Queue()

    def tell(self, happened: object) -> None:
        """From the thread: an Event, of which the first says that all have begun; an exception; or None.

        None is the end of a job that isn't texts.
        """
        try:
            self._loop.call_soon_threadsafe(self._hear, happened)
        except RuntimeError:  # the loop has been closed
            self.cancel()

    def _hear(self, happened: object) -> None:
        n_before = self.n_open
        if isinstance(happened, Exception):
            self.n_open = 0
        elif happened is None or happened.stop_reason:
            self.n_open -= 1
        self._ended(n_before - self.n_open)
        self._events.put_nowait(happened)

    def cancel(self) -> None:
        """Nobody wants it any more: its texts end before their next steps."""
        self.cancelled.set()
        for text in self.texts:
            text.cancelled = True

    async def begun(self) -> None:
        """Wait until all texts have begun. Raises what kept them from it."""
        happened = await self._events.get()
        if isinstance(happened, Exception):
            raise happened

    async def events(self):
        """What happens, until all has ended. Raises what went wrong."""
        while self.n_open or not self._events.empty():
            happened = await self._events.get()
            if isinstance(happened, Exception):
                raise happened
            if happened and happened.stop_reason == "cancelled":
                raise Gone("cancelled")
            yield happened

    async def done(self) -> object:
        """Wait for the end, and give the result. Raises what went wrong."""
        async for _ in self.events():
            pass
        return self.result


class Engine:
    """The thread. `write` and `compute` are called in an event loop, and so is whoever a job tells something.

    Attributes:
        llama: its model.
        ending: whether nothing new is begun.
        n_texts: how many texts have not ended, and other jobs.
        most: how many there may be.
    """

    def __init__(self, llama: Llama, at_once: int | None = None, waiting: int = WAITING):
        self.llama, self.most, self.ending, self.n_texts = llama, (at_once or AT_ONCE) + waiting, False, 0
        self._stop, self._inbox = threading.Event(), SimpleQueue()
        self._together = Together(llama, cancel=self._stop, at_once=at_once)
        self._owners: dict[Generation, tuple[Job, int]] = {}
        self._others: deque[tuple[Job, Iterator]] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def n_running(self) -> int:
        """Texts and other jobs that are being computed."""
        return self._together.n_running + bool(self._others)

    def write(
        self,
        wanted: list[tuple[str | list[int], Settings]],
        bias: dict | None = None,
        listed: int | None = None,
    ) -> Job:
        """Have texts written. Raises Busy or Ending.

        Args:
            wanted: prompts, and how each is continued.
            bias: as of `Together.begin`.
            listed: so many of the likeliest tokens in each place are kept.
        """
        job = self._admitted(len(wanted))
        job.listed = listed or 0
        self._inbox.put(lambda: self._begin(job, wanted, bias))
        return job

    def compute(self, pieces: Callable[[threading.Event], Iterator], follows: bool = False) -> Job:
        """Have something else computed. Raises Busy or Ending.

        Args:
            pieces: called in the thread with the flag that cancels the job; a generator, whose pieces are
                computed between the steps of texts and whose return value becomes the job's result.
            follows: it is what a request still needs whose texts have been written: it is never refused.
        """
        job = self._admitted(1, follows)
        self._inbox.put(lambda: self._others.append((job, pieces(job.cancelled))))
        return job

    def require_open(self) -> None:
        """Raises Ending where nothing new is begun."""
        if self.ending:
            raise Ending("the server is ending")

    def _admitted(self, n: int, follows: bool = False) -> Job:
        if self._stop.is_set() or not follows:
            self.require_open()
        if self.n_texts + n > self.most and not follows:
            raise Busy(f"{self.n_texts} texts are being written or waiting: try again later")
        self.n_texts += n
        return Job(n, self._has_ended)

    def _has_ended(self, n: int) -> None:
        self.n_texts -= n

    def stop(self) -> None:
        """End whatever is computed before the next layer, and the thread. Those who wait are told Ending."""
        self.ending = True
        self._stop.set()
        if not self._thread.is_alive():
            return
        self._inbox.put(lambda: None)
        self._thread.join()

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            self._take(wait=not len(self._together) and not self._others)
            if self._others:
                self._advance()
            if len(self._together):
                self._turn()
        self._take(wait=False)
        for job in [
            *dict.fromkeys(job for job, _ in self._owners.values()),
            *(job for job, _ in self._others),
        ]:
            job.tell(Ending("the server has ended"))

    def _take(self, wait: bool) -> None:
        """Begin what has come."""
        try:
            while True:
                self._inbox.get(wait)()
                wait = False
        except Empty:
            pass

    def _begin(self, job: Job, wanted: list, bias: dict | None) -> None:
        try:
            for prompt, settings in wanted:
                job.texts.append(self._together.begin(prompt, settings, bias))
        except Exception as error:
            for text in job.texts:
                text.end("cancelled")
            return job.tell(error)
        job.tell(Event(0, "", 0, None))
        if job.cancelled.is_set():  # meanwhile
            job.cancel()
        for index, text in enumerate(job.texts):
            self._owners[text] = job, index
            self._deliver(text, "")

    def _deliver(self, text: Generation, piece: str) -> None:
        job, index = self._owners[text]
        for at, token in enumerate(text.tokens[job.n_light[index] :], job.n_light[index]):
            text.tokens[at] = _light(token, job.listed)
        job.n_light[index] = len(text.tokens)
        if piece or text.stop_reason:
            job.tell(Event(index, piece, len(text.tokens), text.stop_reason))
        if text.stop_reason:
            del self._owners[text]

    def _turn(self) -> None:
        """A step of every text."""
        pieces = self._together.pieces
        try:
            with self.llama.backend.running():
                self._together.turn()
        except Cancelled:
            return
        except Exception as error:  # of a damaged file, say: what is being written can't go on
            for text in self._owners:
                text.stop_reason = "cancelled"  # its cache may be what fails
            for job in dict.fromkeys(job for job, _ in self._owners.values()):
                job.tell(Failed(error))
            self._owners.clear()
            pieces.clear()
        while pieces:
            text, piece = pieces.popleft()
            if text in self._owners:
                self._deliver(text, piece)
        if not len(self._together):
            self._together.turn()  # which lets go of those that have ended

    def _advance(self) -> None:
        """A piece of another job."""
        job, pieces = self._others.popleft()
        if job.cancelled.is_set():
            pieces.close()
            job.tell(Gone("cancelled"))
            return
        try:
            with cancellable(self._stop), self.llama.backend.running(job.cancelled):
                next(pieces)
            self._others.appendleft((job, pieces))
        except StopIteration as ended:
            job.result = ended.value
            job.tell(None)
        except Exception as error:
            job.tell(error)


def _light(token: Token, listed: int) -> Token:
    """A token without what no answer tells, which is most of what it takes."""
    if not token.stages:
        return token
    first, none = token.stages[0], token.stages[0].removed[:0].copy()
    kept, probs = first.kept[:listed].copy(), first.probs[:listed].copy()
    return replace(token, stages=(replace(first, kept=kept, probs=probs, removed=none),))
