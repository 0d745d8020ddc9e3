import numpy as np
import pytest

import tinyllama
from tinyllama.config import PRESETS
from tinyllama.errors import TinyllamaError
from tinyllama.lab import plots
from tinyllama.lab.plots import sheets
from tinyllama.model import Step, run_layers, unembed
from tinyllama.ops import softmax

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


# --- of a model, with the numbers behind them -------------------------------------------------------

GIRL = "Once upon a time there was a girl named Lily. One day,"
BOY = "Once upon a time there was a boy named Tim. One day,"
LAYER, HEAD = 2, 3
SHEETS = {
    "all_heads": lambda llama: plots.all_heads(llama, GIRL, "all heads"),
    "lens": lambda llama: plots.lens(llama, GIRL),
    "top_tokens": lambda llama: plots.top_tokens(llama, GIRL, tinyllama.ablate("layers.1.attention.output")),
    "patching_map": lambda llama: plots.patching_map(llama, GIRL, BOY, " Lily", " Tim"),
    "ablation_map": lambda llama: plots.ablation_map(llama, GIRL, " she"),
}


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", "numpy")


def finished(llama, stream: np.ndarray, layer: int) -> np.ndarray:
    """The logits of a prompt's last token, of its residual stream after a layer, [n_tokens, dim]."""
    model, ops = llama._model, llama.backend
    step = Step(range(len(stream)), ops.new_cache(llama.config, len(stream)))
    return unembed(model, ops, run_layers(model, ops, stream, [step], layer + 1))[-1]


def token(llama, piece: str) -> int:
    return [llama.tokenizer.piece(n) for n in range(llama.config.vocab_size)].index(piece)


@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet_is_a_png_and_its_numbers_are_finite(name, llama):
    picture = SHEETS[name](llama)
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert picture.numbers and all(np.isfinite(array).all() for array in picture.numbers.values())


