import subprocess
import sys
import threading
import time

import pytest

from tinyllama.errors import TinyllamaError, check_cancelled
from tinyllama.lab.widgets.worker import Worker


def go_on():
    """A job that goes on until it is stopped."""
    while True:
        check_cancelled()
        time.sleep(0.001)


def test_a_job_runs_in_a_daemon_thread_and_tells_its_end():
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


@pytest.mark.parametrize(
    "error, words", [(MemoryError(), "not enough memory"), (OSError("disk\ngone"), "OSError: disk gone")]
)
def test_what_nobody_expects_is_said_in_one_line_too(error, words):
    def fail():
        raise error

    worker = Worker(lambda: None)
    worker.start(fail)
    assert worker.wait(5) and words in worker.error and "\n" not in worker.error


def test_a_job_that_is_told_to_stop_stops_and_the_next_one_runs():
    worker, done = Worker(lambda: None), []
    worker.start(go_on)
    worker.stop()
    assert worker.wait(5) and worker.error == ""
    worker.start(lambda: done.append(worker.is_set()))
    assert worker.wait(5) and done == [False]


def test_a_second_job_is_refused_unless_it_takes_the_place_of_the_first():
    worker, done = Worker(lambda: None), []
    worker.start(go_on)
    assert not worker.start(lambda: done.append("refused"))
    assert worker.start(lambda: done.append("done"), instead=True)
    assert worker.wait(5) and done == ["done"]


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


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_a_process_that_ends_in_the_middle_of_a_run_leaves_nothing_hanging(backend):
    code = f"""
import sys, time
from tinyllama.lab.widgets.session import Session
session = Session()
session.generate("Once upon a time", "small", {backend!r}, 2, n_predict=-1, ctx_size=100_000)
while session.run is None or not session.run.completion.tokens:
    time.sleep(0.01)
print("writing", flush=True)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout, process.stderr) == (0, "writing\n", "")


def test_who_waits_for_a_job_waits_for_the_one_that_its_end_has_started():
    def changed():
        if not worker.busy and not done:
            done.append(1)
            worker.start(lambda: (time.sleep(0.01), done.append(2)))

    done, worker = [], Worker(changed)
    worker.start(lambda: None)
    assert worker.wait(5) and done == [1, 2]


def test_a_job_takes_the_place_of_all_that_the_end_of_the_first_starts():
    def changed():
        if not worker.busy and len(started) < 2:
            started.append(1)
            worker.start(go_on)

    started, done, worker = [], [], Worker(changed)
    worker.start(go_on)
    assert worker.start(lambda: done.append(1), instead=True)
    assert worker.wait(5) and done == [1]


def test_a_job_that_takes_another_s_place_is_started_though_one_comes_in_between():
    class Lock:
        """Lets another job in before the second time that somebody asks."""

        def __init__(self):
            self.asked, self.lock = 0, threading.RLock()

        def __enter__(self):
            self.asked += 1
            if self.asked == 2:
                other = threading.Thread(target=worker.start, args=(go_on,))
                other.start()
                other.join()
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()

    worker, done = Worker(lambda: None), []
    worker.start(go_on)
    worker.stop()
    assert worker.wait(5)
    worker._starting = Lock()
    worker._starting.asked = 1
    assert worker.start(lambda: done.append(1), instead=True)
    assert worker.wait(5) and done == [1]


def test_loading_leaves_what_the_job_says():
    worker, said = Worker(lambda: None), []

    def job():
        worker.doing = "Running it"
        worker.load("small", "numpy")
        said.append(worker.doing)

    worker.start(job)
    assert worker.wait(30) and said == ["Running it"]
