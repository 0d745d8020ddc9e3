"""The playground's state, without a browser and without a widget."""

import math

import numpy as np
import pytest

import tinyllama
from tinyllama.config import PRESETS
from tinyllama.lab.widgets import report
from tinyllama.lab.widgets.session import HISTORY, Session, batch_size

STORY = "Once upon a time"
HOW = {"backend": "numpy", "threads": 1}


def finished(session: Session) -> Session:
    assert session.worker.wait(30)
    assert session.worker.doing == ""
    return session


@pytest.fixture
def session():
    return Session()


@pytest.fixture
def told_everything(monkeypatch):
    """Nothing is held back, however busy this computer is."""
    monkeypatch.setattr("tinyllama.lab.widgets.worker.INTERVAL", 0)
    monkeypatch.setattr("tinyllama.lab.widgets.worker.SHARE", math.inf)


def test_a_run_writes_what_generate_writes(session):
    assert session.generate(STORY, **HOW, seed=4, n_predict=20)
    run = finished(session).run
    text = tinyllama.generate(STORY, **HOW, seed=4, n_predict=20)
    assert run.completion == text and run.text == STORY + text
    assert eval(run.completion.call()) == text
    assert session.worker.error == ""


def test_every_token_has_its_text_and_what_was_expected_there(session):
    session.generate(STORY, **HOW, seed=4, n_predict=20)
    run = finished(session).run
    assert "".join(run.texts()) == run.text
    assert len(run.texts()) == len(run.tokens) == len(run.prompt_tokens) + 20
    assert all(token.stages for token in run.tokens[len(run.prompt_tokens) :])


def test_a_run_is_told_of_while_it_goes_on(told_everything):
    seen = []
    session = Session(lambda: seen.append(len(session.run.tokens) if session.run else 0))
    session.generate(STORY, **HOW, n_predict=12)
    finished(session)
    assert seen == sorted(seen) and len(set(seen)) > 5
    assert seen[-1] == len(session.run.tokens)


def test_a_second_run_is_refused_while_one_goes_on(session):
    assert session.generate(STORY, **HOW, n_predict=-1, seed=1)
    assert not session.generate(STORY, **HOW)
    session.worker.stop()
    finished(session)
    assert session.generate(STORY, **HOW, n_predict=1)


def test_a_stopped_run_keeps_its_text_and_its_call_gives_it_again():
    def stop_after_a_few():
        if session.run and len(session.run.completion.tokens) > 3:
            session.worker.stop()

    session = Session(stop_after_a_few)
    session.generate(STORY, **HOW, n_predict=-1, seed=1)
    text = finished(session).run.completion
    assert text.stop_reason == "cancelled" and text.tokens
    assert eval(text.call()) == text


def test_a_run_can_be_stopped_while_its_prompt_is_read(told_everything):
    def stop_at_third_batch():
        if session.run and session.run.generation:
            read.append(session.run.generation.n_read)
            if read[-1] >= 32:
                session.worker.stop()

    read, session = [], Session(stop_at_third_batch)
    session.generate(STORY * 30, **HOW, batch_size=16)
    run = finished(session).run
    assert read[0] == 0 and read[-1] == 32 and not run.completion.tokens
    assert run.completion.stop_reason == "cancelled" and session.worker.error == ""
    assert report.status(session).startswith(f"Prompt {len(run.prompt_tokens)} tokens · text 0 tokens")


@pytest.mark.parametrize("name, n_tokens", [("7B", 64), ("13B", 32), ("65B", 16)])
def test_large_models_read_a_prompt_in_small_pieces(name, n_tokens):
    assert batch_size(PRESETS[name]) == n_tokens


def test_small_models_read_a_prompt_in_one_piece(session):
    assert batch_size(tinyllama.load("small").config) == 512
    session.generate(STORY, **HOW, n_predict=1)
    assert finished(session).run.completion.settings["batch_size"] == 512


def test_a_missing_model_is_an_error_in_one_line_and_the_next_run_works(session):
    session.generate(STORY, "nothing/here.gguf")
    assert "nothing/here.gguf: there is no such file" in finished(session).worker.error
    assert session.run is None
    session.generate(STORY, **HOW, n_predict=2)
    assert finished(session).worker.error == "" and len(session.run.completion.tokens) == 2


