"""Wrong arguments from Python raise and never reach a kernel; the pool lives with threads and forks."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tinyllama._native", reason="the C backend is not built")

from tinyllama import _native, backends
from tinyllama.backends.native import Native
from tinyllama.quant import TYPES, quantize
from tinyllama.tensor import Tensor

X = np.ones((2, 64), np.float32)


def weight(n_out=8, n_in=64, type="q4_0"):
    tensor = Tensor.from_array("", np.ones((n_out, n_in), np.float32), type)
    return Native(1).prepare(tensor, True)


def out(*shape):
    return np.empty(shape, np.float32)


def packed(n_rows, n_cols):
    """The bytes of q4_0 blocks."""
    return quantize(np.ones((n_rows, n_cols), np.float32), "q4_0").reshape(-1).view(np.uint8)


@pytest.mark.parametrize(
    "x, outs, error",
    [
        (X.astype(np.float64), (out(2, 8),), TypeError),
        (X[:, ::2].repeat(2, 1)[:, ::2], (out(2, 8),), ValueError),
        (np.ones((2, 128), np.float32)[:, ::2], (out(2, 8),), ValueError),
        (X[0], (out(2, 8),), ValueError),
        (X[:, :32].copy(), (out(2, 8),), ValueError),
        (X, (out(2, 9),), ValueError),
        (X, (out(3, 8),), ValueError),
        (X, (out(16),), ValueError),
        (X, (out(2, 16)[:, ::2],), ValueError),
        (X, (np.empty((2, 8), np.float64),), TypeError),
        (X, (), ValueError),
        (X, (out(2, 8), out(2, 8)), ValueError),
        (X, [out(2, 8)], TypeError),
        (None, (out(2, 8),), TypeError),
        (
            np.frombuffer(b"\0" + X.tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 64),
            (out(2, 8),),
            ValueError,
        ),
    ],
)
def test_matmul_refuses_what_does_not_fit(x, outs, error):
    with pytest.raises(error):
        _native.matmul(x, (weight(),), outs, 1)


def test_matmul_refuses_an_output_that_is_read_only():
    fixed = out(2, 8)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _native.matmul(X, (weight(),), (fixed,), 1)


@pytest.mark.parametrize("threads", [0, -1, -(2**31)])
def test_less_than_one_thread_is_refused(threads):
    x, w = np.ones((3, 512), np.float32), weight(512, 512)  # enough work to be shared
    heads, cache = np.ones((3, 8, 64), np.float32), np.zeros((8, 512, 64), np.float16)
    calls = [
        lambda: _native.matmul(x, (w,), (out(3, 512),), threads),
        lambda: _native.pack("q4_0", packed(512, 512), 512, 512, w, 0, 0, threads),
        lambda: _native.rms_norm(x, x[0], 1e-6, out(3, 512), threads),
        lambda: _native.swiglu(x, x, out(3, 512), threads),
        lambda: _native.rope(heads, np.ones((3, 32), np.complex64), heads, threads),
        lambda: _native.attention(heads, heads, heads, cache, cache.copy(), 500, out(3, 512), threads),
        lambda: _native.read_all(np.zeros(1 << 20, np.uint8), threads),
        lambda: _native.multiply_all(10, threads),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="at least one thread"):
            call()


def test_more_threads_than_there_can_be_are_as_many_as_there_can_be():
    w, x = weight(8, 64), X.copy()
    _native.matmul(x, (w,), (first := out(2, 8),), 1)
    _native.matmul(x, (w,), (second := out(2, 8),), 2**31)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "wrong", [np.empty(256 // 8, object), np.empty(64, np.float32), np.empty(256, np.int8)]
)
def test_bytes_are_written_into_bytes_alone(wrong):
    """Into an array of objects they would become pointers."""
    with pytest.raises(TypeError):
        _native.cast("f32", X[:1], "f32", wrong)
    with pytest.raises(TypeError):
        _native.pack("q4_0", np.empty(4096 // wrong.itemsize, wrong.dtype), 8, 64, weight(), 0, 0, 1)


def test_a_type_is_its_size_too():
    """On some systems a long, 'l', has four bytes."""
    _testbuffer = pytest.importorskip("_testbuffer", reason="this Python comes without its own tests")
    longs = _testbuffer.ndarray([1, 2], shape=[2], format="<l")
    assert memoryview(longs).itemsize == 4
    with pytest.raises(TypeError, match="of 4 bytes"):
        _native.rows(weight(), longs, out(2, 64))


def test_an_array_without_dimensions_is_one_number():
    number = np.array(3, np.float32)
    _native.swiglu(number, number, number, 1)
    np.testing.assert_allclose(number, 9 / (1 + np.exp(-3)), rtol=1e-6)


def test_matmul_refuses_what_is_no_weight():
    with pytest.raises(TypeError):
        _native.matmul(X, (X,), (out(2, 2),), 1)


def test_a_product_of_no_tokens_is_empty():
    assert Native(2).matmul(X[:0], weight()).shape == (0, 8)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (("q4_7", 8, 64, 1.0), ValueError),
        (("q4_0", 8, 63, 1.0), ValueError),
        (("q4_0", 0, 64, 1.0), ValueError),
        (("q4_0", -1, 64, 1.0), ValueError),
        (("q4_0", 2**40, 2**40, 1.0), ValueError),
        (("q4_0_2023", 8, 64, 1.0), ValueError),  # is prepared as another
        (("f16\0", 8, 64, 1.0), ValueError),
        (("q4_0", 2**24, 2**24, 1.0), MemoryError),
        (("q4_0", 8, 64, 1.0, True), TypeError),
        ((7, 8, 64, 1.0), TypeError),
    ],
)
def test_a_weight_needs_a_type_a_shape_and_the_memory(arguments, error):
    with pytest.raises(error):
        _native.Weight(*arguments)


@pytest.mark.parametrize("type", ["f32", "q4_1"])
@pytest.mark.parametrize("shape", [(1, 32), (40, 64), (1024, 4096), (6000, 4096)])
def test_a_new_weight_is_all_zeros_even_where_another_has_been(shape, type):
    """Small ones share memory, large ones have their own: f32 [6000, 4096] is 98 MB."""
    for _ in range(2):
        weights = [_native.Weight(type, *shape) for _ in range(3)]
        for i in (1, 0, 2):
            assert weights[i].nbytes >= shape[0] * shape[1] // 2
            assert _native.read_all((weights[i],), 2) == 0
        weights[1] = None
        data = quantize(np.arange(shape[1], dtype=np.float32)[None], type).reshape(-1).view(np.uint8)
        _native.pack(type, data, 1, shape[1], weights[0], shape[0] - 1, 0, 1)
        assert _native.read_all((weights[0],), 2) != 0 and _native.read_all((weights[2],), 2) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much is mapped")
def test_the_memory_of_weights_that_are_gone_goes_back():
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = mapped()
    small = [_native.Weight("q4_0", 512, 512) for _ in range(600)]
    large = _native.Weight("f32", 4096, 4096)
    assert mapped() - before > 64 << 20
    del small, large
    assert mapped() - before < 8 << 20


def test_a_mapped_weight_takes_no_memory_and_is_read_where_it_lies():
    data, whole = packed(8, 64), _native.Weight("q4_0", 8, 64, mapped=True)
    _native.pack("q4_0", data, 8, 64, whole, 0, 0, 1)
    assert (whole.nbytes, whole.bytes_read) == (0, len(data))
    assert _native.read_all((whole,), 1) == _native.read_all(data, 1)
    assert weight().bytes_read == weight().nbytes


@pytest.mark.parametrize("threads", [1, 3])
def test_several_weights_are_read_as_one_to_the_last_line(threads):
    """In pieces of 256 KB, each in three streams: no line may be left out or read twice."""
    data = np.random.default_rng(0).integers(0, 256, (1 << 20) + 640, np.uint8)
    for n_bytes in (64, 128, 256, 1 << 18, (1 << 18) + 64, len(data)):
        words = data[:n_bytes].view(np.uint64)
        assert _native.read_all(data[:n_bytes], threads) == int(words.sum(dtype=np.uint64))
    weights = [weight(8 * n, 64) for n in (1, 40, 2000)]
    mapped = _native.Weight("q4_0", 8, 64, mapped=True)
    _native.pack("q4_0", packed(8, 64), 8, 64, mapped, 0, 0, 1)
    alone = sum(_native.read_all((one,), 1) for one in (*weights, mapped))
    assert _native.read_all((*weights, mapped), threads) == alone % 2**64
    assert _native.read_all((), threads) == 0


def test_only_bytes_and_tuples_of_weights_are_read():
    for wrong in ((weight(), X), [weight()], weight(), X):
        with pytest.raises(TypeError):
            _native.read_all(wrong, 1)


def test_the_types_of_c_are_those_of_quant():
    defined = {name: (kind.block, kind.dtype.itemsize, kind.prepared) for name, kind in TYPES.items()}
    assert _native.types().items() <= defined.items()


LARGEST = 2**63 - 1


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "row, col",
    [(-1, 0), (1, 0), (0, 32), (0, 7), (2**62, 0), (0, 2**62), (LARGEST - 3, 0), (0, LARGEST - 31)],
)
def test_pack_refuses_blocks_beside_the_weight(row, col, mapped):
    to = _native.Weight("q4_0", 8, 64, mapped=True) if mapped else weight()
    with pytest.raises(ValueError):
        _native.pack("q4_0", packed(8, 64), 8, 64, to, row, col, 1)


@pytest.mark.parametrize(
    "n_rows, n_cols", [(LARGEST, 64), (8, LARGEST - 31), (-8, 64), (8, -64), (0, 64), (8, 0)]
)
def test_pack_refuses_another_number_of_blocks_than_there_are(n_rows, n_cols):
    with pytest.raises(ValueError):
        _native.pack("q4_0", packed(8, 64), n_rows, n_cols, weight(), 0, 0, 1)


def test_a_mapped_weight_is_used_when_it_has_each_of_its_blocks_once():
    whole, half = _native.Weight("q4_0", 8, 64, mapped=True), packed(4, 64)
    uses = (
        lambda: _native.matmul(X, (whole,), (out(2, 8),), 1),
        lambda: _native.rows(whole, np.array([0]), out(1, 64)),
    )
    for row in (0, 4):
        for use in uses:
            with pytest.raises(ValueError, match="missing"):
                use()
        _native.pack("q4_0", half, 4, 64, whole, row, 0, 1)
        with pytest.raises(ValueError, match="has some of these"):
            _native.pack("q4_0", half, 4, 64, whole, max(row - 1, 0), 0, 1)
    for use in uses:
        use()


def test_a_settled_weight_lets_go_of_its_arrays():
    data = packed(8, 64)
    whole, before = _native.Weight("q4_0", 8, 64, mapped=True), sys.getrefcount(data)
    with pytest.raises(ValueError, match="missing"):
        _native.settle(whole, 1)
    _native.pack("q4_0", data, 8, 64, whole, 0, 0, 1)
    assert sys.getrefcount(data) > before
    for _ in range(2):
        _native.settle(whole, 1)
        assert sys.getrefcount(data) == before
    data[:] = 0
    np.testing.assert_array_equal(Native(1).matmul(X, whole), Native(1).matmul(X, weight()))


def test_pack_refuses_too_few_bytes():
    with pytest.raises(ValueError, match="not the size"):
        _native.pack("q4_0", np.zeros(7, np.uint8), 8, 64, weight(), 0, 0, 1)


def test_rows_that_are_overwritten_while_they_are_looked_up_stay_what_they_were():
    table = np.arange(8 * 64, dtype=np.float32).reshape(8, 64) * 1e30
    w = Native(1).prepare(Tensor.from_array("", table, "f32"), True)
    rows = np.full(4 * 32, 3)
    both = rows.view(np.float32).reshape(4, 64)
    _native.rows(w, rows[:4], both)
    np.testing.assert_array_equal(both, table[[3, 3, 3, 3]])


@pytest.mark.parametrize("row", [-1, 8, 2**62])
def test_rows_refuses_a_token_that_is_not_there(row):
    with pytest.raises(IndexError):
        Native(2).embedding(weight(), np.array([0, row]))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"pos": 8}, ValueError),
        ({"pos": -1}, ValueError),
        ({"pos": 2**62}, ValueError),
        ({"window": -1}, ValueError),
        ({"window": 9}, ValueError),
        ({"k": np.zeros((2, 2, 16), np.float32)}, ValueError),
        ({"k": np.zeros((1, 2, 32), np.float32)}, ValueError),
        ({"keys": np.zeros((2, 8, 32), np.float32)}, TypeError),
        ({"keys": np.zeros((2, 8, 16), np.float16)}, ValueError),
        ({"values": np.zeros((2, 7, 32), np.float16)}, ValueError),
        ({"out": np.zeros((2, 64), np.float32)}, ValueError),
        ({"q": np.zeros((2, 3, 32), np.float32), "out": np.zeros((2, 96), np.float32)}, ValueError),
        ({"q": np.zeros((2, 0, 32), np.float32), "out": np.zeros((2, 0), np.float32)}, ValueError),
    ],
)
def test_attention_refuses_what_does_not_fit(change, error):
    good = {
        "q": np.zeros((2, 4, 32), np.float32),
        "k": np.zeros((2, 2, 32), np.float32),
        "v": np.zeros((2, 2, 32), np.float32),
        "keys": np.zeros((2, 8, 32), np.float16),
        "values": np.zeros((2, 8, 32), np.float16),
        "pos": 6,
        "out": np.zeros((2, 128), np.float32),
        "threads": 1,
    }
    _native.attention(*good.values())
    with pytest.raises(error):
        _native.attention(*(good | change).values())


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu", "rope"])
def test_element_wise_operations_refuse_other_shapes(operation):
    x, freqs = np.zeros((2, 4, 32), np.float32), np.zeros((2, 16), np.complex64)
    wrong = {
        "rms_norm": (X, X[0, :32].copy(), 1e-6, out(2, 64), 1),
        "swiglu": (X, X[:1].copy(), out(2, 64), 1),
        "rope": (x, freqs[:1].copy(), np.zeros_like(x), 1),
    }
    with pytest.raises(ValueError):
        getattr(_native, operation)(*wrong[operation])


def test_there_is_no_level_of_an_unknown_name():
    with pytest.raises(ValueError, match="sse9"):
        _native.use_level("sse9")
    assert "ref" in _native.levels()


def run(code: str, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_the_environment_variable_sets_the_level():
    done = run("from tinyllama import _native; print(_native.level())", TINYLLAMA_CPU="ref")
    assert done.stdout.strip() == "ref"


def test_a_level_that_the_cpu_lacks_leaves_the_other_backends():
    done = run("from tinyllama.backends import available; print(available())", TINYLLAMA_CPU="sse9")
    assert "TINYLLAMA_CPU=sse9" in done.stdout and "'numpy': None" in done.stdout


def test_without_the_extension_auto_falls_back_and_says_why():
    code = """if True:
        import sys
        sys.modules["tinyllama._native"] = None
        from tinyllama.backends import available, get_backend
        print(get_backend("auto").name, available()["c"])"""
    assert run(code).stdout.startswith("numpy its extension was not built")


def test_two_python_threads_may_call_at_once():
    w = weight(4096, 64)
    expected, wrong = Native(2).matmul(X, w), []

    def work():
        for _ in range(200):
            if not np.array_equal(Native(2).matmul(X, w), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, threading
import numpy as np
from tinyllama.backends.native import Native
from tinyllama.tensor import Tensor
tensor = Tensor.from_array("", np.ones((4096, 256), np.float32), "q4_0")
weight = Native(2).prepare(tensor, True)
x = np.ones((3, 256), np.float32)
expected = Native(2).matmul(x, weight)
busy = lambda: [Native(2).matmul(x, weight) for _ in range(500)]
threading.Thread(target=busy, daemon=True).start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(Native(2).matmul(x, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_gets_a_pool_of_its_own_and_exit_never_hangs():
    done = run(FORK, PYTHONWARNINGS="ignore")
    assert done.stdout.strip() == "done", done.stderr


def test_auto_takes_c_first():
    assert backends.get_backend("auto", 1).name == "c"
