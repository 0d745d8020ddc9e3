"""Layers go to workers that have the memory, so that the slowest is quick; what a worker lacks is named."""

import itertools
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce

import dask
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.backends import get_backend
from tinyllama.cluster import found as room
from tinyllama.cluster.found import UNTROUBLED, digest
from tinyllama.cluster.loading import load
from tinyllama.cluster.shares import HOP, Worker, split, survey
from tinyllama.config import EMBEDDING, OUTPUT
from tinyllama.errors import Cancelled, TinyllamaError, cancellable
from tinyllama.formats import open_checkpoint
from tinyllama.machine import limits
from tinyllama.settings import default_ctx_size

native = pytest.importorskip("tinyllama._native")


def worker(
    seconds: float = 1.0,
    free: int = 10**9,
    n_layers: int = 8,
    output: float = 0.0,
    bytes=(1, 0, 0, 0),
    name="0",
) -> Worker:
    """One that takes `seconds` a layer; `bytes`: of a layer, the embedding, the output, what each needs."""
    layer, *others = bytes
    layers = tuple(layer) if isinstance(layer, tuple) else (layer,) * n_layers
    who = {"address": f"tcp://{name}", "name": name, "host": "here", "digest": "same"}
    how = {"backend": "c", "level": "avx2", "cache_type": "float16", "threads": 1, "mapped": False}
    memory = {"needed": 0, "available": free, "used": 0, "allowed": free, "free": free}
    took = {"layer_seconds": seconds, "output_seconds": output, "layer_bytes": layers, "cache_bytes": 0}
    names = ("embedding_bytes", "output_bytes", "working_bytes")
    return Worker(**who, **how, **memory, **took, **dict(zip(names, others, strict=True)))


def counts(ranges: list[range]) -> list[int]:
    return [len(layers) for layers in ranges]


def test_what_layers_need_is_their_weights_their_caches_and_what_computing_takes():
    some = replace(worker(bytes=(10, 3, 5, 2)), cache_bytes=4)
    assert some.memory(range(2)) == {"weights": 2 * 6 + 3, "kv_cache": 2 * 4, "activations": 2}
    for layers in (range(2), range(3, 5), range(6, 8), range(8)):
        assert sum(some.memory(layers).values()) == some.needs(layers)


# --- split ----------------------------------------------------------------------------------------


def test_equal_workers_get_equal_shares():
    assert split([worker(n_layers=80), worker(n_layers=80)]) == [range(40), range(40, 80)]


def test_a_worker_twice_as_fast_gets_twice_as_many():
    assert counts(split([worker(1, n_layers=30), worker(0.5, n_layers=30)])) == [10, 20]


def test_the_last_worker_has_fewer_by_what_the_output_matrix_takes():
    assert counts(split([worker(output=2.0), worker(output=2.0)])) == [5, 3]


def test_what_the_fast_one_has_no_memory_for_goes_to_the_slow_one():
    assert counts(split([worker(1, free=3), worker(9)])) == [3, 5]


def test_a_worker_that_would_only_be_slower_gets_none():
    assert split([worker(1), worker(100), worker(1)]) == [range(4), range(4, 4), range(4, 8)]


def test_fewer_workers_do_what_more_would_not_do_faster():
    ranges = split([worker(n_layers=4), worker(n_layers=4), worker(n_layers=4)])
    assert sorted(counts(ranges)) == [0, 2, 2]


def test_embedding_and_output_count_where_they_lie():
    sizes = 1, 2, 3, 1  # of a layer, the embedding, the output matrix, and what each worker needs
    assert counts(split([worker(free=1 + 2 + 2, bytes=sizes), worker(free=6 + 3 + 1, bytes=sizes)])) == [2, 6]


sizes = st.integers(0, 6)


@st.composite
def some_workers(draw) -> list[Worker]:
    n_layers = draw(st.integers(1, 6))
    layers = tuple(draw(st.lists(st.integers(1, 6), min_size=n_layers, max_size=n_layers)))
    speeds = st.floats(0.0001, 10)
    one = st.builds(
        lambda seconds, output, free, *others: worker(seconds, free, n_layers, output, (layers, *others)),
        *(speeds, speeds, st.integers(0, 40), sizes, sizes, sizes),
    )
    return draw(st.lists(one, min_size=1, max_size=4))


