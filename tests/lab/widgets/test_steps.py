import threading

import numpy as np
import pytest

import tinyllama
from tinyllama.errors import Cancelled, TinyllamaError, cancellable
from tinyllama.lab.widgets.steps import MOST_COLUMNS, Walk
from tinyllama.machine import limits
from tinyllama.ops import softmax

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small")


@pytest.fixture
def walk(llama):
    return Walk(llama, STORY)


def test_next_goes_through_every_tap_in_the_order_in_which_they_are_computed(walk, llama):
    seen = [walk.name]
    for _ in range(len(walk.names) + 3):
        walk.go(steps=1)
        seen.append(walk.name)
    assert list(dict.fromkeys(seen)) == list(llama.trace(STORY))
    assert walk.name == "logits"
    walk.go(steps=-1000)
    assert walk.name == "embedding"


def test_a_layer_s_slider_keeps_the_step_and_a_step_keeps_the_layer(walk):
    walk.go(layer=1, kind="attention.weights")
    assert walk.name == "layers.1.attention.weights"
    walk.go(layer=3)
    assert walk.name == "layers.3.attention.weights"
    walk.go(kind="residual")
    assert walk.name == "layers.3.residual"
    walk.go(kind="logits")
    assert (walk.name, walk.layer, walk.kind) == ("logits", None, "logits")
    walk.go(layer=2)
    assert walk.name == "layers.2.attention.norm"


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_the_numbers_are_those_of_the_taps_in_any_backend(backend):
    llama = tinyllama.load("small", backend)
    walk, taps = Walk(llama, STORY), llama.trace(STORY)
    walk.go(layer=2, kind="residual")
    np.testing.assert_allclose(walk.map().values, taps["layers.2.residual"], rtol=1e-3, atol=1e-3)
    walk.go(kind="attention.q")
    walk.head = 5
    np.testing.assert_allclose(walk.map().values, taps["layers.2.attention.q"][:, 5], rtol=1e-3, atol=1e-3)


def test_an_attention_map_has_a_row_and_a_column_a_token_and_no_future(walk):
    walk.go(layer=0, kind="attention.weights")
    shown = walk.map()
    assert shown.axis == "" and shown.is_share
    np.testing.assert_allclose(np.nansum(shown.values, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.isnan(shown.values), np.triu(np.ones(shown.values.shape), 1) > 0)


def test_wide_values_show_the_number_farthest_from_0_of_each_cell(walk, llama):
    walk.go(kind="logits")
    shown, logits = walk.map(), llama.trace(STORY, "logits")["logits"]
    assert shown.values.shape[1] <= MOST_COLUMNS and shown.per_cell == 6
    np.testing.assert_allclose(np.abs(shown.values[2, 10]), np.abs(logits[2, 60:66]).max(), rtol=1e-3)


def test_heads_that_share_a_key_show_the_same(smollm2_file):
    walk = Walk(tinyllama.load(smollm2_file), "The capital")
    walk.go(layer=1, kind="attention.k")
    assert walk.config.n_heads // walk.config.n_kv_heads == 3
    maps = []
    for head in (0, 2, 3):
        walk.head = head
        maps.append(walk.map().values)
    np.testing.assert_array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[0], maps[2])


def test_what_the_model_would_say_after_the_last_layer_is_what_it_says(walk, llama):
    walk.go(kind="logits")
    for position in (1, 4):
        walk.go(position=position)
        probs = softmax(llama.logits(STORY)[position])
        says = walk.says()
        assert len(says) == llama.config.n_layers and all(len(row) == 5 for row in says)
        best = np.argsort(-probs)[:5]
        assert [piece for piece, _ in says[-1]] == [llama.tokenizer.piece(int(token)) for token in best]
        np.testing.assert_allclose([prob for _, prob in says[-1]], probs[best], rtol=1e-2)


def test_what_the_model_would_say_is_told_of_layers_that_are_complete(walk):
    n_said = {}
    for name in walk.names:
        n_said[name] = len(walk.says())
        walk.go(steps=1)
    assert n_said["layers.0.feed_forward.output"] == 0 and n_said["layers.0.residual"] == 1
    assert n_said["layers.1.attention.norm"] == 1 and n_said["norm"] == walk.config.n_layers


def test_a_shape_is_told_with_its_axes(walk):
    walk.go(layer=0, kind="attention.weights")
    assert walk.shape() == "[n_heads, n_tokens, n_past] = [8, 5, 5]"


def test_it_is_refused_where_there_is_no_memory_for_all_values(llama, monkeypatch, tmp_path):
    taken = sum(array.nbytes for array in llama.trace(STORY).values())
    (tmp_path / "meminfo").write_text(f"MemAvailable: {taken // 1024} kB")
    monkeypatch.setattr(limits, "MEMINFO", tmp_path / "meminfo")
    with pytest.raises(
        TinyllamaError,
        match="a context of 5 tokens, 5 of them computed at once, and what is kept of them needs",
    ):
        Walk(llama, STORY)


def test_a_walk_can_be_cancelled_before_it_begins(llama):
    flag = threading.Event()
    flag.set()
    with cancellable(flag), pytest.raises(Cancelled):
        Walk(llama, STORY)
