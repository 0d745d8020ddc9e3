"""The table on MLX: weights stand for the file's numbers, and each entry computes its definition."""

import os
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import product

import nasty
import numpy as np
import pytest
import tiny

import tinyllama
from tinyllama import ops, quant
from tinyllama.backends import available, get_backend
from tinyllama.backends.numpy import Backend
from tinyllama.commands.compare import InStep
from tinyllama.config import Config, RopeScaling
from tinyllama.errors import Cancelled
from tinyllama.model import build, forward, tap_shapes
from tinyllama.quant import BLOCK, TYPES
from tinyllama.tensor import Piece, Tensor, halves_order
from tinyllama.texts.drafts import Pace
from tinyllama.texts.perplexity import perplexity

if find_spec("mlx") is None:
    pytest.skip("mlx is not installed", allow_module_level=True)

from checkpoints import refused

mlx = pytest.importorskip("tinyllama.backends.mlx", exc_type=ImportError)
Mlx, mx = mlx.Mlx, mlx.mx

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog. "
CONFIG = tiny.CONFIG  # 4 heads share 2 of keys and values
WIDER = 20  # bytes of memory for a weight while it is packed

dtypes = pytest.mark.parametrize("dtype", mlx.LIMITS)


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def numbers(matrix: mlx.Matrix) -> np.ndarray:
    """What a prepared weight stands for, as MLX says, [n_out, n_in]."""
    if not matrix.bits:
        return mlx.to_numpy(matrix.arrays[0])
    return mlx.to_numpy(mx.dequantize(*matrix.arrays, BLOCK, matrix.bits))


def layouts(type: str, x: np.ndarray) -> dict[str, Tensor]:
    """The same weights [n_out, n_in] in one piece, in several, and in an order of their own."""

    def pieces(*parts, **more):
        return tuple(
            Piece(quant.quantize(part, type).tobytes(), 0, type, part.shape, **more) for part in parts
        )

    order = halves_order(len(x) // 16, 16)
    return {
        "whole": Tensor.from_array("w", x, type),
        "rows": Tensor("w", x.shape, pieces(x[:16], x[16:])),
        "columns": Tensor("w", x.shape, pieces(x[:, :512], x[:, 512:]), axis=1),
        "ordered": Tensor("w", x.shape, pieces(x[np.argsort(order)], order=order)),
    }


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [type for type in TYPES if type in mlx.BITS or TYPES[type].block == 1])
def test_exact_types_keep_the_numbers_of_their_blocks(type, monkeypatch):
    table, x, ids = Mlx(1, "float32"), normal(48, 1024), np.array([47, 0, 3, 3])
    with_scales_of_half = "q4_0_2023" not in type  # others are rounded once more: q * d - 8 * d
    for portion, (layout, tensor) in product([2**24, 5 * 1024], layouts(type, x).items()):
        monkeypatch.setattr(mlx, "PORTION", portion)
        matrix, expected = table.prepare(tensor), tensor.dequantize()
        taken = mlx.to_numpy(table.embedding(matrix, ids))
        assert matrix.shape == x.shape and matrix.type == type and matrix.bits == mlx.BITS.get(type, 0)
        if with_scales_of_half:
            assert np.array_equal(numbers(matrix), expected), layout
            assert np.array_equal(taken, expected[ids]), layout
        np.testing.assert_allclose(numbers(matrix), expected, rtol=0, atol=2**-23 * np.abs(x).max())
        np.testing.assert_allclose(taken, expected[ids], rtol=0, atol=2**-23 * np.abs(x).max())


@pytest.mark.parametrize("type", [type for type in mlx.BITS if "q4_0_2023" not in type])
def test_exact_types_keep_the_numbers_that_quantizers_stumble_over(type):
    for name, x in nasty.nasty_rows().items():
        tensor = Tensor.from_array(name, x, type)
        assert np.array_equal(numbers(Mlx(1, "float32").prepare(tensor)), tensor.dequantize()), name


INEXACT = [type for type in TYPES if type not in mlx.BITS and TYPES[type].block > 1]


