"""Ctrl-C, a kernel's interrupt and `kill`: heard soon, and everything is right afterwards."""

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tinyllama
from tinyllama.backends import available, get_backend
from tinyllama.errors import Cancelled, cancellable, check_cancelled
from tinyllama.machine.interrupts import interruptible, ours
from tinyllama.tensor import Tensor

ROOT = Path(__file__).parents[2]
BACKENDS = [name for name, reason in available().items() if reason is None]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def send(number: int = signal.SIGINT) -> None:
    """To this process; it is handled before this returns."""
    signal.raise_signal(number)


# --- the door -------------------------------------------------------------------------------------


def test_inside_of_the_door_an_interrupt_raises_only_where_somebody_looks():
    steps = []
    with pytest.raises(KeyboardInterrupt), interruptible() as flag:
        assert not flag.is_set() and flag.signal is None
        check_cancelled()
        send()
        steps.append("goes on")
        assert flag.is_set() and flag.signal == signal.SIGINT
        try:
            check_cancelled()
        except Cancelled:
            steps.append("stopped")
            raise
    assert steps == ["goes on", "stopped"]


def test_an_interrupt_that_nobody_looked_at_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt), interruptible():
        send()


def test_who_goes_on_after_an_interrupt_has_doors_of_its_own_and_other_signals_are_the_outer_doors():
    with pytest.raises(KeyboardInterrupt), interruptible(signals=(signal.SIGINT, signal.SIGTERM)) as outer:
        with ours():
            with pytest.raises(KeyboardInterrupt):
                send()
            with pytest.raises(KeyboardInterrupt), interruptible() as inner:
                send()
                assert inner.is_set()
            check_cancelled()
            send(signal.SIGTERM)
            with pytest.raises(Cancelled):
                check_cancelled()
        assert outer.signal == signal.SIGTERM and signal.getsignal(signal.SIGINT) == outer.catch


def test_several_in_a_row_are_as_good_as_one():
    with pytest.raises(KeyboardInterrupt), interruptible():
        for _ in range(3):
            send()


def test_who_never_looks_is_interrupted_by_a_late_second_one(monkeypatch):
    monkeypatch.setattr("tinyllama.machine.interrupts.PATIENCE", -1)
    steps = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        send()
        steps.append("goes on")
        send()
        steps.append("not reached")
    assert steps == ["goes on"]


def test_outside_of_the_door_everything_is_as_it_was():
    with contextlib.suppress(KeyboardInterrupt), interruptible():
        send()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_cancelled()
    with pytest.raises(KeyboardInterrupt):
        send()


def test_of_doors_inside_each_other_only_the_outermost_acts():
    steps = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        with interruptible():
            send()
        steps.append("the inner one raised nothing")
        with pytest.raises(Cancelled), interruptible():
            check_cancelled()
        steps.append("but sees the flag of the outer one")
    assert len(steps) == 2


def test_somebody_s_own_flag_stops_it_too_and_is_no_interrupt():
    cancel = threading.Event()
    with pytest.raises(Cancelled), interruptible(cancel) as flag:
        check_cancelled()
        cancel.set()
        assert flag.is_set() and flag.signal is None
        check_cancelled()


def test_other_failures_pass_unless_an_interrupt_came_before():
    with pytest.raises(ZeroDivisionError), interruptible():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), interruptible():
        send()
        1 / 0  # noqa: B018


def test_an_interrupt_in_code_that_swallows_exceptions_is_raised_at_the_end():
    """NumPy and the garbage collector drop what a signal handler raises; a flag stays set."""
    with pytest.raises(KeyboardInterrupt), interruptible(), contextlib.suppress(BaseException):
        send()
        check_cancelled()


@pytest.mark.parametrize("n_times", [50, pytest.param(5000, marks=pytest.mark.long)])
def test_at_any_moment_an_interrupt_is_heard_once_and_never_inside(n_times):
    """A loop of doors is interrupted wherever it is: entering, inside, leaving or between two of them."""
    chance, go = random.Random(n_times), queue.SimpleQueue()

    def interrupts():
        for seconds in iter(go.get, None):
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupts)
    thread.start()
    try:
        for _ in range(n_times):
            inside, end = False, time.monotonic() + 60
            with pytest.raises(KeyboardInterrupt):
                go.put(chance.uniform(0, 2e-4))
                while time.monotonic() < end:
                    with interruptible(), interruptible():
                        inside = True
                        sum(range(chance.randrange(30)))
                        inside = False
            assert not inside
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        go.put(None)
        thread.join()


