"""Values are replaced as one says, on every backend, and afterwards the model is as before."""

import asyncio
import threading
from functools import partial

import numpy as np
import pytest

import tinyllama
from tinyllama import ablate, steer
from tinyllama.backends import available
from tinyllama.errors import TinyllamaError
from tinyllama.model import tap_shapes
from tinyllama.ops import rope_freqs, softmax

BACKENDS = [name for name, reason in available().items() if reason is None]
LONG = "Once upon a time, there was a little girl named Lily who had a small dog and a big red ball. " * 2
PROMPT = "Once upon a time, there was a little girl named Lily"
LIMIT = {
    "numpy": 1e-8,
    "numexpr": 1e-8,
}  # mean squared error relative to the mean square, of other orders of sums
IN_BLOCKS = 2e-3  # and where activations are int8, or keys and values halves


@pytest.fixture(scope="module", params=BACKENDS)
def llama(request):
    return tinyllama.load("small", request.param)


def forward_by_hand(llama, ids, change=lambda name, array: array):
    """Logits [n_tokens, vocab_size] in plain NumPy, each value handed through change(name, array)."""
    c, weight = llama.config, {}
    for name in c.tensor_shapes():
        weight[name] = llama.weight(name.removesuffix(".weight"))
    turn, n, see = rope_freqs(c, np.arange(len(ids)))[:, None], len(ids), change

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c.norm_eps) * weight[f"{name}.weight"]

    def rope(x):
        return (np.ascontiguousarray(x).view(np.complex64) * turn).view(np.float32)

    x = see("embedding", weight["tok_embeddings.weight"][ids])
    for i in range(c.n_layers):
        at, ff = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        h = see(f"{at}.norm", norm(x, f"layers.{i}.attention_norm"))
        q, k, v = (h @ weight[f"{at}.{w}.weight"].T for w in ("wq", "wk", "wv"))
        q = see(f"{at}.q", q.reshape(n, c.n_heads, c.head_dim))
        k, v = (see(f"{at}.{s}", y.reshape(n, c.n_kv_heads, c.head_dim)) for s, y in (("k", k), ("v", v)))
        q, k = see(f"{at}.q_rope", rope(q)), see(f"{at}.k_rope", rope(k))
        k, v = (np.repeat(y, c.n_heads // c.n_kv_heads, 1) for y in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(np.float32(c.head_dim))
        scores = see(f"{at}.scores", np.where(np.tri(n) > 0, scores, -np.inf).astype(np.float32))
        weights = see(f"{at}.weights", softmax(scores))
        heads = see(f"{at}.heads", np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1))
        x = see(f"layers.{i}.residual_mid", x + see(f"{at}.output", heads @ weight[f"{at}.wo.weight"].T))
        h = see(f"{ff}.norm", norm(x, f"layers.{i}.ffn_norm"))
        gate, up = (
            see(f"{ff}.{s}", h @ weight[f"{ff}.{w}.weight"].T) for s, w in (("gate", "w1"), ("up", "w3"))
        )
        hidden = see(f"{ff}.hidden", gate / (1 + np.exp(-gate)) * up)
        x = see(f"layers.{i}.residual", x + see(f"{ff}.output", hidden @ weight[f"{ff}.w2.weight"].T))
    x = see("norm", norm(x, "norm"))
    return see("logits", x @ (weight.get("output.weight", weight["tok_embeddings.weight"])).T)


def noise(array):
    """Another value of the same shape, from its shape alone; scores stay masked, weights stay shares."""
    rng = np.random.default_rng(array.size)
    new = (array * rng.uniform(0.5, 1.5, array.shape)).astype(np.float32)
    return np.where(np.isfinite(array), new, array)


def error(found, expected):
    return np.mean((found - expected) ** 2) / np.mean(expected**2)


KINDS = [name for name in tap_shapes(tinyllama.load("small").config, 1) if not name.startswith("layers.")]
KINDS += [name for name in tap_shapes(tinyllama.load("small").config, 1) if name.startswith("layers.2.")]


@pytest.mark.parametrize("name", KINDS)
def test_what_goes_on_from_a_replaced_value_is_what_numpy_computes_by_hand(name, llama):
    ids = llama.tokens(PROMPT)
    with llama.edit({name: noise}):
        found = llama.logits(ids)
    expected = forward_by_hand(llama, ids, lambda at, array: noise(array) if at == name else array)
    assert error(found, expected) < LIMIT.get(llama.backend.name, IN_BLOCKS)
    assert error(llama.logits(ids), expected) > 10 * error(found, expected)


def test_a_function_may_change_the_array_in_place_or_return_nothing(llama):
    def in_place(x):
        x[:, 3] = 0

    def look(x):
        seen.append(x.copy())

    seen, plain = [], llama.logits(PROMPT)
    with llama.edit({"layers.1.residual": in_place}):
        changed = llama.logits(PROMPT)
    with llama.edit({"layers.1.residual": lambda x: np.where(np.arange(x.shape[1]) == 3, 0, x)}):
        np.testing.assert_array_equal(changed, llama.logits(PROMPT))
    with llama.edit({"layers.1.residual": look}):
        np.testing.assert_array_equal(plain, llama.logits(PROMPT))
    np.testing.assert_array_equal(seen[0], llama.trace(PROMPT, "layers.1.residual")["layers.1.residual"])


def test_trace_inside_of_an_edit_shows_what_was_put_in_and_what_follows(llama):
    with llama.edit({"layers.1.residual": lambda x: x + 1}):
        inside = llama.trace(PROMPT, "layers.*.residual")
    outside = llama.trace(PROMPT, "layers.*.residual")
    names = [f"layers.{n}.residual" for n in range(3)]
    np.testing.assert_array_equal(inside[names[0]], outside[names[0]])
    np.testing.assert_allclose(inside[names[1]], outside[names[1]] + 1, rtol=1e-3, atol=1e-4)
    assert error(inside[names[2]], outside[names[2]]) > 1e-4


def test_edits_inside_of_each_other_act_one_after_the_other(llama):
    with llama.edit({"norm": lambda x: x + 1}), llama.edit({"norm": lambda x: 2 * x}):
        found = llama.trace(PROMPT, "norm")["norm"]
    np.testing.assert_allclose(found, 2 * (llama.trace(PROMPT, "norm")["norm"] + 1), rtol=1e-3, atol=1e-3)


def test_a_function_of_two_arguments_learns_where_it_is(llama):
    def note(array, at):
        places.append((at.name, at.positions.tolist(), array.shape[0]))

    places = []
    with llama.edit({"blocks.1.hook_resid_post": note}):
        text = llama.generate(PROMPT, temp=0, n_predict=3)
    n = len(llama.tokens(PROMPT))
    assert len(text.ids) == 3
    assert places == [("layers.1.residual", [*range(n)], n)] + [
        ("layers.1.residual", [m], 1) for m in (n, n + 1)
    ]


@pytest.mark.parametrize(
    "how", ["generate", "stream", "many", "chat", "score", "perplexity", "drafts", "astream"]
)
def test_an_edit_holds_for_whatever_computes(how, llama):
    from tinyllama.texts.perplexity import perplexity

    async def asked():
        return "".join([piece async for piece in llama.astream(PROMPT, temp=0, n_predict=12)])

    ways = {
        "generate": lambda: llama.generate(PROMPT, temp=0, n_predict=12),
        "stream": lambda: "".join(llama.stream(PROMPT, temp=0, n_predict=12)),
        "many": lambda: llama.generate([PROMPT, "Tom and"], temp=0, n_predict=12),
        "chat": lambda: llama.chat("Who is Lily?", temp=0, n_predict=12),
        "score": lambda: [token.prob for token in llama.score(PROMPT)],
        "perplexity": lambda: perplexity(llama, PROMPT * 3, ctx_size=8, progress=False).perplexity,
        "drafts": lambda: llama.generate(PROMPT, temp=0, n_predict=12, draft_lookup=True),
        "astream": lambda: asyncio.run(asked()),
    }
    edit = ablate("layers.0.attention.output") | steer(np.ones(llama.config.dim), 2, 0.5)
    before = ways[how]()
    with llama.edit(edit):
        inside, again = ways[how](), ways[how]()
    assert inside == again != before
    assert ways[how]() == before  # nothing that was computed inside is remembered


def test_nothing_is_remembered_into_an_edit_or_out_of_it(llama):
    """Caches of texts are taken over from about 17 tokens on: they would hide that the prompt is edited."""
    edit, settings = ablate("layers.0.attention.v"), {"temp": 0, "n_predict": 12}
    plain = llama.generate(LONG, **settings, remember=False)
    llama.generate(LONG, **settings)
    again = llama.generate(LONG, **settings)
    assert again == plain and again.timings.n_remembered > 0
    text = llama.stream(LONG, **settings)
    with llama.edit(edit):
        inside = [llama.generate(LONG, **settings) for _ in range(2)]
        fresh = llama.generate(LONG, **settings, remember=False)
        assert inside == [fresh, fresh] != [plain, plain] and text.finish() == fresh
        assert [one.timings.n_remembered for one in inside] == [0, 0]
    assert llama.generate(LONG, **settings) == plain


def test_texts_together_are_edited_as_each_alone(llama):
    def only_the_first(array, at):
        array[at.positions == 4] = 0

    prompts = [PROMPT, "Tom and his dog went to the park", "The sun"]
    with llama.edit({"layers.1.residual": only_the_first}):
        together = llama.generate(prompts, temp=0, n_predict=10)
        alone = [llama.generate(prompt, temp=0, n_predict=10) for prompt in prompts]
    assert together == alone


def test_an_edit_ends_with_an_interrupt_and_holds_in_no_other_thread(llama):
    plain, found = llama.logits(PROMPT), []
    with pytest.raises(KeyboardInterrupt), llama.edit({"norm": lambda x: 0 * x}):
        thread = threading.Thread(target=lambda: found.append(llama.logits(PROMPT)))
        thread.start()
        thread.join()
        raise KeyboardInterrupt
    np.testing.assert_array_equal(found[0], plain)
    np.testing.assert_array_equal(llama.logits(PROMPT), plain)


def test_an_edit_of_one_model_is_none_of_another(llama):
    other = tinyllama.load("small", "numpy", threads=1)
    plain = other.logits(PROMPT)
    with llama.edit({"norm": lambda x: 0 * x}):
        np.testing.assert_array_equal(other.logits(PROMPT), plain)


def test_a_kernel_steps_aside_for_the_layer_alone_whose_weights_are_changed():
    """Bits of the fast attention and of NumPy's differ: all layers before keep those of the fast one."""
    llama = tinyllama.load("small", "c") if "c" in BACKENDS else pytest.skip("the C extension isn't built")
    plain = llama.trace(PROMPT, "layers.*.residual")
    with llama.edit({"layers.2.attention.weights": lambda x: x}):
        found = llama.trace(PROMPT, "layers.*.residual")
    for n in (0, 1):
        np.testing.assert_array_equal(found[f"layers.{n}.residual"], plain[f"layers.{n}.residual"])


WRONG = {
    "another shape": (lambda x: x[1:], r"edit of norm: \(1, 256\) went in and \(0, 256\) came back"),
    "no array": (lambda x: 3, "edit of norm: an array of numbers must come back, not 3"),
    "text": (lambda x: x.astype(str), "edit of norm: an array of numbers must come back"),
    "NaN": (lambda x: x * np.nan, "edit of norm: NaN or infinity came back"),
    "infinity": (lambda x: x.astype(float) * 1e300, "edit of norm: NaN or infinity came back"),
    "raises": (lambda x: x["a"], "edit of norm: IndexError: only integers"),
    "refuses": (partial(*ablate("norm", dims=999)["norm"]), r"edit of norm: dim \[999\] is not in 0..255"),
}


@pytest.mark.parametrize(("function", "message"), WRONG.values(), ids=WRONG)
def test_what_comes_back_wrong_is_one_line_with_the_tap_s_name_and_changes_nothing(function, message, llama):
    before = llama.generate(PROMPT, temp=0, n_predict=5)
    with pytest.raises(TinyllamaError, match=message) as caught, llama.edit({"result_norm": function}):
        llama.generate("Tom", temp=0, n_predict=5, remember=False)
    assert "\n" not in str(caught.value)
    assert llama.generate(PROMPT, temp=0, n_predict=5) == before


def test_wrong_edits_are_refused_before_anything_runs(llama):
    for edit, message in (
        ({"layers.2.residul": abs}, "nothing in this model is named 'layers.2.residul': did you mean layers"),
        ({3: abs}, "a value's name is text, not 3"),
        ({"norm": 1}, r"edit of 'norm': \[1\] isn't a function"),
        ([abs], "an edit is a dict, name -> function, not"),
        (steer(np.ones(256), 9), "nothing in this model is named 'layers.9.residual'"),
    ):
        with pytest.raises(TinyllamaError, match=message), llama.edit(edit):
            pytest.fail("it holds")


def test_edits_that_make_the_model_overflow_are_told_as_such(llama):
    with (
        pytest.raises(TinyllamaError, match="the model computes NaN or infinity: what is edited makes it so"),
        np.errstate(all="ignore"),
        llama.edit({"layers.0.feed_forward.[gu]*": lambda x: np.full_like(x, 3e38)}),
    ):
        llama.generate(PROMPT, n_predict=1)


def test_a_cancelled_pass_inside_of_an_edit_leaves_the_model_as_it_was(llama):
    flag, plain = threading.Event(), llama.logits(PROMPT)

    def stop(array):
        flag.set()
        return 2 * array

    with llama.edit({"layers.0.residual": stop}):
        text = llama.stream(PROMPT, cancel=flag, n_predict=5)
        assert text.finish() == "" and text.stop_reason == "cancelled"
    np.testing.assert_array_equal(llama.logits(PROMPT), plain)


def opened(llama, edit):
    """A generator that is inside of an edit until it is closed."""
    with llama.edit(edit):
        yield


def test_edits_that_do_not_end_in_the_order_of_their_beginning_end_all_the_same(llama):
    plain, doubled = llama.logits(PROMPT), {"layers.0.residual": lambda x: 2 * x}
    with llama.edit(doubled):
        expected = llama.logits(PROMPT)
    first, second = opened(llama, {"norm": lambda x: x + 1}), opened(llama, doubled)
    next(first), next(second)
    first.close()
    np.testing.assert_array_equal(llama.logits(PROMPT), expected)
    second.close()
    np.testing.assert_array_equal(llama.logits(PROMPT), plain)


def test_an_edit_that_another_thread_ends_has_ended(llama):
    plain, begun = llama.logits(PROMPT), opened(llama, {"norm": lambda x: x + 1})
    next(begun)
    thread = threading.Thread(target=begun.close)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(llama.logits(PROMPT), plain)


def test_what_was_begun_inside_goes_on_outside_without_the_edit(llama):
    async def after_the_end():
        async def later():
            await ended.wait()
            return llama.logits(PROMPT)

        ended = asyncio.Event()
        with llama.edit({"norm": lambda x: x + 1}):
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        ended.set()
        return await task

    np.testing.assert_array_equal(asyncio.run(after_the_end()), llama.logits(PROMPT))


def test_an_edit_may_be_entered_again_and_is_checked_when_it_is_made(llama):
    plain, edit = llama.logits(PROMPT), llama.edit({"norm": lambda x: x + 1})
    with edit:
        once = llama.logits(PROMPT)
    with edit, edit:
        assert error(llama.logits(PROMPT), once) > 1e-4
    np.testing.assert_array_equal(llama.logits(PROMPT), plain)
    with pytest.raises(TinyllamaError, match="nothing in this model is named 'nope'"):
        llama.edit({"nope": abs})


def test_a_function_may_ask_the_model_itself_which_is_not_edited_then(llama):
    other = llama.trace(PROMPT, "layers.1.residual")["layers.1.residual"]
    with llama.edit(
        {"layers.1.residual": lambda x: llama.trace(PROMPT, "layers.1.residual")["layers.1.residual"]}
    ):
        found = llama.trace(PROMPT, "layers.1.residual")["layers.1.residual"]
    np.testing.assert_array_equal(found, other)


def test_a_text_of_whose_tokens_nobody_wants_logits_is_not_shown(llama):
    """Of a long prompt's pieces only the last has logits; other texts go through the model beside it."""

    def largest(array):
        assert array.size
        return array / array.max()

    with llama.edit({"norm": largest}):
        texts = llama.generate([LONG, "Tom"], temp=0, n_predict=4, batch_size=4)
        alone = [llama.generate(prompt, temp=0, n_predict=4, batch_size=4) for prompt in (LONG, "Tom")]
    assert texts == alone


def test_a_token_that_looks_at_nothing_is_named_by_its_tap(llama):
    with (
        pytest.raises(TinyllamaError, match=r"edit of layers\.1\.attention\.scores: a token is left"),
        llama.edit({"layers.1.attention.scores": lambda x: np.full_like(x, -np.inf)}),
    ):
        llama.logits(PROMPT)


def test_taps_of_names_that_there_are_not_are_refused(llama):
    with pytest.raises(TinyllamaError, match="nothing in this model is named 'nrm'"):
        llama.forward([1, 2], llama.new_cache(2), taps={"nrm": print})


def test_attention_that_runs_in_numpy_is_in_the_memory_that_is_asked_for(llama, monkeypatch):
    asked = []
    monkeypatch.setattr(type(llama.backend), "require_run", lambda *_, **run: asked.append(run["tapped"]))
    llama.logits(PROMPT)
    with llama.edit(ablate("layers.1.attention.weights")):
        llama.logits(PROMPT)
    assert asked == [False, True]
