"""The way to a cluster, and what stands in it."""

import os
import signal
import socket
import time
from contextlib import suppress
from unittest import mock

import dask
import pytest
from distributed import Client

from tinyllama import TinyllamaError
from tinyllama.cluster import connect
from tinyllama.cluster.connect import connected, refill


def blocked() -> bool:
    """Whether this process never sees Ctrl-C."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_processes_of_this_computer_have_their_threads_and_leave_ctrl_c_to_us():
    with connected(processes=2, threads=3) as client:
        assert [*client.nthreads().values()] == [3, 3]
        assert [*client.run(blocked).values()] == [True, True]
        with connected(client) as same:
            assert same is client
        with connected(client.scheduler.address) as other:
            assert other.nthreads() == client.nthreads()
        assert client.status == "running" and not blocked()


@pytest.mark.parametrize("address", ["nonsense", "foo://host:1", "tcp://127.0.0.1:1"])
def test_an_address_without_a_scheduler_is_named_in_one_line(address, monkeypatch):
    monkeypatch.setattr(connect, "PATIENCE", 0.5)
    with pytest.raises(TinyllamaError, match=f"^{address}: .*$"), connected(address):
        pass


@pytest.mark.parametrize(
    ("setting", "address", "said"),
    [
        ({}, "tls://127.0.0.1:1", "tls://127.0.0.1:1: TLS expects"),
        ({"require-encryption": True}, "tcp://127.0.0.1:1", "tcp://127.0.0.1:1: encryption required"),
        ({"tls.client.cert": "/no/cert.pem"}, "tls://127.0.0.1:1", "/no/cert.pem: there is no such file"),
    ],
)
def test_what_is_missing_for_tls_is_named_in_one_line(setting, address, said):
    configured = dask.config.set({f"distributed.comm.{name}": value for name, value in setting.items()})
    with configured, pytest.raises(TinyllamaError, match=f"^{said}.*$"), connected(address):
        pass


def test_a_process_that_dask_has_given_up_is_started_anew():
    soon = dask.config.set({"distributed.deploy.lost-worker-timeout": "0.5s"})
    with soon, connected(processes=1, threads=1) as client:
        (nanny,), killed = client.cluster.workers.values(), set()
        while nanny.status.name == "running":
            if pid := nanny.pid:  # there is none for a moment
                killed.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        while not client.nthreads():
            assert refill(client)
            time.sleep(0.2)
        assert client.submit(os.getpid).result() not in killed


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(connect, "find_spec", lambda name: None)
    with pytest.raises(TinyllamaError, match=r"pip install 'tinyllama-lab\[cluster\]'"), connected(Client):
        pass


def test_what_is_no_scheduler_is_told_in_a_line(client):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # as a dashboard, which waits for a request
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with (
            mock.patch.object(connect, "PATIENCE", 0.5),
            pytest.raises(TinyllamaError, match="isn't a scheduler"),
        ):
            connected(address).__enter__()
    worker = next(iter(client.nthreads()))
    with pytest.raises(TinyllamaError, match=f"{worker}: is a worker, not its scheduler"):
        connected(worker).__enter__()
    for wrong in ("", 5):
        with pytest.raises(TinyllamaError, match="no address of a scheduler"):
            connected(wrong).__enter__()
