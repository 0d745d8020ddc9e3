"""The playground's state, without a browser and without a widget."""

import math
import threading

import pytest

import tinyllama
from tinyllama.generation import Generation
from tinyllama.lab.widgets.session import HISTORY, Session

STORY = "Once upon a time"
HOW = {"backend": "numpy", "threads": 1}


def finished(session: Session) -> Session:
    assert session.worker.wait(30)
    assert session.state == "idle"
    return session


@pytest.fixture
def session():
    return Session()


@pytest.fixture
def told_everything(monkeypatch):
    """Nothing is held back, however busy this computer is."""
    monkeypatch.setattr("tinyllama.lab.widgets.worker.INTERVAL", 0)
    monkeypatch.setattr("tinyllama.lab.widgets.worker.TELLING", math.inf)


def test_a_run_writes_what_generate_writes(session):
    assert session.generate(STORY, **HOW, seed=4, n_predict=20)
    run = finished(session).run
    text = tinyllama.generate(STORY, **HOW, seed=4, n_predict=20)
    assert run.completion == text and run.text == STORY + text
    assert eval(run.completion.call()) == text
    assert session.error == ""


def test_every_token_has_its_text_and_what_was_expected_there(session):
    session.generate(STORY, **HOW, seed=4, n_predict=20)
    run = finished(session).run
    assert "".join(run.texts()) == run.text
    assert len(run.texts()) == len(run.tokens) == len(run.prompt_tokens) + 20
    assert all(token.stages for token in run.tokens[len(run.prompt_tokens) :])


def test_a_run_is_told_of_while_it_goes_on(told_everything):
    seen = []
    session = Session(lambda: seen.append((session.state, len(session.run.tokens) if session.run else 0)))
    session.generate(STORY, **HOW, n_predict=12)
    finished(session)
    lengths = [n_tokens for state, n_tokens in seen if state == "writing"]
    assert lengths == sorted(lengths) and len(set(lengths)) > 5
    assert seen[-1] == ("idle", len(session.run.tokens))


def test_a_second_run_is_refused_while_one_goes_on(session):
    assert session.generate(STORY, **HOW, n_predict=-1, seed=1)
    assert not session.generate(STORY, **HOW)
    session.stop()
    finished(session)
    assert session.generate(STORY, **HOW, n_predict=1)


def test_a_stopped_run_keeps_its_text_and_its_call_gives_it_again(session):
    written = threading.Event()
    session._changed = session.worker._changed = lambda: session.state == "writing" and written.set()
    session.generate(STORY, **HOW, n_predict=-1, seed=1)
    assert written.wait(30)
    session.stop()
    text = finished(session).run.completion
    assert text.stop_reason == "cancelled" and text.tokens
    assert eval(text.call()) == text


def test_stopping_while_a_prompt_is_read_ends_before_the_next_operation(session, monkeypatch):
    def stop_at_third(self, *arguments, **options):
        seen.append(len(seen))
        if len(seen) == 3:
            session.stop()
        return forward(self, *arguments, **options)

    seen, forward = [], tinyllama.Llama.forward
    monkeypatch.setattr(tinyllama.Llama, "forward", stop_at_third)
    session.generate(STORY * 30, **HOW, batch_size=16)
    run = finished(session).run
    assert len(seen) == 3 and not run.completion.tokens
    assert run.completion.stop_reason == "cancelled" and session.error == ""


def test_a_missing_model_is_an_error_in_one_line_and_the_next_run_works(session):
    session.generate(STORY, "nothing/here.gguf")
    assert "nothing/here.gguf: there is no such file" in finished(session).error
    assert session.run is None
    session.generate(STORY, **HOW, n_predict=2)
    assert finished(session).error == "" and len(session.run.completion.tokens) == 2


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
    assert why in finished(session).error


@pytest.mark.parametrize(
    "error, words", [(MemoryError(), "not enough memory"), (OSError("disk\ngone"), "disk gone")]
)
def test_what_nobody_expects_is_said_too(session, error, words, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(Generation, "_predict", fail)
    session.generate(STORY, **HOW)
    assert words in finished(session).error and "\n" not in session.error
    assert len(session.run.completion.tokens) == 1


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
    assert all(math.isnan(token.prob) for token in finished(session).run.prompt_tokens)
    session.select(2)
    finished(session)
    expected = [token.prob for token in tinyllama.load("small", **HOW).score(STORY)]
    found = [token.prob for token in session.run.prompt_tokens[1:]]
    assert found == pytest.approx(expected[1:], rel=1e-4)
    assert session.selected == 2


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
        seen.append((session.state, session.loaded))
        if session.loaded > 0.5:
            session.stop()

    folder = tmp_path / "small"
    folder.symlink_to(tinyllama.load("small").checkpoint.path)
    seen, session = [], Session(stop_half_way)
    session.generate(STORY, str(folder), "numpy", 3)
    assert finished(session).run is None and session.error == ""
    shares = [share for state, share in seen if state == "loading"]
    assert shares == sorted(shares) and 0.5 < shares[-1] < 0.7


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
    assert finished(session).error == ""
    assert len(session.run.tokens) == len(session.runs[0].tokens) + 2
