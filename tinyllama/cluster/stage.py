"""Some layers of a model on one worker, with their caches: a Dask actor.

A pass goes from stage to stage. The first looks up the embedding, each runs its layers and sends the residual
stream on, the last chooses tokens; what it answers comes back the same way. While a pass is in later stages,
the first ones compute the next.

    Pass 7, with ids       --> layers 0 to 19 --> Pass 7, with x --> layers 20 to 39 --> Done
                                                  Pass 8, with ids --> layers 0 to 19 --> ...
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

from ..backends import Packing, get_backend
from ..config import EMBEDDING, OUTPUT
from ..errors import cancellable, check_cancelled, require
from ..formats import Checkpoint, open_checkpoint
from ..model import Step, build, forward_texts, unembed
from ..ops import KVCache
from ..tensor import Tensor
from ..texts.choosing import Choice, Chosen
from .found import digest, left
from .shares import Worker

LOOK = 0.2  # seconds between two looks whether somebody still waits


class Lost(Exception):
    """A stage can't be reached."""


@dataclass
class Part:
    """Tokens of one text in a pass."""

    cache: int  # its number
    n_ctx: int  # tokens that it may hold
    n_past: int  # tokens of it that count; what a stage has beyond them is forgotten
    tokens: list[int]
    n_logits: int
    choose: Choice | None = None
    taps: tuple[str, ...] = ()  # names of values that somebody wants to see


@dataclass
class Fork:
    """A new cache that begins like another: see `KVCache.fork`."""

    cache: int
    new: int
    n_tokens: int
    n_ctx: int


@dataclass
class Pass:
    """What goes from stage to stage, each of which computes all of them in the order of their numbers."""

    number: int  # 0, 1, 2, ...
    parts: list[Part]  # none where it was stopped, or failed, in a stage before
    forks: list[Fork]
    forgotten: list[int]  # numbers of caches that nobody needs any more
    x: np.ndarray | None = None  # the residual stream, [n_tokens, dim]; None before the first stage
    seconds: tuple[float, ...] = ()  # that each stage has computed


@dataclass
class Done:
    """What the last stage answers: of each text what was chosen, or logits [n_logits, vocab_size]."""

    found: list
    seconds: tuple[float, ...]


@dataclass
class Seen:
    """A value that somebody wants to see, or to replace, before the pass goes on."""

    part: int  # the number of its text
    name: str
    array: np.ndarray


class Talk(NamedTuple):
    """Between the thread of a pass, whose values somebody sees, and the event loop."""

    seen: SimpleQueue
    answers: SimpleQueue


async def call(rpc, key: str, method: str, *what):
    """Have an actor do something. Dask's own way, by `Actor`, waits for one that is lost to come back.

    Raises Lost where it can't be reached, else what the actor raised.
    """
    from distributed.protocol import to_serialize

    try:
        answer = await rpc.actor_execute(
            function=method, actor=key, args=[*map(to_serialize, what)], kwargs={}
        )
    except Exception as error:
        raise Lost(" ".join(str(error).split())) from None
    if answer["status"] != "OK":
        raise answer["exception"]
    return answer["result"]


