import json
from dataclasses import replace

import numpy as np
import pytest

import tinyllama
from tinyllama.lab.widgets import report
from tinyllama.lab.widgets.session import Session
from tinyllama.machine.limits import human
from tinyllama.texts.completion import Completion, Token

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def session():
    session = Session()
    for how in ({"seed": 4, "repeat_penalty": 1.1}, {"seed": 5, "temp": 0}):
        session.generate(STORY, backend="numpy", n_predict=12, **how)
        session.worker.wait(30)
    session.select(2)
    session.worker.wait(30)
    session.show(1)
    return session


@pytest.fixture(scope="module")
def run(session):
    return session.find(1)


def test_a_token_comes_with_the_ten_likeliest_and_what_became_of_them(run):
    index = len(run.prompt_tokens) + 2
    token, shown = run.tokens[index], report.token_report(run, index)
    assert [column["name"].split()[0] for column in shown["columns"]] == [
        "the",
        "repetition",
        "temperature",
        "top-k",
        "top-p",
    ]
    assert len(shown["rows"]) in (10, 11)
    assert [row["id"] for row in shown["rows"][:10]] == token.stages[0].kept[:10].tolist()
    (chosen,) = [row for row in shown["rows"] if row["is_chosen"]]
    assert chosen["id"] == token.id and chosen["cells"][0]["share"] == pytest.approx(token.prob, rel=1e-4)
    last = token.stages[-1]
    for row in shown["rows"]:
        assert (row["cells"][-1] == "removed") == (row["id"] not in last.kept)


def test_a_stage_says_what_it_did_with_the_setting_it_had(run):
    columns = report.token_report(run, len(run.prompt_tokens) + 2)["columns"]
    assert [column["name"] for column in columns[1:]] == [
        "repetition penalty 1.1",
        "temperature 0.8",
        "top-k 40",
        "top-p 0.9",
    ]
    assert columns[2]["note"] == "sharpens"
    assert columns[3]["note"].startswith("keeps 40, removes 1,496: ")


def test_a_token_says_how_surprising_it_was(run):
    index = len(run.prompt_tokens) + 2
    facts = report.token_report(run, index)["facts"]
    assert f"{run.tokens[index].surprise:.1f} bits" in facts
    assert report.percent(run.tokens[index].prob) in facts


def test_greedy_says_so(session):
    run = session.find(2)
    shown = report.token_report(run, len(run.prompt_tokens))
    assert "Temperature 0 takes the likeliest" in shown["facts"] and len(shown["columns"]) == 1


def test_a_prompt_s_token_tells_what_was_expected_there(session):
    shown = report.token_report(session.find(2), 2)
    assert "part of the prompt" in shown["facts"] and len(shown["rows"]) >= 10


def test_the_first_token_tells_why_it_has_no_probability(run):
    shown = report.token_report(run, 0)
    assert "nothing before it" in shown["facts"] and not shown["rows"]


def test_a_taken_token_is_listed_however_unlikely_it_was(run):
    index = len(run.prompt_tokens)
    first = run.tokens[index].stages[0]
    unlikely = next(i for i in range(run.tokenizer.vocab_size) if i not in first.kept)
    run.completion.tokens[0] = Token(unlikely, "x", 1e-9, run.tokens[index].stages)
    row = report.token_report(run, index)["rows"][-1]
    assert (
        row["id"] == unlikely and row["is_chosen"] and "not among" in report.token_report(run, index)["facts"]
    )
    assert row["cells"][0]["text"] == "< 0.01 %" and row["cells"][-1] == "removed"


def test_the_status_gives_both_speeds_the_context_and_the_memory(session):
    line = report.status(session)
    for words in (
        "Prompt 5 tokens at",
        "text 12 tokens at",
        "context 17 of 2,048",
        "memory",
        "seed 4",
        "ended",
    ):
        assert words in line


