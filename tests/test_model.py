import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny

from tinyllama.backends import available, get_backend
from tinyllama.config import FAMILIES, Family
from tinyllama.errors import Cancelled, cancellable
from tinyllama.model import Step, build, embed, forward, run_layers, unembed

SAME = 1e-4  # logits of one prompt computed in another order of float32 sums

TOKENS = np.random.default_rng(2).integers(0, tiny.CONFIG.vocab_size, 21)


@pytest.fixture(params=[name for name, reason in available().items() if not reason and name != "c"])
def ops(request):
    return get_backend(request.param, threads=2)


def made(ops, type="f32", copy=True):
    return build(tiny.CONFIG, tiny.tensors(type=type), partial(ops.prepare, copy=copy))


def logits(ops, model, batches, **options):
    cache = ops.new_cache(tiny.CONFIG, len(TOKENS))
    return np.concatenate([forward(model, ops, batch, cache, **options) for batch in batches])


def test_a_prompt_at_once_equals_token_by_token_and_any_batch_size(ops):
    model = made(ops)
    whole = logits(ops, model, [TOKENS])
    assert whole.shape == (len(TOKENS), tiny.CONFIG.vocab_size)
    for size in (1, 2, 8):
        batches = [TOKENS[start : start + size] for start in range(0, len(TOKENS), size)]
        np.testing.assert_allclose(logits(ops, model, batches), whole, rtol=0, atol=SAME)


def test_the_last_token_s_logits_alone_are_those_of_all(ops):
    model = made(ops)
    last = logits(ops, model, [TOKENS], last=True)
    np.testing.assert_allclose(last, logits(ops, model, [TOKENS])[-1:], rtol=0, atol=SAME)


@pytest.mark.parametrize("name", ["numpy", "numexpr"])
def test_one_thread_equals_eight_to_the_last_bit(name, monkeypatch):
    monkeypatch.setattr("tinyllama.ops.CHUNK", 512)  # many jobs even at this size
    monkeypatch.setattr("tinyllama.ops.WORTH_SHARING", 0)  # and all of them shared
    one, eight = (logits(b, made(b, "q4_0"), [TOKENS]) for b in (get_backend(name, 1), get_backend(name, 8)))
    np.testing.assert_array_equal(one, eight)


def test_unpacking_the_weights_when_loading_changes_no_logits(ops):
    later = logits(ops, made(ops, "q4_0", copy=False), [TOKENS])
    np.testing.assert_allclose(later, logits(ops, made(ops, "q4_0"), [TOKENS]), rtol=0, atol=SAME)


def test_numexpr_computes_what_numpy_does():
    by_name = {name: get_backend(name, 2) for name in ("numpy", "numexpr")}
    expected, fused = (logits(ops, made(ops), [TOKENS]) for ops in by_name.values())
    np.testing.assert_allclose(fused, expected, rtol=0, atol=SAME)


def test_a_later_token_never_changes_an_earlier_one(ops):
    model, changed = made(ops), TOKENS.copy()
    changed[10] = (changed[10] + 1) % tiny.CONFIG.vocab_size
    before, after = (logits(ops, model, [tokens]) for tokens in (TOKENS, changed))
    np.testing.assert_allclose(after[:10], before[:10], rtol=0, atol=SAME)
    assert np.abs(after[10:] - before[10:]).max() > 0.1


def test_without_output_weight_the_embedding_table_is_used():
    ops, tied = get_backend("numpy", 1), tiny.tensors()
    del tied["output.weight"]
    model = build(tiny.CONFIG, tied, partial(ops.prepare, copy=True))
    assert model.output is model.tok_embeddings


def test_every_named_step_is_tapped_with_its_shape(ops):
    seen = {}
    logits(ops, made(ops), [TOKENS], taps=tiny.all_taps(seen.__setitem__))
    c, n_tokens = tiny.CONFIG, len(TOKENS)
    shapes = {
        "embedding": (n_tokens, c.dim),
        "layers.1.attention.norm": (n_tokens, c.dim),
        "layers.1.attention.q": (n_tokens, c.n_heads, c.head_dim),
        "layers.1.attention.k": (n_tokens, c.n_kv_heads, c.head_dim),
        "layers.1.attention.v": (n_tokens, c.n_kv_heads, c.head_dim),
        "layers.1.attention.q_rope": (n_tokens, c.n_heads, c.head_dim),
        "layers.1.attention.k_rope": (n_tokens, c.n_kv_heads, c.head_dim),
        "layers.1.attention.scores": (c.n_heads, n_tokens, n_tokens),
        "layers.1.attention.weights": (c.n_heads, n_tokens, n_tokens),
        "layers.1.attention.heads": (n_tokens, c.dim),
        "layers.1.attention.output": (n_tokens, c.dim),
        "layers.1.residual_mid": (n_tokens, c.dim),
        "layers.1.feed_forward.norm": (n_tokens, c.dim),
        "layers.1.feed_forward.gate": (n_tokens, c.hidden_dim),
        "layers.1.feed_forward.up": (n_tokens, c.hidden_dim),
        "layers.1.feed_forward.hidden": (n_tokens, c.hidden_dim),
        "layers.1.feed_forward.output": (n_tokens, c.dim),
        "layers.1.residual": (n_tokens, c.dim),
        "norm": (n_tokens, c.dim),
        "logits": (n_tokens, c.vocab_size),
    }
    found = {name: array.shape for name, array in seen.items() if "layers.0" not in name}
    assert list(found.items()) == list(shapes.items())  # in the order in which they are computed