@pytest.mark.parametrize("type", INEXACT)
def test_other_types_are_off_by_a_255th_of_their_group_s_range_at_most(type, monkeypatch):
    table, x = Mlx(1, "float32", "8-bit"), normal(48, 1024)
    for portion, (layout, tensor) in product([2**24, 5 * 1024], layouts(type, x).items()):
        monkeypatch.setattr(mlx, "PORTION", portion)
        matrix, groups = table.prepare(tensor), tensor.dequantize().reshape(-1, BLOCK)
        off = np.abs(numbers(matrix).reshape(-1, BLOCK) - groups).max(axis=1)
        assert (off <= 1.001 * np.ptp(groups, axis=1) / 255).all(), layout
    assert matrix.bits == 8


@dtypes
@pytest.mark.parametrize("type", ["f32", "f16", "bf16", *INEXACT])
def test_floats_are_rounded_once(type, dtype):
    table, to = Mlx(1, dtype, "float"), {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    for layout, tensor in layouts(type, normal(48, 1024)).items():
        expected = quant.dequantize(quant.quantize(tensor.dequantize(), to), to)
        assert np.array_equal(numbers(table.prepare(tensor)), expected), layout


@dtypes
def test_scales_are_rounded_to_the_dtype(dtype):
    relative = {"float32": 2**-22, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    for type in mlx.BITS:
        tensor = Tensor.from_array("w", normal(16, 512), type)
        off = np.abs(numbers(Mlx(1, dtype).prepare(tensor)) - tensor.dequantize()).reshape(-1, BLOCK)
        largest = np.abs(tensor.dequantize()).reshape(-1, BLOCK).max(axis=1)
        assert (off.max(axis=1) <= 3 * relative * largest).all(), type


@dtypes
@pytest.mark.parametrize("inexact_as", ["8-bit", "float"])
def test_what_a_weight_will_take_is_known_before(dtype, inexact_as):
    table = Mlx(1, dtype, inexact_as)
    for type in TYPES:
        tensor = Tensor.from_array("w", normal(8, 512), type)
        assert table.prepare(tensor).nbytes == table.prepared_bytes(tensor), type
    norm = Tensor.from_array("n", normal(64))
    assert table.prepare(norm).nbytes == table.prepared_bytes(norm)


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "q4_k", "q6_k", "f16"])
def test_preparing_takes_the_memory_of_a_portion_beside_the_weights(type, monkeypatch):
    monkeypatch.setattr(mlx, "PORTION", 2**16)
    table = Mlx(1, "float16")
    tensors = [Tensor.from_array("w", normal(512, 512, seed=seed), type) for seed in range(12)]
    largest, total = table.prepared_bytes(tensors[0]), sum(map(table.prepared_bytes, tensors))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    kept = [table.prepare(tensor) for tensor in tensors]
    in_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(matrix.nbytes for matrix in kept) == total
    in_mlx = mx.get_peak_memory() - before
    assert in_mlx + in_numpy <= 1.1 * total + largest + WIDER * 2**16


def test_numbers_too_large_for_the_dtype_are_refused_and_the_tensor_is_named():
    large = normal(8, 64)
    large[3, 5] = 7e4
    for tensor in (
        Tensor.from_array("layers.1.attention.wq.weight", large),
        Tensor.from_array("layers.1.attention_norm.weight", large[3]),
        Tensor.from_array("output.weight", 10 * large, "q4_0_2023"),
    ):
        refused(lambda tensor=tensor: Mlx(1, "float16").prepare(tensor), tensor.name, "float16", "dtype")
        for dtype in ("float32", "bfloat16"):
            Mlx(1, dtype).prepare(tensor)


def test_preparing_stops_between_portions(monkeypatch):
    class Flag:
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 3

    monkeypatch.setattr(mlx, "PORTION", 64)
    table, flag = Mlx(1), Flag()
    with pytest.raises(Cancelled), table.running(flag):
        table.prepare(Tensor.from_array("w", normal(100, 64), "q4_0"))
    assert flag.asked == 4


# --- operations -----------------------------------------------------------------------------------


def assert_close(table: Mlx, operation: str, found, expected: np.ndarray, types=()):
    """Mean squared error as `compare` reckons it, within what the backend says of itself."""
    found = table.to_numpy(found)
    assert found.dtype == np.float32 and found.shape == expected.shape
    error = np.mean((found.astype(np.float64) - expected) ** 2) / np.mean(expected.astype(np.float64) ** 2)
    assert error <= table.tolerance(operation, types), f"{operation}: {error:.1e}"


