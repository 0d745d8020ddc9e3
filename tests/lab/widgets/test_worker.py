import subprocess
import sys
import threading
import time

import pytest

import tinyllama
from tinyllama.config import PRESETS
from tinyllama.errors import TinyllamaError
from tinyllama.lab.widgets.worker import Worker, batch_size


def test_a_job_runs_in_another_thread_and_tells_its_end():
    told, where = [], []
    worker = Worker(lambda: told.append(worker.busy))
    assert worker.start(lambda: where.append(threading.current_thread().daemon))
    assert worker.wait(5) and where == [True] and told[-1] is False


def test_a_failed_job_leaves_one_line_and_the_next_clears_it():
    def fail():
        raise TinyllamaError("a.gguf: no such file")

    worker = Worker(lambda: None)
    worker.start(fail)
    assert worker.wait(5) and worker.error == "a.gguf: no such file"
    worker.start(lambda: None)
    assert worker.wait(5) and worker.error == ""


def test_the_flag_is_set_by_stop_and_cleared_by_the_next_start():
    worker, went = Worker(lambda: None), threading.Event()

    def until_stopped():
        while not worker.is_set():
            time.sleep(0.001)
        went.set()

    worker.start(until_stopped)
    worker.stop()
    assert went.wait(5) and worker.wait(5)
    flags = []
    worker.start(lambda: flags.append(worker.is_set()))
    assert worker.wait(5) and flags == [False]


@pytest.fixture
def until_stopped():
    """A job that goes on until it is stopped, and says when it has."""

    def make(worker, done):
        def job():
            while not worker.is_set():
                time.sleep(0.001)
            done.append("stopped")

        return job

    return make


def test_a_job_can_take_the_place_of_the_one_that_is_running(until_stopped):
    worker, done = Worker(lambda: None), []
    worker.start(until_stopped(worker, done))
    assert not worker.start(lambda: done.append("refused"))
    assert worker.start(lambda: done.append("superseded"), instead=True)
    assert worker.start(lambda: done.append("done"), instead=True)
    assert worker.wait(5) and done[0] == "stopped" and done[-1] == "done" and "refused" not in done
    assert len(done) <= 3


def test_stopping_stops_what_would_follow_too(until_stopped):
    worker, done = Worker(lambda: None), []
    worker.start(until_stopped(worker, done))
    worker.start(until_stopped(worker, done), instead=True)
    worker.stop()
    assert worker.wait(5) and set(done) == {"stopped"}


def test_telling_is_held_back_until_some_time_has_passed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    told = []
    worker = Worker(lambda: told.append(now[0]))
    for step in range(13):
        now[0] = 1 + step / 64
        worker.tell()
    assert told == [1, 1 + 4 / 64, 1 + 8 / 64, 1 + 12 / 64]


def test_telling_takes_a_tenth_of_the_time_at_most(monkeypatch):
    def tell_slowly():
        now[0] += 0.02
        told.append(now[0])

    now, told = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    worker = Worker(tell_slowly)
    for _ in range(1000):
        now[0] += 0.001
        worker.tell()
    assert 4 <= len(told) <= 6 and len(told) * 0.02 <= 0.11 * now[0]


@pytest.mark.parametrize("name, tokens", [("7B", 64), ("13B", 32), ("65B", 16)])
def test_large_models_read_a_prompt_in_small_pieces(name, tokens):
    assert batch_size(PRESETS[name]) == tokens


def test_small_models_read_a_prompt_in_one_piece():
    assert batch_size(tinyllama.load("small").config) == 512


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_a_process_that_ends_in_the_middle_of_a_run_leaves_nothing_hanging(backend):
    code = f"""
import sys, time
from tinyllama.lab.widgets.session import Session
session = Session()
session.generate("Once upon a time", "small", {backend!r}, 2, n_predict=-1, ctx_size=100_000)
while session.state != "writing":
    time.sleep(0.01)
print("writing", flush=True)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout, process.stderr) == (0, "writing\n", "")