def test_the_sheet_of_all_heads_has_a_map_for_each_and_grey_for_the_future(llama):
    picture = SHEETS["all_heads"](llama)
    weights, n_tokens = picture.numbers["weights"], len(llama.tokens(GIRL))
    assert weights.shape == (4, 8, n_tokens, n_tokens)
    np.testing.assert_array_equal(weights[LAYER], llama.trace(GIRL)[f"layers.{LAYER}.attention.weights"])
    drawn = picture.axes[0].images[0].get_array()
    step = (drawn.shape[1] + n_tokens // 8) // 8
    tile = drawn[(3 - LAYER) * step :, HEAD * step :][:n_tokens, :n_tokens]
    np.testing.assert_array_equal(tile.mask, np.triu(np.ones((n_tokens, n_tokens), bool), 1))
    np.testing.assert_array_equal(tile.filled(0), weights[LAYER, HEAD])


def test_the_last_row_of_the_lens_is_what_the_model_says(llama):
    numbers = SHEETS["lens"](llama).numbers
    probs = softmax(llama.logits(GIRL))
    assert numbers["ids"].shape == numbers["probs"].shape == (5, len(probs))
    np.testing.assert_array_equal(numbers["ids"][-1], probs.argmax(axis=-1))
    np.testing.assert_allclose(numbers["probs"][-1], probs.max(axis=-1), rtol=1e-3)
    early = softmax(llama.unembed(llama.trace(GIRL)["layers.1.residual"]))
    np.testing.assert_allclose(numbers["probs"][2], early.max(axis=-1), rtol=1e-3)


def test_the_likeliest_tokens_are_those_of_both_runs_and_the_model_is_as_before(llama):
    numbers, edit = SHEETS["top_tokens"](llama).numbers, tinyllama.ablate("layers.1.attention.output")
    before = llama.logits(GIRL)[-1]
    with llama.edit(edit):
        after = llama.logits(GIRL)[-1]
    probs, ids = (softmax(before), softmax(after)), numbers["ids"]
    assert set(ids) == set(np.argsort(-np.maximum(*probs))[:10])
    np.testing.assert_allclose(numbers["before"], probs[0][ids], rtol=1e-3)
    np.testing.assert_allclose(numbers["after"], probs[1][ids], rtol=1e-3)
    np.testing.assert_allclose(numbers["change"], (after - before)[ids], atol=1e-4)
    assert (np.diff(numbers["before"]) <= 0).all() and not np.allclose(*probs)


def test_patching_is_what_the_layers_above_make_of_a_stream_with_one_row_of_the_other(llama):
    numbers = SHEETS["patching_map"](llama).numbers
    right, wrong = token(llama, " Lily"), token(llama, " Tim")
    streams = [llama.trace(prompt, f"layers.{LAYER}.residual").popitem()[1] for prompt in (GIRL, BOY)]

    def difference(stream):
        logits = finished(llama, stream, LAYER)
        return logits[right] - logits[wrong]

    best, worst = map(difference, streams)
    for position in (1, 8, 10, 14):
        patched = streams[1].copy()
        patched[position] = streams[0][position]
        by_hand = (difference(patched) - worst) / (best - worst)
        np.testing.assert_allclose(numbers["restored"][LAYER, position], by_hand, atol=1e-4)
    assert numbers["ids"].tolist() == [right, wrong]
    np.testing.assert_allclose(numbers["restored"][-1], [*[0] * 14, 1], atol=1e-4)  # only the last is read


def test_ablation_is_what_the_layers_above_make_of_a_layer_without_that_head(llama):
    numbers, taps = SHEETS["ablation_map"](llama).numbers, llama.trace(GIRL)
    width, she = llama.config.head_dim, token(llama, " she")
    columns = slice(HEAD * width, (HEAD + 1) * width)
    for layer in (1, llama.config.n_layers - 1):
        found = taps[f"layers.{layer}.attention.heads"][:, columns]
        mid = (
            taps[f"layers.{layer}.residual_mid"]
            - found @ llama.weight(f"layers.{layer}.attention.wo")[:, columns].T
        )
        norm = mid / np.sqrt((mid**2).mean(axis=-1, keepdims=True) + llama.config.norm_eps)
        norm = norm * llama.weight(f"layers.{layer}.ffn_norm")
        w1, w2, w3 = (llama.weight(f"layers.{layer}.feed_forward.w{n}") for n in (1, 2, 3))
        gate = norm @ w1.T
        stream = mid + (gate / (1 + np.exp(-gate)) * (norm @ w3.T)) @ w2.T
        by_hand = finished(llama, stream, layer)[she] - taps["logits"][-1, she]
        np.testing.assert_allclose(numbers["change"][layer, HEAD], by_hand, atol=2e-3)
    assert numbers["change"].shape == (4, 8) and numbers["id"] == she


# --- nothing but the edit makes a difference --------------------------------------------------------

BOTH = ["small", "smollm2"]
EXACT = 1e-6  # of logits that went through the same kernels, in the same company


def on_c(name: str):
    try:
        return tinyllama.load(name, "c")
    except TinyllamaError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", BOTH)
def test_a_map_of_edits_that_change_nothing_is_exactly_zero(name, monkeypatch):
    nothing = tinyllama.ablate("layers.*.attention.heads", positions=[99])
    monkeypatch.setattr(sheets, "ablate", lambda at, head: {at: nothing["layers.*.attention.heads"]})
    assert not plots.ablation_map(on_c(name), "Once upon a time").numbers["change"].any()


@pytest.mark.parametrize("name", BOTH)
def test_a_token_before_the_first_that_differs_restores_exactly_nothing(name):
    restored = plots.patching_map(on_c(name), GIRL, BOY, 300, 400).numbers["restored"]
    assert not restored[:, :7].any() and restored.any()


@pytest.mark.parametrize("name", BOTH)
def test_top_tokens_of_an_edit_that_changes_nothing_are_as_before(name):
    same = {"layers.*.attention.weights": lambda weights: weights}  # such an edit ends the fast kernel
    assert not plots.top_tokens(on_c(name), GIRL, same).numbers["change"].any()


@pytest.mark.parametrize("name, at_once", [("small", 1), ("small", 4), ("smollm2", 4)])
def test_ablation_is_what_an_edit_of_as_many_texts_gives(name, at_once, monkeypatch):
    llama = on_c(name)
    ids = llama.tokens("Once upon a time")
    monkeypatch.setattr(sheets, "AT_ONCE", at_once * len(ids))
    numbers = plots.ablation_map(llama, ids).numbers

    def logit(edit) -> float:
        with llama.edit(edit):
            if at_once == 1:
                return llama.logits(ids)[-1, numbers["id"]]
            steps = [Step(ids, llama.new_cache(len(ids), at_once=at_once * len(ids))) for _ in range(at_once)]
            return llama.run(steps)[0][-1, numbers["id"]]

    for layer, head in ((0, 1), (LAYER, HEAD)):
        by_hand = logit(tinyllama.ablate(f"layers.{layer}.attention.heads", [head])) - logit({})
        np.testing.assert_allclose(numbers["change"][layer, head], by_hand, atol=EXACT)


# --- what is drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHEETS)
def test_the_heading_of_a_sheet_names_the_prompt_and_takes_another(name, llama):
    assert name == "all_heads" or GIRL[:40] in SHEETS[name](llama).axes[0].get_title(loc="left")
    assert plots.all_heads(llama, "Once", "mine").axes[0].get_title(loc="left") == "mine"


@pytest.mark.parametrize("name", ["patching_map", "ablation_map"])
def test_a_map_of_layers_names_the_last_one_and_says_what_its_colours_mean(name, llama):
    axes, bar = SHEETS[name](llama).axes
    assert [*axes.get_yticks()] == [0, 1, 2, 3] and axes.get_ylim()[0] < axes.get_ylim()[1]
    assert "orange: " in bar.get_ylabel()


@pytest.mark.parametrize("n_tokens, n_labels", [(23, 23), (32, 32), (94, 47)])
def test_a_lens_has_words_that_can_be_read_or_none(n_tokens, n_labels):
    picture = plots.logit_lens([["word"] * n_tokens] * 3, np.full((3, n_tokens), 0.5), ["token"] * n_tokens)
    picture.draw_without_rendering()
    axes = picture.axes[0]
    assert len(axes.texts) == (3 * n_tokens if n_tokens <= 32 else 0)
    assert all(text.get_fontsize() >= 7 for text in axes.texts)
    assert all(text.get_window_extent().width < axes.bbox.width / n_tokens for text in axes.texts)
    names = [label for label in axes.get_xticklabels() if label.get_text()]
    assert len(names) == n_labels
    assert names[0].get_window_extent().x1 < names[1].get_window_extent().x0


def test_the_heads_of_more_layers_than_heads_lie_in_columns_of_layers(llama, monkeypatch):
    weights = np.stack([np.tril(np.full((2, 3, 3), 0.1 * layer)) for layer in range(5)])
    monkeypatch.setattr(llama, "trace", lambda *_: dict(enumerate(weights)))
    picture = plots.all_heads(llama, "Once")
    picture.draw_without_rendering()
    axes = picture.axes[0]
    assert axes.get_ylabel() == "head" and axes.get_xlabel().startswith("layer")
    drawn = axes.images[0].get_array()
    assert drawn.shape == (2 * 3 + 1, 5 * 3 + 4)
    np.testing.assert_allclose(drawn[2, 0::4], 0.1 * np.arange(5))
    assert axes.bbox.height > 0.6 * picture.bbox.height  # no empty band


@pytest.mark.parametrize(
    "arguments, why",
    [
        ((GIRL, "Once upon a time"), "as many tokens, and they have 15 and 5"),
        ((GIRL, GIRL), "name two answers"),
        ((GIRL, BOY, "Lily "), "no token is 'Lily '"),
        ((GIRL, BOY, 10**6), "token id"),
    ],
)
def test_prompts_and_answers_that_cannot_be_compared_are_refused(arguments, why, llama):
    with pytest.raises(TinyllamaError, match=why):
        plots.patching_map(llama, *arguments)
