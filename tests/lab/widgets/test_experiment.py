"""What changes inside a model, or another prompt or model, make of an answer; without a widget."""

import numpy as np
import pytest

import tinyllama
from tinyllama.errors import TinyllamaError
from tinyllama.lab.widgets.experiment import Change, Here, Side, change, differences, likeliest, run
from tinyllama.lab.widgets.steps import Walk
from tinyllama.ops import softmax

GIRL = "Once upon a time there was a girl named Lily. One day,"
BOY = "Once upon a time there was a boy named Tim. One day,"
SHORT = "There was a boy named Tim. One day,"

CHANGES = {
    "a head off": [Change("layers.2.attention.heads", heads=[3])],
    "two heads of one layer off": [Change("layers.2.attention.heads", heads=[n]) for n in (0, 5)],
    "a layer's attention off": [Change("layers.1.attention.output")],
    "a number at a token": [Change("layers.1.residual", dims=[7], positions=[10], value=25.0)],
    "a layer's network as on average": [Change("layers.1.feed_forward.output", value="mean")],
    "a head twice as strong": [Change("layers.0.attention.v", heads=[1], times=2.0)],
    "one token of another prompt": [Change("layers.0.residual", positions=[10], prompt=BOY)],
    "all tokens of a shorter prompt": [Change("layers.1.residual", prompt=SHORT)],
    "two kinds at once": [
        Change("layers.0.residual", positions=[8, 10], prompt=BOY),
        Change("layers.*.feed_forward.output", times=0.5),
    ],
}


def side(prompt=GIRL, *changes, **more):
    return Side(prompt, "small", "numpy", changes, **more)


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", "numpy")


@pytest.fixture(scope="module")
def plain():
    return run(side())


@pytest.mark.parametrize("name", CHANGES)
def test_the_lines_of_python_write_the_same_text(name, plain):
    outcome = run(side(GIRL, *CHANGES[name]))
    names = {}
    exec(outcome.code, names)  # lines that one can paste
    assert names["text"] == outcome.text and len(outcome.text.tokens) == 16
    assert not np.allclose(outcome.logits, plain.logits, atol=1e-2)


