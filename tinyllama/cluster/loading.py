"""`tinyllama.load`: a model here, or on the workers of a Dask cluster."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from .. import llama
from ..errors import require
from ..formats import default_model
from ..llama import Llama
from ..machine.interrupts import interruptible


def load(
    model: str | Path | None = None,
    backend: str | None = None,
    threads: int | None = None,
    *,
    scheduler=None,
    split: Sequence[int] | None = None,
    mmap: bool = False,
    announce: Callable[[Path | str, dict[str, int], bool], None] | None = None,
    progress: Callable = iter,
    **options,
) -> Llama:
    """Load a model on this computer, or, with a scheduler, on the workers of a Dask cluster.

    Here a model that is loaded already is returned. On a cluster each worker opens its own file of the model
    and computes some of its layers; `close()` has all of them give their memory back.

    Args:
        model: a file or folder, "small" (it ships with tinyllama), "smollm2" (`tinyllama download smollm2`),
            "hf:org/name" or "hf:org/name:Q4_K_M" (of the Hugging Face hub), "ollama:name:tag". None: what the
            environment variable TINYLLAMA_MODEL says, else "small". Each worker looks for it on its computer.
        backend: "mlx", "c", "numexpr", "numpy" or "auto"; None asks TINYLLAMA_BACKEND.
        threads: None for one a core, on a Mac one a fast core; of a worker for as many as its --nthreads.
        scheduler: the address of a scheduler, "tcp://host:8786", or a Dask client, which stays open.
        split: how many layers each worker gets, in the order of their names, [40, 40] say; None shares them
            out by memory and speed.
        mmap: leave the weights in their file, mapped. Loading takes no time, and the weights no memory but
            the page cache, which the system can take back; each token takes longer. The results are the same.
        announce: called before loading with the path, what it will take, as `Backend.memory` says, and
            whether weights stay in their file; on a cluster for each worker, with its layers for the path.
        progress: wraps the iteration over the tensors, as tqdm does; on a cluster it isn't used.
        options: of the backend: dtype, inexact_as, gpu_layers; see `get_backend`.
    Raises:
        TinyllamaError: there is no such file, it is damaged, or there isn't the memory for it; it names the
            worker. There is no scheduler, or split is none of this model.
    """
    if scheduler is None:
        require(split is None, "split is for a model on several machines: name their scheduler")
        how = {"mmap": mmap, "announce": announce, "progress": progress}
        return llama.load(model, backend, threads, **how, **options)
    from . import shares
    from .connect import connected
    from .found import everywhere
    from .pipeline import Pipeline

    model, started = everywhere(default_model() if model is None else model), time.perf_counter()
    given = {name: value for name, value in options.items() if value is not None}
    with interruptible(), ExitStack() as opened:
        client = opened.enter_context(connected(scheduler))
        among = shares.named(client, split)
        workers = shares.survey(client, model, backend, threads, among, mmap=mmap, **given)
        counts = split and [n for n in split if n]
        ranges = dict(zip(workers, shares.split(workers, counts), strict=True))
        used = {worker: layers for worker, layers in ranges.items() if layers}
        for worker, layers in used.items() if announce else ():
            what = f"layers {layers.start} to {layers.stop - 1} on {worker}"
            announce(what, worker.memory(layers), worker.mapped)
        pipeline = Pipeline(opened, client, model, used, given)
    pipeline.load_seconds = time.perf_counter() - started
    return pipeline
