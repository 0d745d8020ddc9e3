import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from tinyllama import backends, ops
from tinyllama.backends import numexpr
from tinyllama.backends.numpy import one_blas_thread
from tinyllama.errors import Cancelled, TinyllamaError, cancellable
from tinyllama.tensor import Tensor

CLOSE = 2e-6  # a few float32 roundings of values near 1


def normal(*shape):
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("n_tokens", [1, 600])  # below and above the size where numexpr takes over
def test_numexpr_s_entries_compute_their_definitions(n_tokens):
    x, up = normal(n_tokens, 64), normal(n_tokens, 64)[::-1]
    table = backends.get_backend("numexpr", 2)
    for fused, defined in (
        (numexpr.softmax(x), ops.softmax(x)),
        (table.swiglu(x, up), ops.swiglu(x, up)),
    ):
        np.testing.assert_allclose(fused, defined, rtol=0, atol=CLOSE)
        assert fused.dtype == np.float32


def test_auto_takes_the_first_that_runs_here():
    first = next(name for name, reason in backends.available().items() if reason is None)
    assert backends.get_backend("auto", 1).name == first


def test_auto_goes_on_to_the_next_where_one_is_missing(monkeypatch):
    for name in ("c", "numpy"):
        monkeypatch.setitem(backends.BACKENDS, name, ("missing", "Missing"))
    assert "No module named" in backends.available()["c"]
    assert backends.get_backend("auto", 1).name == "numexpr"
    with pytest.raises(TinyllamaError, match=r"c.*No module named"):
        backends.get_backend("c", 1)


def test_the_environment_variable_sets_the_default(monkeypatch):
    monkeypatch.setenv("TINYLLAMA_BACKEND", "numpy")
    assert backends.get_backend(None, 1).name == "numpy"
    assert backends.get_backend("numexpr", 1).name == "numexpr"


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(TinyllamaError, match=r"'cuda'.*numpy"):
        backends.get_backend("cuda")


def test_fewer_than_one_thread_is_refused():
    with pytest.raises(TinyllamaError, match="0"):
        backends.get_backend("numpy", 0)


def test_blas_keeps_to_one_thread_inside_and_gets_its_own_back():
    before = blas_threads()
    with one_blas_thread(), one_blas_thread():
        assert blas_threads() <= {1}
    assert blas_threads() == before


def test_blas_keeps_to_one_thread_in_every_python_thread():
    before, inside = blas_threads(), []

    def use():
        with one_blas_thread():
            inside.append(blas_threads())

    use()
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert inside[0] <= {1} and inside[1] <= {1} and blas_threads() == before


def test_blas_gets_its_threads_back_when_two_python_threads_overlap():
    before, first_in, first_out = blas_threads(), threading.Event(), threading.Event()

    def second():
        first_in.wait()
        with one_blas_thread():
            first_out.wait()

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    with one_blas_thread():
        first_in.set()
    first_out.set()
    thread.join()
    assert blas_threads() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_in_python_stops_between_its_jobs(threads):
    class Flag:
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 3

    rows, flag = 40, Flag()
    weight = Tensor.from_array("w", np.ones((rows, ops.CHUNK), np.float32))  # a row is a job
    table = backends.get_backend("numpy", threads)
    with pytest.raises(Cancelled), cancellable(flag):
        table.matmul(np.ones((1, ops.CHUNK), np.float32), weight)
    assert flag.asked > 3  # so it was looked at between jobs, of which each computes nothing once it is set