@dtypes
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_products_are_those_of_numpy(dtype, type, n_tokens):
    x = normal(n_tokens, 512)
    weights = [Tensor.from_array("w", normal(n_out, 512, seed=n_out), type) for n_out in (48, 64)]
    table = Mlx(1, dtype)
    prepared = [table.prepare(weight) for weight in weights]
    both = table.matmul(table.array(x), *prepared)
    for found, weight, alone in zip(both, weights, prepared, strict=True):
        assert_close(table, "matmul", found, ops.matmul(x, weight), [type])
        assert np.array_equal(table.to_numpy(found), table.to_numpy(table.matmul(table.array(x), alone)))


@dtypes
def test_norms_and_gates_are_those_of_numpy(dtype):
    table, x, gate, weight = Mlx(1, dtype), normal(7, 160), 4 * normal(7, 160, seed=1), normal(160, seed=2)
    gate[0, :2] = -100, 100  # e^100 is no float32
    prepared = table.prepare(Tensor.from_array("n", weight))
    assert_close(
        table, "rms_norm", table.rms_norm(table.array(x), prepared, 1e-5), ops.rms_norm(x, weight, 1e-5)
    )
    assert_close(table, "swiglu", table.swiglu(table.array(gate), table.array(x)), ops.swiglu(gate, x))
    assert not table.to_numpy(table.rms_norm(table.array(0 * x), prepared, 1e-6)).any()


SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 32.0, 8192, 1.0, 4.0),
    "yarn": RopeScaling("yarn", 4.0, 2048),  # its magnitude is 1.14
}
POSITIONS = {"of one text": range(5, 12), "of several": [0, 1, 2, 40, 0, 7], "far": [0, 7999, 8000, 131_000]}


@dtypes
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("where", POSITIONS)
def test_rope_turns_each_token_as_in_numpy(dtype, scaling, where):
    config = Config(128, 2, 2, 96, 160, 2, rope_theta=5e5, rope_scaling=SCALINGS[scaling])
    table, positions, factors = Mlx(1, dtype), np.array(POSITIONS[where]), ops.rope_factors(config)
    x = normal(len(positions), 2, config.head_dim)
    found = table.rope(table.array(x), table.rope_freqs(config, positions, factors))
    assert_close(table, "rope", found, ops.rope(x, ops.rope_freqs(config, positions, factors)))


@dtypes
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("tapped", [False, True])
def test_attention_is_that_of_numpy_behind_any_past(dtype, window, tapped):
    table = Mlx(1, dtype)
    ours, theirs = table.new_cache(CONFIG, 60), ops.KVCache(CONFIG, 60)
    for n_tokens in (1, 9, 1, 4, 20):
        q, k, v = (normal(n_tokens, n, CONFIG.head_dim, seed=n_tokens + n) for n in (4, 2, 2))
        seen, expected = {}, {}
        taps = [{name: partial(kept.__setitem__, name) for name in ops.INNER} for kept in (seen, expected)]
        taps = taps if tapped else (None, None)
        found = table.attention(*map(table.array, (q, k, v)), ours, 1, taps[0], window)
        assert_close(table, "attention", found, ops.attention(q, k, v, theirs, 1, taps[1], window))
        for cache in (ours, theirs):
            cache.extend(range(n_tokens), n_tokens)
        assert seen.keys() == expected.keys() == ({"scores", "weights"} if tapped else set())
        if tapped:
            assert np.array_equal(np.isinf(table.to_numpy(seen["scores"])), np.isinf(expected["scores"]))
            assert_close(table, "attention", seen["weights"], expected["weights"])


@dtypes
@pytest.mark.parametrize("type", ["f32", "q4_0", "q8_0"])
def test_every_step_of_the_model_is_numpy_s_within_its_limit(dtype, type):
    config = Config(64, 2, 4, 96, 160, 2, 32, rope_scaling=SCALINGS["yarn"], sliding_window=6)
    sides, tensors = [Backend(1), Mlx(1, dtype)], tiny.tensors(config, type)
    models = [build(config, tensors, partial(side.prepare, copy=True)) for side in sides]
    both = InStep(sides, models)
    cache = both.new_cache(config, 40)
    for tokens in (range(9), [7], range(20)):
        forward(models[0], both, list(tokens), cache)
    assert [(step.name, step.mean_error) for step in both.steps if step.mean_error > step.limit] == []


