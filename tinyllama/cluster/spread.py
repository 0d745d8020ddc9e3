"""The requests of a batch, spread over the workers of a Dask cluster.

A piece of some lines is handed to one worker, and each has four at a time, which it answers together. What
decides who computes what are a few rules:

- a worker that has fewer pieces gets the next one: so a fast one gets more than a slow one;
- the fewer lines wait, the smaller are the pieces;
- a piece whose worker has died waits again, before all others;
- when none waits, one that takes twice as long as usual is also given to a worker that has nothing to do, and
  the first answer counts. What a text becomes doesn't depend on who writes it.
"""

import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, KeysView
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue

from distributed import CancelledError, Client, Future

from ..errors import TinyllamaError, check_cancelled, require
from ..machine.limits import human
from ..machine.terminal import say
from ..texts.openai import Refused
from .connect import refill
from .found import Found, Wanted, another, lacks, look, unlike
from .worker import Work, answer

PIECE = 8  # lines of a piece, at most
AHEAD = 4  # pieces that a worker has at the same time
OFTEN = 1.0  # seconds between two looks at who is there
LOOK = 0.1  # seconds that are waited for an answer before something else is done
ALONE = 60  # seconds in which a process of this computer that has died should have been started anew
PATIENCE = 10  # seconds in which a worker has to send what it says it has
DEATHS = 20  # of workers, one after the other without any answer: what they are asked kills them


@dataclass(eq=False)
class Piece:
    """Lines that are answered together."""

    lines: list[tuple[object, dict]]
    handed_out: float