def every_split(workers: list[Worker]) -> list[list[range]]:
    """All that fit into memory."""
    n_layers = len(workers[0].layer_bytes)
    ends = itertools.combinations_with_replacement(range(n_layers + 1), len(workers) - 1)
    found = [list(map(range, (0, *stops), (*stops, n_layers))) for stops in ends]
    return [
        ranges for ranges in found if all(w.needs(r) <= w.free for w, r in zip(workers, ranges, strict=True))
    ]


def slowest(workers, ranges) -> float:
    return max(map(Worker.seconds, workers, ranges))


def one_text(workers, ranges) -> float:
    return reduce(
        float.__add__, (w.seconds(r) + HOP * bool(r) for w, r in zip(workers, ranges, strict=True)), 0.0
    )


@given(some_workers())
def test_no_other_split_that_fits_has_a_faster_slowest_worker(workers):
    possible = every_split(workers)
    if not possible:
        with pytest.raises(
            TinyllamaError, match=r"needs at least .* of memory; free are .* on worker tcp://0"
        ):
            split(workers)
        return
    ranges = split(workers)
    assert ranges in possible
    quickest = min(slowest(workers, other) for other in possible)
    assert slowest(workers, ranges) == quickest
    as_quick = [other for other in possible if slowest(workers, other) == quickest]
    assert one_text(workers, ranges) == min(one_text(workers, other) for other in as_quick)


@given(some_workers(), st.lists(st.integers(-1, 6), max_size=5))
def test_a_wanted_split_is_taken_as_it_is_or_refused(workers, wanted):
    try:
        ranges = split(workers, wanted)
    except TinyllamaError:
        ranges = None
    padded = wanted + [0] * (len(workers) - len(wanted))
    assert ranges == next((r for r in every_split(workers) if counts(r) == padded), None)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([4, 3], "split 4,3 makes 7 layers, and the model has 8: 4,4 would be right"),
        ([9, -1], "split is a list of numbers of layers, [40, 40] say, not [9, -1]"),
        ([4.0, 4.0], "split is a list of numbers of layers, [40, 40] say, not [4.0, 4.0]"),
        ("4,4", "split is a list of numbers of layers, [40, 40] say, not '4,4'"),
        ([0, 0], "split is a list of numbers of layers, [40, 40] say, not [0, 0]"),
        (
            [7, 1],
            "worker tcp://0 (0, host here): 7 layers need 7 B of memory, and 6 B are free: "
            "split 4,4 would fit",
        ),
    ],
)
def test_a_split_that_is_not_possible_is_refused_with_one_that_is(wanted, message):
    with pytest.raises(TinyllamaError) as error:
        split([worker(free=6), worker(free=6, name="1")], wanted)
    assert str(error.value) == message


def test_a_worker_that_is_left_out_need_not_be_able(client):
    with memory_limit(client, "0", 1000), load("small", scheduler=client, split=[0, 4]) as llama:
        assert [worker.name for worker in llama.shares] == ["1"]
    with pytest.raises(TinyllamaError, match="split 3,0,1 is for 3 workers, and there are 2"):
        load("small", scheduler=client, split=[3, 0, 1])


def test_workers_that_are_not_listed_or_have_zero_are_left_out():
    workers = [worker(), worker(), worker()]
    assert split(workers, [8]) == split(workers, [8, 0, 0]) == [range(8), range(8, 8), range(8, 8)]
    assert split(workers, [0, 8]) == [range(0), range(8), range(8, 8)]


def test_what_is_too_large_for_all_is_refused_with_all_figures():
    with pytest.raises(TinyllamaError) as error:
        split([worker(free=3), worker(free=4, name="1")])
    free = "3 B on worker tcp://0 (0, host here), 4 B on worker tcp://1 (1, host here)"
    hint = "add workers, or give them more memory (`dask worker --memory-limit`)"
    assert str(error.value) == f"the model needs at least 8 B of memory; free are {free}: {hint}"


