"""A Llama whose layers lie on several workers. Of the model only its vocabulary is here.

Texts, schedules and tools use it as any other: they need its `run`, and of a cache the ids.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from concurrent.futures import CancelledError as FuturesCancelled
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from ..backends import Packing
from ..errors import TinyllamaError, check_cancelled, naming, require
from ..llama import Llama
from ..model import Step
from ..ops import KVCache
from ..taps.edits import edited, is_edited
from ..texts.doubts import require_finite
from ..texts.drafts import Pace
from ..texts.remembered import Remembered
from ..tokenizer import make_tokenizer
from .far import NO_FILE, Far
from .shares import Worker
from .stage import Done, Fork, Lost, Part, Pass, Seen, Stage, call

PIECE = 64  # tokens, at least, of a long prompt that go through a stage together; more than ops.FEW
LOOK = 0.05  # seconds between two looks for Ctrl-C
DIRECT = 2.0  # seconds in which a worker that can be reached has answered
PATIENCE = 5.0  # seconds in which Dask finds out that a worker is gone
GRACE = 0.5  # seconds that stages have to give their memory back; one that stands still does it later


@dataclass(eq=False)
class Run:
    """Steps on their way through the stages, in one pass or, of a long prompt, in several."""

    steps: Sequence[Step]
    passes: list[Pass] = field(default_factory=list)
    futures: list[Future] = field(default_factory=list)  # of the passes; none where taps see values
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        self._lengths = [len(step.cache) for step in self.steps]

    def count(self) -> None:
        """Add its tokens to the caches."""
        n_together = sum(len(part.tokens) for part in self.passes[-1].parts)
        for step in self.steps:
            step.cache.extend([*map(int, step.tokens)], n_together)

    def undo(self) -> None:
        """Take them out again."""
        for step, length in zip(self.steps, self._lengths, strict=True):
            step.cache.trim(length)


class Pipeline(Llama):
    """A model of which each worker has some layers.

    Attributes:
        shares: the layers of each worker, in their order.
        took: the seconds of the last steps, and those that each stage computed, in all passes.
        forgotten, forks: of caches, what the next pass tells the stages.
    """

    def __init__(self, opened: ExitStack, client, model: str, shares: dict[Worker, range], options: dict):
        """Args:
        opened: what ends with it, or where this fails.
        shares: none of the ranges is empty.
        options: of the backend.
        """
        self.name, self.shares, self._client = model, shares, client
        self._model, self._lost, self._tapping = None, "", threading.local()
        self.forgotten: list[int] = []
        self.forks: list[Fork] = []
        self.took: tuple[float, tuple[float, ...]] = (0.0, ())
        self._n_passes, self._lock = 0, threading.Lock()
        self._actors = [self._start(worker, layers, options) for worker, layers in shares.items()]
        opened.callback(client.cancel, self._actors, force=True)
        while not all(actor.done() for actor in self._actors):
            check_cancelled()
            gone = self._gone()
            require(not gone, gone)
            time.sleep(LOOK)
        for worker, actor in zip(shares, self._actors, strict=True):
            with naming(str(worker)):
                actor.result()
        self._routes = [self._route(worker.address) for worker in shares]
        behind = [(worker.address, actor.key) for worker, actor in zip(shares, self._actors, strict=True)][1:]
        self.result(*(self._ask(stage, "follow", *next_one) for stage, next_one in enumerate(behind)))
        [(self.checkpoint, self.n_params)] = self.result(self._ask(0, "head"))
        self.config, self.backend = self.checkpoint.config, Far(self, options)
        self.tokenizer = make_tokenizer(self.checkpoint.vocabulary, self.checkpoint.path)
        self._model = self._actors
        self.packing, self.mapped = Packing(self.backend, {}, self.checkpoint.check_unchanged, False), False
        self.remembered, self.pace, self._templates = Remembered(), Pace(), {}
        self._opened = opened.pop_all()

    def _start(self, worker: Worker, layers: range, options: dict):
        """Have a worker open its layers."""
        key = f"layers-{layers.start}-to-{layers.stop - 1}-of-{Path(self.name).name}-{time.time_ns()}"
        where = {"workers": [worker.address], "allow_other_workers": False, "key": key}
        return self._client.submit(Stage, self.name, layers, worker, options, actor=True, **where)

    # --- passes -----------------------------------------------------------------------------------

    def run(self, steps: Sequence[Step], *, cancel=None, checked: bool = True) -> list:
        """As Llama's. Where a step says what to choose, that comes in place of its logits."""
        return self.start(steps, cancel=cancel, checked=checked)()

    def start(self, steps: Sequence[Step], *, cancel=None, checked: bool = True) -> Callable[[], list]:
        """Begin to run steps. Returns a function that waits for them, and gives what `run` does."""
        self.model()
        inside = "a tap or an edit can't run the model that it is in, where that lies on several machines"
        require(not getattr(self._tapping, "name", None), inside)
        run = Run([edited(self, step) for step in steps] if is_edited(self) else steps)
        if any(step.taps for step in run.steps):
            return partial(self._end, run, cancel, checked)
        with self.backend.running(cancel):
            check_cancelled()
            for parts in self._pieces(run.steps):
                self._send(run, parts)
        is_piece = not any(step.n_logits for step in run.steps)
        return partial(self._go_on if is_piece else self._end, run, cancel, checked)

    def _send(self, run: Run, parts: list[Part]) -> None:
        """Have the stages compute a pass."""
        run.passes.append(self._numbered(parts))
        run.futures.append(self._ask(0, "run", run.passes[-1]))

    def _numbered(self, parts: list[Part]) -> Pass:
        """The next pass. It has to be sent: the stages wait for it."""
        with self._lock:
            forks, forgotten = [*self.forks], [*self.forgotten]
            del self.forks[: len(forks)], self.forgotten[: len(forgotten)]
            self._n_passes += 1
            return Pass(self._n_passes - 1, parts, forks, forgotten)

    def _go_on(self, run: Run, cancel, checked: bool) -> list:
        """What `start` returns of a piece of a prompt, which the next one may follow without delay."""
        run.count()
        pieces = run.steps[0].cache.pieces
        pieces.append(run)
        if len(pieces) > len(self.shares):
            self._wait_for(pieces[:1], cancel)
        return [np.empty((0, self.config.vocab_size), np.float32) for _ in run.steps]

    def _end(self, run: Run, cancel, checked: bool) -> list:
        """What `start` returns of other steps."""
        pieces = [piece for step in run.steps for piece in step.cache.pieces]
        done = self._wait_for([*pieces, run], cancel)
        seconds = zip(*(some.seconds for some in done), strict=True)
        self.took = time.perf_counter() - run.started, tuple(map(sum, seconds))
        run.count()
        found = done[-1].found if len(done) == 1 else [_joined([some.found[0] for some in done])]
        for step, made in zip(run.steps, found, strict=True):
            if checked and isinstance(made, np.ndarray):
                require_finite(self, made, step.cache.ids)
        return found

    def _wait_for(self, runs: list[Run], cancel) -> list[Done]:
        """Wait for runs that follow each other; what the passes of the last one gave."""
        try:
            with self.backend.running(cancel):
                for run in runs:
                    done = self.result(*run.futures) if run.futures else self._shown(run)
                    self._leave(run)
        except BaseException:
            for run in reversed(runs):
                run.undo()
                self._leave(run)
            if self._model is not None:
                self.ask_all("stop", [given.number for run in runs for given in run.passes])
            raise
        return done

    def _leave(self, run: Run) -> None:
        for step in run.steps:
            step.cache.pieces = [piece for piece in step.cache.pieces if piece is not run]

    def _shown(self, run: Run) -> list[Done]:
        """Compute a pass whose values taps see: stage by stage, and from value to value."""
        check_cancelled()
        made = self._numbered([self._part(step, 0, len(step.tokens)) for step in run.steps])
        run.passes, last = [made], len(self.shares) - 1
        for stage in range(last + 1):
            try:
                [made] = self.result(self._ask(stage, "show", made))
                while isinstance(made, Seen):
                    new = self._tapped(run.steps[made.part], made)
                    check_cancelled()
                    [made] = self.result(self._ask(stage, "go_on", run.passes[0].number, new))
            except BaseException:
                if stage < last and self._model is not None:  # the later stages wait for this pass
                    self._ask(stage + 1, "run", replace(run.passes[0], parts=[]))
                raise
        return [made]

    def _tapped(self, step: Step, seen: Seen) -> np.ndarray | None:
        self._tapping.name = seen.name
        try:
            return step.taps[seen.name](seen.array)
        finally:
            self._tapping.name = None

    def _pieces(self, steps: Sequence[Step]) -> list[list[Part]]:
        """The parts of each pass: of a long prompt several passes, which follow each other closely."""
        n_tokens = len(steps[0].tokens)
        n_pieces = self.n_pieces(n_tokens)
        if len(steps) > 1 or n_pieces == 1:
            return [[self._part(step, 0, len(step.tokens)) for step in steps]]
        bounds = [n_tokens * number // n_pieces for number in range(n_pieces + 1)]
        return [[self._part(steps[0], *some)] for some in pairwise(bounds)]

    def n_pieces(self, n_tokens: int) -> int:
        """In how many passes so many tokens of one text are computed."""
        return n_tokens // PIECE if self.backend.is_piecewise and n_tokens >= 2 * PIECE else 1

    def _part(self, step: Step, start: int, stop: int) -> Part:
        cache, n_tokens = step.cache, len(step.tokens)
        n_logits = min(stop - start, max(0, stop - (n_tokens - step.n_logits)))
        choose = step.choose if stop == n_tokens else None
        tokens = [*map(int, step.tokens[start:stop])]
        return Part(cache.number, cache.n_ctx, len(cache) + start, tokens, n_logits, choose, (*step.taps,))

    # --- stages -----------------------------------------------------------------------------------

    def _ask(self, stage: int, method: str, *what) -> Future:
        """Have a stage do something."""
        asked = call(self._routes[stage], self._actors[stage].key, method, *what)
        try:
            return asyncio.run_coroutine_threadsafe(asked, self._client.loop.asyncio_loop)
        except RuntimeError:
            asked.close()
            raise TinyllamaError(f"{self.name}: its Dask client has been closed") from None

    def _route(self, address: str):
        """The way to a worker: straight, or where there is none, as into Kubernetes, by the scheduler."""
        from distributed.actor import ProxyRPC

        parts = urlsplit(address)
        try:
            socket.create_connection((parts.hostname, parts.port), timeout=DIRECT).close()
        except OSError:
            return ProxyRPC(self._client.scheduler, address)
        return self._client.rpc(address)

    def ask_all(self, method: str, *what) -> list[Future]:
        """Have all stages do something."""
        self.model()
        return [self._ask(stage, method, *what) for stage in range(len(self.shares))]

    def result(self, *futures) -> list:
        """What several futures give, or raise. Raises TinyllamaError where a worker is gone, and closes."""
        try:
            while (ended := wait(futures, LOOK, FIRST_EXCEPTION)).not_done:
                check_cancelled()
                for future in ended.done:
                    future.result()  # raises what it raised: others may wait for it in vain
                if any(actor.status != "finished" for actor in self._actors):
                    raise Lost("Dask says so")
            return [future.result() for future in futures]
        except (Lost, FuturesCancelled) as error:
            self._lost = self._lost or self._cause(error)
            self.close()
            raise TinyllamaError(self._lost) from None

    def _cause(self, error: Exception) -> str:
        """Why a stage doesn't answer."""
        until = time.monotonic() + PATIENCE
        while not (gone := self._gone()) and time.monotonic() < until:
            time.sleep(LOOK)
        return gone or f"{self.name}: a stage is lost ({error}): load the model again"

    def _gone(self) -> str:
        """What it means that a worker isn't there any more; nothing if all are."""
        try:
            there = self._client.nthreads()
        except (
            Exception
        ) as error:  # there are several, of a scheduler that is gone and of a client that is closed
            return f"the scheduler is gone ({error}), and with it {self.name}: load the model again"
        lost = [share for share in self.shares.items() if share[0].address not in there]
        for worker, layers in lost[:1]:
            what = f"layers {layers.start} to {layers.stop - 1} of {self.name}"
            return f"{worker} is gone, and with it {what}: load the model again"
        return ""

    # --- what else needs weights ------------------------------------------------------------------

    def unembed(self, residual: np.ndarray) -> np.ndarray:
        """As Llama's."""
        self.model()
        return self.result(self._ask(len(self.shares) - 1, "unembed", residual))[0]

    def weight(self, name: str) -> np.ndarray:
        """As Llama's."""
        self.model()
        found = [some for some in self.result(*self.ask_all("weight", name)) if some is not None]
        if name == "output" and not found:
            return self.weight("tok_embeddings")
        require(found, f"no weight is named {name!r}")
        return found[0]

    def load_cache(self, *_, **__) -> KVCache:
        """As Llama's; there is none."""
        raise TinyllamaError(NO_FILE)

    def model(self):
        """As Llama's: nothing here needs more of it than that it is there."""
        require(not self._lost, self._lost)
        return super().model()

    def close(self) -> None:
        """Have all workers give their memory back."""
        if self._model is not None:
            there = [stage for stage, actor in enumerate(self._actors) if actor.status == "finished"]
            with suppress(TinyllamaError):
                wait([self._ask(stage, "close") for stage in there], GRACE)
            super().close()
            with suppress(RuntimeError):  # of a client that has been closed before
                self._opened.close()


def _joined(found: list) -> object:
    """What the passes of one text gave: of the last what was chosen, or the logits of all."""
    return found[-1] if not isinstance(found[-1], np.ndarray) else np.concatenate(found)
