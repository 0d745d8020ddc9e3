"""Each token of a text carries the values that chose it."""

import json

import numpy as np
import pytest

import tinyllama
from tinyllama.backends import available
from tinyllama.commands import main
from tinyllama.errors import TinyllamaError
from tinyllama.machine import limits
from tinyllama.ops import FEW
from tinyllama.texts.drafts import Pace

BACKENDS = [name for name, reason in available().items() if reason is None]
PROMPT = "Once upon a time, there was a little girl named Lily. She had a little"
NAMES = ("layers.*.attention.weights", "layers.2.residual", "layers.1.attention.q_rope", "logits")
#: Mean squared error relative to the mean square: tokens that are computed one by one, or together.
LIMITS = {"numpy": 1e-8, "numexpr": 1e-8, "c": 1e-3, "mlx": 1e-3}


@pytest.fixture(scope="module", params=BACKENDS)
def llama(request):
    return tinyllama.load("small", request.param)


def assert_as_traced(llama, text, prompt=PROMPT):
    ids = llama.tokens(prompt)
    traced = llama.trace([*ids, *text.ids], *NAMES)
    for n, token in enumerate(text.tokens):
        at = len(ids) - 1 + n  # the token before chose it
        for name, found in token.taps.items():
            whole = traced[name]
            expected = whole[:, at, : at + 1] if name.endswith("weights") else whole[at]
            assert found.shape == expected.shape, name
            assert np.mean((found - expected) ** 2) <= LIMITS[llama.backend.name] * np.mean(expected**2), name


DRAFTS = {"draft_lookup": True, "repeat_penalty": 0.7}  # a text that repeats itself


@pytest.mark.parametrize("settings", [{}, DRAFTS, {"batch_size": 4}, {"remember": False}])
def test_they_are_those_of_a_trace_of_the_whole_text(settings, llama, monkeypatch):
    note = Pace.note  # every pass takes a second, so that guesses pay
    monkeypatch.setattr(Pace, "note", lambda self, n_tokens, _: note(self, n_tokens, 1.0))
    monkeypatch.setattr(llama, "pace", Pace())
    for n_tokens in [*range(1, FEW + 1)] * 3:
        llama.pace.note(n_tokens, 1.0)
    text = llama.generate(PROMPT, temp=0, n_predict=24, taps=NAMES, **settings)
    assert bool(text.timings.n_drafted) == (settings is DRAFTS)
    assert {*text.tokens[0].taps} == {f"layers.{n}.attention.weights" for n in range(4)} | {*NAMES[1:]}
    assert_as_traced(llama, text)


def test_texts_together_have_each_their_own(llama):
    prompts = [PROMPT, "Tom and"]
    texts = llama.generate(prompts, temp=0, n_predict=6, taps=NAMES)
    for prompt, text in zip(prompts, texts, strict=True):
        assert_as_traced(llama, text, prompt)


def test_only_the_text_that_asks_for_them_has_any(llama):
    watched, plain = llama.generate([PROMPT, PROMPT], temp=0, n_predict=4, each=[{"taps": "norm"}, {}])
    assert [[*token.taps] for token in watched.tokens] == [["norm"]] * 4
    assert [token.taps for token in plain.tokens] == [{}] * 4


def test_names_of_others_stay_as_they_were_asked_for(llama):
    text = llama.generate(PROMPT, n_predict=2, taps=["l_out-1", "blocks.1.hook_resid_post"])
    assert [*text.tokens[1].taps] == ["l_out-1", "blocks.1.hook_resid_post"]


def test_the_logits_are_those_that_the_probability_comes_from(llama):
    for token in llama.generate(PROMPT, seed=1, n_predict=5, taps="logits").tokens:
        x = np.exp(token.taps["logits"] - token.taps["logits"].max())
        assert token.prob == pytest.approx(x[token.id] / x.sum(), rel=1e-5)


def test_inside_of_an_edit_they_are_the_edited_ones(llama):
    with llama.edit({"norm": lambda x: x + 1}):
        text = llama.generate(PROMPT, temp=0, n_predict=2, taps="norm")
        traced = llama.trace([*llama.tokens(PROMPT), *text.ids], "norm")["norm"]
    np.testing.assert_allclose(text.tokens[0].taps["norm"], traced[-3], rtol=0.05, atol=0.05)


def test_what_all_tokens_will_keep_has_to_fit_into_memory_before_the_first(llama, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemAvailable: 50000 kB")
    monkeypatch.setattr(limits, "MEMINFO", tmp_path / "meminfo")
    llama.generate(PROMPT, n_predict=1, taps="logits", ctx_size=64)
    for prompt in (PROMPT, [PROMPT, "Tom"]):
        with pytest.raises(TinyllamaError, match="what is kept of them needs"):
            llama.stream(prompt, n_predict=2000, taps="layers.*", ctx_size=2048)


def test_a_pattern_that_matches_nothing_is_refused(llama):
    with pytest.raises(TinyllamaError, match="nothing in this model is named 'nrm'"):
        llama.generate(PROMPT, taps="nrm")


def test_the_command_prints_them_as_json(capsys):
    main(["generate", "-p", PROMPT, "-n", "2", "--json", "--taps", "kq-1", "--taps", "norm", "-s", "1"])
    taps = json.loads(capsys.readouterr().out)["taps"]
    n = len(tinyllama.load("small").tokens(PROMPT))
    assert [len(token["kq-1"][0]) for token in taps] == [n, n + 1] and len(taps[0]["norm"]) == 256


def test_the_command_refuses_them_where_nobody_would_see_them(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "-p", PROMPT, "--taps", "norm"])
    assert "argument --taps: needs --json" in capsys.readouterr().err
