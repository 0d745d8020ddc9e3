"""Ready-made edits do what transformers' hooks do on the same weights."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from twin import twin

import tinyllama
from tinyllama import ablate, patch, scale, steer
from tinyllama.backends import available
from tinyllama.errors import TinyllamaError
from tinyllama.taps.edits import Place

BACKENDS = [name for name, reason in available().items() if reason is None]
PROMPT = "Once upon a time, there was a little girl named Lily"
OTHER = "The big dog ran to the park and saw a red ball there"
LIMITS = {
    "numpy": 1e-8,
    "numexpr": 1e-8,
}  # mean squared error relative to the mean square: other orders of sums
IN_BLOCKS = 2e-3  # int8 activations, keys and values in half precision


@pytest.fixture(scope="module", params=BACKENDS)
def llama(request):
    return tinyllama.load("small", request.param)


def hooked(llama, ids, module: str, change, before=False) -> np.ndarray:
    """transformers' logits [n_tokens, vocab_size], with what goes into a module, or comes out, changed."""
    model = twin(llama)
    place = model.model.get_submodule(module)
    if before:
        place.register_forward_pre_hook(lambda _, inputs: (change(inputs[0].clone()), *inputs[1:]))
    else:
        place.register_forward_hook(lambda _, inputs, output: change(output.clone()))
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def assert_same(llama, found, expected):
    error = np.mean((found - expected) ** 2) / np.mean(expected**2)
    assert error < LIMITS.get(llama.backend.name, IN_BLOCKS)


def test_a_head_is_switched_off_as_by_a_hook(llama):
    def without(heads):
        heads[:, :, 2 * 32 : 3 * 32] = 0
        return heads

    ids = llama.tokens(PROMPT)
    with llama.edit(ablate("layers.1.attention.heads", heads=2)):
        found = llama.logits(ids)
    assert_same(llama, found, hooked(llama, ids, "layers.1.self_attn.o_proj", without, before=True))
    with llama.edit(ablate("blocks.1.attn.hook_pattern", heads=[2])):
        assert_same(llama, llama.logits(ids), found)


def test_a_layer_s_output_is_replaced_by_its_mean_over_the_tokens_as_by_a_hook(llama):
    ids = llama.tokens(PROMPT)
    with llama.edit(ablate("layers.2.feed_forward.output", value="mean")):
        found = llama.logits(ids)
    expected = hooked(llama, ids, "layers.2.mlp", lambda x: x.mean(1, keepdim=True).expand_as(x))
    assert_same(llama, found, expected)


def test_neurons_of_some_tokens_are_set_to_a_number_as_by_a_hook(llama):
    def change(hidden):
        hidden[:, 3:5, [7, 9]] = 2.5
        return hidden

    ids = llama.tokens(PROMPT)
    with llama.edit(ablate("layers.0.feed_forward.hidden", dims=[7, 9], positions=[3, 4], value=2.5)):
        found = llama.logits(ids)
    assert_same(llama, found, hooked(llama, ids, "layers.0.mlp.down_proj", change, before=True))


def test_a_value_is_multiplied_as_by_a_hook(llama):
    def change(heads):
        heads[:, 1:3, 32:64] *= -1.5
        return heads

    ids = llama.tokens(PROMPT)
    with llama.edit(scale("layers.1.attention.heads", -1.5, heads=1, positions=[1, 2])):
        found = llama.logits(ids)
    assert_same(llama, found, hooked(llama, ids, "layers.1.self_attn.o_proj", change, before=True))


def test_a_residual_of_another_prompt_is_patched_in_as_by_a_hook(llama):
    ids, other = llama.tokens(PROMPT), llama.tokens(OTHER)
    taps = llama.trace(other, "layers.*.residual")

    def change(x):
        x[:, [2, 5]] = torch.tensor(taps["layers.1.residual"][[2, 5]])
        return x

    with llama.edit(patch(taps, at="layers.1.residual", positions=[2, 5])):
        found = llama.logits(ids)
    assert_same(llama, found, hooked(llama, ids, "layers.1", change))


