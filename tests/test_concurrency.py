"""Threads, forks and processes that share models, and what a lot of work leaves behind."""

import gc
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

import tinyllama
from tinyllama.backends import available
from tinyllama.errors import TinyllamaError
from tinyllama.machine.download import small_folder
from tinyllama.texts.schedule import Schedule

ROOT = Path(__file__).parents[1]
BACKENDS = [name for name, reason in available().items() if reason is None]
PROMPTS = [
    "Once upon a time",
    "The old king",
    "In the forest",
    "A little girl",
    "At sea",
    "One day",
    "No",
    "He",
]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what Linux lists")


def python(code: str, *arguments, timeout: float = 120) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


# --- threads --------------------------------------------------------------------------------------


class Given:
    """A cancel flag that is set, or fails, when it has been asked a number of times."""

    def __init__(self, number: int, fails: bool = False):
        self.left, self.fails = number, fails

    def is_set(self) -> bool:
        self.left -= 1
        if self.left < 0 and self.fails:
            raise OSError("of its own")
        return self.left < 0


def at_once(jobs: list) -> list:
    """Results of all jobs, or their exceptions, each done in a thread of its own, begun together."""
    results, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(number):
        barrier.wait()
        try:
            results[number] = jobs[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def text_of(llama, number: int, n_predict: int, cancel=None):
    settings = {"temp": 0.0} if number % 2 else {"temp": 0.9, "seed": number}
    return llama.generate(PROMPTS[number], n_predict=n_predict, cancel=cancel, **settings)


def check_eight_threads(model, backend, mmap, n_predict):
    if mmap and backend == "mlx":
        pytest.skip("it copies all weights")
    llama = tinyllama.load(model, backend, 2, mmap=mmap)
    alone = [text_of(llama, number, n_predict) for number in range(8)]
    flags = [None] * 6 + [Given(30), Given(30, fails=True)]
    jobs = [lambda n=n: text_of(llama, n, n_predict, flags[n]) for n in range(8)]
    *whole, cancelled, failed = at_once(jobs)
    for text, expected in zip(whole, alone, strict=False):
        assert text == expected and text.ids == expected.ids and text.probs == expected.probs
    assert cancelled.stop_reason == "cancelled" and alone[6].startswith(cancelled)
    assert isinstance(failed, OSError)


@pytest.mark.parametrize("mmap", [False, True], ids=["loaded", "mapped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_threads_each_get_what_they_get_alone(backend, mmap):
    check_eight_threads("small", backend, mmap, n_predict=12)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ["small", "smollm2"])
def test_eight_threads_each_get_what_they_get_alone_for_long(model, backend, smollm2_file):
    for mmap in (False, True):
        check_eight_threads(model, backend, mmap, n_predict=60)


class Sharing:
    """A Schedule that one thread runs while others add texts to it, wait for them, or end them."""

    def __init__(self, llama):
        self.llama, self.schedule, self.over, self.ended = llama, Schedule(llama.run, 2**30), False, set()
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        while not self.over:
            self.schedule.turn()
            self.ended |= {text for text, _ in self.schedule.pieces if text.stop_reason is not None}
            self.schedule.pieces.clear()
            time.sleep(0)

    def submit(self, seed: int, after: float | None):
        prompt, n = PROMPTS[seed % 8] * (1 + seed % 5), 1 + seed % 40
        text = self.llama.stream(prompt, n_predict=n, seed=seed)
        self.schedule.add(text, self.llama.backend.cache_bytes(self.llama.config, text.most))
        ends = None if after is None else time.monotonic() + after
        while text not in self.ended:
            time.sleep(0.001)
            if ends and time.monotonic() > ends:
                text.cancelled = True
        return text.completion()


def check_submitting(seconds: float):
    """Six threads submit and cancel at random; what isn't cancelled is what it is alone, to the bit."""
    llama, rng, found = tinyllama.load("small", "c", 2), random.Random(0), []
    sharing, ends = Sharing(llama), time.monotonic() + seconds

    def client():
        while time.monotonic() < ends:
            seed = rng.randrange(200)
            found.append((seed, sharing.submit(seed, rng.choice([None, None, 0.0, 0.01, 0.05]))))

    try:
        assert at_once([client] * 6) == [None] * 6
    finally:
        sharing.over = True
        sharing.thread.join()
    alone = {}
    for seed, text in found:
        if seed not in alone:
            alone[seed] = llama.generate(
                PROMPTS[seed % 8] * (1 + seed % 5), n_predict=1 + seed % 40, seed=seed, remember=False
            )
        expected = alone[seed]
        if text.stop_reason == "cancelled":
            assert expected.startswith(text) and expected.probs[: len(text.probs)] == text.probs
        else:
            assert text == expected and text.probs == expected.probs
    assert len(found) > 20
    assert {text.stop_reason for _, text in found} >= {"cancelled", "length"}


@pytest.mark.skipif("c" not in BACKENDS, reason="others are the same within their tolerance")
def test_threads_that_submit_and_cancel_at_random_get_what_they_get_alone():
    check_submitting(3)


@pytest.mark.long
@pytest.mark.skipif("c" not in BACKENDS, reason="others are the same within their tolerance")
def test_threads_that_submit_and_cancel_at_random_for_ten_minutes():
    check_submitting(600)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_a_model_ends_other_threads_texts_with_an_error_at_most(backend):
    for _ in range(2):
        llama = tinyllama.load("small", backend, 2, progress=iter)
        expected = llama.generate("Once", n_predict=24, temp=0)
        begun = threading.Event()

        class Begun(Given):
            def is_set(self, begun=begun):
                begun.set()
                return False

        def close(llama=llama, begun=begun):
            begun.wait()
            llama.close()
            llama.close()  # twice is fine

        jobs = [lambda llama=llama: llama.generate("Once", n_predict=24, temp=0, cancel=Begun(0))] * 3
        *texts, closed = at_once([*jobs, close])
        assert closed is None
        for text in texts:
            assert text == expected or (isinstance(text, TinyllamaError) and "has been closed" in str(text))


def test_a_text_that_is_given_up_leaves_nothing():
    run = tinyllama.load().stream("Once upon a time", temp=0, remember=False)
    next(run)
    cache = weakref.ref(run.cache)
    del run
    gc.collect()
    assert cache() is None


@needs_proc
@pytest.mark.parametrize("backend", BACKENDS)
def test_loading_that_fails_midway_leaves_nothing(backend, tmp_path):
    import shutil

    folder = shutil.copytree(small_folder(), tmp_path / "small")

    def failing(names):
        yield from names[:20]
        raise RuntimeError("midway")

    tinyllama.load(progress=iter).close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="midway"):
            tinyllama.load(folder, backend, progress=failing)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert tinyllama.load(folder, backend).generate("Once", n_predict=2, temp=0)


# --- processes ------------------------------------------------------------------------------------


def text_in_child(backend: str) -> str:
    return str(tinyllama.load("small", backend, 2).generate("Once upon a time", n_predict=12, temp=0))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_processes_say_what_this_one_says(method):
    code = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
from test_concurrency import BACKENDS, text_in_child
expected = [text_in_child(name) for name in BACKENDS]  # all of their threads have been started
with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
    found = [pool.apply_async(text_in_child, (name,)) for name in BACKENDS]
    assert [text_in_child(name) for name in BACKENDS] == expected  # meanwhile
    assert [one.get(60) for one in found] == expected
print("done")
"""
    done = python(code, ROOT / "tests", method)
    assert done.stdout == "done\n", done.stderr


FORKS = """
import os, sys, threading, time
import tinyllama
backend, n = sys.argv[1], int(sys.argv[2])
llama = tinyllama.load("small", backend, 2)
say = lambda llama: llama.generate("Once upon a time there was a king", n_predict=6, temp=0)
expected, stop, wrong = say(llama), threading.Event(), []

def busy():
    while not stop.is_set():
        wrong.extend(text for text in [say(llama)] if text != expected)

def loading():
    while not stop.is_set():
        tinyllama.load("small", backend, 2, mmap=True).close()

threads = [threading.Thread(target=busy), threading.Thread(target=busy), threading.Thread(target=loading)]
for thread in threads:
    thread.start()
for _ in range(n):
    child = os.fork()
    if child == 0:
        fresh = tinyllama.load("small", backend, 1)
        os._exit(0 if say(llama) == expected and say(fresh) == expected else 1)
    deadline, ended = time.monotonic() + 30, 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        os.kill(child, 9)
        os._exit(print("a child hangs", flush=True) or 3)
    if status:
        os._exit(print("a child says something else", flush=True) or 4)
stop.set()
for thread in threads:
    thread.join()
print("wrong" if wrong else "done")
"""


@needs_fork
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "mlx"])  # it has locks of its own
def test_a_child_forked_while_other_threads_compute_and_load_says_the_same(backend):
    done = python(FORKS, backend, 8)
    assert done.stdout == "done\n", done.stderr


@needs_fork
@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_children_forked_while_other_threads_compute_and_load_say_the_same(backend):
    done = python(FORKS, backend, 200, timeout=1200)
    assert done.stdout == "done\n", done.stderr


@needs_fork
def test_a_forked_child_has_all_threads_of_blas_though_another_thread_was_computing():
    pytest.importorskip("threadpoolctl")
    code = """
import os, threading
from threadpoolctl import ThreadpoolController
from tinyllama.backends import get_backend
libraries = ThreadpoolController().select(user_api="blas").lib_controllers
threads = lambda: [library.get_num_threads() for library in libraries]
before, backend = threads(), get_backend("numpy", 2)
inside, leave = threading.Event(), threading.Event()
def compute():
    with backend.running():
        inside.set()
        leave.wait()
thread = threading.Thread(target=compute)
thread.start()
inside.wait()
assert set(threads()) <= {1}
child = os.fork()
if child == 0:
    with backend.running():
        assert set(threads()) <= {1}
    os._exit(0 if threads() == before else 1)
leave.set()
thread.join()
print(os.waitpid(child, 0)[1], threads() == before)
"""
    done = python(code)
    assert done.stdout == "0 True\n", done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_python_exits_quietly_while_a_daemon_thread_writes(backend):
    code = """
import sys, threading, time
import tinyllama
llama = tinyllama.load("small", sys.argv[1], 2)
def forever():
    while True:
        llama.generate("Once upon a time", n_predict=100)
for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(float(sys.argv[2]))
print("done")
"""
    for pause in (0.02, 0.1):
        done = python(code, backend, pause)
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# --- a lot of work --------------------------------------------------------------------------------


#: Bytes that the allocator may keep of up to 40 caches at once, which come and go in other sizes each time.
ALLOWED = {("texts", "c"): 10e6, ("texts", "numpy"): 40e6}


def soak(task: str, model: str, backend: str, n: int, warm: int) -> None:
    """Memory within ALLOWED, descriptors and threads constant, from the `warm`th tenth of the work on."""
    command = [sys.executable, ROOT / "tests" / "soak.py", task, model, backend, str(n)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    states = found["states"][warm:]
    rss = [state["rss"] for state in states]
    print(
        f"\n{task}, {model}, {backend}: {n} in {found['seconds']:.0f} s, {rss[0] / 1e6:.1f} MB "
        f"{(max(rss) - rss[0]) / 1e6:+.1f} MB, {states[-1]['fds']} files, {states[-1]['threads']} threads"
    )
    assert max(rss) - rss[0] < ALLOWED.get((task, backend), 5e6)
    assert len({(state["fds"], state["threads"]) for state in states}) == 1


@pytest.mark.skipif("c" not in BACKENDS, reason="the other backends take longer")
def test_thousands_of_tokens_leave_nothing_behind():
    soak("tokens", "small", "c", 2000, warm=5)


@pytest.mark.skipif("c" not in BACKENDS, reason="the other backends take longer")
def test_thousands_of_tokens_of_many_texts_leave_nothing_behind():
    soak("texts", "small", "c", 5000, warm=5)


def test_models_that_are_loaded_and_unloaded_leave_nothing_behind():
    soak("loads", "small", BACKENDS[0], 10, warm=5)


@pytest.mark.long
@pytest.mark.parametrize(
    "task, model, backend, n",
    [
        ("tokens", "small", "c", 100_000),
        ("tokens", "small", "numpy", 10_000),
        ("tokens", "small", "numexpr", 10_000),
        ("tokens", "smollm2", "c", 5_000),
        ("texts", "small", "c", 100_000),
        ("texts", "small", "numpy", 10_000),
        ("loads", "small", "c", 200),
        ("loads", "small", "numpy", 50),
    ],
)
def test_a_lot_of_work_leaves_nothing_behind(task, model, backend, n, smollm2_file):
    soak(task, model, backend, n, warm=1)
