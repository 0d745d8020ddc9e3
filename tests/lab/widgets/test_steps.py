import re
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


def test_the_likeliest_tokens_are_those_of_the_logits(walk, llama):
    for position in (2, 4):
        walk.go(position=position)
        logits = llama.logits(STORY)[position]
        found = walk.likeliest()
        assert [token.id for token in found] == np.argsort(-logits)[:10].tolist()
        np.testing.assert_allclose([token.logit for token in found], np.sort(logits)[:-11:-1], rtol=1e-3)
        np.testing.assert_allclose(
            [token.prob for token in found], np.sort(softmax(logits))[:-11:-1], rtol=1e-2
        )


def test_a_token_that_is_taken_follows_the_one_that_is_looked_at(walk, llama):
    token = walk.likeliest()[3].id
    assert walk.followed_by(token) == [*llama.tokens(STORY), token]
    walk.go(position=2)
    assert walk.followed_by(token) == [*llama.tokens(STORY)[:3], token]


def test_a_token_is_asked_about_those_that_it_sees(walk):
    walk.looks_at = 3
    walk.go(position=3)
    assert walk.looks_at == 3 and {look.looks_at for look in walk.looks()} == {3}
    walk.go(position=2)
    assert walk.looks_at is None


PLACES = [
    {},
    {"layer": 2, "kind": "attention.weights", "head": 3, "position": 4, "looks_at": 1},
    {"kind": "logits", "position": 0},
    {"layer": 0, "kind": "residual", "looks_at": 0},
]


def opened(line: str) -> Walk:
    """What a line of Python opens."""

    class Stepper:
        @staticmethod
        def stepper(prompt, model, **place):
            walk = Walk(tinyllama.load(model), prompt)
            walk.open(**place)
            return walk

    return eval(line, {"tinyllama": Stepper})


@pytest.mark.parametrize("place", PLACES)
def test_its_line_of_python_opens_the_same_place(walk, place):
    walk.open(**place)
    other = opened(walk.call("small"))
    for name in ("tokens", "name", "head", "position", "looks_at"):
        assert getattr(other, name) == getattr(walk, name)


def test_a_line_of_python_says_what_it_has_to():
    llama = tinyllama.load("small")
    assert Walk(llama, STORY).call("small") == "tinyllama.stepper('Once upon a time', model='small')"
    assert Walk(llama, STORY).call("small", "numpy", view="lens").endswith("backend='numpy', view='lens')")


def test_ids_that_their_text_does_not_give_stay_ids(llama):
    ids = [*llama.tokens("Once upon a"), llama.tokenizer.vocabulary.pieces.index("n")]  # " an" is one token
    walk = Walk(llama, ids)
    assert not walk.is_text and walk.text == "Once upon an"
    assert opened(walk.call("small")).tokens == walk.tokens == ids
    assert Walk(llama, llama.tokens(STORY)).is_text and Walk(llama, llama.tokens(STORY)).text == STORY


def test_control_tokens_are_written_by_name(smollm2_file):
    llama, text = tinyllama.load(smollm2_file), "<|im_start|>user\nHi<|im_end|>\n"
    walk = Walk(llama, llama.tokens(text))
    assert walk.is_text and walk.text == text


WRONG = [
    ({"layer": 4}, "layer is 4, but must be in 0..3"),
    (
        {"layer": 1, "kind": "attention.queries"},
        "no kind of step is named 'attention.queries': there are embedding",
    ),
    ({"head": 8}, "head is 8, but must be in 0..7"),
    ({"head": "first"}, "head is 'first', but must be in 0..7"),
    ({"position": 5}, "position is 5, but must be in 0..4"),
    ({"position": 2, "looks_at": 3}, "looks_at is 3, but must be in 0..2"),
]


@pytest.mark.parametrize("place, said", WRONG)
def test_a_place_that_is_not_there_is_an_error(walk, place, said):
    with pytest.raises(TinyllamaError, match=re.escape(said)):
        walk.open(**place)


def test_a_new_walk_follows_an_old_one(walk, llama):
    walk.open(3, "attention.weights", 7, 2, 1)
    same, other = Walk(llama, STORY), Walk(llama, "The wolf")
    same.follow(walk)
    other.follow(walk)
    assert (same.name, same.head, same.position, same.looks_at) == (walk.name, 7, 2, 1)
    assert (other.name, other.head, other.position, other.looks_at) == (walk.name, 7, 3, None)


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