def model_of(table, config: Config = CONFIG, type: str = "q4_0"):
    return build(config, tiny.tensors(config, type), partial(table.prepare, copy=True))


@dtypes
def test_taps_are_numpy_s_arrays_of_float32_as_the_definition_lists_them(dtype):
    table, seen = Mlx(1, dtype), {}
    taps = tiny.all_taps(seen.__setitem__, CONFIG)
    logits = forward(model_of(table), table, [5, 6, 7], table.new_cache(CONFIG, 3), taps=taps)
    assert {name: array.shape for name, array in seen.items()} == tap_shapes(CONFIG, 3)
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in seen.values())
    assert np.array_equal(seen["logits"], logits) and logits.dtype == np.float32


@pytest.mark.parametrize("tokens", [[7], range(30)], ids=["a token", "a piece of a prompt"])
def test_a_pass_is_evaluated_once(tokens, monkeypatch):
    table, noted = Mlx(1, "float32"), []
    model, cache = model_of(table), table.new_cache(CONFIG, 100)
    forward(model, table, list(range(20)), cache)

    def compute(*what, really=mlx.compute):
        noted.append("eval")
        really(*what)

    def to_numpy(x, really=mlx.to_numpy):
        noted.append(mx.get_peak_memory() - before)  # without as much as a hidden layer's activations
        return really(x)

    monkeypatch.setattr(mlx, "compute", compute)
    monkeypatch.setattr(mlx, "to_numpy", to_numpy)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    forward(model, table, list(tokens), cache, last=True)
    computed, evaluated = noted  # the logits; the caches, of which nothing is left to be computed
    assert evaluated == "eval"
    assert computed < 4 * len(tokens) * CONFIG.hidden_dim or computed < 2**12


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture(params=mlx.LIMITS)
def llama(request):
    return tinyllama.load("small", "mlx", 1, dtype=request.param)


@pytest.fixture(scope="module")
def defined():
    """NumPy's logits of the story, [n_tokens, vocab_size]."""
    return tinyllama.load("small", "numpy", 1).logits(STORY)


#: Mean squared error of logits after 4 layers, each of which rounds to the dtype, by what one step may have.
LAYERS = 20


def assert_logits(llama, found: np.ndarray, expected: np.ndarray):
    error = np.mean((found.astype(np.float64) - expected) ** 2) / np.mean(expected.astype(np.float64) ** 2)
    assert error <= LAYERS * llama.backend.tolerance("attention"), f"{error:.1e}"


def test_logits_are_numpy_s_at_once_and_in_pieces(llama, defined):
    ids, cache = llama.tokens(STORY), llama.new_cache(200)
    assert_logits(llama, llama.logits(ids), defined)
    pieces = [llama.forward(ids[start : start + n], cache) for start, n in [(0, 1), (1, 8), (9, 1), (10, 99)]]
    assert cache.ids == ids and cache.dtype == llama.backend.cache_type
    assert_logits(llama, np.concatenate(pieces), defined)


def test_long_products_are_computed_piece_by_piece_with_the_same_result(llama, monkeypatch):
    whole = llama.logits(STORY)
    monkeypatch.setattr(mlx, "AT_ONCE", 1)
    assert np.array_equal(llama.logits(STORY), whole)


def test_texts_are_what_each_is_alone_and_with_drafts(llama, monkeypatch):
    prompts, settings = [STORY, "Tom", STORY * 2 + "The"], {"temp": 0, "n_predict": 12, "remember": False}
    alone = [llama.generate(prompt, **settings) for prompt in prompts]
    for text, expected in zip(llama.generate(prompts, **settings), alone, strict=True):
        assert_same_or_near_tie(llama, text, expected)
    note = Pace.note
    monkeypatch.setattr(Pace, "note", lambda self, n_tokens, _: note(self, n_tokens, 1.0))  # guesses pay
    for drafts in ({"draft_lookup": True}, {"spec_draft_model": "small"}):
        text = llama.generate(STORY, **settings, **drafts)
        assert_same_or_near_tie(llama, text, alone[0])