def test_signals_that_are_asked_for_are_caught_and_told_apart():
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        with pytest.raises(KeyboardInterrupt), interruptible(signals=signals) as flag:
            send(number)
            check_cancelled()
        assert flag.signal == number
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_signal_that_somebody_else_handles_or_ignores_is_left_alone():
    for theirs in (signal.SIG_IGN, lambda *_: None):
        before = signal.signal(signal.SIGINT, theirs)
        try:
            with interruptible() as flag:
                assert signal.getsignal(signal.SIGINT) is theirs
                send()
                assert not flag.is_set()
            assert signal.getsignal(signal.SIGINT) is theirs
        finally:
            signal.signal(signal.SIGINT, before)


def test_in_another_thread_only_the_flag_is_looked_at():
    cancel, ended = threading.Event(), []

    def work():
        try:
            with interruptible(cancel):
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
                while True:
                    check_cancelled()
        except Cancelled:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt), interruptible():
        send()
    assert thread.is_alive()
    cancel.set()
    thread.join(60)
    assert ended == [True]


# --- a model --------------------------------------------------------------------------------------


def interrupt(*arguments) -> None:
    """Run interrupted.py, which looks at the model after each interrupt."""
    command = [sys.executable, ROOT / "tests" / "interrupted.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    for step, times in json.loads(done.stdout)["heard"].items():  # for `make soak`
        print(f"{arguments}: {step}: {len(times)} interrupts, heard after at most {1000 * max(times):.0f} ms")


@pytest.mark.parametrize(
    "backend", [BACKENDS[0], *(pytest.param(name, marks=pytest.mark.long) for name in BACKENDS[1:])]
)
def test_an_interrupt_at_any_moment_leaves_a_model_that_says_what_it_said(backend):
    interrupt("small", backend, 2)


@pytest.mark.long
@pytest.mark.parametrize("mmap", [False, True], ids=["loaded", "mapped"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ["small", "smollm2"])
def test_a_hundred_interrupts_leave_a_model_that_says_what_it_said(model, backend, mmap, smollm2_file):
    interrupt(model, backend, 100 if model == "small" else 20, *["--mmap"] * mmap)


# --- what takes long looks at the flag ------------------------------------------------------------


class Counting:
    """A flag that is set once it has been looked at a number of times; by default never."""

    def __init__(self, at_most: float = float("inf")):
        self.n, self.at_most = 0, at_most

    def is_set(self) -> bool:
        self.n += 1
        return self.n > self.at_most


@pytest.mark.parametrize("backend", BACKENDS)
def test_loading_looks_once_a_tensor_a_pass_once_a_layer_and_a_text_now_and_then(backend):
    tinyllama.load("small", backend).close()
    with cancellable(loading := Counting()):
        llama = tinyllama.load("small", backend)
    assert loading.n >= len(llama.checkpoint.tensors)
    with cancellable(running := Counting()):
        llama.logits([1, 2, 3])
    assert running.n >= llama.config.n_layers
    for text in ("ab" * 9_000, "It was once. " * 5000):
        with cancellable(cutting := Counting()):
            llama.tokens(text)
        assert cutting.n >= 3
    for step in (lambda: llama.tokens("It was twice. " * 5000), lambda: llama.logits([1, 2, 3])):
        with pytest.raises(Cancelled), cancellable(Counting(2)):
            step()


def prepared(type: str, array: np.ndarray):
    return get_backend("c", 2).prepare(Tensor.from_array("w", array, type), copy=True)


@pytest.mark.skipif("c" not in BACKENDS, reason="calls of C")
def test_a_long_product_in_c_is_several_calls_with_the_same_result(monkeypatch):
    rng, table = np.random.default_rng(0), get_backend("c", 2)
    weights = [prepared(type, rng.standard_normal((64, 96), np.float32)) for type in ("q4_0", "f16")]
    x = rng.standard_normal((100, 96), np.float32)
    whole = table.matmul(x, *weights)
    for limit in ("AT_ONCE", "AT_ONCE_IN_TILES"):
        monkeypatch.setattr(f"tinyllama.backends.native.{limit}", 128 * 96 * 32)
    with cancellable(flag := Counting()):
        parts = table.matmul(x, *weights)
    assert flag.n == 3  # of 32, 32 and 36 tokens
    for part, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5)
    with pytest.raises(Cancelled), cancellable(Counting(2)):
        table.matmul(x, *weights)


@pytest.mark.skipif("c" not in BACKENDS, reason="calls of C")
@pytest.mark.parametrize("type", ["q4_0", "f32", "q4_0_2023"])
def test_a_large_weight_is_packed_in_portions_to_the_same_weight(type, monkeypatch):
    rng, table = np.random.default_rng(0), get_backend("c", 2)
    array, x = rng.standard_normal((333, 64), np.float32), rng.standard_normal((3, 64), np.float32)
    whole = table.matmul(x, prepared(type, array))
    monkeypatch.setattr("tinyllama.backends.native.PORTION", 2000)
    with cancellable(flag := Counting()):
        weight = prepared(type, array)
    assert flag.n > 3
    np.testing.assert_array_equal(table.matmul(x, weight), whole)


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
        assert line, "the command ended"
    if step == "decode":
        process.stdout.read(60)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert b"Traceback" not in err and err.endswith(b"stopped: interrupted\n")


# --- a notebook -----------------------------------------------------------------------------------

NOTEBOOK = {
    "load": "print('begun')\nwhile True: tinyllama.load('small', backend=B).close()",
    "prefill": "print('begun')\nwhile True: llama.logits(long)",
    "decode": "print('begun')\nwhile True: llama.generate('Once upon', n_predict=500, temp=0)",
}


@pytest.fixture(scope="module")
def kernel():
    """A Jupyter kernel as a notebook has it; call it with code, get what is printed and the error's name."""
    jupyter_client = pytest.importorskip("jupyter_client")
    manager, client = jupyter_client.manager.start_new_kernel(env=environment())

    def run(code: str, interrupt: bool = False) -> tuple[str, str | None]:
        sent, printed, error = client.execute(code), "", None
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != sent:
                continue
            kind, content = message["msg_type"], message["content"]
            printed += content["text"] if kind == "stream" else ""
            error = content["ename"] if kind == "error" else error
            if interrupt and "begun" in printed:
                interrupt = False
                time.sleep(0.2)
                manager.interrupt_kernel()
            if kind == "status" and content["execution_state"] == "idle":
                return printed, error

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize(
    "backend", [BACKENDS[0], *(pytest.param(name, marks=pytest.mark.long) for name in BACKENDS[1:])]
)
def test_a_notebook_s_interrupt_ends_the_cell_and_the_next_cell_is_right(kernel, backend):
    code = f"""
import tinyllama
B = {backend!r}
llama = tinyllama.load('small', backend=B)
long = (llama.tokens('Once upon a time there was a king. ') * 60)[:500]
before = llama.generate('Once upon', n_predict=9, temp=0)
"""
    assert kernel(code)[1] is None
    for step, cell in NOTEBOOK.items():
        assert kernel(cell, interrupt=True)[1] == "KeyboardInterrupt", step
        code = "llama = tinyllama.load('small', backend=B)\n"
        code += "print(llama.generate('Once upon', n_predict=9, temp=0) == before)"
        assert kernel(code) == ("True\n", None), step


def test_an_interrupt_while_a_widget_s_run_goes_on_reaches_neither_it_nor_the_model():
    from tinyllama.lab.widgets.worker import Worker

    expected = tinyllama.generate("Once upon a time", n_predict=60, temp=0)
    found, worker = [], Worker(lambda: None)
    llama = tinyllama.load()
    assert worker.start(
        lambda: found.append(llama.generate("Once upon a time", n_predict=60, temp=0, cancel=worker))
    )
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            tinyllama.generate("The old king", n_predict=200)
    assert worker.wait(60) and worker.error == "" and found == [expected]
