"""Who gets which layers of a model that lies on several workers.

`survey` asks each worker: is the file there, and the same as on the others; how much memory is free; how long
does a layer take? `split` makes ranges of layers of the answers, one for each worker.

The residual stream passes all of them, one after the other, so one text alone takes the sum of their times.
But several texts, or the pieces of a long prompt, follow each other closely, and then the slowest worker sets
the pace. So its time is made as short as memory allows.
"""

import math
import operator
import re
import time
import timeit
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np

from ..backends import Backend
from ..config import EMBEDDING, OUTPUT
from ..errors import TinyllamaError, check_cancelled, require
from ..formats import Checkpoint
from ..machine.limits import human, require_memory
from ..model import Step, build, embed, run_layers, unembed
from ..settings import default_ctx_size
from .found import Found, Wanted, another, lacks, left, look, unlike

if TYPE_CHECKING:
    from distributed import Client

ROUNDS, ENOUGH = 9, 1.0  # runs that are measured, unless fewer take so many seconds
BEYOND_CACHES = 2**27  # bytes of layers that are measured together: no cache holds them for the next token
LOOK = 0.1  # seconds between two looks at what is measured, and for Ctrl-C
HOP = 0.001  # seconds that a residual stream takes to the next machine; only decides between equal splits


@dataclass(frozen=True, kw_only=True)
class Worker(Found):
    """What `survey` finds out about one."""

    free: int  # bytes of memory that its share may take
    layer_seconds: float  # of one token in one layer
    output_seconds: float  # of one token in the last norm and the output matrix
    layer_bytes: tuple[int, ...]  # of each layer: its weights and a full KV cache
    embedding_bytes: int  # of what the first layer's worker has beside
    output_bytes: int  # of what the last layer's has
    working_bytes: int  # of what each has: activations and the vocabulary
    cache_bytes: int  # of each layer's full KV cache, which `layer_bytes` include

    def needs(self, layers: range) -> int:
        """Bytes of memory that these layers take here, none if there are none.

        Who has all layers of a model that has one matrix for embedding and output has it twice here.
        """
        n_bytes = self.working_bytes + sum(self.layer_bytes[layers.start : layers.stop])
        n_bytes += self.embedding_bytes * (layers.start == 0)
        return (n_bytes + self.output_bytes * self._has_last(layers)) * bool(layers)

    def memory(self, layers: range) -> dict[str, int]:
        """What `needs` is made of, as `Backend.memory` names it; none of the ranges is empty."""
        kv_cache = self.cache_bytes * len(layers)
        weights = self.needs(layers) - kv_cache - self.working_bytes
        return {"weights": weights, "kv_cache": kv_cache, "activations": self.working_bytes}

    def seconds(self, layers: range) -> float:
        """The time of one token in these layers."""
        return self.layer_seconds * len(layers) + self.output_seconds * self._has_last(layers)

    def _has_last(self, layers: range) -> bool:
        return bool(layers) and layers.stop == len(self.layer_bytes)


# --- what each worker has -------------------------------------------------------------------------


def named(client: "Client", wanted: Sequence[int] | None) -> list[str]:
    """The addresses of the workers that shall have so many layers each, in the order of their names.

    Those for which `wanted` has a 0, or nothing, needn't be able to. None means all.

    Raises TinyllamaError where there are fewer workers.
    """

    def names(dask_scheduler) -> dict[str, str]:
        return {worker.address: str(worker.name) for worker in dask_scheduler.workers.values()}

    found = client.run_on_scheduler(names)
    order = sorted(found, key=lambda address: _by_number(found[address]))
    if wanted is None:
        return order
    require_counts(wanted)
    many = f"split {','.join(map(str, wanted)):.80} is for {len(wanted)} workers, and there are {len(order)}"
    require(len(wanted) <= len(order), many)
    return [address for address, n in zip(order, wanted, strict=False) if n]


def survey(
    client: "Client",
    model: str | Path,
    backend: str | None = None,
    threads: int | None = None,
    among: Sequence[str] | None = None,
    **options,
) -> list[Worker]:
    """Have workers of a cluster open a model and measure some of its layers, all at the same time.

    Args:
        among: their addresses; None for all that there are.
        model: as `load` takes it. Each worker looks for it on its own computer, and fetches what is "hf:".
        backend: None for what the worker's TINYLLAMA_BACKEND says, else "auto".
        threads: None for as many as the worker runs tasks at a time, its --nthreads.
        options: mmap, and those of `get_backend`.
    Returns:
        the workers in the order of their names.
    Raises:
        TinyllamaError: names a worker that can't, and why: another version of tinyllama, no such file,
            another file than on the others, not the memory to measure a layer.
    Warns where workers compute differently, so that a text isn't to the bit what one of them would write.
    """
    among = [*client.nthreads()] if among is None else among
    for trouble in lacks(client, among).values():
        require(not trouble, trouble)
    wanted = Wanted.of(model, backend, threads, **options)
    workers = sorted(_answers(client, wanted, among), key=lambda worker: _by_number(worker.name))
    for worker in workers:
        same = worker.digest == workers[0].digest
        require(same, f"{worker}: {another(wanted.model, workers[0])}")
    if differ := unlike(workers):
        warnings.warn(differ, stacklevel=2)
    return workers