def assert_same_or_near_tie(llama, text, expected):
    """Greedy texts may part where products of another number of rows are rounded otherwise: at a near tie."""
    parted = next(
        (i for i, pair in enumerate(zip(text.ids, expected.ids, strict=True)) if len(set(pair)) > 1), None
    )
    if parted is not None:
        logits = llama.logits([*llama.tokens(expected.settings["prompt"]), *expected.ids[:parted]])[-1]
        second, best = np.sort(logits)[-2:]
        assert best - second < 40 * np.abs(logits).max() * llama.backend.tolerance("rope") ** 0.5


def test_scores_and_perplexity_are_numpy_s(llama, defined):
    exact = tinyllama.load("small", "numpy", 1)
    for ours, theirs in zip(llama.score(STORY, batch_size=7)[1:], exact.score(STORY)[1:], strict=True):
        assert ours.id == theirs.id and ours.prob == pytest.approx(theirs.prob, rel=0.2, abs=1e-3)
    found, expected = (perplexity(one, STORY * 3, 64, progress=False).perplexity for one in (llama, exact))
    assert found == pytest.approx(expected, rel=3e-2 if llama.backend.cache_type == "bfloat16" else 3e-3)


def test_a_trace_unembeds_to_the_answer(llama, defined):
    taps = llama.trace(STORY, "layers.*.residual", "layers.*.weights", "logits")
    assert_logits(llama, taps["logits"], defined)
    assert_logits(llama, llama.unembed(taps["layers.3.residual"]), defined)
    np.testing.assert_allclose(taps["layers.1.attention.weights"].sum(axis=-1), 1, rtol=0, atol=1e-5)


CONTINUE = """
import sys, numpy as np, tinyllama
for dtype in sys.argv[2:]:
    llama = tinyllama.load("small", "mlx", 1, dtype=dtype)
    for mapped in (False, True):
        cache = llama.load_cache(f"{sys.argv[1]}/{dtype}", mapped=mapped)
        cache = cache.fork() if mapped else cache
        np.save(f"{sys.argv[1]}/{dtype}-{mapped}.npy", llama.forward([5, 6, 7], cache))
"""


def test_a_saved_cache_goes_on_with_the_same_bits_in_another_process_too(tmp_path):
    expected = {}
    for dtype in mlx.LIMITS:
        llama = tinyllama.load("small", "mlx", 1, dtype=dtype)
        cache = llama.new_cache(100)
        llama.forward(llama.tokens(STORY), cache)
        cache.save(tmp_path / dtype)
        again = llama.load_cache(tmp_path / dtype)
        expected[dtype] = llama.forward([5, 6, 7], cache)
        assert np.array_equal(llama.forward([5, 6, 7], again), expected[dtype])
    subprocess.run([sys.executable, "-c", CONTINUE, tmp_path, *mlx.LIMITS], check=True, timeout=100)
    for dtype, mapped in product(mlx.LIMITS, [False, True]):
        assert np.array_equal(np.load(tmp_path / f"{dtype}-{mapped}.npy"), expected[dtype])


def test_a_cache_of_another_dtype_is_refused(tmp_path):
    half, single = (tinyllama.load("small", "mlx", 1, dtype=dtype) for dtype in ("float16", "float32"))
    cache = half.new_cache(10)
    half.forward([5, 6], cache)
    cache.save(tmp_path / "cache")
    refused(lambda: single.load_cache(tmp_path / "cache"), "float16", "float32")


# --- ends, threads, processes ---------------------------------------------------------------------