# --- survey ---------------------------------------------------------------------------------------


def on(client, name: str, function, *args):
    """Run a function on the worker of a name."""
    addresses = client.run(lambda dask_worker: str(dask_worker.name))
    (address,) = [address for address, own in addresses.items() if own == name]
    return client.run(function, *args, workers=[address])[address]


@pytest.fixture
def model(tmp_path):
    """The small model, in a folder by itself."""
    return shutil.copytree(open_checkpoint("small").files[0].path.parent, tmp_path / "small-model")


def test_each_worker_tells_of_the_model_and_of_itself(client):
    checkpoint, table = open_checkpoint("small"), get_backend("c", 1)
    config, tensors = checkpoint.config, checkpoint.tensors
    workers = survey(client, "small", "c")
    assert [worker.name for worker in workers] == ["0", "1"]
    whole = sum(table.memory(config, tensors, default_ctx_size(config)).values())
    twice = 0 if OUTPUT in tensors else table.prepared_bytes(tensors[EMBEDDING])
    for found in workers:
        assert (found.backend, found.level, found.threads) == ("c", table.level, 1)
        assert found.digest == digest(checkpoint)
        assert found.needs(range(config.n_layers)) == whole + twice
        assert min(found.free, found.layer_seconds, found.output_seconds) > 0
    assert sum(map(len, split(workers))) == config.n_layers


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_weights_that_stay_in_their_file_are_counted_as_they_lie_there(client, backend):
    tensors = open_checkpoint("small").tensors
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("layers.0."))
    for found in survey(client, "small", backend, 2, mmap=True):
        one = get_backend(backend, 2)
        config = open_checkpoint("small").config
        cache = one.cache_bytes(config, default_ctx_size(config)) // config.n_layers
        assert (found.mapped, found.threads, found.layer_bytes[0]) == (True, 2, layer + cache)


def test_workers_of_one_computer_share_its_memory(client, tmp_path):
    def say(n_bytes: int) -> None:
        (tmp_path / "meminfo").write_text(f"MemAvailable: {n_bytes // 1024} kB\n")

    with changed(client, "0", limits, "MEMINFO", tmp_path / "meminfo"):
        say(2**29)
        assert survey(client, "small")[0].free == 2**28


@contextmanager
def changed(client, name: str, module, attribute: str, value):
    """Inside, an attribute of a module is another one on a worker."""

    def change(value):
        before = getattr(module, attribute)
        setattr(module, attribute, value)
        return before

    before = on(client, name, change, value)
    try:
        yield
    finally:
        on(client, name, change, before)


@contextmanager
def memory_limit(client, name: str, n_bytes: int):
    """Inside, a worker has been started with --memory-limit."""

    def limit(n_bytes, dask_worker):
        dask_worker.memory_manager.memory_limit = n_bytes

    on(client, name, limit, n_bytes)
    try:
        yield
    finally:
        on(client, name, limit, None)


def test_a_worker_s_share_keeps_below_what_dask_would_pause_it_for(client):
    with memory_limit(client, "1", 10**9):
        used = on(client, "1", limits.used_memory)
        free = survey(client, "small")[1].free
    assert 0 < free < UNTROUBLED * 10**9 - 0.9 * used


def test_a_worker_without_memory_for_a_layer_is_named(client):
    measured = "a layer and the output matrix, which are measured,"
    needs = rf"worker tcp://\S+ \(1, host .*\): .*: {measured} needs .* of memory, and 0 B are free"
    with memory_limit(client, "1", 1000), pytest.raises(TinyllamaError, match=needs):
        survey(client, "small")


@contextmanager
def in_folder(client, name: str, folder):
    """Inside, a worker runs in a folder."""
    before = on(client, name, os.getcwd)
    on(client, name, os.chdir, folder)
    try:
        yield
    finally:
        on(client, name, os.chdir, before)


