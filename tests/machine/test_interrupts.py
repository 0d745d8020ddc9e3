"""Ctrl-C and a kernel's interrupt: heard soon, and the model says afterwards what a fresh one says."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from interrupted import others

import tinyllama
from tinyllama import backends, tokenizer
from tinyllama.machine import threads
from tinyllama.backends import available
from tinyllama.blocks import TYPES
from tinyllama.machine.download import small_folder
from tinyllama.formats import open_checkpoint

ROOT = Path(__file__).parents[2]
BACKENDS = [name for name, reason in available().items() if reason is None]
pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer's signals")

#: Seconds. Here it is ten times less; a computer that is busy with other tests must not fail them.
HEARD_WITHIN = 5


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def interrupted(*arguments) -> dict:
    """Run interrupted.py: step -> seconds until each signal was heard."""
    command = [sys.executable, ROOT / "tests" / "interrupted.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["heard"]


def figures(title: str, heard: dict) -> None:
    """For `make soak`."""
    steps = [f"{step} {1000 * max(times, default=0):.0f}" for step, times in heard.items()]
    print(f"\n{title}: longest in ms, {sum(map(len, heard.values()))} interrupts: {', '.join(steps)}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupt_at_any_moment_leaves_a_model_that_says_what_a_fresh_one_says(backend):
    heard = interrupted("small", backend, 6)
    assert max(max(times, default=0) for times in heard.values()) < HEARD_WITHIN


@pytest.mark.long
@pytest.mark.parametrize("mmap", [False, True], ids=["loaded", "mapped"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ["small", "smollm2"])
def test_many_interrupts_leave_a_model_that_says_what_a_fresh_one_says(model, backend, mmap, smollm2_file):
    heard = interrupted(model, backend, 40, *["--mmap"] * mmap)
    figures(f"{model}, {backend}{', mapped' * mmap}", heard)
    assert max(max(times) for times in heard.values()) < HEARD_WITHIN


@pytest.fixture
def alarm():
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    gc.disable()  # hypothesis looks at each collection, and Python drops interrupts that fall into that
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    gc.enable()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# --- threads --------------------------------------------------------------------------------------


class Library:
    """A BLAS whose calls are interrupted, the one of a number before it has done anything, or after."""

    def __init__(self):
        self.threads, self.calls = 4, 0
        self.interrupted, self.before = None, True

    def get_num_threads(self):
        return self._call(lambda: self.threads)

    def set_num_threads(self, number):
        self._call(lambda: setattr(self, "threads", number))

    def _call(self, do):
        self.calls += 1
        if self.calls == self.interrupted and self.before:
            raise KeyboardInterrupt
        result = do()
        if self.calls == self.interrupted:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_blas_gets_its_threads_back_wherever_an_interrupt_comes(number, before, monkeypatch):
    blas, library = backends._Blas(), Library()
    blas._libraries = [library]
    monkeypatch.setattr(backends, "_blas", blas)
    library.interrupted, library.before = number, before
    with pytest.raises(KeyboardInterrupt), backends.one_blas_thread():
        assert number == 3 and library.threads == 1
    with backends.one_blas_thread():
        assert library.threads == 1
    assert library.threads == 4 and not blas._inside


def test_jobs_of_a_product_end_with_an_interrupt(alarm):
    started = []

    def job(number):
        if number == 0:
            alarm(0.02)
        started.append(number)
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        threads.shared_out(3, job, range(100_000))
    assert 0 < len(started) < 100_000
    deadline = time.monotonic() + 10
    while others() and time.monotonic() < deadline:
        time.sleep(0.001)
    n = len(started)
    time.sleep(0.02)
    assert len(started) == n


def test_interrupts_as_threads_start_and_end_leave_none_behind_and_are_nothing_but_interrupts(alarm):
    for seed in range(2000):
        try:
            alarm(random.Random(seed).uniform(1e-5, 3e-4))
            for _ in range(10_000):
                threads.shared_out(3, id, range(3))
        except KeyboardInterrupt:
            pass
    deadline = time.monotonic() + 10
    while others() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not others()


def test_interrupts_of_threads_that_yield_results_are_nothing_but_interrupts_and_end_them_all(alarm):
    def endless(given_up):
        end = time.monotonic() + HEARD_WITHIN
        while not given_up.is_set() and time.monotonic() < end:
            yield 1

    for seed in range(1000):
        given_up = threading.Event()
        jobs = [endless(given_up) for _ in range(3)]
        with pytest.raises(KeyboardInterrupt):
            alarm(random.Random(seed).uniform(1e-5, 1e-3))
            with closing(threads.results_of(jobs, given_up.set)) as results:
                sum(results)
    deadline = time.monotonic() + 10
    while others() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not others()


def test_no_interrupt_is_dropped_while_weights_are_viewed(alarm):
    kind, rows = TYPES["q4_0"], bytes(18)
    for _ in range(30):
        with pytest.raises(KeyboardInterrupt):
            alarm(1e-3)
            end = time.monotonic() + HEARD_WITHIN
            while time.monotonic() < end:
                kind.view(rows, (1, 32))


@pytest.mark.parametrize("n_threads", [1, 4])
def test_a_job_that_fails_ends_the_others_and_is_told(n_threads):
    done = []

    def job(number):
        if number == 5:
            raise MemoryError("no room")
        done.append(number)

    with pytest.raises(MemoryError, match="no room"):
        threads.shared_out(n_threads, job, range(100_000))
    assert len(done) < 100_000


# --- long calls -----------------------------------------------------------------------------------


def test_an_interrupt_does_not_wait_for_the_tokens_of_a_long_text(alarm):
    interrupted, ended = threading.Event(), threading.Event()

    def encode(text):
        alarm(0.01)
        interrupted.wait(60)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        tokenizer._interruptibly(encode, "a" * tokenizer.LONG)
    assert not ended.is_set()
    interrupted.set()
    assert ended.wait(60)  # it goes on, for nobody


@pytest.mark.parametrize("model", ["small", "smollm2"])
def test_a_long_text_becomes_the_tokens_of_its_pieces(model, smollm2_file):
    path = smollm2_file if model == "smollm2" else small_folder()
    made = tokenizer.make_tokenizer(open_checkpoint(path).vocabulary)
    line = "It was once.\n"
    short, long = made.encode(line * 10), made.encode(line * tokenizer.LONG)
    assert made.decode(long) == line * tokenizer.LONG
    assert long[: len(short)] == short

    def wrong(text):
        raise OverflowError("too long")

    with pytest.raises(OverflowError, match="too long"):
        tokenizer._interruptibly(wrong, "a" * tokenizer.LONG)


@pytest.mark.skipif("c" not in BACKENDS, reason="calls of C")
def test_a_long_product_is_several_calls_with_the_same_result(monkeypatch):
    native = pytest.importorskip("tinyllama.backends.native")
    rng = np.random.default_rng(0)
    from tinyllama.quant import Tensor

    table = backends.get_backend("c", 2)
    weights = [
        table.prepare(Tensor.from_array("", rng.standard_normal((64, 96), dtype=np.float32), type), copy=True)
        for type in ("q4_0", "f16")
    ]
    x = rng.standard_normal((100, 96), dtype=np.float32)
    whole, calls = table.matmul(x, *weights), []
    monkeypatch.setattr(native, "AT_ONCE", 128 * 96 * 30)
    matmul = native._native.matmul
    monkeypatch.setattr(native._native, "matmul", lambda *args: (calls.append(len(args[0])), matmul(*args)))
    parts = table.matmul(x, *weights)
    assert calls == [24, 24, 24, 24, 4]
    for part, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif("c" not in BACKENDS, reason="calls of C")
def test_a_large_tensor_is_repacked_in_portions_to_the_same_weight(monkeypatch):
    native = pytest.importorskip("tinyllama.backends.native")
    from tinyllama.quant import Tensor

    array = np.random.default_rng(0).standard_normal((333, 64), dtype=np.float32)
    table = backends.get_backend("c", 2)
    for type in ("q4_0", "f32", "q4_0_2023"):
        tensor = Tensor.from_array("", array, type)
        cut = Tensor("", type, tensor.shape, (tensor.parts[0][:50], tensor.parts[0][50:]))
        expected = [table.prepare(one, copy=True).memory[0].tobytes() for one in (tensor, cut)]
        with monkeypatch.context() as patch:
            patch.setattr(native, "PORTION", 2000)
            found = [table.prepare(one, copy=True).memory[0].tobytes() for one in (tensor, cut)]
        assert found == expected and found[0] == found[1]


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_control_c_ends_the_command_quietly(step, tmp_path):
    prompt = tmp_path / "prompt"
    prompt.write_text("Once upon a time. " * (300 if step == "prefill" else 1))
    command = [
        sys.executable,
        "-m",
        "tinyllama",
        "generate",
        "-f",
        prompt,
        "--backend",
        "numpy",
        "-n",
        "1000",
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = b""
    while b"prompt tokens" not in line:  # the model is loaded and the prompt is being read
        line = process.stderr.readline()
    if step == "decode":
        process.stdout.read(60)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and time.monotonic() - started < HEARD_WITHIN
    assert b"Traceback" not in err and err.endswith(b"stopped: interrupted\n")


# --- a notebook -----------------------------------------------------------------------------------

NOTEBOOK = {
    "load": "while True: llama_module._loaded.clear(); print('begun'); tinyllama.load('small', backend=B)",
    "prefill": "print('begun')\nwhile True: llama.logits(long)",
    "decode": "print('begun')\nwhile True: llama.generate('Once upon', n_predict=500, temp=0)",
}


@pytest.fixture(scope="module")
def kernel():
    """A Jupyter kernel as a notebook has it; call it with code, get what is printed and the error's name."""
    jupyter_client = pytest.importorskip("jupyter_client")
    manager, client = jupyter_client.manager.start_new_kernel(env=environment())

    def run(code: str, interrupt: bool = False) -> tuple[str, str | None, float]:
        sent, printed, error, at = client.execute(code), "", None, 0.0
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != sent:
                continue
            kind, content = message["msg_type"], message["content"]
            printed += content["text"] if kind == "stream" else ""
            error = content["ename"] if kind == "error" else error
            if interrupt and not at and "begun" in printed:
                time.sleep(0.2)
                at = time.monotonic()
                manager.interrupt_kernel()
            if kind == "status" and content["execution_state"] == "idle":
                return printed, error, time.monotonic() - at

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_notebook_s_interrupt_ends_the_cell_and_the_next_cell_is_right(kernel, backend):
    code = f"""
import tinyllama
from tinyllama import llama as llama_module
B = {backend!r}
llama = tinyllama.load('small', backend=B)
long = (llama.tokens('Once upon a time there was a king. ') * 60)[:500]
before = llama.generate('Once upon', n_predict=9, temp=0)
"""
    assert kernel(code)[1] is None
    for step, cell in NOTEBOOK.items():
        _, error, seconds = kernel(cell, interrupt=True)
        assert error == "KeyboardInterrupt" and seconds < HEARD_WITHIN, step
        check = (
            "print(tinyllama.load('small', backend=B).generate('Once upon', n_predict=9, temp=0) == before)"
        )
        assert kernel(check)[:2] == ("True\n", None), step
        assert kernel(check.replace("tinyllama.load('small', backend=B)", "llama"))[0] == "True\n", step
        print(f"\nnotebook, {backend}, {step}: {1000 * seconds:.0f} ms")


def test_an_interrupt_while_a_widget_s_run_goes_on_reaches_neither_it_nor_the_model(alarm):
    from tinyllama.lab.widgets.worker import Worker

    expected = tinyllama.generate("Once upon a time", n_predict=60, temp=0)
    found, worker = [], Worker(lambda: None)
    llama = tinyllama.load()
    assert worker.start(
        lambda: found.append(llama.generate("Once upon a time", n_predict=60, temp=0, cancel=worker))
    )
    with pytest.raises(KeyboardInterrupt):  # one at least: Python drops those that fall into a finalizer
        for _ in range(20):
            alarm(0.005)
            tinyllama.generate("The old king", n_predict=200)
    assert worker.wait(60) and worker.error == "" and found == [expected]