class Given:
    """A flag that is set when it has been asked a number of times."""

    def __init__(self, number: int):
        self.left = number

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def in_a_thread(job):
    """What a job returns, or raises, done in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(job).result()


def assert_goes_on(asked: int, run) -> None:
    """Stop a pass where the flag is asked for the so-manyth time, and go on from its cache."""
    llama = tinyllama.load("small", "mlx", 1)
    ids, cache = llama.tokens(STORY), llama.new_cache(100)
    whole = llama.logits(ids)
    llama.forward(ids[:9], cache)
    with pytest.raises(Cancelled):
        llama.forward(ids[9:20], cache, cancel=Given(asked))
    assert cache.ids == ids[:9]
    np.testing.assert_allclose(run(lambda: llama.forward(ids[9:], cache)), whole[9:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("asked", range(4))
def test_a_cache_goes_on_after_a_pass_that_was_stopped(asked):
    assert_goes_on(asked, lambda job: job())


@pytest.mark.parametrize("asked", range(1, 4))
def test_a_cache_goes_on_in_another_thread_after_a_pass_that_was_stopped(asked):
    assert_goes_on(asked, in_a_thread)


@pytest.mark.parametrize("run", [lambda job: job(), in_a_thread], ids=["here", "in another thread"])
def test_a_text_whose_flag_is_set_within_its_prompt_ends_and_is_gone_on_from(run):
    llama = tinyllama.load("small", "mlx", 1)
    settings = {"temp": 0, "n_predict": 8, "batch_size": 20}
    expected = llama.generate(STORY * 2, **settings, remember=False)
    llama.remembered.clear()
    text = llama.generate(STORY * 2, **settings, cancel=Given(6))
    assert text.stop_reason == "cancelled" and text == ""
    again = run(lambda: llama.generate(STORY * 2, **settings))
    assert again.timings.n_remembered > 0 and again == expected


def test_two_threads_write_with_one_model_what_each_writes_alone():
    llama, prompts = tinyllama.load("small", "mlx", 1), ["Tom", "The cat"]

    def write(prompt):
        return llama.generate(prompt, temp=0, n_predict=20, remember=False)

    expected = [write(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, prompts)) == expected


FORK = """
import os, tinyllama
llama = tinyllama.load("small", "mlx", 1)
say = lambda: llama.generate("Once upon a time", n_predict=6, temp=0)
expected = say()
child = os.fork()
if child == 0:
    os._exit(0 if say() == expected and tinyllama.load("small", "mlx", 2).generate("Tom", n_predict=2) else 1)
print(os.waitpid(child, 0)[1], say() == expected)
"""


@pytest.mark.skipif(mlx.ON_GPU or sys.platform == "win32", reason="a GPU can't be used over a fork")
def test_a_forked_child_writes_the_same():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0 True\n", done.stderr


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("mlx", {"dtype": "float8"}, ["'float8'", "float32, float16, bfloat16"]),
        ("mlx", {"inexact_as": "4-bit"}, ["'4-bit'", "8-bit, float"]),
        *(
            (name, {"dtype": "float16"}, [f"'{name}' has no dtype", "mlx"])
            for name in ("c", "numpy", "numexpr")
        ),
        ("c", {"gpu_layers": 2}, ["'c' has no gpu_layers"]),
        ("c", {"inexact_as": "float"}, ["'c' has no inexact_as"]),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(name, options, words):
    if not available()[name]:
        refused(lambda: get_backend(name, 1, **options), *words)


def test_a_model_that_is_to_stay_in_its_file_is_copied_with_one_warning():
    with pytest.warns(UserWarning, match="mmap is ignored") as warned:
        mapped = tinyllama.load("small", "mlx", 1, mmap=True)
    assert len(warned) == 1 and not mapped.mapped
    assert np.array_equal(mapped.logits("Tom"), tinyllama.load("small", "mlx", 1).logits("Tom"))


@pytest.mark.skipif(sys.platform != "linux", reason="on a Mac with Metal it is the first")
def test_auto_takes_another_backend_on_linux_unless_options_ask_for_this_one():
    assert get_backend("auto", 1).name != "mlx"
    assert get_backend("auto", 1, dtype="bfloat16").title.endswith(", bfloat16")


def test_the_title_says_which_device_computes_and_in_what():
    title = Mlx(1, "bfloat16").title
    assert title.startswith("backend mlx (") and title.endswith(", bfloat16")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_text_goes_on_in_another_thread_and_threads_that_end_leave_none_behind():
    llama = tinyllama.load("small", "mlx", 1)
    expected = llama.generate("Tom", temp=0, n_predict=6)
    run = llama.stream("Tom", temp=0, n_predict=6, remember=False)
    first, rest = next(run), []
    for _ in range(2):  # the second has nothing left to do
        thread = threading.Thread(target=lambda: rest.extend(run))
        thread.start()
        thread.join()
    assert first + "".join(rest) == expected
    before = len(os.listdir("/proc/self/task"))
    for _ in range(10):
        thread = threading.Thread(target=lambda: llama.logits("Tom"))
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/task")) <= before + 1