def test_the_memory_is_that_of_the_weights_and_of_the_texts_that_are_remembered(session, run):
    weights, texts = run.memory
    assert weights > 4_000_000 and 0 < texts < 10_000_000
    assert f"memory: model {human(weights)}, texts {human(texts)}" in report.status(session)


def test_a_text_that_ends_at_once_says_so(run):
    empty = replace(run, warnings=["the prompt ends in a space"])
    empty._completion = Completion("")
    empty._completion.tokens, empty._completion.stop_reason = [], "eos"
    empty._completion.settings = run.completion.settings
    assert report.notes(empty) == [
        "The model ended the text at once: it added nothing.",
        "The prompt ends in a space.",
    ]
    assert report.notes(run) == []


def test_runs_are_exported_as_json_with_what_makes_them_again(session):
    runs = json.loads(json.dumps(report.export(session.runs), allow_nan=False))
    for kept, run in zip(runs, session.runs, strict=True):
        assert tinyllama.generate(**kept["settings"]) == run.completion and kept["text"] == run.text
        assert [token["id"] for token in kept["tokens"]] == [token.id for token in run.tokens]


def test_two_runs_are_compared_by_what_differs(session):
    differing = {name for name, _, differs in report.comparison(session.find(1), session.find(2)) if differs}
    assert differing == {"Temperature", "Repetition penalty", "Seed"}


def test_a_run_s_title_tells_it_from_others(session):
    assert report.title(session.find(1)) == "1: Once upon a time · small · temperature 0.8, seed 4"
    named = replace(session.find(1), name="the first")
    assert report.title(named) == "1: the first"


@pytest.mark.parametrize(
    "share, text",
    [
        (1, "100 %"),
        (0.1234, "12 %"),
        (0.0123, "1.2 %"),
        (0.00123, "0.12 %"),
        (1e-9, "< 0.01 %"),
        (None, "–"),
    ],
)
def test_shares_are_written_with_two_digits(share, text):
    assert report.percent(share) == text


ATTENDED = np.array([[0.8, 0.05, 0.15], [0.4, 0.5, 0.1]])  # [n_layers, n_past]


@pytest.mark.parametrize(
    "layer, sinks, levels",
    [(0, True, [1, 0.0625, 0.1875]), (0, False, [0, 0.333, 1]), (None, False, [0, 1, 0.455])],
)
def test_attention_is_tinted_by_its_strongest_token_with_the_first_or_without_it(layer, sinks, levels):
    shown = report.attention(ATTENDED, layer, sinks)
    assert shown["levels"] == pytest.approx(levels, abs=1e-3)
    assert shown["shares"] == pytest.approx(ATTENDED.mean(axis=0) if layer is None else ATTENDED[layer])
    assert report.attention(ATTENDED, layer, sinks, first=1)["levels"] == shown["levels"][1:]
    assert report.attention(None, layer, sinks) == {}


def test_what_is_tinted_is_told_and_why_the_first_token_is_not():
    said = report.attention_note(ATTENDED, 0, sinks=False)
    assert "all heads of layer 0" in said and "strongest tint is 15 %" in said
    assert "gets 80 %" in said and "attention sink" in said
    said = report.attention_note(ATTENDED, None, sinks=True)
    assert "of all 2 layers" in said and "strongest tint is 60 %" in said and "sink" not in said


def test_the_first_token_is_called_a_sink_only_where_it_gets_most():
    assert "gets 40 %" in (said := report.attention_note(ATTENDED[1:], None, sinks=False))
    assert "sink" not in said


@pytest.mark.parametrize("first, is_told", [(0, False), (1, False), (2, True)])
def test_it_is_told_where_the_strongest_tint_is_on_a_token_that_is_not_shown(first, is_told):
    said = report.attention_note(ATTENDED, 1, False, first)
    assert ("before this answer: show what the model saw" in said) == is_told


def test_where_only_the_first_token_is_before_it_that_one_is_tinted():
    assert report.attention(ATTENDED[:, :1], None, sinks=False)["levels"] == [1]
