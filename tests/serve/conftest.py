"""A server of the small model: in this process for a TestClient, and in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import tinyllama
from tinyllama.serve.app import App
from tinyllama.serve.engine import Engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def llama():
    return tinyllama.load("small", "c", 2)


@pytest.fixture
def engine(llama):
    made = Engine(llama)
    yield made
    made.stop()


@pytest.fixture
def app(engine):
    return App(engine, "small", chat_template="chatml")


@pytest.fixture
def client(app):
    with TestClient(app.guarded()) as made:
        yield made


class Process:
    """`tinyllama serve` in a process of its own."""

    def __init__(self, log: Path, *options: object):
        command = [sys.executable, "-m", "tinyllama", "serve", "--port", "0", "-t", "2", *map(str, options)]
        places = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": places}
        self.log = log
        with open(log, "w") as stderr:
            self.popen = subprocess.Popen(command, stderr=stderr, env=environment, cwd=ROOT)
        self.url = self._address()

    def _address(self) -> str:
        while self.popen.poll() is None:
            if found := re.search(r"listens on (http\S+)", self.log.read_text()):
                return found[1]
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status."""
        self.popen.send_signal(number)
        return self.popen.wait()


@pytest.fixture
def start(tmp_path):
    """A function: it starts a Process with these options, which ends with the test."""
    started = []

    def start(*options: object) -> Process:
        started.append(Process(tmp_path / f"log{len(started)}", *options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def process(tmp_path_factory):
    """One for all tests that leave it as it is."""
    made = Process(tmp_path_factory.mktemp("serve") / "log", "--chat-template", "chatml")
    yield made
    made.kill()