@pytest.mark.parametrize(
    "prompt, settings, why",
    [
        ("", {}, "prompt is empty"),
        (STORY, {"backend": "abacus"}, "no backend"),
        (STORY, {"temp": -1}, "temp"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_the_tool(session, prompt, settings, why):
    session.generate(prompt, **settings)
    assert why in finished(session).worker.error


def test_continuing_goes_on_where_the_text_ends(session):
    session.generate(STORY, **HOW, seed=4, n_predict=10)
    first = finished(session).run
    session.resume(n_predict=5, seed=7, temp=0.5)
    second = finished(session).run
    assert second.text.startswith(first.text) and len(second.text) > len(first.text)
    assert second.prompt == STORY and second.prompt_tokens == first.prompt_tokens
    assert second.taken == first.completion.tokens
    assert eval(second.completion.call()) == second.completion


def test_another_token_in_the_text_begins_a_run_that_keeps_what_was_before(session):
    session.generate(STORY, **HOW, seed=4, n_predict=10)
    first = finished(session).run
    index = len(first.prompt_tokens) + 3
    other = int(first.tokens[index].stages[0].kept[5])
    assert other != first.tokens[index].id
    session.resume_with(index, other, n_predict=6, seed=1)
    second = finished(session).run
    assert [t.id for t in second.tokens[: index + 1]] == [t.id for t in first.tokens[:index]] + [other]
    assert second.changed == index and second.number == first.number + 1
    assert second.tokens[index].prob == pytest.approx(first.tokens[index].stages[0].probs[5])
    expected = tinyllama.generate([t.id for t in second.tokens[: index + 1]], **HOW, n_predict=6, seed=1)
    assert second.completion == expected and first in session.runs


def test_another_token_in_the_prompt_shortens_it(session):
    session.generate(STORY, **HOW, seed=4, n_predict=4)
    finished(session).select(3)
    run = finished(session).run
    other = int(run.tokens[3].stages[0].kept[1])
    session.resume_with(3, other, n_predict=4)
    new = finished(session).run
    assert new.prompt == "Once upon" and new.changed == 3
    assert new.text.startswith("Once upon" + run.tokenizer.piece(other))


def test_a_prompt_s_probabilities_come_when_one_of_its_tokens_is_selected(session):
    session.generate(STORY, **HOW, n_predict=3, seed=1)
    assert all(token.prob is None for token in finished(session).run.prompt_tokens)
    session.select(2)
    finished(session)
    expected = [token.prob for token in tinyllama.load("small", **HOW).score(STORY)]
    found = [token.prob for token in session.run.prompt_tokens[1:]]
    assert found == pytest.approx(expected[1:], rel=1e-4)
    assert session.selected == 2


def test_what_a_token_s_pass_attended_to_is_the_last_row_of_the_weights(session):
    session.generate(STORY, **HOW, n_predict=12, seed=1)
    finished(session).attend(True)
    llama = tinyllama.load("small", **HOW)
    for index in (1, 3, 12):
        session.select(index)
        found = finished(session).attention
        weights = llama.trace([token.id for token in session.run.tokens[:index]], "*.attention.weights")
        by_hand = np.stack([layer.mean(axis=0)[-1] for layer in weights.values()])
        np.testing.assert_allclose(found, by_hand, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_attention_is_of_the_selected_token_and_only_while_it_is_asked_for(session):
    session.generate(STORY, **HOW, n_predict=6, seed=1)
    finished(session).select(7)
    assert finished(session).attention is None
    session.attend(True)
    assert finished(session).attention.shape == (4, 7)
    session.attend(False)
    assert session.attention is None
    session.attend(True)
    session.select(0)  # nothing is before it
    assert finished(session).attention is None
    session.clear()
    assert session.attention is None


def test_two_tokens_selected_one_right_after_the_other_are_both_explained(session):
    session.generate(STORY, **HOW, n_predict=6, seed=1)
    finished(session).attend(True)
    for index in (2, 8):
        session.select(index)
    assert finished(session).attention.shape == (4, 8) and session.run.tokens[2].prob is not None


def test_selecting_what_is_not_there_selects_nothing(session):
    session.select(3)
    assert session.selected is None
    session.generate(STORY, **HOW, n_predict=2)
    finished(session).select(99)
    assert session.selected is None


def test_clearing_keeps_the_history(session):
    session.generate(STORY, **HOW, n_predict=2)
    run = finished(session).run
    session.clear()
    assert session.run is None
    session.show(run.number)
    assert session.run is run


def test_the_history_is_bounded_and_holds_no_model(session):
    for _ in range(HISTORY + 2):
        session.generate(STORY, **HOW, n_predict=1)
        finished(session)
    assert [run.number for run in session.runs] == list(range(3, HISTORY + 3))
    assert all(run.generation is None for run in session.runs)


def test_loading_shows_its_progress_and_can_be_stopped(tmp_path, told_everything):
    def stop_half_way():
        if session.worker.doing.startswith("Loading the model: "):
            seen.append(int(session.worker.doing.split()[-2]))
            if seen[-1] > 50:
                session.worker.stop()

    folder = tmp_path / "small"
    folder.symlink_to(tinyllama.load("small").checkpoint.path)
    seen, session = [], Session(stop_half_way)
    session.generate(STORY, str(folder), "numpy", 3)
    assert finished(session).run is None and session.worker.error == ""
    assert seen == sorted(seen) and len(seen) > 10 and 50 < seen[-1] < 70


def test_two_sessions_run_at_once_and_each_writes_what_it_writes_alone():
    sessions = [Session(), Session()]
    for seed, session in enumerate(sessions):
        session.generate(STORY, seed=seed, n_predict=30)
    for seed, session in enumerate(sessions):
        assert finished(session).run.completion == tinyllama.generate(STORY, seed=seed, n_predict=30)


def test_a_closed_model_is_loaded_again(session):
    session.generate(STORY, **HOW, n_predict=2)
    finished(session)
    tinyllama.load("small", **HOW).close()
    session.resume(n_predict=2)
    assert finished(session).worker.error == ""
    assert len(session.run.tokens) == len(session.runs[0].tokens) + 2
