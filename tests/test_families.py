"""Every family of models computes what transformers computes, with the same random weights."""

from dataclasses import replace
from functools import partial

import families
import numpy as np
import pytest
import tiny

import tinyllama
from tinyllama.backends import available, get_backend
from tinyllama.config import RopeScaling
from tinyllama.errors import TinyllamaError
from tinyllama.model import Model, build, forward, tap_shapes

LOGITS = 1e-3  # largest difference of float32 sums in another order, over 300 tokens
BACKENDS = [name for name, reason in available().items() if not reason]


def model_of(name, backend, **changes) -> Model:
    theirs = families.made(name)
    config = replace(families.config_of(theirs), **changes)
    return build(config, families.tensors_of(theirs), partial(backend.prepare, copy=True))


def logits(model, backend, calls=(families.N_PAST,)) -> np.ndarray:
    """Of a text that is computed in calls of so many tokens."""
    cache, tokens, found = backend.new_cache(model.config, sum(calls)), families.text(sum(calls)), []
    for n in calls:
        found.append(forward(model, backend, tokens[len(cache) : len(cache) + n], cache))
    return np.concatenate(found)


@pytest.mark.parametrize("name", families.VARIANTS)
def test_logits_are_those_of_transformers(name):
    table = get_backend("numpy", 2)
    got = logits(model_of(name, table), table)
    np.testing.assert_allclose(got, families.logits_of(name), rtol=0, atol=LOGITS)


@pytest.mark.skipif("c" not in BACKENDS, reason="the extension was not built")
@pytest.mark.parametrize("name", families.VARIANTS)
def test_c_computes_them_within_its_limit_in_any_batches(name):
    table, expected = get_backend("c", 2), families.logits_of(name)
    got = logits(model_of(name, table), table, [70, 1, 1, 200, 1, 27])
    families.assert_close_in_c(got, expected, table)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_is_the_same_for_any_threads_and_a_large_one_changes_nothing(backend):
    one, calls = get_backend(backend, 1), [150, 1, 149]
    narrow = logits(model_of("mistral", one), one, calls)
    whole = logits(model_of("mistral", one, sliding_window=0), one, calls)
    for threads in (2, 3):
        table = get_backend(backend, threads)
        np.testing.assert_array_equal(logits(model_of("mistral", table), table, calls), narrow)
        larger = model_of("mistral", table, sliding_window=families.N_PAST)
        np.testing.assert_array_equal(logits(larger, table, calls), whole)
    window = families.config_of(families.made("mistral")).sliding_window
    np.testing.assert_allclose(narrow[:window], whole[:window], rtol=0, atol=0.1)
    assert np.abs(narrow - whole)[window:].max() > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mistral", "mistral-nemo", "qwen2", "qwen3", "llama-biases"])
def test_taps_show_every_step_in_its_shape(name, backend):
    table, seen = get_backend(backend, 2), {}
    model = model_of(name, table)
    cache = table.new_cache(model.config, 50)
    taps = tiny.all_taps(lambda name, array: seen.update({name: array.shape}), model.config)
    forward(model, table, families.text(50), cache, taps=taps)
    assert list(seen.items()) == list(tap_shapes(model.config, 50).items())


def test_attention_weights_are_zero_outside_of_the_window():
    table, seen = get_backend("numpy", 1), {}
    model = model_of("mistral", table)
    taps = {"layers.1.attention.weights": partial(seen.__setitem__, "weights")}
    forward(model, table, families.text(50), table.new_cache(model.config, 50), taps=taps)
    weights = seen["weights"]
    past = np.arange(50)[:, None] - np.arange(50)
    assert (weights[:, (past < 0) | (past >= 37)] == 0).all()
    assert (weights[:, (past >= 0) & (past < 37)] > 0).all()


@pytest.mark.parametrize("kind", ["dynamic", "longrope", ""])
def test_another_scaling_of_rope_is_refused_by_its_name(kind):
    with pytest.raises(TinyllamaError, match=f"kind {kind!r}"):
        RopeScaling(kind, 4.0, 64)


@pytest.mark.parametrize("numbers", [{"factor": 0.0}, {"factor": float("nan")}, {"beta_fast": -1.0}])
def test_scalings_that_no_model_has_are_refused(numbers):
    with pytest.raises(TinyllamaError, match=next(iter(numbers))):
        RopeScaling(**({"kind": "yarn", "factor": 4.0, "original_context": 64} | numbers))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_rows_in_halves_are_in_pairs_whether_they_stay_in_their_file_or_not(name, backend, tmp_path):
    families.write_gguf(name, tmp_path / "model.gguf")
    tokens, expected = families.text(40), families.logits_of(name, 40)
    with tinyllama.load(tmp_path / "model.gguf", backend, 2) as llama:
        copied = llama.logits(tokens)
        np.testing.assert_array_equal(llama.weight("layers.1.attention.wk"), weight_of(name))
    with tinyllama.load(tmp_path / "model.gguf", backend, 2, mmap=backend != "mlx") as llama:
        mapped = llama.logits(tokens)
    if backend == "c":
        families.assert_close_in_c(copied, expected, llama.backend)
    else:
        np.testing.assert_allclose(copied, expected, rtol=0, atol=LOGITS)
    np.testing.assert_allclose(mapped, copied, rtol=0, atol=0 if backend == "c" else LOGITS)


def weight_of(name):
    return families.tensors_of(families.made(name))["layers.1.attention.wk.weight"].dequantize()
