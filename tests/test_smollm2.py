"""SmolLM2, a real model: our logits against transformers', on the same dequantized weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from twin import twin

import tinyllama
from tinyllama import ablate, patch, steer
from tinyllama.backends import available
from tinyllama.errors import TinyllamaError

LOGITS = 1e-3  # largest difference that another order of float32 sums makes in 30 layers, over 200 tokens
TEXT = (
    "The Moon is Earth's only natural satellite. It orbits at an average distance of 384,400 kilometres, "
    "about thirty times the width of the Earth. It always shows the same face, because gravity has slowed"
    " its rotation to match its orbit. In July 1969 two astronauts walked on it for the first time; "
    "twelve people have done so, and the last of them left in December 1972. They brought back 382 "
    "kilograms of rock, from which we know that it is almost as old as the Solar System: 4.5 billion "
    "years. Most geologists think that a body of the size of Mars struck the young Earth, and that the "
    "Moon formed from what was thrown into orbit. Since then it has been moving away from us, by nearly "
    "four centimetres every year, and the days on Earth have been getting longer. Its phases gave people "
    "their months, and its pull on the oceans gives us the tides, twice a day."
)
QUESTION = "The first man on the moon was"


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    with tinyllama.load(smollm2_file, backend="numpy") as llama:
        yield llama


@pytest.fixture(scope="module")
def reference(smollm2):
    return twin(smollm2)


@pytest.mark.parametrize(("backend", "n_tokens"), [("numpy", 200), ("numexpr", 50)])
def test_logits_agree_with_transformers(smollm2_file, smollm2, reference, backend, n_tokens):
    ids = smollm2.tokens(TEXT)[:n_tokens]
    assert len(ids) == n_tokens
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    logits = tinyllama.load(smollm2_file, backend=backend).logits(ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS)


def test_greedy_text_names_neil_armstrong(smollm2):
    assert "Neil Armstrong" in smollm2.generate(QUESTION, temp=0, n_predict=16)


def test_a_long_prompt_in_small_batches_gives_the_same_logits(smollm2):
    ids = smollm2.tokens(TEXT)[:60]
    whole, cache = smollm2.logits(ids), smollm2.new_cache(60)
    for size in (1, 7, 32, 20):
        some = slice(len(cache), len(cache) + size)
        np.testing.assert_allclose(smollm2.forward(ids[some], cache), whole[some], rtol=0, atol=LOGITS)
    assert cache.ids == ids


# llama.cpp rounds activations to 8 bits; where its choice differed, our two best were 0.14 apart.
NEAR_TIE = 0.3


def _runs_of_llama_cpp():
    record = json.loads((Path(__file__).parent / "golden" / "llama_cpp.json").read_text())
    return [pytest.param(run, id=run["prompt"][:20]) for run in record["runs"]]


@pytest.mark.parametrize("run", _runs_of_llama_cpp())
def test_greedy_text_is_llama_cpp_s_wherever_the_two_best_logits_are_no_near_tie(smollm2, run):
    assert smollm2.tokens(run["prompt"]) == run["prompt_ids"]
    logits = smollm2.logits(run["prompt_ids"] + run["ids"])[len(run["prompt_ids"]) - 1 : -1]
    second, best = np.sort(logits, axis=-1)[:, -2:].T
    clear = best - second > NEAR_TIE
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(logits.argmax(-1)[clear], np.array(run["ids"])[clear])


#: What rounding inputs to 8 bits may change: KL divergence of the next token's probabilities, in nats, mean
#: over a text; perplexity, as a fraction, of which chance makes a third in so many tokens.
KL_LIMIT, PERPLEXITY_LIMIT = 1e-3, 3e-3


def test_backend_c_predicts_what_numpy_does(smollm2_file, smollm2):
    pytest.importorskip("tinyllama._native", reason="the C backend is not built")
    text = (Path(__file__).parents[1] / "data" / "held_out.txt").read_text()[:6000]
    ids = smollm2.tokens(TEXT + text)[:1000]
    _assert_predicts(tinyllama.load(smollm2_file, backend="c"), smollm2, ids, KL_LIMIT, PERPLEXITY_LIMIT)


@pytest.mark.long
@pytest.mark.parametrize(
    "dtype, kl, perplexity",
    [("float32", 1e-7, 1e-5), ("float16", KL_LIMIT, PERPLEXITY_LIMIT), ("bfloat16", 4e-3, 2e-2)],
)
def test_backend_mlx_predicts_what_numpy_does(smollm2_file, smollm2, dtype, kl, perplexity):
    pytest.importorskip("tinyllama.backends.mlx", exc_type=ImportError)
    on_mlx = tinyllama.load(smollm2_file, backend="mlx", dtype=dtype)
    _assert_predicts(on_mlx, smollm2, smollm2.tokens(TEXT)[:100], kl, perplexity)


def _assert_predicts(llama, smollm2, ids, kl_limit, perplexity_limit):
    caches, divergence, loss = (smollm2.new_cache(1000), llama.new_cache(1000)), [], []
    for start in range(0, len(ids), 200):
        some, following = ids[start : start + 200], np.array(ids[start + 1 : start + 201])
        p, q = (
            _log_probs(one.forward(some, cache)) for one, cache in zip((smollm2, llama), caches, strict=True)
        )
        divergence.extend((np.exp(p) * (p - q)).sum(axis=-1))
        loss.extend((p - q)[np.arange(len(following)), following])
    assert np.mean(divergence) < kl_limit
    assert abs(np.expm1(np.mean(loss))) < perplexity_limit


def _log_probs(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_a_prompt_of_bytes_that_no_token_stands_for_is_refused(smollm2):
    with pytest.raises(TinyllamaError, match="nothing in it that the vocabulary knows"):
        smollm2.generate("\x04")


def test_a_matrix_with_two_uses_counts_once(smollm2):
    assert smollm2.n_params == 134_515_008 and "134,515,008 weights" in repr(smollm2)


@pytest.mark.parametrize("backend", ["numpy", "c"])
@pytest.mark.parametrize("kind", ["head", "key of three heads", "layer", "patch", "steer"])
def test_edits_are_what_transformers_hooks_make(smollm2_file, smollm2, reference, backend, kind):
    if available()[backend]:
        pytest.skip(available()[backend])
    ids, other = smollm2.tokens(TEXT)[:40], smollm2.tokens(TEXT)[60:100]
    taps = smollm2.trace(other, "layers.12.residual")
    patched, direction = torch.tensor(taps["layers.12.residual"]), np.sin(np.arange(576, dtype=np.float32))

    def zeros(start, stop):
        def change(x):
            x[..., start:stop] = 0
            return x

        return change

    def put(x):
        x[:, [7, 39]] = patched[[7, 39]]
        return x

    head, key = zeros(4 * 64, 5 * 64), zeros(64, 2 * 64)
    edits = {  # what we say, the module whose input or output a hook changes, and how
        "head": (ablate("layers.5.attention.heads", heads=4), "layers.5.self_attn.o_proj", "in", head),
        "key of three heads": (ablate("Kcur-9", heads=1), "layers.9.self_attn.k_proj", "out", key),
        "layer": (ablate("layers.3.feed_forward.output"), "layers.3.mlp", "out", zeros(0, 576)),
        "patch": (patch(taps, positions=[7, -1]), "layers.12", "out", put),
        "steer": (steer(direction, 20, 2.0), "layers.20", "out", lambda x: x + 2 * torch.tensor(direction)),
    }
    edit, name, side, change = edits[kind]
    module = reference.model.get_submodule(name)
    if side == "in":
        hook = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0].clone()), *inputs[1:]))
    else:
        hook = module.register_forward_hook(lambda _, inputs, output: change(output.clone()))
    try:
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0].numpy()
    finally:
        hook.remove()
    llama = tinyllama.load(smollm2_file, backend=backend)
    plain = llama.logits(ids)
    with llama.edit(edit):
        found = llama.logits(ids)
    error, effect = (np.mean((x - expected) ** 2) / np.mean(expected**2) for x in (found, plain))
    limit, times = (1e-8, 5) if backend == "numpy" else (2e-3, 1.5)  # c rounds activations to 8 bits
    assert error < limit and effect > times * error
