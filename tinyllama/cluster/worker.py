"""What runs on the workers of a cluster: a share of a batch.

The pieces that a process has at the same time are answered together, by one of their threads for all.
"""

import threading
from collections import deque
from dataclasses import dataclass
from weakref import WeakValueDictionary

from distributed import get_worker, secede

from ..errors import Cancelled
from ..llama import load
from ..texts.answering import Answering
from ..texts.openai import Refused
from .found import Wanted

LOOK = 0.5  # seconds between two looks whether somebody waits for what a thread waits for


@dataclass(frozen=True)
class Work:
    """What the workers of a run are for. `run` tells it from others."""

    run: str
    wanted: Wanted
    name: str  # of the model, in answers
    ctx_size: int | None
    batch_size: int


class Shared:
    """An Answering for all threads of a process, of which one takes the turns until its own piece is done."""

    def __init__(self, answering: Answering):
        self._answering, self._changed, self._is_led = answering, threading.Condition(), False
        self._waiting: deque[tuple[object, dict]] = deque()
        self._ended: dict[object, dict | Refused] = {}

    def answer(self, entries: list[dict]) -> list[dict | Refused]:
        """What becomes of each request. Raises Cancelled where nobody waits for it any more."""
        jobs = [object() for _ in entries]
        self._waiting.extend(zip(jobs, entries, strict=True))
        while not self._have(jobs):
            with self._changed:
                self._changed.wait_for(lambda: not self._is_led or self._have(jobs), LOOK)
                leads, self._is_led = not self._is_led, True
            try:
                while leads and not self._have(jobs):
                    self._take_turn()
            finally:
                if leads:
                    self._tell(is_led=False)
            _check_wanted()
        return [self._ended.pop(job) for job in jobs]

    def _have(self, jobs: list[object]) -> bool:
        return all(job in self._ended for job in jobs)

    def _take_turn(self) -> None:
        _check_wanted()
        while self._waiting:
            self._answering.add(*self._waiting.popleft())
        if ended := dict(self._answering.turn()):
            self._ended.update(ended)
            self._tell(is_led=True)

    def _tell(self, is_led: bool) -> None:
        """Wake the others: something has ended, or somebody else has to take the turns."""
        with self._changed:
            self._is_led = is_led
            self._changed.notify_all()


_shared: WeakValueDictionary[tuple, Shared] = WeakValueDictionary()


def answer(work: Work, entries: list[dict]) -> list[dict | Refused]:
    """Answer a piece of a batch, together with the others that this process has.

    It leaves its place among Dask's threads to the next piece: so the model always has texts to go on with.
    """
    secede()
    wanted = work.wanted
    with wanted.alone():
        shared = _shared.get(work.run)
        if shared is None:
            llama = load(wanted.model, *wanted.where(), mmap=wanted.mmap, **wanted.options)
            shared = Shared(Answering(llama, work.name, work.ctx_size, work.batch_size))
            _shared[work.run] = shared
    return shared.answer(entries)


def _check_wanted() -> None:
    """Raises Cancelled if the task that asks is nobody's any more: the batch has ended, or its client has."""
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    if task is None or task.state not in ("executing", "long-running"):
        raise Cancelled("nobody waits for these answers")
