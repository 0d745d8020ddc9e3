"""Weights that begin in their file: the same bits before and after they are packed, however that ends."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import tinyllama
from tinyllama import llama as loading
from tinyllama.backends import Packing, available, get_backend, packing
from tinyllama.commands import main
from tinyllama.errors import Cancelled, TinyllamaError
from tinyllama.formats import open_checkpoint
from tinyllama.machine.download import small_folder
from tinyllama.model import build, forward

if available()["c"]:
    pytest.skip("the C backend was not built", allow_module_level=True)

from tinyllama.backends import native

PROMPT, ROOT = "Once upon a time", Path(__file__).parents[2]
THREADS = 3  # as no other test has, so that each model is loaded here
DEADLINE = 60  # seconds in which a thread must have done what it does in a moment


@pytest.fixture
def large(monkeypatch):
    """Models are treated as if they were large, and none is loaded yet."""
    monkeypatch.setattr(native, "SMALL", 0)
    monkeypatch.setattr(loading, "_loaded", {})


@pytest.fixture
def llama(large):
    with tinyllama.load("small", "c", THREADS) as loaded:
        yield loaded


@pytest.fixture
def held(large, monkeypatch):
    """Packing waits where it has begun with a weight: (it has begun, go on, the weights that were begun)."""
    begun, go_on, weights, settle = threading.Event(), threading.Event(), [], native.Native.settle

    def slowly(self, weight, tensor):
        weights.append(tensor.name)
        begun.set()
        assert go_on.wait(DEADLINE)
        settle(self, weight, tensor)

    monkeypatch.setattr(native.Native, "settle", slowly)
    yield begun, go_on, weights
    go_on.set()


@pytest.fixture(scope="module")
def expected():
    """The greedy text of the model, all of its weights packed when it was loaded."""
    with tinyllama.load("small", "c", THREADS) as packed:
        assert packed.packing.state == (0, 0, 0)
        return packed.generate(PROMPT, n_predict=20, temp=0)


def until(holds) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def say(llama, **settings):
    return llama.generate(PROMPT, n_predict=20, temp=0, **settings)


# --- the results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 3, 100])
def test_logits_are_the_same_bits_whenever_weights_are_packed(large, each):
    checkpoint, backend = open_checkpoint("small"), get_backend("c", THREADS)
    model = build(checkpoint.config, checkpoint.tensors, lambda tensor: backend.prepare(tensor, copy=True))
    later = Packing(backend, checkpoint.tensors, checkpoint.check_unchanged, mmap=False)
    exchanged = build(checkpoint.config, checkpoint.tensors, later.prepare)
    n_weights, caches = later.state[2], [backend.new_cache(checkpoint.config, 64) for _ in range(2)]
    assert n_weights == sum(len(tensor.shape) == 2 for tensor in checkpoint.tensors.values())
    while True:
        first, second = (forward(m, backend, [7], c) for m, c in zip((model, exchanged), caches, strict=True))
        np.testing.assert_array_equal(second, first)
        if not all(later.pack_one() for _ in range(each)):
            break
    assert later.state[1:] == (n_weights, 0) and later.state[0] > 0


def test_a_model_is_packed_while_it_writes_and_says_the_same(llama, expected):
    text = say(llama)
    assert text.ids == expected.ids and text.probs == expected.probs
    until(lambda: llama.packing.state[2] == 0)
    text = say(llama)
    assert text.ids == expected.ids and text.probs == expected.probs
    assert text.timings.n_packed > 0 and text.timings.pack > 0 and text.timings.n_left == 0


def test_a_model_that_nobody_runs_is_packed_too(large, monkeypatch, expected):
    monkeypatch.setattr(packing, "PATIENCE", 0.01)
    with tinyllama.load("small", "c", THREADS) as llama:
        until(lambda: llama.packing.state[2] == 0)
        assert say(llama).probs == expected.probs


def test_packing_begins_when_the_first_token_is_there(held):
    begun, _, _ = held
    with tinyllama.load("small", "c", THREADS) as llama:
        assert not begun.is_set()
        next(llama.stream(PROMPT))
        assert begun.wait(DEADLINE)


@pytest.mark.parametrize("backend", [name for name, no in available().items() if not no and name != "mlx"])
def test_with_mmap_nothing_is_ever_packed(large, monkeypatch, backend):
    monkeypatch.setattr(packing, "PATIENCE", 0)
    with tinyllama.load("small", backend, THREADS, mmap=True) as llama:
        assert say(llama).timings.n_packed == 0
        assert llama.mapped and llama.packing.state == (0, 0, 0)
        assert "packing" not in {thread.name for thread in threading.enumerate()}


def test_the_command_line_says_what_was_packed(large, capsys):
    assert main(["generate", "-m", "small", "-p", PROMPT, "-n", "20", "--backend", "c", "-t", "3"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pack ")]
    assert "weights, in the background" in line


# --- however it ends ------------------------------------------------------------------------------


def test_cancelled_texts_go_on_with_the_same_tokens(held, expected):
    begun, go_on, _ = held
    with tinyllama.load("small", "c", THREADS) as llama:
        stop = threading.Event()
        run = llama.stream(PROMPT, n_predict=20, temp=0, cancel=stop)
        next(run)
        assert begun.wait(DEADLINE)
        stop.set()
        assert run.finish().stop_reason == "cancelled"
        with pytest.raises(Cancelled):
            llama.score(PROMPT, cancel=stop)
        go_on.set()
        assert say(llama).probs == expected.probs


def test_a_model_that_is_closed_is_packed_no_further(held):
    begun, go_on, weights = held
    llama = tinyllama.load("small", "c", THREADS)
    next(llama.stream(PROMPT))
    assert begun.wait(DEADLINE)
    llama.close()
    go_on.set()
    until(lambda: "packing" not in {thread.name for thread in threading.enumerate()})
    assert len(weights) == 1
    with pytest.raises(TinyllamaError, match="has been closed"):
        say(llama)


def test_a_model_that_is_gone_is_packed_no_further(held):
    begun, go_on, weights = held
    llama = tinyllama.load("small", "c", THREADS)
    next(llama.stream(PROMPT))
    assert begun.wait(DEADLINE)
    gone = weakref.ref(llama.packing)
    del llama
    for threads in (4, 5):  # of which so many are kept
        tinyllama.load("small", "numpy", threads)
    gc.collect()
    go_on.set()
    until(lambda: gone() is None)
    until(lambda: "packing" not in {thread.name for thread in threading.enumerate()})
    assert len(weights) == 1


def test_where_memory_is_short_the_rest_stays_in_the_file(large, free_memory, capsys, expected):
    with tinyllama.load("small", "c", THREADS) as llama:
        free_memory(2**25)
        llama.backend.require_run = lambda *_, **__: None  # there would be none for the text either
        text = say(llama)
        until(lambda: llama.packing.trouble)
        assert text.probs == say(llama).probs == expected.probs
        assert "needs" in llama.packing.trouble and "are free" in llama.packing.trouble
        assert llama.packing.state[2] > 0 and llama.packing.state[1] == 0
        assert main(["generate", "-m", "small", "-p", PROMPT, "-n", "3", "--backend", "c", "-t", "3"]) == 0
        assert "warning: " in capsys.readouterr().err


def test_a_file_may_change_when_its_weights_are_packed_and_not_before(held, tmp_path, expected):
    begun, go_on, _ = held
    for name in small_folder().iterdir():
        shutil.copy(name, tmp_path)
    weights = tmp_path / "consolidated.00.pth"
    with tinyllama.load(tmp_path, "c", THREADS) as llama:
        next(llama.stream(PROMPT))
        assert begun.wait(DEADLINE)
        go_on.set()
        until(lambda: llama.packing.state[2] == 0)
        weights.write_bytes(b"\7" * weights.stat().st_size)
        assert say(llama).probs == expected.probs
    shutil.copy(small_folder() / weights.name, tmp_path)
    go_on.clear()
    begun.clear()
    with tinyllama.load(tmp_path, "c", THREADS) as llama:
        next(llama.stream(PROMPT))
        assert begun.wait(DEADLINE)
        os.utime(weights, (0, 0))
        go_on.set()
        until(lambda: llama.packing.trouble)
        for _ in range(2):
            with pytest.raises(TinyllamaError, match="was changed while"):
                say(llama)


FORK = """
import os, threading, time
import tinyllama
from tinyllama.backends import native
native.SMALL, settle = 0, native.Native.settle
begun, go_on = threading.Event(), threading.Event()
def slowly(*arguments):
    begun.set()
    go_on.wait(60)
    settle(*arguments)
native.Native.settle = slowly
llama = tinyllama.load("small", "c", 2)
say = lambda: llama.generate("Once upon a time", n_predict=20, temp=0).probs
expected = say()
assert begun.wait(60)
def all_packed():
    go_on.set()
    assert say() == expected
    deadline = time.monotonic() + 60
    while llama.packing.state[2] and time.monotonic() < deadline:
        time.sleep(0.001)
    return not llama.packing.state[2] and say() == expected
child = os.fork()
if not child:
    os._exit(0 if all_packed() else 1)
print(os.waitpid(child, 0)[1], all_packed())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_that_is_forked_meanwhile_packs_for_itself():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "0 True\n", done.stderr