def test_without_changes_it_is_what_generate_writes(plain, llama):
    assert plain.text == llama.generate(GIRL, n_predict=16, temp=0)
    np.testing.assert_allclose(plain.logits, llama.logits(GIRL)[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("at", ["layers.1.attention.weights", "layers.*.attention.scores", "*.heads"])
@pytest.mark.parametrize("model", ["small", "smollm2"])
def test_a_change_that_changes_nothing_gives_the_same_on_the_c_backend(model, at, request):
    model = str(request.getfixturevalue("smollm2_file")) if model == "smollm2" else model
    left, right = (run(Side(GIRL, model, "c", some)) for some in [(), (Change(at, times=1.0),)])
    np.testing.assert_array_equal(left.logits, right.logits)
    np.testing.assert_array_equal(left.residuals, right.residuals)
    assert left.text == right.text


@pytest.mark.parametrize("model", ["small", "smollm2"])
def test_as_it_is_is_what_the_stepper_shows_on_the_c_backend(model, request):
    model = str(request.getfixturevalue("smollm2_file")) if model == "smollm2" else model
    walk, outcome = Walk(tinyllama.load(model, "c"), GIRL), run(Side(GIRL, model, "c"))
    walk.go(kind="logits")
    likeliest = walk.likeliest()
    assert [token.logit for token in likeliest] == np.sort(outcome.logits)[:-11:-1].tolist()
    assert walk.says()[-1] == [(token.piece, token.prob) for token in likeliest[:5]]
    names = {}
    exec(outcome.code, names)
    assert names["text"] == outcome.text


def test_a_token_that_the_prompt_does_not_have_is_refused(llama):
    with pytest.raises(TinyllamaError, match="this prompt has 5 tokens: there is no token 15"):
        run(side("Once upon a time", Change("layers.1.residual", positions=[15])))


def test_a_patch_from_a_shorter_prompt_says_which_tokens(plain):
    found = run(side(GIRL, Change("layers.1.residual", prompt=SHORT)))
    assert found.changes == [f"layers.1.residual as after “{SHORT}”: tokens 4 to 14 from its tokens 0 to 10"]
    one = run(side(GIRL, Change("layers.1.residual", positions=[10], prompt=SHORT)))
    assert one.changes[0].endswith(": token 10 from its token 6") and plain.changes == []


def test_a_prompt_of_ids_is_as_good_as_its_text(plain, llama):
    found = run(side(llama.tokens(GIRL)))
    assert found.text == plain.text and found.pieces == plain.pieces


def test_a_number_is_set_and_scaled_where_it_is_named_and_nowhere_else(plain):
    for how, expected in {"value": 25.0, "times": plain.residuals[1, 10, 7] * 25}.items():
        one = Change("layers.1.residual", dims=[7], positions=[10], **{how: 25.0})
        found = run(side(GIRL, one)).residuals
        assert found[1, 10, 7] == pytest.approx(expected, rel=1e-4)
        found[1, 10, 7] = plain.residuals[1, 10, 7]
        np.testing.assert_allclose(found[1], plain.residuals[1], atol=1e-4)


def test_a_patched_token_has_the_other_prompt_s_value(llama):
    there = llama.trace(BOY, "layers.0.residual")["layers.0.residual"]
    found = run(side(GIRL, *CHANGES["one token of another prompt"])).residuals[0]
    np.testing.assert_allclose(found[10], there[10], atol=1e-4)
    there = llama.trace(SHORT, "layers.1.residual")["layers.1.residual"]
    found = run(side(GIRL, *CHANGES["all tokens of a shorter prompt"])).residuals[1]
    np.testing.assert_allclose(found[-len(there) :], there, atol=1e-4)  # aligned at their ends


def test_a_patch_takes_the_other_prompt_as_it_is_whatever_else_is_changed(llama):
    both = [Change("layers.0.attention.output"), Change("layers.2.residual", positions=[14], prompt=BOY)]
    there = llama.trace(BOY, "layers.2.residual")["layers.2.residual"]
    np.testing.assert_allclose(run(side(GIRL, *both)).residuals[2][14], there[14], atol=1e-4)


def test_the_likeliest_tokens_of_both_sides_with_what_became_of_them(plain):
    other = run(side(GIRL, *CHANGES["a layer's attention off"]))
    rows = likeliest(plain, other)
    before, after = softmax(plain.logits), softmax(other.logits)
    best = np.argsort(-np.maximum(before, after))[:10]
    assert {row.piece for row in rows} == {plain.tokenizer.piece(int(token)) for token in best}
    first = int(plain.logits.argmax())
    assert rows[0].piece == plain.tokenizer.piece(first)
    assert rows[0].probs == pytest.approx((before[first], after[first]))
    assert rows[0].change == pytest.approx(other.logits[first] - plain.logits[first], abs=1e-4)


def test_streams_differ_from_where_they_are_changed_on(plain):
    found = differences(plain, run(side(GIRL, *CHANGES["a number at a token"])))
    assert found.shape == (4, len(plain.pieces))
    np.testing.assert_allclose(found[0], 0, atol=1e-5)
    np.testing.assert_allclose(found[1, :10], 0, atol=1e-5)
    assert found[1, 10] > 0.1 and (found[2:, 10:] > 1e-3).all()


def test_two_prompts_are_held_against_each_other_from_the_end_on(plain):
    found, by_hand = differences(plain, short := run(side(SHORT))), short.residuals[2, -2]
    assert found.shape == (4, len(short.pieces))
    one = plain.residuals[2, -2]
    assert found[2, -2] == pytest.approx(np.linalg.norm(one - by_hand) / np.linalg.norm(one))


def test_two_models_have_what_both_of_them_know(plain, smollm2_file):
    other = run(Side(GIRL, str(smollm2_file), n_predict=4))
    assert differences(plain, other) is None
    rows = likeliest(plain, other)
    assert len(rows) == 10 and all(row.change is None for row in rows)  # their logits have no common scale
    ids = {other.tokenizer.piece(token): token for token in range(len(other.logits))}
    both = [row for row in rows if None not in row.probs]
    assert both and both[0].probs[1] == pytest.approx(other.probs[ids[both[0].piece]])


def test_a_change_is_written_down_and_read_again():
    for one in [one for some in CHANGES.values() for one in some]:
        assert change(eval(repr(one.keywords()))) == one
    assert Change("layers.0.residual").keywords() == {"at": "layers.0.residual"}
    assert str(CHANGES["a number at a token"][0]) == "layers.1.residual, dim 7, token 10 = 25"
    assert str(CHANGES["a head twice as strong"][0]) == "layers.0.attention.v, head 1 × 2"
    assert "as after “Once upon a time there was a boy" in str(CHANGES["one token of another prompt"][0])


@pytest.mark.parametrize("where", ["attention.q", "attention.weights", "attention.heads"])
def test_where_one_stands_a_value_of_a_head_is_changed_for_that_head(llama, where):
    here = Here(GIRL, "small", "numpy", llama.config, f"layers.1.{where}", 1, 5, 3)
    assert here.change(False, value=0.5).keywords() == {
        "at": f"layers.1.{where}",
        "heads": [5],
        "positions": [3],
        "value": 0.5,
    }
    assert here.head_off() == Change("layers.1.attention.heads", heads=[5])
    assert here.part_off("feed_forward") == Change("layers.1.feed_forward.output")
    assert here.change(True, prompt=BOY) == Change(f"layers.1.{where}", prompt=BOY)


def test_heads_that_share_a_key_are_changed_together(smollm2_file):
    config = tinyllama.load(smollm2_file).config
    here = Here(GIRL, "smollm2", "auto", config, "layers.1.attention.k", 1, 5, 3)
    assert here.change(True, dim=2).keywords() == {"at": "layers.1.attention.k", "heads": [1], "dims": [2]}


@pytest.mark.parametrize(
    "one, why",
    [
        (Change("layers.9.residual"), "layers.9.residual"),
        (Change("layers.1.residual", heads=[0]), "has no heads"),
        (Change("layers.1.attention.heads", heads=[8]), "head \\[8\\] is not in 0..7"),
        (Change("layers.1.residual", dims=[10**6]), "is not in 0..255"),
        (Change("layers.1.residual", positions=[0], prompt=SHORT), "none is as far from its end"),
        (Change("layers.1.residual", prompt=""), "prompt is empty"),
        (Change("layers.1.residual", value=float("nan")), "value must be a number"),
        (Change("layers.1.residual", times=float("inf")), "times must be a number"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line_and_the_model_is_as_before(one, why, plain, llama):
    with pytest.raises(TinyllamaError, match=why):
        run(side(GIRL, one))
    assert llama.generate(GIRL, n_predict=16, temp=0) == plain.text


@pytest.mark.parametrize(
    "wrong", [{"at": "layers.1.residual", "head": 3}, {"heads": [3]}, "layers.1.residual"]
)
def test_what_is_no_change_is_refused(wrong):
    with pytest.raises(TinyllamaError, match="a change is a dict with at, and some of heads, dims"):
        change(wrong)
