"""Prompts that begin like an earlier text: what is read of them, and that it changes no bit."""

import pytest

import tinyllama
from tinyllama.backends import available
from tinyllama.ops import FEW
from tinyllama.texts import remembered

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog. "


@pytest.fixture
def llama():
    if reason := available()["c"]:
        pytest.skip(reason)
    loaded = tinyllama.load("small", "c", 2)
    loaded.remembered.clear()
    return loaded


def say(llama, prompt, **settings):
    return llama.generate(prompt, **{"n_predict": 12, "seed": 3, **settings})


def test_a_prompt_goes_on_from_one_that_began_alike_with_the_same_bits(llama):
    prompts = [
        STORY * 2 + "Her dog was big and brown, and he liked to run.",
        STORY * 3 + "One day, it rained.",
    ]
    for batch_size in (512, 24):
        fresh = [say(llama, prompt, remember=False, batch_size=batch_size) for prompt in prompts]
        llama.remembered.clear()
        first, second = (say(llama, prompt, batch_size=batch_size) for prompt in prompts)
        assert (first.timings.n_remembered, first.probs) == (0, fresh[0].probs)
        assert second.timings.n_remembered >= len(llama.tokens(STORY * 2)) - 1
        assert second.probs == fresh[1].probs


def test_the_same_prompt_again_reads_only_its_end(llama):
    first, second = say(llama, STORY * 2), say(llama, STORY * 2)
    assert second.timings.n_remembered == first.timings.n_prompt - FEW - 1
    assert first.probs == second.probs


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(llama):
    first = say(llama, STORY)
    ids = [*llama.tokens(STORY), *first.ids, *llama.tokens(" Then Tom came.")[1:]]
    second = say(llama, ids)
    assert second.timings.n_remembered == len(llama.tokens(STORY)) + len(first.ids) - 1


def test_a_text_that_is_edited_goes_on_from_what_was_read(llama):
    first = say(llama, STORY * 2)
    ids = [*llama.tokens(STORY * 2), *first.ids[:5], *llama.tokens(STORY)[1:]]
    fresh, second = say(llama, ids, remember=False), say(llama, ids)
    assert second.timings.n_remembered == first.timings.n_prompt and second.probs == fresh.probs


def test_short_prompts_and_those_that_begin_otherwise_are_read(llama):
    assert say(llama, "Once upon a time").timings.n_remembered == 0
    assert say(llama, "Once upon a time").timings.n_remembered == 0
    say(llama, STORY)
    assert say(llama, "The " + STORY).timings.n_remembered == 0


def test_the_text_that_was_used_least_recently_is_forgotten_first(llama, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 2)
    prompts = [f"{name} was there. {STORY * 2}" for name in ("Tom", "Sue", "Max")]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        say(llama, prompt)
    assert [say(llama, prompt).timings.n_remembered > 0 for prompt in (prompts[0], prompts[1])] == [
        True,
        False,
    ]


@pytest.mark.parametrize("n_bytes", [0, 40_000])
def test_memory_is_bounded(llama, free_memory, monkeypatch, n_bytes):
    monkeypatch.setattr(remembered, "LIMIT", n_bytes)
    for n in range(4):
        say(llama, f"{n} " + STORY)
        assert sum(cache.nbytes for cache, _ in llama.remembered._kept) <= n_bytes


def test_a_text_whose_cache_is_kept_is_not_changed_by_those_that_go_on_from_it(llama):
    run = llama.stream(STORY, n_predict=20, seed=4)
    next(run)
    say(llama, STORY + "Tom ran.", seed=9)
    assert run.finish().probs == say(llama, STORY, n_predict=20, seed=4, remember=False).probs


def test_a_model_that_is_closed_keeps_nothing():
    with tinyllama.load("small", threads=5) as llama:
        say(llama, STORY)
        assert llama.remembered._kept
    assert not llama.remembered._kept


def test_what_lies_in_a_file_takes_no_memory_and_goes_on_with_the_same_bits(llama, tmp_path, monkeypatch):
    cache, ids = llama.new_cache(100), llama.tokens(STORY * 3)
    llama.forward(ids[:40], cache)
    cache.save(tmp_path / "a")
    monkeypatch.setattr(remembered, "LIMIT", 0)
    llama.remembered.keep(llama.load_cache(tmp_path / "a", mapped=True), whole=True)
    fresh, text = say(llama, ids, remember=False), say(llama, ids)
    assert text.timings.n_remembered == 40 and text.probs == fresh.probs