def _answers(client: "Client", wanted: Wanted, addresses: Sequence[str]) -> list[Worker]:
    """What each worker has found. Raises TinyllamaError for the first that can't."""
    futures = {}
    computers = Counter(urlsplit(address).hostname for address in addresses)
    for address in addresses:
        measured = partial(_measured, n_here=computers[urlsplit(address).hostname])
        key = f"survey-of-the-model-{address}-{time.time_ns()}"
        futures[address] = client.submit(look, wanted, measured, workers=[address], key=key, priority=10)
    require(futures, "the cluster has no workers: `dask worker ADDRESS` starts one")
    while not all(future.done() for future in futures.values()):
        check_cancelled()
        gone = futures.keys() - client.nthreads().keys()  # whose tasks would wait for them forever
        require(not gone, f"worker {min(gone, default='')} left while it was measured: its log says why")
        time.sleep(LOOK)
    found = {address: future.exception() or future.result() for address, future in futures.items()}
    for address, answer in found.items():
        if isinstance(answer, TinyllamaError):
            raise answer  # it names the worker
        said = f"{type(answer).__name__}: {' '.join(str(answer).split())}"
        require(isinstance(answer, Worker), f"worker {address}: {said}")
    return list(found.values())


def _by_number(name: str) -> list:
    """A key to sort by, where numbers within a name count as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _measured(found: Found, table: Backend, checkpoint: Checkpoint, n_here: int) -> Worker:
    """What a worker, one of n_here on its computer, has for its share, and how fast it is."""
    require("gpu_layers" not in table.options, "gpu_layers is for a model on one computer")
    free = left(found.available // n_here, found.allowed)
    config, tensors = checkpoint.config, checkpoint.tensors
    n_bytes = {name: t.nbytes if found.mapped else table.prepared_bytes(t) for name, t in tensors.items()}
    one_layer = table.memory(replace(config, n_layers=1), {}, default_ctx_size(config))
    layers = [0] * config.n_layers
    for name in tensors:
        if name.startswith("layers."):
            layers[int(name.split(".")[1])] += n_bytes[name]
    output, some = n_bytes.get(OUTPUT, n_bytes[EMBEDDING]), _typical(layers)
    while len(some) > 1 and sum(layers[i] for i in some) + output > free:
        some = some[::2]  # a worker may have room for some layers only
    measured = f"{checkpoint.path}: a layer and the output matrix, which are measured,"
    require_memory(sum(layers[i] for i in some) + output, measured, free)
    layer_seconds, output_seconds = _timed(table, checkpoint, some, copy=not found.mapped)
    return Worker(
        **vars(found),
        free=free,
        layer_seconds=layer_seconds,
        output_seconds=output_seconds,
        layer_bytes=tuple(weights + one_layer["kv_cache"] for weights in layers),
        embedding_bytes=n_bytes[EMBEDDING],
        output_bytes=output + n_bytes["norm.weight"],
        working_bytes=one_layer["activations"] + one_layer["tokenizer"],
        cache_bytes=one_layer["kv_cache"],
    )


def _typical(layers: list[int]) -> list[int]:
    """Numbers of layers, spread evenly, that together don't stay in a cache; `layers` are their bytes."""
    n_layers = len(layers)
    n = min(n_layers, -(-BEYOND_CACHES * n_layers // sum(layers)))
    return [(2 * i + 1) * n_layers // (2 * n) for i in range(n)]


def _timed(table: Backend, checkpoint: Checkpoint, layers: list[int], copy: bool) -> tuple[float, float]:
    """Seconds that one token takes in one of these layers, and in norm and output.

    They are measured on a model that has no other layers, and the output matrix as its embedding, too.
    """
    config = replace(checkpoint.config, n_layers=len(layers))
    tensors = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("layers.")}
    tensors[EMBEDDING] = tensors.pop(OUTPUT, tensors[EMBEDDING])
    for name, tensor in checkpoint.tensors.items():
        first, number, *rest = name.split(".")
        if first == "layers" and int(number) in layers:
            tensors[".".join([first, str(layers.index(int(number))), *rest])] = tensor
    with table.running():
        model = build(config, tensors, partial(table.prepare, copy=copy))
        step = Step([0], table.new_cache(config, 1))
        x = embed(model, table, np.array([0]))
        run = _seconds(lambda: table.to_numpy(run_layers(model, table, x, [step])))
        return run / len(layers), _seconds(lambda: table.to_numpy(unembed(model, table, x)))


def _seconds(run: Callable[[], object]) -> float:
    """The least time of several runs, after one that warms up: what else runs there only adds to it."""
    run()
    times: list[float] = []
    while len(times) < ROUNDS and sum(times) < ENOUGH:
        times += timeit.repeat(run, number=1, repeat=1)
    return min(times)


# --- who gets which layers ------------------------------------------------------------------------


def split(workers: Sequence[Worker], wanted: Sequence[int] | None = None) -> list[range]:
    """The layers of each worker, in the order of the workers: [range(0, 50), range(50, 80)].

    Every worker may take part: its share is the larger, the faster it is, as far as its memory goes. A range
    is empty where others do without the worker. The first layer's worker has the embedding, too, and the last
    one's the output matrix.

    Args:
        wanted: how many layers each gets, in place of that; those that it doesn't list, or lists with 0, get
            none. [80] or [80, 0] leaves all to the first.
    Raises:
        TinyllamaError: the memory doesn't suffice, or `wanted` is no split of this model; it then says one.
    """
    if wanted is not None:
        return _wanted(workers, wanted)
    slowest, _ = _best(workers, Worker.seconds, max)
    if slowest == math.inf:
        needed = min(worker.needs(range(len(worker.layer_bytes))) for worker in workers)
        free = ", ".join(f"{human(worker.free)} on {worker}" for worker in workers)
        more = "add workers, or give them more memory (`dask worker --memory-limit`)"
        raise TinyllamaError(f"the model needs at least {human(needed)} of memory; free are {free}: {more}")

    def quick_enough(worker: Worker, layers: range) -> float:
        seconds = worker.seconds(layers)
        return math.inf if seconds > slowest else seconds + HOP * bool(layers)

    return _best(workers, quick_enough, operator.add)[1]


def _best(workers: Sequence[Worker], cost: Callable, join: Callable) -> tuple[float, list[range]]:
    """The least that a split costs, and this split; infinity where none fits into memory.

    What comes after the first workers only depends on how many layers these have. So of all splits that give
    them so many, the best one is kept, and goes on to the next worker.

    Args:
        cost: (worker, layers) -> of this part.
        join: (cost, cost) -> of both, `max` or addition.
    """
    n_layers, kept = len(workers[0].layer_bytes), {0: (0.0, [])}
    for worker in workers:
        longer: dict[int, tuple[float, list[range]]] = {}
        for first, (before, ranges) in kept.items():
            for layers in (range(first, stop) for stop in range(first, n_layers + 1)):
                fits = worker.needs(layers) <= worker.free
                joined = join(before, cost(worker, layers)) if fits else math.inf
                if joined < longer.get(layers.stop, (math.inf,))[0]:
                    longer[layers.stop] = joined, [*ranges, layers]
        kept = longer
    return kept.get(n_layers, (math.inf, []))


def require_counts(wanted: Sequence[int]) -> None:
    """Raise TinyllamaError unless these are numbers of layers."""
    right = isinstance(wanted, list | tuple) and all(isinstance(n, int) and n >= 0 for n in wanted)
    require(right and any(wanted), f"split is a list of numbers of layers, [40, 40] say, not {wanted!r:.80}")


def _wanted(workers: Sequence[Worker], wanted: Sequence[int]) -> list[range]:
    """Ranges of so many layers, after a look whether they are possible."""
    require_counts(wanted)
    n_layers, said = len(workers[0].layer_bytes), ",".join(map(str, wanted))
    if sum(wanted) != n_layers:
        total = f"split {said} makes {sum(wanted)} layers, and the model has {n_layers}"
        raise TinyllamaError(f"{total}: {_counts(workers)} would be right")
    counts = [*wanted, *[0] * (len(workers) - len(wanted))]
    ranges = [range(stop - n, stop) for n, stop in zip(counts, accumulate(counts), strict=True)]
    for worker, layers in zip(workers, ranges, strict=True):
        if worker.needs(layers) > worker.free:
            needed = f"{len(layers)} layers need {human(worker.needs(layers))} of memory"
            costs = f"{needed}, and {human(worker.free)} are free"
            raise TinyllamaError(f"{worker}: {costs}: split {_counts(workers)} would fit")
    return ranges


def _counts(workers: Sequence[Worker]) -> str:
    """The split that we would take, as the command line has it."""
    return ",".join(str(len(layers)) for layers in split(workers))