class Stage:
    """Layers of a model; the first stage also has the embedding, the last one norm and output.

    Passes are computed in a thread, one after the other. The worker's event loop takes them in, and sends on
    what was made of them.
    """

    def __init__(self, model: str, layers: range, worker: Worker, options: dict):
        """Args:
        model, options: as of `load`.
        worker: what `survey` found here.
        """
        from distributed import get_worker

        self._first, self._dask = layers.start, get_worker()
        checkpoint = open_checkpoint(model)
        require(digest(checkpoint) == worker.digest, f"{checkpoint.path} has changed")
        self._is_last = layers.stop == checkpoint.config.n_layers
        self._config = replace(checkpoint.config, n_layers=len(layers))
        self._table = get_backend(worker.backend, worker.threads, **options)
        free = self._table.free_memory
        self._table.free_memory = lambda: left(free(), worker.allowed)  # Dask ends who takes more
        self._tensors = dict(_own(checkpoint.tensors, layers, self._is_last))
        self._packing = Packing(self._table, self._tensors, checkpoint.check_unchanged, worker.mapped)
        self._model = build(self._config, self._tensors, self._packing.prepare)
        self._packing.start()
        n_params = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
        self._head = replace(checkpoint, tensors={}, files=[]), n_params
        self._caches: dict[int, KVCache] = {}
        self._due, self._news = 0, asyncio.Condition()  # the number of the next pass
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._stopped: set[int] = set()  # numbers of passes
        self._talks: dict[int, Talk] = {}  # of the passes whose values are seen
        self._next: Callable | None = None

    # --- in the event loop ------------------------------------------------------------------------

    async def follow(self, address: str, key: str) -> None:
        """Say where the next stage is."""
        self._next = partial(call, self._dask.rpc(address), key)

    async def head(self) -> tuple[Checkpoint, int]:
        """What the model's file says of it beside its weights, and how many it has in all."""
        return self._head

    async def run(self, given: Pass) -> Done:
        """Compute a pass here and in all later stages, which learn of one that fails, too."""
        failed = None
        try:
            made = await (await self._in_turn(given, self._compute, given))
        except Exception as error:
            failed, made = error, replace(given, parts=[], x=None)
        if not self._is_last:
            made = await self._next("run", made)
        if failed:
            raise failed
        return made

    async def show(self, given: Pass) -> Seen | Pass | Done:
        """Compute a pass here, up to a value that somebody wants to see; then `go_on`."""
        talk = self._talks[given.number] = Talk(SimpleQueue(), SimpleQueue())
        await self._in_turn(given, self._compute_showing, given, talk)
        return await self._next_seen(given.number)

    async def go_on(self, number: int, answer: np.ndarray | None) -> Seen | Pass | Done:
        """Go on with a pass, with a value in place of the one that was seen; None leaves it."""
        self._talks[number].answers.put(answer)
        return await self._next_seen(number)

    async def stop(self, numbers: list[int]) -> None:
        """Stop passes before their next layers."""
        self._stopped.update(numbers)

    async def unembed(self, residual: np.ndarray) -> np.ndarray:
        """As `model.unembed`."""
        x = np.require(residual, requirements="A")
        return await asyncio.to_thread(lambda: self._table.to_numpy(unembed(self._model, self._table, x)))

    async def require_run(self, n_ctx: int, run: dict) -> None:
        """As `Backend.require_run`."""
        self._table.require_run(self._config, n_ctx, **run)

    async def cache_room(self, at_once: int) -> int:
        """As `Backend.cache_room`."""
        return self._table.cache_room(self._config, at_once)

    async def weight(self, name: str) -> np.ndarray | None:
        """A weight, by its name in the whole model; None if it is elsewhere."""
        own = self._local(name)
        tensor = self._tensors.get(f"{own}.weight") or self._tensors.get(own)
        return tensor and await asyncio.to_thread(lambda: np.array(tensor.dequantize()))

    async def close(self) -> None:
        """Give the memory back."""
        self._packing.stop()
        self._model = None
        self._thread.shutdown(wait=False)
        self._caches.clear()
        self._tensors.clear()

    async def _in_turn(self, given: Pass, function: Callable, *what) -> asyncio.Future:
        """Do something in the thread, behind all passes before: the network may bring them later."""
        async with self._news:
            await self._news.wait_for(lambda: self._due == given.number)
            future = asyncio.get_running_loop().run_in_executor(self._thread, function, *what)
            self._due += 1
            self._news.notify_all()
        return future

    async def _next_seen(self, number: int) -> Seen | Pass | Done:
        made = await asyncio.to_thread(self._talks[number].seen.get)
        if not isinstance(made, Seen):
            del self._talks[number]
        if isinstance(made, Exception):
            raise made
        return made

    # --- in the thread ----------------------------------------------------------------------------

    def is_stopped(self, number: int) -> bool:
        """Whether nobody waits for a pass any more; nor for any if Dask has let go of this actor."""
        return number in self._stopped or all(
            self is not actor for actor in [*self._dask.state.actors.values()]
        )

    def _compute(self, given: Pass, show: Callable | None = None) -> Pass | Done:
        """What a pass is after this stage. Show takes (part, name, array) and returns an array, or None."""
        started = time.perf_counter()
        for fork in given.forks:
            if fork.cache in self._caches:
                self._caches[fork.new] = self._caches[fork.cache].fork(fork.n_tokens, fork.n_ctx)
        for cache in given.forgotten:
            self._caches.pop(cache, None)
        self._stopped.difference_update([number for number in [*self._stopped] if number < given.number])
        found = self._found(given, show) if given.parts else [None]
        seconds = (*given.seconds, time.perf_counter() - started)
        if not self._is_last:
            return replace(given, x=found[0], seconds=seconds)
        return Done([_chosen(*some) for some in zip(given.parts, found, strict=False)], seconds)

    def _found(self, given: Pass, show: Callable | None) -> list[np.ndarray]:
        """As `forward_texts`."""
        with cancellable(Flag(given.number, self)), self._table.running():
            check_cancelled()
            self._packing.check()
            steps = [self._step(number, part, show) for number, part in enumerate(given.parts)]
            x = (
                given.x if given.x is None else np.require(given.x, requirements="A")
            )  # a network's aren't aligned
            found = forward_texts(self._model, self._table, steps, x)
        self._packing.start()
        return found

    def _step(self, number: int, part: Part, show: Callable | None) -> Step:
        cache = self._caches.get(part.cache)
        if cache is None:
            cache = self._caches[part.cache] = self._table.new_cache(self._config, part.n_ctx)
        require(part.n_past <= len(cache), "what this text goes on from was stopped before it was computed")
        cache.trim(part.n_past)
        mine = {self._local(name): name for name in part.taps}
        taps = {own: partial(show, number, name) for own, name in mine.items() if own}
        return Step(part.tokens, cache, part.n_logits, taps)

    def _compute_showing(self, given: Pass, talk: Talk) -> None:
        def show(part: int, name: str, array: np.ndarray) -> np.ndarray | None:
            talk.seen.put(Seen(part, name, array))
            while True:
                check_cancelled()
                with suppress(Empty):
                    return talk.answers.get(timeout=LOOK)

        try:
            talk.seen.put(self._compute(given, show))
        except Exception as error:
            talk.seen.put(error)

    def _local(self, name: str) -> str | None:
        return _local(name, self._first, self._config.n_layers)


