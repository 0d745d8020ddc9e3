"""What a worker has: this version of tinyllama, the model's file, a backend, memory."""

import asyncio
import hashlib
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import __version__
from ..backends import Backend, get_backend
from ..errors import TinyllamaError, naming
from ..formats import Checkpoint, open_checkpoint
from ..machine.hub import is_offline
from ..machine.limits import UNKNOWN, used_memory
from ..machine.offline import offline
from ..settings import default_ctx_size

if TYPE_CHECKING:
    from distributed import Client, Worker

ANSWER = 2.0  # seconds in which a worker says its version

#: Of a worker's --memory-limit. Above it Dask looks for what it could write to disk, and warns; at 0.8 it
#: pauses the worker, and at 0.95 it kills it.
UNTROUBLED = 0.7


@dataclass(frozen=True)
class Wanted:
    """A model, and how workers shall run it."""

    model: str
    backend: str | None = None
    threads: int | None = None  # None: those that the worker has
    mmap: bool = False
    options: dict = field(default_factory=dict)  # of the backend
    offline: bool = field(default_factory=is_offline)  # on workers as here

    @classmethod
    def of(cls, model, backend=None, threads=None, mmap=False, **options) -> "Wanted":
        """A model as `load` takes it."""
        return cls(everywhere(model), backend, threads, mmap, options)

    def where(self) -> tuple[str | None, int]:
        """The backend and the number of threads, on a worker."""
        from distributed import get_worker

        return self.backend, get_worker().state.nthreads if self.threads is None else self.threads

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other thread of the process opens or loads a model."""
        with _alone, offline(self.offline):
            yield


_alone = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a worker has."""

    address: str  # "tcp://192.168.0.5:40123"
    name: str  # what `dask worker --name` said; else its address
    host: str  # its computer's name
    backend: str
    level: str | None  # the instruction set of backend "c"
    cache_type: str  # of the numbers in its KV cache
    threads: int
    mapped: bool  # weights stay in their file
    digest: str  # of the model there
    needed: int  # bytes of memory that the whole model takes
    available: int  # bytes that are free on its computer, for all processes there
    used: int  # bytes that its process has, of which a model that it has loaded before is a part
    allowed: int  # bytes that Dask lets its process have

    def __str__(self) -> str:
        named = f"{self.name}, " if self.name != self.address else ""
        return f"worker {self.address} ({named}host {self.host})"


def everywhere(model: str | Path) -> str:
    """A model's path as workers find it, which run in other folders; a name stays as it is."""
    return str(Path(model).absolute()) if Path(model).exists() else str(model)


def lacks(client: "Client", addresses: Iterable[str]) -> dict[str, str]:
    """Why workers can't be asked for anything, "" if they can; without those that don't answer.

    Dask doesn't say so: a worker that is sent a task of a package that it hasn't ends.
    """

    async def versions() -> list:
        asked = (client.run(_version, workers=[address], on_error="return") for address in addresses)
        return await asyncio.gather(*(asyncio.wait_for(one, ANSWER) for one in asked), return_exceptions=True)

    found: dict[str, object] = {}
    for answer in client.sync(versions):
        found |= answer if isinstance(answer, dict) else {}
    answered = ((address, what) for address, what in found.items() if not isinstance(what, OSError))
    return {address: other_version(f"worker {address}", what) for address, what in answered}


def require_scheduler(client: "Client") -> None:
    """Raise TinyllamaError where the scheduler hasn't this version of tinyllama."""
    try:
        version = client.run_on_scheduler(_version)
    except Exception as error:
        version = error
    if trouble := other_version(f"the scheduler, {client.scheduler.address},", version):
        raise TinyllamaError(trouble)


def other_version(who: str, version: object) -> str:
    """What is wrong with a version, "" if it is ours."""
    said, hint = " ".join(str(version).split()), f"pip install 'tinyllama-lab[cluster]=={__version__}' there"
    return "" if version == __version__ else f"{who} hasn't tinyllama {__version__} ({said}): {hint}"


def _version() -> str:
    return __version__


def another(model: str, first: Found) -> str:
    """What is said of a worker whose digest isn't the first one's."""
    return f"{model} isn't the same model there as on {first}: copy the file"


def unlike(workers: Iterable[Found]) -> str:
    """What workers that compute differently mean, "" if all compute alike."""
    kinds = sorted({" ".join(filter(None, (worker.backend, worker.level))) for worker in workers})
    differ = f"workers compute with {' and '.join(kinds)}, which differ in the last bits"
    what = f"{differ}: a text may depend on who computes it; TINYLLAMA_CPU makes them alike"
    return what if len(kinds) > 1 else ""


# --- on a worker ----------------------------------------------------------------------------------


def look(wanted: Wanted, more: Callable | None = None) -> Found | TinyllamaError:
    """See what a worker has. Fetches a model of the hub. Errors are returned: Dask prints raised ones.

    Args:
        more: (found, backend, checkpoint) -> what is returned in place of `found`.
    """
    from distributed import get_worker

    own, host = get_worker(), platform.node()
    try:
        named = f"{own.name}, " if str(own.name) != own.address else ""
        with naming(f"worker {own.address} ({named}host {host})"):
            table = get_backend(*wanted.where(), **wanted.options)
            with wanted.alone():
                checkpoint = open_checkpoint(wanted.model)
            found = _found(own, host, table, checkpoint, wanted.mmap)
            return more(found, table, checkpoint) if more else found
    except TinyllamaError as error:
        return error


def _found(own: "Worker", host: str, table: Backend, checkpoint: Checkpoint, mmap: bool) -> Found:
    limit = own.memory_manager.memory_limit
    config, tensors = checkpoint.config, checkpoint.tensors
    mapped = table.keeps_in_file(tensors, mmap)
    parts = table.memory(config, tensors, default_ctx_size(config), mmap=mmap)
    return Found(
        address=own.address,
        name=str(own.name),
        host=host,
        backend=table.name,
        level=table.level,
        cache_type=table.cache_type,
        threads=table.threads,
        mapped=mapped,
        digest=digest(checkpoint),
        needed=sum(parts.values()) - mapped * parts["weights"],
        available=table.free_memory(),
        used=used_memory(),
        allowed=int(UNTROUBLED * limit) if limit else UNKNOWN,
    )


def left(available: int, allowed: int) -> int:
    """Of bytes of memory that are free, those that Dask leaves this worker."""
    return max(0, min(available, allowed - used_memory()))


def digest(checkpoint: Checkpoint) -> str:
    """The same for the same model: a hash of all but the weights, and of two rows of each of these."""
    about = checkpoint.config, replace(checkpoint.vocabulary, path=None), checkpoint.template
    made = hashlib.sha256(repr(about).encode(errors="surrogatepass"))
    for name, tensor in sorted(checkpoint.tensors.items()):
        made.update(repr((name, tensor.type, tensor.shape)).encode())
        for piece, row in ((tensor.pieces[0], 0), (tensor.pieces[-1], tensor.pieces[-1].shape[0] - 1)):
            made.update(np.ascontiguousarray(piece.blocks(row, row + 1)))
    return made.hexdigest()
