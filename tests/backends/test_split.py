"""A model whose first layers run on MLX and whose others run in C."""

from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import tiny

import tinyllama
from tinyllama.backends import get_backend
from tinyllama.backends.numpy import HALF_LIMIT, Backend
from tinyllama.errors import Cancelled
from tinyllama.model import build, forward, tap_shapes
from tinyllama.texts.drafts import Pace

if find_spec("mlx") is None:
    pytest.skip("mlx is not installed", allow_module_level=True)

from checkpoints import refused

split = pytest.importorskip("tinyllama.backends.split", exc_type=ImportError)
Mlx, Native, mx = split.Mlx, split.Native, pytest.importorskip("mlx.core")

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog. "
N_LAYERS = 4  # of the small model
LAYERS = [0, 1, N_LAYERS, N_LAYERS + 5]

LAYERS_TOGETHER = 20 * HALF_LIMIT  # error of logits, by what one step may have

gpu_layers = pytest.mark.parametrize("n", LAYERS)


def split_model(n: int) -> tinyllama.Llama:
    return tinyllama.load("small", "mlx", 2, gpu_layers=n)


@pytest.fixture(scope="module")
def defined():
    """NumPy's logits of the story, [n_tokens, vocab_size]."""
    return tinyllama.load("small", "numpy", 1).logits(STORY)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean square of the difference, relative to that of what is expected."""
    return np.mean((found.astype(np.float64) - expected) ** 2) / np.mean(expected.astype(np.float64) ** 2)


@gpu_layers
def test_logits_are_numpy_s_at_once_and_in_pieces(n, defined):
    llama = split_model(n)
    ids, cache = llama.tokens(STORY), llama.new_cache(200)
    assert error(llama.logits(ids), defined) < LAYERS_TOGETHER
    pieces = [llama.forward(ids[start : start + some], cache) for start, some in [(0, 1), (1, 20), (21, 99)]]
    assert error(np.concatenate(pieces), defined) < LAYERS_TOGETHER
    assert cache.ids == ids


@gpu_layers
def test_each_weight_lies_on_its_side_and_so_do_keys_and_values(n):
    llama = split_model(n)
    cache = llama.new_cache(10)
    llama.forward([5, 6], cache)
    on_gpu = min(n, N_LAYERS)
    for arrays in (cache.keys, cache.values):
        assert [isinstance(array, mx.array) for array in arrays] == [i < on_gpu for i in range(N_LAYERS)]
    needed = llama.backend.memory(llama.config, llama.checkpoint.tensors, 100)
    sides = {
        side: sum(
            table.prepared_bytes(tensor)
            for key, tensor in llama.checkpoint.tensors.items()
            if (key.startswith("layers.") and int(key.split(".")[1]) < n) == (side == "gpu_weights")
        )
        for side, table in {"gpu_weights": Mlx(1, "float16"), "weights": Native(1)}.items()
    }
    assert {side: needed[side] for side in sides} == sides


def test_taps_of_both_sides_are_numpy_s_arrays_near_its_own():
    tensors, taps = tiny.tensors(type="q8_0"), ({}, {})
    for table, seen in zip((Backend(1), get_backend("mlx", 2, gpu_layers=1)), taps, strict=True):
        model = build(tiny.CONFIG, tensors, partial(table.prepare, copy=True))
        every = tiny.all_taps(seen.__setitem__)
        forward(model, table, list(range(9)), table.new_cache(tiny.CONFIG, 9), taps=every)
    expected, found = taps
    assert {name: array.shape for name, array in found.items()} == tap_shapes(tiny.CONFIG, 9)
    for name, array in found.items():
        assert type(array) is np.ndarray and array.dtype == np.float32
        seen = np.isfinite(expected[name])
        assert error(array[seen], expected[name][seen]) < 1e-3, name


@pytest.mark.parametrize("n", [1, N_LAYERS])
def test_texts_are_what_each_is_alone_and_with_drafts(n, monkeypatch):
    llama, settings = split_model(n), {"temp": 0, "n_predict": 12, "remember": False}
    prompts = [STORY, "Tom", STORY + "The"]
    alone = [llama.generate(prompt, **settings) for prompt in prompts]
    assert llama.generate(prompts, **settings) == alone
    note = Pace.note
    monkeypatch.setattr(Pace, "note", lambda self, n_tokens, _: note(self, n_tokens, 1.0))  # guesses pay
    assert llama.generate(STORY, **settings, draft_lookup=True) == alone[0]


@gpu_layers
@pytest.mark.parametrize("mapped", [False, True])
def test_a_saved_cache_goes_on_with_the_same_bits(n, mapped, tmp_path):
    llama = split_model(n)
    cache = llama.new_cache(100)
    llama.forward(llama.tokens(STORY), cache)
    cache.save(tmp_path / "cache")
    again = llama.load_cache(tmp_path / "cache", mapped=mapped)
    again = again.fork() if mapped else again
    assert np.array_equal(llama.forward([5, 6, 7], again), llama.forward([5, 6, 7], cache))


class Given:
    """A flag that is set when it has been asked a number of times."""

    def __init__(self, number: int):
        self.left = number

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("asked", range(N_LAYERS))
def test_a_cache_goes_on_after_a_pass_that_was_stopped_on_either_side(asked):
    llama = split_model(2)
    ids, cache = llama.tokens(STORY), llama.new_cache(100)
    whole = llama.logits(ids)
    llama.forward(ids[:9], cache)
    with pytest.raises(Cancelled):
        llama.forward(ids[9:20], cache, cancel=Given(asked))
    assert cache.ids == ids[:9]
    assert error(llama.forward(ids[9:], cache), whole[9:]) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_dtype_than_c_s_is_refused(dtype):
    refused(lambda: get_backend("mlx", 1, gpu_layers=1, dtype=dtype), "gpu_layers needs dtype float16")
    assert get_backend("mlx", 1, gpu_layers=1, dtype="float16").cache_type == "float16"


def test_layers_that_do_not_fit_on_the_gpu_are_refused_with_the_figures(monkeypatch):
    monkeypatch.setattr(Mlx, "free_memory", lambda self: 3_000_000)
    words = "small: 3 layers on the GPU", "needs 4.8 MB of memory, and 3.0 MB are free"
    refused(lambda: split_model(3), *words)
    assert split_model(1).generate("Tom", n_predict=2)


def test_the_title_says_who_computes_what():
    title = get_backend("mlx", 2, gpu_layers=3).title
    assert "with the first 3 layers; else backend c, 2 threads" in title
