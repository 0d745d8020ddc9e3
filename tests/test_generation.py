import threading
import warnings

import numpy as np
import pytest

import tinyllama
from tinyllama.errors import Cancelled, TinyllamaError
from tinyllama.texts.completion import Token

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", backend="numpy", threads=2)


def joined(run) -> str:
    return "".join(run)


def test_a_completion_is_a_str_that_knows_how_it_came_about(llama):
    text = llama.generate(STORY, n_predict=20, seed=5)
    assert isinstance(text, str) and len(text) > 20
    assert len(text.ids) == len(text.probs) == len(text.tokens) == 20
    assert all(0 < prob <= 1 for prob in text.probs)
    assert text.stop_reason == "length"
    assert text.timings.n_predict == 19 and text.timings.total > 0
    assert text == llama.tokenizer.decode(text.ids, strip_prefix=False)


def test_a_run_can_be_repeated_from_its_result():
    text = tinyllama.generate(STORY, n_predict=24, repeat_penalty=1.1, stop="nothing stops it")
    assert text.seed >= 0
    again = tinyllama.generate(**text.settings)
    assert again == text and again.ids == text.ids and again.settings == text.settings


def test_the_same_seed_gives_the_same_text_at_any_number_of_threads_and_batch_size():
    texts = {
        tinyllama.generate(STORY * 5, threads=threads, batch_size=size, seed=1, n_predict=30)
        for threads, size in ((1, 512), (8, 512), (2, 512))
    }
    assert len(texts) == 1


def test_another_seed_gives_another_text(llama):
    assert llama.generate(STORY, seed=1) != llama.generate(STORY, seed=2)


def test_the_joined_stream_equals_the_whole(llama):
    run = llama.stream(STORY, seed=3, n_predict=40)
    pieces = list(run)
    assert len(pieces) > 20
    assert "".join(pieces) == run.completion() == llama.generate(STORY, seed=3, n_predict=40)


def test_greedy_text_is_the_argmax_of_the_logits(llama):
    text = llama.generate(STORY, temp=0, n_predict=8)
    logits = llama.logits(llama.tokens(STORY) + text.ids)
    np.testing.assert_array_equal(logits.argmax(-1)[-9:-1], text.ids)


def test_probabilities_are_the_model_s_own_before_temperature(llama):
    text = llama.generate(STORY, temp=0.5, top_k=3, n_predict=8, seed=1)
    logits = llama.logits(llama.tokens(STORY) + text.ids)[-9:-1].astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(text.probs, probs[np.arange(8), text.ids], rtol=1e-3)


@pytest.mark.parametrize("token", [7, 23, 41])
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(llama, token):
    whole = llama.generate(STORY, seed=3, n_predict=60)
    at = len("".join(map(str, whole[: token * 2])))
    stop = whole[at : at + 7]
    assert len(stop) == 7
    run = llama.stream(STORY, seed=3, n_predict=60, stop=("never in there", stop))
    assert joined(run) == whole[: whole.index(stop)]
    assert run.stop_reason == "stop"


def test_text_that_only_began_a_stop_string_is_shown_in_the_end(llama):
    whole = llama.generate(STORY, seed=3, n_predict=10)
    assert llama.generate(STORY, seed=3, n_predict=10, stop=whole[-4:] + "€") == whole


def test_a_completion_of_a_run_that_goes_on_stays_as_it_is(llama):
    run = llama.stream(STORY, n_predict=6, seed=1)
    next(run)
    text = run.completion()
    n_tokens, timings = len(text.tokens), str(text.timings)
    joined(run)
    assert len(text.tokens) == n_tokens < len(run.tokens) and str(text.timings) == timings


def test_no_half_of_a_stop_string_is_ever_shown(llama):
    whole = llama.generate(STORY, seed=3, n_predict=40)
    run = llama.stream(STORY, seed=3, n_predict=40, stop=whole[30:50])
    shown = ""
    for piece in run:
        shown += piece
        assert whole[:30].startswith(shown)
    assert shown == whole[:30]


def test_the_context_s_end_is_the_text_s(llama):
    n_prompt = len(llama.tokens(STORY))
    text = llama.generate(STORY, ctx_size=n_prompt + 5, n_predict=-1, seed=1)
    assert text.stop_reason == "context" and len(text.ids) == 6


def test_a_prompt_longer_than_the_context_is_refused_with_both_figures(llama):
    n_prompt = len(llama.tokens(STORY))
    with pytest.raises(TinyllamaError, match=f"context is full.* {n_prompt} tokens.* 3"):
        llama.stream(STORY, ctx_size=3)


def test_nothing_is_written_when_nothing_is_asked_for(llama):
    text = llama.generate(STORY, n_predict=0)
    assert text == "" and text.stop_reason == "length"


