"""The way to a Dask cluster: one that is there, or one of processes on this computer."""

import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..errors import TinyllamaError, check_cancelled, naming, require
from ..machine.limits import default_threads
from ..machine.terminal import say
from .found import require_scheduler

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

PATIENCE = 10  # seconds in which a scheduler has to answer
GIVEN_UP = ("closing", "closed", "failed")  # of the states that a worker's parent can have
LOOK = 0.2  # seconds between two looks for workers, and for Ctrl-C


@contextmanager
def connected(scheduler=None, processes: int | None = None, threads: int | None = None) -> Iterator["Client"]:
    """A client of a cluster that has a worker at least.

    Args:
        scheduler: its address, as tcp://host:8786, or a Client, which stays open.
        processes: in place of a scheduler, so many workers on this computer, which end with the block;
            threads: of each of these; None for its share of the cores.
    Raises:
        TinyllamaError: the package is missing, or there is no scheduler at the address.
    """
    require(find_spec("distributed"), "this needs distributed: pip install 'tinyllama-lab[cluster]'")
    from distributed import Client, LocalCluster

    if isinstance(scheduler, Client):
        yield scheduler
    elif scheduler is not None:
        with _quiet():
            _require_certificates()
            with naming(scheduler, TypeError, RuntimeError):  # the last two are Dask's, about TLS
                _require_dask(scheduler)
                try:
                    client = Client(scheduler, timeout=PATIENCE)
                except TypeError as error:
                    is_worker = "identity()" in str(error)  # what a worker is asked that takes it for one
                    raise TinyllamaError("is a worker, not its scheduler" if is_worker else error) from None
            with closing(client):
                require_scheduler(client)
                _wait_for_a_worker(client, scheduler)
                yield client
    else:
        threads = threads or max(1, default_threads() // processes)
        options = {"memory_limit": None, "dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
        with _without_interrupts(), naming(f"{processes} processes", RuntimeError):
            cluster = LocalCluster(n_workers=processes, threads_per_worker=threads, **options)
        with cluster, Client(cluster) as client, _quiet():
            yield client


def _require_dask(scheduler: str) -> None:
    """Raise TinyllamaError where something listens that isn't a scheduler: Dask would wait for it forever."""
    require(isinstance(scheduler, str) and scheduler, f"no address of a scheduler: {scheduler!r:.80}")
    parts = urlsplit(scheduler)
    if parts.scheme not in ("", "tcp") or not parts.port:
        return
    with suppress(ConnectionError), socket.create_connection((parts.hostname, parts.port), PATIENCE) as there:
        try:
            there.recv(1)  # Dask speaks first
        except TimeoutError:
            raise TinyllamaError(
                "isn't a scheduler of Dask: its dashboard, for one, has another port"
            ) from None


def _require_certificates() -> None:
    """Raise TinyllamaError where Dask's configuration names a file for TLS that isn't there."""
    from distributed.security import Security

    tls = Security()
    for file in (tls.tls_ca_file, tls.tls_client_cert, tls.tls_client_key):
        is_there = not file or "\n" in file or Path(file).is_file()
        require(is_there, f"{file}: there is no such file, which Dask's configuration of TLS names")


def refill(client: "Client") -> bool:
    """Start processes of this computer anew that Dask has given up: one that dies as it starts, say.

    Returns whether the workers are such processes.
    """
    from distributed import LocalCluster

    cluster = client.cluster
    if not isinstance(cluster, LocalCluster):
        return False
    for name, nanny in [*cluster.workers.items()]:
        if nanny.status.name in GIVEN_UP:
            cluster.workers.pop(name, None)
    if len(cluster.workers) < len(cluster.worker_spec):
        cluster.loop.add_callback(_correct, cluster)
    return True


async def _correct(cluster: "LocalCluster") -> None:
    """Have a cluster the processes that it should have."""
    with suppress(Exception):  # one has died again: the next look sees it
        await cluster


def _wait_for_a_worker(client: "Client", address: str) -> None:
    """Workers may come later than we, from a queue, say: whoever waits sees it, and may end it."""
    if not client.nthreads():
        say(f"waiting for a worker: dask worker {address}")
    while not client.nthreads():
        check_cancelled()
        time.sleep(LOOK)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, what becomes of a cluster is told by errors alone, not also by logs with tracebacks."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Threads that begin inside, and all processes that these start, never see a terminal's Ctrl-C.

    It is for us, and we end them; they would answer with tracebacks.
    """
    resource_tracker.ensure_running()  # here: as it starts it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
