import multiprocessing
import threading
from contextlib import closing

import pytest

from tinyllama.backends import available, get_backend
from tinyllama.commands.programs import AsItComes, Elsewhere, LlamaCpp, Task, Tinyllama
from tinyllama.errors import Cancelled, TinyllamaError, cancellable

RUNS = [name for name, reason in available().items() if not reason]


def task(backend: str = "numpy", **changes) -> Task:
    how = {"model": "small", "shape": None, "type": "q4_0", "backend": backend, "level": None, "threads": 1}
    return Task(**how | {"mmap": False, "n_ctx": 64, "at_once": 8} | changes)


@pytest.mark.parametrize("backend", RUNS)
def test_a_program_says_the_same_of_itself_here_and_in_a_process_of_its_own(backend):
    with closing(Tinyllama(task(backend))) as here, closing(Elsewhere(Tinyllama, task(backend))) as there:
        for program in (here, there):
            assert program.seconds(8, 0) > 0 and program.seconds(1, 8) > 0
            assert (program.probe() is None) == (get_backend(backend).level is None)
        ours, theirs = here.facts(), there.facts()
        for fact in ("level", "mapped", "bytes_read", "memory"):
            assert ours[fact] == theirs[fact], fact


def test_what_a_user_waits_for_holds_loading_and_the_first_token():
    with closing(Elsewhere(AsItComes, task())) as running:
        assert running.facts()["first_token"] > 0


def test_what_a_program_raises_is_raised_here():
    with pytest.raises(TinyllamaError, match="no such file"):
        Elsewhere(Tinyllama, task(model="nowhere.gguf"))


SLOW = """
import time
class Llama:
    def __init__(self, *_, **__):
        time.sleep(60)
"""


def test_whoever_is_told_to_stop_does_not_wait_for_a_process(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    flag, before = threading.Event(), multiprocessing.active_children()  # of other tests
    threading.Timer(0.5, flag.set).start()
    with cancellable(flag), pytest.raises(Cancelled):
        Elsewhere(LlamaCpp, task())
    assert {*multiprocessing.active_children()} <= {*before}, "it has been ended"