@pytest.mark.parametrize(
    ("positions", "pairs"),
    [(None, "all"), ({3: 1, 4: 6}, {3: 1, 4: 6}), ({-1: -2}, "end"), (-1, "last")],
)
def test_patched_tokens_are_those_that_are_named(positions, pairs, llama):
    taps = llama.trace(OTHER, "layers.1.residual")
    there, before = taps["layers.1.residual"], llama.trace(PROMPT, "layers.1.residual")["layers.1.residual"]
    n, expected = len(there), before.copy()
    known = {"all": {i: i for i in range(min(n, len(before)))}, "end": {n - 1: n - 2}, "last": {n - 1: n - 1}}
    for here, other in (pairs if isinstance(pairs, dict) else known[pairs]).items():
        if here < len(before):
            expected[here] = there[other]
    with llama.edit(patch(taps, positions=positions)):
        found = llama.trace(PROMPT, "layers.1.residual")["layers.1.residual"]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_patch_of_everything_gives_the_other_prompt_s_answer(llama):
    """All residuals of one layer: what comes after knows nothing of this prompt."""
    ids, other = llama.tokens(PROMPT)[:9], llama.tokens(OTHER)[:9]
    with llama.edit(patch(llama.trace(other, "layers.1.residual"))):
        found = llama.logits(ids)
    assert_same(llama, found, llama.logits(other))


def test_attention_of_another_prompt_is_patched_row_by_row(llama):
    taps = llama.trace(OTHER, "layers.1.attention.weights")
    with llama.edit(patch(taps, positions=[4])):
        found = llama.trace(PROMPT, "layers.1.attention.weights")["layers.1.attention.weights"]
    expected = llama.trace(PROMPT, "layers.1.attention.weights")["layers.1.attention.weights"]
    expected[:, 4, :5] = taps["layers.1.attention.weights"][:, 4, :5]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_steering_adds_a_direction_as_a_hook_does_also_to_tokens_that_are_written(llama):
    direction = np.random.default_rng(0).normal(size=llama.config.dim).astype(np.float32)
    ids = llama.tokens(PROMPT)
    with llama.edit(steer(direction, layer=2, strength=0.7)):
        found = llama.logits(ids)
        text = llama.generate(ids, temp=0, n_predict=5)
        again = llama.logits(ids + text.ids).argmax(-1)[len(ids) - 1 : -1]
    assert_same(llama, found, hooked(llama, ids, "layers.2", lambda x: x + 0.7 * torch.tensor(direction)))
    assert text.ids == again.tolist()


def test_edits_are_joined_also_those_of_one_value(llama):
    one, two = (ablate("layers.1.attention.heads", heads=head) for head in (0, 3))
    mine = {"layers.1.attention.heads": lambda x: 2 * x, "norm": lambda x: x + 1}
    with llama.edit(one), llama.edit(two), llama.edit(mine), llama.edit(steer(np.ones(256), 2)):
        expected = llama.logits(PROMPT)
    with llama.edit(one | two | mine | steer(np.ones(256), 2)):
        np.testing.assert_array_equal(expected, llama.logits(PROMPT))
    all_of_them = mine | steer(np.ones(256), 2)
    all_of_them |= one
    all_of_them |= two
    with llama.edit(all_of_them):
        np.testing.assert_array_equal(expected, llama.logits(PROMPT))