def test_a_worker_without_the_file_is_named(client, model):
    missing = rf"^worker tcp://\S+ \(\d, host .*\): {model.name}: there is no such file"
    with in_folder(client, "0", model.parent), pytest.raises(TinyllamaError, match=missing):
        survey(client, model.name)


@pytest.mark.parametrize("place", [0, -1])
def test_a_worker_with_another_file_of_the_name_is_named(client, model, tmp_path_factory, place):
    other = shutil.copytree(model, tmp_path_factory.mktemp("other") / model.name)
    change_a_weight(other, place)
    differs = r"^worker \S+ \(\d, host .*\): .* isn't the same model there as on worker .*: copy the file$"
    with in_folder(client, "0", model.parent), in_folder(client, "1", other.parent):
        with pytest.raises(TinyllamaError, match=differs):
            survey(client, model.name)
        shutil.copytree(model, other, dirs_exist_ok=True)
        assert len(survey(client, model.name)) == 2


def change_a_weight(model, place: int) -> None:
    """One bit of it."""
    piece = open_checkpoint(model).tensors["layers.1.feed_forward.w1.weight"].pieces[0]
    where = piece.offset + place % piece.nbytes
    with piece.data.path.open("r+b") as file:
        file.seek(where)
        (byte,) = file.read(1)
        file.seek(where)
        file.write(bytes([byte ^ 1]))


def test_a_worker_with_another_version_is_named(client):
    other = (
        r"^worker \S+ hasn't tinyllama \S+ \(0\.0\.1\): pip install 'tinyllama-lab\[cluster\]==\S+' there$"
    )
    with changed(client, "1", room, "__version__", "0.0.1"), pytest.raises(TinyllamaError, match=other):
        survey(client, "small")


@pytest.fixture
def without_tinyllama(client):
    """A worker that can't import it; its address."""

    def hide() -> None:
        names = [name for name in sys.modules if name.split(".")[0] == "tinyllama"]
        dask.hidden = {name: sys.modules.pop(name) for name in names}
        sys.modules["tinyllama"] = None

    def show() -> None:
        sys.modules.update(dask.hidden)

    on(client, "1", hide)
    yield on(client, "1", lambda dask_worker: dask_worker.address)
    on(client, "1", show)


def test_a_worker_without_tinyllama_is_named_and_goes_on(client, without_tinyllama):
    lacks = (
        rf"^worker {without_tinyllama} hasn't tinyllama \S+ \(ModuleNotFoundError.*\): pip install .* there$"
    )
    with pytest.raises(TinyllamaError, match=lacks):
        survey(client, "small")
    assert len(client.nthreads()) == 2


@pytest.mark.skipif(len(native.levels()) < 2, reason="this CPU has one level")
def test_other_instruction_sets_warn(client):
    low = native.levels()[0] if native.levels()[0] != native.level() else native.levels()[1]
    on(client, "0", native.use_level, low)
    try:
        with pytest.warns(UserWarning, match=rf"c {low}.*: a text may depend on who computes it"):
            survey(client, "small", "c")
    finally:
        on(client, "0", native.use_level, native.level())


@pytest.fixture
def busy(client, tmp_path):
    """The address of a worker whose thread does something else until the test ends."""
    wait = tmp_path / "wait"
    wait.touch()

    def work(path) -> None:
        while path.exists():
            time.sleep(0.02)

    address = on(client, "1", lambda dask_worker: dask_worker.address)
    future = client.submit(work, wait, workers=[address], pure=False)
    while not on(client, "1", lambda dask_worker: dask_worker.state.executing_count):
        time.sleep(0.02)
    yield address
    wait.unlink()
    future.release()


def test_a_survey_is_cancelled_while_workers_are_busy(client, busy):
    flag = threading.Event()
    threading.Timer(0.2, flag.set).start()
    with cancellable(flag), pytest.raises(Cancelled):
        survey(client, "small")


def test_a_worker_that_dies_meanwhile_is_named(client, busy):
    pid = on(client, "1", os.getpid)
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(TinyllamaError, match=f"worker {busy} left while it was measured"):
        survey(client, "small")