@dataclass
class Flag:
    """Whether a pass has been stopped, as `check_cancelled` asks it."""

    number: int
    stage: Stage

    def is_set(self) -> bool:
        """Whether to stop."""
        return self.stage.is_stopped(self.number)


def _chosen(part: Part, logits: np.ndarray) -> Chosen | np.ndarray:
    """What is sent back; of NaN all logits, so that it is told."""
    return part.choose(logits) if part.choose and np.isfinite(logits).all() else logits


def _own(tensors: dict[str, Tensor], layers: range, is_last: bool) -> Iterator[tuple[str, Tensor]]:
    """The weights of a stage, by their names in a model that has no other layers."""
    for name, tensor in tensors.items():
        is_end = name in ("norm.weight", OUTPUT)
        own = _local(name, layers.start, len(layers))
        if own and (is_last or not is_end) and (layers.start == 0 or name != EMBEDDING):
            yield own, tensor
    if is_last and layers.start and OUTPUT not in tensors:
        yield OUTPUT, tensors[EMBEDDING]


def _local(name: str, first: int, n_layers: int) -> str | None:
    """ "layers.7.residual" -> "layers.2.residual" where layer 5 is the first; None of layers elsewhere."""
    if not name.startswith("layers."):
        return name
    _, number, *rest = name.split(".", 2)
    own = int(number) - first if number.isdecimal() else -1
    return ".".join(["layers", str(own), *rest]) if 0 <= own < n_layers else None
