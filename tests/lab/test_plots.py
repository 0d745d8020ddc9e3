import numpy as np
import pytest

from tinyllama.config import PRESETS
from tinyllama.lab import plots

PIECES = ["<s>", " Once", "\n", "$5"]
WEIGHTS = np.tril(np.full((2, 4, 4), 0.25))
PICTURES = {
    "attention": lambda: plots.attention(WEIGHTS[0], PIECES, "one head"),
    "attention_heads": lambda: plots.attention_heads(WEIGHTS, PIECES, "two heads"),
    "matrix": lambda: plots.matrix(np.where(WEIGHTS[0] > 0, 1.0, -np.inf), PIECES, "dim"),
    "bars": lambda: plots.bars([0.5, 0.2, 0.2, 0.1], PIECES),
    "lines": lambda: plots.lines({"up": [1, 2, 3], "down": [3, 2, 1]}, "layer", "rms", yscale="log"),
    "histogram": lambda: plots.histogram({"w1": WEIGHTS, "w2": -WEIGHTS}, "weight"),
    "arrows": lambda: plots.arrows({"q": np.array([1, 0.5]), "turned": np.array([-0.5, 1])}),
    "tokens": lambda: plots.tokens({"LLaMA": PIECES}, [[1, 2, 3, 4]]),
    "logit_lens": lambda: plots.logit_lens([PIECES] * 3, np.full((3, 4), 0.5), PIECES),
    "passes": lambda: plots.passes({"A": [[("read", "2")], [("written", piece) for piece in PIECES]]}, "x"),
    "machine": lambda: plots.machine(PRESETS["7B"]),
    "flow": lambda: plots.flow({"norm": "RMSNorm", "q": "wq"}, arrows=["dim"]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_png_and_the_same_each_time(name):
    first, second = (PICTURES[name]()._repr_png_() for _ in range(2))
    assert first.startswith(b"\x89PNG") and first == second


def test_labels_show_a_token_s_spaces_and_newlines_and_leave_names_alone():
    assert plots.labels([" Once", "  ", "\n", "layer 0"]) == ["▁Once", "▁▁", "\\n", "layer 0"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PICTURES)
def test_pieces_of_a_stranger_s_vocabulary_are_drawn_as_text_and_not_at_any_length(name, monkeypatch):
    monkeypatch.setitem(globals(), "PIECES", ["$\\frac{", "\x1b]0;\x07", "A" * 60_000, "\udc80\u202e\0"])
    assert PICTURES[name]()._repr_png_().startswith(b"\x89PNG")


def test_the_future_is_no_number_but_grey():
    (axes, _) = PICTURES["attention"]().axes
    (image,) = axes.images
    assert np.array_equal(image.get_array().mask, np.triu(np.ones((4, 4), bool), 1))


def test_tokens_are_tick_labels():
    (axes, _) = PICTURES["attention"]().axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<s>", "▁Once", "\\n", r"\$5"]
