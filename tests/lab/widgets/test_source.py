"""Lines are found in the live source: whatever the taps of a run are called, each has its line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tinyllama
from tinyllama.config import PRESETS
from tinyllama.lab.widgets import source
from tinyllama.lab.widgets.kinds import KINDS

LLAMA = PRESETS["7B"]


@pytest.fixture(scope="module")
def taps():
    """What the taps of a run gave, by their names without the layer."""
    names = tinyllama.load("small").trace("Once upon a time")
    short = {name: name.split(".", 2)[2] if name.startswith("layers.") else name for name in names}
    return {short[name]: array for name, array in names.items()}


def test_every_tap_has_its_sentence_and_there_are_no_others(taps):
    assert set(taps) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_marked_lines_are_in_the_file_and_assign_the_value(kind):
    found = source.excerpts(kind, LLAMA)[0]
    module = {"model.py": source.model, "ops.py": source.ops}[found.file]
    lines = Path(module.__file__).read_text(encoding="utf-8").splitlines()
    assert found.marked and all(lines[number - 1] == text for number, text in found.lines.items())
    assert found.marked <= set(found.lines)
    variable = "x" if "residual" in kind else kind.rpartition(".")[2]
    for number in found.marked:
        left, text = lines[number - 1].partition("=")[0], lines[number - 1]
        assigned = variable in left.replace(",", " ").replace("[", " ").split()
        assert assigned or text.lstrip().startswith(f'return see("{variable}"')


@pytest.mark.parametrize(
    "kind, words",
    [
        ("embedding", "ops.embedding(model.tok_embeddings"),
        ("attention.q", 'ops.matmul(norm, layer["wq"]'),
        ("attention.scores", "queries @ keys"),
        ("attention.weights", "softmax(scores)"),
        ("feed_forward.hidden", "ops.swiglu(gate, up)"),
        ("residual", "x + _feed_forward("),
        ("logits", "ops.matmul(norm, model.output)"),
    ],
)
def test_the_marked_lines_are_those_that_a_reader_expects(kind, words):
    found = source.excerpts(kind, LLAMA)[0]
    assert any(words in text for number, text in found.lines.items() if number in found.marked)


def test_an_optional_step_is_marked_for_the_models_that_have_it():
    def marked(config):
        found = source.excerpts("attention.q", config)[0]
        return [text for number, text in found.lines.items() if number in found.marked]

    assert not any('layer["wq.bias"]' in text for text in marked(LLAMA))
    assert any('layer["wq.bias"]' in text for text in marked(replace(LLAMA, biases=True)))


def test_docstrings_are_left_out():
    assert not any(
        "Args:" in text for kind in KINDS for text in source.excerpts(kind, LLAMA)[0].lines.values()
    )


def test_an_operation_comes_with_its_definition():
    _, found = source.excerpts("feed_forward.hidden", LLAMA)
    assert (found.file, found.function) == ("ops.py", "swiglu")
    assert any("gate / (1 + np.exp(-gate)) * up" in text for text in found.lines.values())
    assert len(source.excerpts("attention.weights", LLAMA)) == 1


def test_axes_are_named_with_the_sizes_that_the_model_has(taps):
    c = tinyllama.load("small").config
    sizes = {name: getattr(c, name) for name in ("dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim")}
    sizes |= {"vocab_size": c.vocab_size, "n_tokens": 5, "n_past": 5}
    for kind, array in taps.items():
        assert np.shape(array) == tuple(sizes[axis] for axis in KINDS[kind].axes), kind