class Spread(AbstractContextManager):
    """What answers the requests of a batch in a cluster; has the interface of `texts.answering.Answering`.

    Jobs have a `number`, of their line, by which Dask's dashboard names what is being answered.
    """

    def __init__(self, client: Client, model: str, name: str, ctx_size: int | None, batch_size: int, **more):
        """Args:
        model: a file that every worker has under this path, or a name.
        more: of `found.Wanted`: backend, threads, mmap; and the backend's options.
        """
        self._work = Work(uuid.uuid4().hex[:8], Wanted.of(model, **more), name, ctx_size, batch_size)
        self._client, self._numbers, self._looked = client, count(1), 0.0
        self._seen = time.perf_counter()  # when there was a worker, the last time
        self._workers: dict[str, Found] = {}  # those that answer, by their addresses
        self._useless: dict[str, str] = {}  # why others don't
        self._waiting: deque[tuple[object, dict]] = deque()
        self._pieces: list[Piece] = []  # that are being answered, the oldest first
        #: What each worker does: it answers a piece, or looks what it has (None).
        self._tasks: dict[Future, tuple[str, Piece | None]] = {}
        self._ended: SimpleQueue[Future] = SimpleQueue()
        self._n_deaths, self._n_pieces, self._piece_seconds = 0, 0, 0.0
        self._started, self.n_tokens, self.load_seconds = time.perf_counter(), 0, 0.0

    def __exit__(self, *_) -> None:
        if self._client.status == "running":
            self._client.cancel([*self._tasks], force=True)

    # --- as of Answering --------------------------------------------------------------------------

    def __len__(self) -> int:
        """Requests that have no answer."""
        return len(self._waiting) + self.n_running

    @property
    def n_running(self) -> int:
        """Requests that workers have."""
        return sum(len(piece.lines) for piece in self._pieces)

    @property
    def room(self) -> bool:
        """Whether another request should be added now."""
        return len(self._waiting) < AHEAD * PIECE * max(1, len(self._workers))

    @property
    def seconds(self) -> float:
        """How long it takes by now, without looking for workers."""
        return time.perf_counter() - self._started - self.load_seconds

    @property
    def where(self) -> str:
        """Who answers, for those who wait."""
        return f" on {len(self._workers)} worker{'s' * (len(self._workers) != 1)}"

    def add(self, job, entry: dict) -> None:
        """Have a request answered; `turn` says what becomes of it."""
        self._waiting.append((job, entry))

    def turn(self) -> Iterator[tuple[object, dict | Refused]]:
        """Keep all workers busy, wait a moment, and give the requests that have been answered.

        Raises TinyllamaError where no worker can answer, or the scheduler is gone; Cancelled after Ctrl-C.
        """
        check_cancelled()
        self._look_around()
        self._hand_out()
        for future in self._futures():
            address, piece = self._tasks.get(future, (None, None))
            result = self._result(address, future) if address else None
            if result is None:  # its worker is gone, or somebody else was faster
                continue
            del self._tasks[future]
            if piece:
                yield from self._take(piece, result)
            else:
                self._hear(address, result)

    def _futures(self) -> Iterator[Future]:
        """Those that have ended, once one has, or after a moment."""
        wait = LOOK
        with suppress(Empty):
            while True:
                yield self._ended.get(timeout=wait)
                wait = 0

    # --- workers ----------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """See who has come and who has gone."""
        if time.perf_counter() < self._looked + OFTEN:
            return
        there, self._looked = self._there(), time.perf_counter()
        known = self._workers.keys() | {address for address, _ in self._tasks.values()}
        for address in known - there:
            say(f"worker {address} is gone")
            self._n_deaths += any(who == address and piece for who, piece in self._tasks.values())
            self._lose(address)
            what = f"the last {DEATHS} workers ended without an answer: what they log says why"
            require(self._n_deaths < DEATHS, what)
        self._useless = {address: why for address, why in self._useless.items() if address in there}
        for address, why in lacks(self._client, there - known - self._useless.keys()).items():
            if why:
                self._give_up(address, why)
            else:
                self._submit("look-for-model", address, None, look, self._work.wanted)
        require(not there or there - self._useless.keys(), "; ".join(self._useless.values()))
        self._seen = self._looked if there else self._seen
        ours = refill(self._client)
        what = f"no process has come back for {ALONE} seconds: what they log says why"
        require(not ours or self._looked < self._seen + ALONE, what)

    def _there(self) -> KeysView[str]:
        """The workers that the scheduler knows."""
        try:
            return self._client.nthreads().keys()
        except (OSError, ValueError, RuntimeError) as error:  # the last two of a client that is closed
            raise TinyllamaError(f"the scheduler is gone ({error}); what was answered is kept") from None

    def _submit(self, key: str, address: str, piece: Piece | None, function, *arguments) -> None:
        """Have one worker run a function, and no other: where it dies we decide what becomes of the piece."""
        key, alone = f"{key}-{next(self._numbers)}-{self._work.run}", {"allow_other_workers": False}
        future = self._client.submit(function, *arguments, key=key, workers=[address], **alone)
        self._tasks[future] = address, piece
        future.add_done_callback(self._ended.put)

    def _result(self, address: str, future: Future):
        """What a worker's task has returned; None where that is lost, or the worker is asked nothing more."""
        if future.status == "error":
            error = future.exception()
            said = str(error) if isinstance(error, TinyllamaError) else f"{type(error).__name__}: {error}"
            return self._give_up(address, f"{self._workers.get(address, f'worker {address}')}: {said}")
        if address in self._there():
            with suppress(TimeoutError, CancelledError):
                return future.result(timeout=PATIENCE)
        return self._lose(address)

    def _hear(self, address: str, found: Found | TinyllamaError) -> None:
        """Have a worker answer, if it has what that takes."""
        if isinstance(found, TinyllamaError):
            return self._give_up(address, str(found))
        if trouble := self._trouble(found):
            return self._give_up(address, f"{found}: {trouble}")
        before, self._workers[address] = unlike(self._workers.values()), found
        if (differ := unlike(self._workers.values())) and not before:
            say(f"warning: {differ}")
        self.load_seconds = self.load_seconds or time.perf_counter() - self._started

    def _trouble(self, found: Found) -> str:
        """Why a worker won't do, "" if it will."""
        first = next(iter(self._workers.values()), found)
        if found.digest != first.digest:
            return another(self._work.wanted.model, first)
        here = [worker for worker in [*self._workers.values(), found] if worker.host == found.host]
        needed, room = sum(one.needed for one in here), found.available + sum(one.used for one in here)
        if needed > room:
            return f"{len(here)} workers there need {human(needed)} of memory, and {human(room)} are free"
        if found.needed > found.allowed:
            limit = f"its --memory-limit leaves {human(found.allowed)}"
            return f"the model needs {human(found.needed)} of memory, and {limit}"
        return ""

    def _give_up(self, address: str, why: str) -> None:
        """Ask a worker nothing more."""
        self._useless[address], self._looked = why, 0.0
        self._lose(address)
        if self._workers or self._tasks:
            say(f"{why}; the others go on without it")

    def _lose(self, address: str) -> None:
        """What a worker has waits again, before all others."""
        self._workers.pop(address, None)
        lost = [future for future, (who, _) in self._tasks.items() if who == address]
        for future in reversed(lost):
            _, piece = self._tasks.pop(future)
            if piece and not self._who_has(piece):
                self._pieces.remove(piece)
                self._waiting.extendleft(reversed(piece.lines))
        self._client.cancel(lost, force=True)

    def _who_has(self, piece: Piece) -> dict[str, Future]:
        return {address: future for future, (address, own) in self._tasks.items() if own is piece}

    # --- pieces -----------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give each worker what it should have."""
        busy = Counter(address for address, _ in self._tasks.values())
        while self._workers:
            address = min(self._workers, key=busy.__getitem__)
            piece = self._next_piece() if busy[address] < AHEAD else None
            piece = piece or (self._late_piece() if not busy[address] else None)
            if piece is None:
                break
            busy[address] += 1
            first, last = piece.lines[0][0].number, piece.lines[-1][0].number
            entries = [entry for _, entry in piece.lines]
            self._submit(f"answers-of-lines-{first}-{last}", address, piece, answer, self._work, entries)

    def _next_piece(self) -> Piece | None:
        size = min(PIECE, -(-len(self._waiting) // (AHEAD * len(self._workers))))
        if not size:
            return None
        self._pieces.append(Piece([self._waiting.popleft() for _ in range(size)], time.perf_counter()))
        return self._pieces[-1]

    def _late_piece(self) -> Piece | None:
        """The oldest that a single worker has, and for longer than usual."""
        usual = self._piece_seconds / self._n_pieces if self._n_pieces else float("inf")
        before = time.perf_counter() - 2 * usual - OFTEN
        late = (piece for piece in self._pieces if piece.handed_out < before)
        return next((piece for piece in late if len(self._who_has(piece)) == 1), None)

    def _take(self, piece: Piece, outcomes: list[dict | Refused]) -> Iterator[tuple[object, dict | Refused]]:
        """The answers of a piece, which nobody has to give any more."""
        if others := [*self._who_has(piece).values()]:
            self._tasks = {future: task for future, task in self._tasks.items() if future not in others}
            self._client.cancel(others, force=True)
        self._pieces.remove(piece)
        self._n_deaths, self._n_pieces = 0, self._n_pieces + 1
        self._piece_seconds += time.perf_counter() - piece.handed_out
        for (job, _), outcome in zip(piece.lines, outcomes, strict=True):
            self.n_tokens += 0 if isinstance(outcome, Refused) else outcome["usage"]["completion_tokens"]
            yield job, outcome
