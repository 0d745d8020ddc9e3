"""What the model would say after every layer and token, against `Llama.unembed` and `Llama.logits`."""

import threading

import numpy as np
import pytest

import tinyllama
from tinyllama.errors import Cancelled, cancellable
from tinyllama.lab.widgets import lens as module
from tinyllama.lab.widgets.lens import Lens
from tinyllama.ops import softmax

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small")


@pytest.fixture
def lens(llama):
    return Lens(llama, list(llama.trace(STORY, "layers.*.residual").values()))


def test_it_is_what_unembedding_every_residual_gives(lens, llama):
    assert list(lens.read()) == [3, 2, 1, 0] and lens.is_read()
    for layer, residual in enumerate(llama.trace(STORY, "layers.*.residual").values()):
        probs = softmax(llama.unembed(residual))
        np.testing.assert_array_equal(lens.ids[layer], probs.argmax(axis=-1))
        np.testing.assert_allclose(lens.probs[layer], probs.max(axis=-1), rtol=1e-5)


def test_the_last_layer_says_what_the_model_says(lens, llama):
    list(lens.read())
    np.testing.assert_array_equal(lens.ids[-1], llama.logits(STORY).argmax(axis=-1))


def test_parts_of_a_layer_give_the_same(lens, llama, monkeypatch):
    list(lens.read())
    monkeypatch.setattr(module, "AT_ONCE", 2 * llama.config.vocab_size)
    parts = Lens(llama, list(llama.trace(STORY, "layers.*.residual").values()))
    list(parts.read())
    np.testing.assert_array_equal(parts.ids, lens.ids)
    np.testing.assert_allclose(parts.probs, lens.probs, rtol=1e-3)


def test_one_that_was_stopped_goes_on_where_it_was(lens):
    flag = threading.Event()
    with cancellable(flag), pytest.raises(Cancelled):
        for _ in lens.read():
            flag.set()
    assert not lens.is_read()
    assert list(lens.read()) == [2, 1, 0]


def test_a_column_begins_with_the_likeliest(lens, llama):
    list(lens.read())
    column = lens.column(2)
    assert [len(row) for row in column] == [module.SAYS] * 4
    for layer, row in enumerate(column):
        assert row[0][0] == llama.tokenizer.piece(int(lens.ids[layer, 2]))
        assert row[0][1] == pytest.approx(lens.probs[layer, 2], rel=1e-3)
        assert [prob for _, prob in row] == sorted((prob for _, prob in row), reverse=True)