def test_the_residual_stream_is_the_sum_of_what_was_added_to_it(ops):
    seen = {}
    logits(ops, made(ops), [TOKENS], taps=tiny.all_taps(seen.__setitem__))
    added = [array for name, array in seen.items() if name.endswith("output")]
    np.testing.assert_allclose(seen["layers.1.residual"], seen["embedding"] + sum(added), rtol=0, atol=SAME)


def test_a_cancel_flag_ends_the_pass_before_the_next_layer(ops):
    flag = threading.Event()

    def tap(name, array):
        seen.append(name)
        if name == "layers.0.attention.output":
            flag.set()

    seen = []
    with pytest.raises(Cancelled), cancellable(flag):
        logits(ops, made(ops), [TOKENS], taps=tiny.all_taps(tap))
    assert seen[-1] == "layers.0.residual"


def test_after_a_cancelled_pass_the_cache_is_good_for_another():
    ops, flag = get_backend("numpy", 1), threading.Event()
    model, cache = made(ops), ops.new_cache(tiny.CONFIG, len(TOKENS))
    forward(model, ops, TOKENS[:5], cache)
    flag.set()
    with pytest.raises(Cancelled), cancellable(flag):
        forward(model, ops, TOKENS[6:], cache)
    assert cache.ids == TOKENS[:5].tolist()
    again = forward(model, ops, TOKENS[5:], cache)
    np.testing.assert_allclose(again, logits(ops, model, [TOKENS])[5:], rtol=0, atol=SAME)


def test_the_cache_holds_the_ids_that_went_through(ops):
    cache = ops.new_cache(tiny.CONFIG, len(TOKENS))
    forward(made(ops), ops, TOKENS, cache)
    assert cache.ids == TOKENS.tolist()


def test_layers_in_two_halves_and_both_ends_by_themselves_are_the_whole_pass(ops):
    model, step = made(ops), Step(TOKENS, ops.new_cache(tiny.CONFIG, len(TOKENS)))
    x = embed(model, ops, TOKENS)
    x = run_layers(model, ops, x, [step], stop=1)
    x = run_layers(model, ops, x, [step], first=1)
    np.testing.assert_array_equal(unembed(model, ops, x), logits(ops, model, [TOKENS]))


def test_a_family_s_biases_and_norms_of_heads_are_steps_of_the_same_pass(ops, monkeypatch):
    monkeypatch.setitem(FAMILIES, "other", Family(biases=True, qk_norms=True))
    config, seen = replace(tiny.CONFIG, family="other"), {}
    weights = tiny.tensors(config)
    assert len(weights) == len(tiny.tensors()) + 5 * config.n_layers
    model = build(config, weights, partial(ops.prepare, copy=True))
    taps = tiny.all_taps(seen.__setitem__)
    forward(model, ops, TOKENS, ops.new_cache(config, len(TOKENS)), taps=taps)
    prefix = "layers.1.attention."
    numbers = {name.removeprefix(prefix): tensor.dequantize() for name, tensor in weights.items()}
    plain = seen[f"{prefix}norm"] @ numbers["wk.weight"].T + numbers["wk.bias"]
    heads = plain.reshape(len(TOKENS), config.n_kv_heads, config.head_dim)
    k = heads / np.sqrt(np.mean(heads**2, -1, keepdims=True) + config.norm_eps) * numbers["k_norm.weight"]
    np.testing.assert_allclose(seen[f"{prefix}k"], k, rtol=0, atol=SAME)
    v = seen[f"{prefix}norm"] @ numbers["wv.weight"].T + numbers["wv.bias"]
    np.testing.assert_allclose(seen[f"{prefix}v"].reshape(v.shape), v, rtol=0, atol=SAME)
