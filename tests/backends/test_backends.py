import os
import sys
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from tinyllama import backends, ops
from tinyllama.backends import numexpr
from tinyllama.errors import Cancelled, TinyllamaError
from tinyllama.quant import Tensor

CLOSE = 2e-6  # a few float32 roundings of values near 1


def normal(*shape):
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("n_tokens", [1, 600])  # below and above the size where numexpr takes over
def test_numexpr_s_entries_compute_their_definitions(n_tokens):
    x, up, weight = normal(n_tokens, 64), normal(n_tokens, 64)[::-1], normal(64)
    for fused, defined in (
        (numexpr.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6)),
        (numexpr.softmax(x), ops.softmax(x)),
        (numexpr.swiglu(x, up), ops.swiglu(x, up)),
    ):
        np.testing.assert_allclose(fused, defined, rtol=0, atol=CLOSE)
        assert fused.dtype == np.float32


def test_auto_takes_the_first_that_runs_here():
    first = next(name for name, reason in backends.available().items() if reason is None)
    assert backends.get_backend("auto", 1).name == first


def test_auto_goes_on_to_the_next_where_one_is_missing(monkeypatch):
    def missing(threads):
        raise ImportError("no compiler was there")

    for name in ("c", "numpy"):
        monkeypatch.setitem(backends.BACKENDS, name, missing)
    assert backends.available()["c"] == "no compiler was there"
    assert backends.get_backend("auto", 1).name == "numexpr"
    with pytest.raises(TinyllamaError, match=r"c.*no compiler was there"):
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
    with backends.one_blas_thread(), backends.one_blas_thread():
        assert blas_threads() <= {1}
    assert blas_threads() == before


def test_blas_keeps_to_one_thread_in_every_python_thread():
    before, inside = blas_threads(), []

    def use():
        with backends.one_blas_thread():
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
        with backends.one_blas_thread():
            first_out.wait()

    thread = threading.Thread(target=second)
    thread.start()
    with backends.one_blas_thread():
        first_in.set()
    first_out.set()
    thread.join()
    assert blas_threads() == before


@pytest.mark.parametrize(
    "files, allowed",
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_container_s_share_of_the_cores_is_respected(files, allowed, tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(backends, "CGROUP", tmp_path)
    assert backends._container_cores() == allowed
    assert 1 <= backends.default_threads() <= (allowed or 10**6)


@pytest.mark.parametrize(
    "known, fast",
    [({"hw.perflevel0.physicalcpu": 4, "hw.physicalcpu": 8}, 4), ({"hw.physicalcpu": 6}, 6), ({}, 8)],
)
def test_a_mac_computes_on_its_fast_cores(known, fast, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(backends, "macos_number", known.get)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(backends, "_container_cores", lambda: None)
    assert backends.default_threads() == fast


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stoppable_product_in_python_stops_between_its_jobs(threads):
    class Flag:
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 3

    rows, flag = 40, Flag()
    weight = Tensor.from_array("w", np.ones((rows, ops.CHUNK), np.float32))  # a row is a job
    table = backends.stoppable(backends.get_backend("numpy", threads), flag)
    with pytest.raises(Cancelled):
        table.matmul(np.ones((1, ops.CHUNK), np.float32), weight)
    assert flag.asked > 3  # so it was looked at between jobs, of which each computes nothing once it is set