REFUSED = {
    "a head that there isn't": (
        lambda: ablate("layers.0.attention.q", heads=[8]),
        r"layers.0.attention.q: head \[8\]",
    ),
    "heads of what has none": (lambda: ablate("layers.0.residual", heads=0), "residual: it has no heads"),
    "a value that is none": (
        lambda: ablate("norm", value="zero"),
        'value must be a number or "mean", not .zero.',
    ),
    "NaN": (lambda: ablate("norm", value=np.nan), "value must be a number"),
    "heads that are text": (
        lambda: ablate("norm", heads="two"),
        "heads, dims, positions and layers are whole",
    ),
    "a factor that is none": (lambda: scale("norm", np.nan), "times must be a number, not nan"),
    "a mask for numbers": (lambda: ablate("norm", heads=np.array([True])), "are whole numbers from 0 on"),
    "positions from the end": (lambda: ablate("norm", positions=-1), "are whole numbers from 0 on, not -1"),
    "a factor in quotes": (lambda: scale("norm", "2"), "times must be a number, not '2'"),
    "half a layer": (lambda: steer(np.ones(256), 1.5), "layers are whole numbers from 0 on, not 1.5"),
    "no vector": (lambda: steer("up", 1), "a vector is an array of numbers"),
    "a factor that no float32 holds": (lambda: scale("norm", 1e300), "times must be a number, not 1e\\+300"),
    "no taps": (lambda: patch(5), "taps must be what trace gave, a dict, not 5"),
    "another width": (lambda: steer(np.ones(3), 0), r"a vector of \(3,\) can't be added to \[dim\]"),
    "a strength that is none": (lambda: steer(np.ones(256), 0, np.inf), "strength must be a number"),
    "taps without it": (
        lambda: patch({"norm": np.ones((3, 256))}, at="logits"),
        "named 'logits': there are norm",
    ),
    "a token that there isn't": (
        lambda: patch({"norm": np.ones((3, 256))}, positions={1: 7}),
        "edit of norm: the other prompt has no token 7",
    ),
    "another model's": (
        lambda: patch({"norm": np.ones((3, 64))}),
        r"edit of norm: \(64,\) of a token can't replace",
    ),
    "a row of another token": (
        lambda: patch({"layers.0.attention.weights": np.ones((8, 3, 3))}, positions={2: 1}),
        "what token 1 looks at can't be what token 2 looks at",
    ),
}


@pytest.mark.parametrize(("made", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(made, message):
    llama = tinyllama.load("small", "numpy")
    with pytest.raises(TinyllamaError, match=message), llama.edit(made()):
        llama.logits(PROMPT)


@pytest.mark.parametrize("none", [[], {}, ()])
def test_nowhere_is_not_everywhere(none, llama):
    taps = llama.trace(OTHER, "layers.1.residual")
    plain = llama.logits(PROMPT)
    with llama.edit(patch(taps, positions=none) | ablate("norm", positions=[*none])):
        np.testing.assert_array_equal(llama.logits(PROMPT), plain)


def test_what_was_traced_is_patched_by_any_of_its_names(llama):
    ours, theirs = (llama.trace(OTHER, name) for name in ("layers.*.residual", "l_out-1"))
    found = []
    for edit in (
        patch(ours, "layers.1.residual", 3),
        patch(ours, "blocks.1.hook_resid_post", 3),
        patch(theirs, "layers.1.residual", 3),
        patch(theirs, positions=3),
    ):
        with llama.edit(edit):
            found.append(llama.logits(PROMPT))
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


@pytest.mark.parametrize("kind", ["weights", "scores"])
@pytest.mark.parametrize(
    "made",
    [
        lambda name: ablate(name, heads=1, value=0.5),
        lambda name: ablate(name, value="mean"),
        lambda name: scale(name, 0),
        lambda name: scale(name, -2),
    ],
    ids=["a number", "mean", "times 0", "times -2"],
)
@pytest.mark.filterwarnings("error")
def test_no_token_sees_the_future_by_what_is_done_to_attention(made, kind, llama):
    name, ids = f"layers.1.attention.{kind}", llama.tokens(PROMPT)
    with llama.edit(made(name)):
        first = llama.logits(ids[:5])
        weights = llama.trace(ids, "layers.1.attention.weights")["layers.1.attention.weights"]
        whole = llama.logits(ids)[:5]
    assert not np.triu(weights, k=1).any()
    if "mean" not in made.__code__.co_consts:  # which depends on all tokens that are computed
        assert_same(llama, whole, first)


def test_a_window_hides_what_is_too_old_from_edits_too():
    config = replace(tiny.CONFIG, sliding_window=3)
    place = Place("layers.0.attention.weights", np.arange(2, 6), config)
    made = np.full((4, 4, 6), 0.25, np.float32)
    ((function,),) = ablate("layers.0.attention.weights", value=9).values()
    age = np.arange(2, 6)[:, None] - np.arange(6)
    seen = (age >= 0) & (age < 3)
    np.testing.assert_array_equal(function(made, place)[0], np.where(seen, 9, 0.25).astype(np.float32))