@pytest.mark.parametrize("empty", ["", []])
def test_an_empty_prompt_is_refused(llama, empty):
    with pytest.raises(TinyllamaError, match="empty"):
        llama.generate(empty)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_token_ids_outside_the_vocabulary_are_refused(llama, wrong):
    with pytest.raises(TinyllamaError, match=str(wrong)):
        llama.logits([1, wrong])


def test_settings_that_make_no_sense_are_refused(llama):
    with pytest.raises(TinyllamaError, match="temp"):
        llama.generate(STORY, temp=-1)


def test_the_end_token_ends_the_text_and_is_not_in_it(llama, monkeypatch):
    whole = llama.generate(STORY, temp=0, n_predict=10)
    fifth = whole.ids[4]
    monkeypatch.setattr(llama.tokenizer, "stop_ids", (fifth,))
    text = llama.generate(STORY, temp=0, n_predict=10)
    assert text.stop_reason == "eos"
    assert text.ids == whole.ids[: whole.ids.index(fifth)]


def test_a_cancel_flag_stops_the_text(llama):
    flag, run = threading.Event(), None
    run = llama.stream(STORY, cancel=flag, n_predict=50, seed=1)
    first = [next(run), next(run)]
    flag.set()
    rest = list(run)
    assert run.stop_reason == "cancelled"
    assert len(run.tokens) < 50
    assert run.completion() == "".join(first + rest)


def test_a_cancel_flag_stops_the_reading_of_a_prompt(llama):
    flag = threading.Event()
    flag.set()
    text = llama.generate(STORY, cancel=flag)
    assert text == "" and text.stop_reason == "cancelled"


def test_stages_are_recorded_on_request_alone(llama):
    asked = llama.generate(STORY, stages=True, n_predict=3, seed=1)
    assert [stage.name for stage in asked.tokens[0].stages] == ["logits", "temp", "top_k", "top_p"]
    assert all(token.id in token.stages[-1].kept for token in asked.tokens)
    assert llama.generate(STORY, n_predict=3, seed=1).tokens[0].stages == ()


def test_a_trailing_space_is_warned_of(llama):
    with pytest.warns(UserWarning, match="space") as caught:
        tinyllama.generate(STORY + " ", n_predict=1)
        tinyllama.stream(STORY + " ")
    assert [warning.filename for warning in caught] == [__file__, __file__]


def test_a_double_bos_is_warned_of():
    with pytest.warns(UserWarning, match="bos"):
        tinyllama.generate("<s>" + STORY, n_predict=1)


def test_a_good_prompt_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tinyllama.generate(STORY, n_predict=1)


def test_pieces_never_split_a_character(llama, monkeypatch):
    flag = "🦙é"
    ids = iter([*llama.tokenizer.encode(flag, bos=False)[-6:], *[llama.tokenizer.eos_id] * 9])
    monkeypatch.setattr("tinyllama.texts.choosing.sample", lambda *_: next(ids))
    pieces = list(llama.stream(STORY))
    assert "".join(pieces) == flag and set(pieces) <= {"🦙", "é", "🦙é"}


def test_the_call_of_a_text_gives_it_again(llama):
    text = llama.generate([1, *llama.tokens(STORY)[1:]], n_predict=12, top_k=7, stop=("\n\n",), stages=True)
    again = eval(text.call())
    assert again == text and again.seed == text.seed
    assert "top_p" not in text.call() and "stages" not in text.call()


def test_the_call_of_a_cancelled_text_asks_for_what_was_written(llama):
    flag = threading.Event()
    run = llama.stream(STORY, cancel=flag, n_predict=50, seed=1)
    next(run), flag.set(), list(run)
    assert eval(run.completion().call()) == run.completion()


def test_a_token_s_surprise_is_counted_in_bits():
    assert Token(1, "heads", 0.5).surprise == 1
    assert Token(1, "never", 0.0).surprise == np.inf


def test_a_prompt_s_score_is_what_generating_it_would_have_said(llama):
    text = llama.generate(STORY, n_predict=9, seed=2, stages=True)
    ids = llama.tokens(STORY) + text.ids
    for batch_size in (512, 3):
        scored = llama.score(ids, batch_size=batch_size)
        assert [token.id for token in scored] == ids
        assert scored[0].prob is None
        np.testing.assert_allclose([token.prob for token in scored[-9:]], text.probs, rtol=1e-3)
        expected = [token.stages[0].kept[:10].tolist() for token in text.tokens]
        assert [token.stages[0].kept[:10].tolist() for token in scored[-9:]] == expected


def test_scoring_can_be_cancelled(llama):
    flag = threading.Event()
    flag.set()
    with pytest.raises(Cancelled):
        llama.score(STORY, cancel=flag)


def test_a_run_knows_how_much_of_the_prompt_it_has_read(llama):
    run = llama.stream(STORY, n_predict=2)
    assert run.n_read == 0
    next(run)
    assert run.n_read == len(run.prompt_ids)
