"""Many texts at once: each is what it is alone, in whatever company and order."""

import gc
import random
import threading
import weakref
from itertools import pairwise

import numpy as np
import pytest

import tinyllama
from tinyllama.backends import available
from tinyllama.errors import TinyllamaError
from tinyllama.ops import FEW
from tinyllama.texts.schedule import Schedule

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog. "
BACKENDS = [name for name, reason in available().items() if not reason]


@pytest.fixture(scope="module", params=BACKENDS)
def llama(request):
    return tinyllama.load("small", request.param, 2)


@pytest.fixture(scope="module")
def in_c():
    if reason := available()["c"]:
        pytest.skip(reason)
    return tinyllama.load("small", "c", 2)


def many(n: int, seed: int = 0) -> tuple[list[str], list[dict]]:
    """Prompts of 1 to 130 tokens, many of which begin alike, and settings for each."""
    rng = random.Random(seed)
    lengths = [rng.choice([4, 20, 60, 100, 105, 300]) for _ in range(n)]
    prompts = [(STORY * 3)[:length] + rng.choice(["", "Tom", "The"]) for length in lengths]
    kinds = [
        {"temp": 0.0},
        {"temp": 0.8},
        {"temp": 1.0, "top_k": 0, "repeat_penalty": 1.1},
        {"batch_size": 32},
    ]
    return prompts, [{"seed": n, "n_predict": rng.randint(1, 40)} | rng.choice(kinds) for n in range(n)]


def alone(llama, prompts, settings):
    return [
        llama.generate(prompt, remember=False, **own) for prompt, own in zip(prompts, settings, strict=True)
    ]


def assert_same_bits(texts, expected):
    assert texts == expected
    for text, other in zip(texts, expected, strict=True):
        assert text.ids == other.ids and text.probs == other.probs and text.stop_reason == other.stop_reason


@pytest.mark.parametrize("n, seed", [(2, 1), (17, 2), (64, 3)])
def test_a_text_is_the_same_bits_alone_and_in_company(in_c, n, seed):
    prompts, settings = many(n, seed)
    expected = alone(in_c, prompts, settings)
    for threads in (1, 2, 3):
        assert_same_bits(tinyllama.load("small", "c", threads).generate(prompts, each=settings), expected)


def test_the_order_in_which_texts_arrive_changes_none(in_c):
    prompts, settings = many(24, 5)
    expected, order = in_c.generate(prompts, each=settings), list(range(24))
    random.Random(1).shuffle(order)
    found = in_c.generate([prompts[i] for i in order], each=[settings[i] for i in order])
    assert_same_bits(found, [expected[i] for i in order])


def test_other_backends_give_the_same_texts_within_their_tolerance(llama):
    prompts, settings = many(6, 7)
    settings = [own | {"n_predict": 8} for own in settings]
    for text, expected in zip(
        llama.generate(prompts, each=settings), alone(llama, prompts, settings), strict=True
    ):
        assert text.ids == expected.ids
        np.testing.assert_allclose(text.probs, expected.probs, rtol=1e-3)


def test_pieces_come_with_the_number_of_their_text(llama):
    prompts, written = [STORY, "Tom", "The cat"], ["", "", ""]
    run = llama.stream(prompts, n_predict=12, temp=0)
    for index, piece in run:
        assert piece
        written[index] += piece
    assert written == run.finish() == [text.completion() for text in run.generations]


def test_texts_are_written_side_by_side_and_the_next_begins_where_one_ends(in_c, monkeypatch):
    monkeypatch.setattr("tinyllama.texts.schedule.AT_ONCE", 2)
    order = [
        index
        for index, _ in in_c.stream(["Tom", "The", "A cat"], each=[{"n_predict": n} for n in (5, 20, 5)])
    ]
    assert order.index(1) < len(order) - order[::-1].index(0)  # the second begins before the first ends
    last_of_first, first_of_third = len(order) - order[::-1].index(0) - 1, order.index(2)
    assert last_of_first < first_of_third < len(order) - order[::-1].index(1) - 1


def test_nobody_waits_longer_than_for_a_piece_of_a_prompt(in_c, monkeypatch):
    sizes, run = [], tinyllama.Llama.run

    def noted(self, steps, **options):
        sizes.append([len(step.tokens) for step in steps])
        return run(self, steps, **options)

    monkeypatch.setattr(tinyllama.Llama, "run", noted)
    in_c.generate(["Tom", STORY * 4, STORY * 2], n_predict=30, batch_size=32, remember=False)
    reading = [len(size) == 1 and size[0] > FEW for size in sizes]
    assert sum(reading) > 3
    assert not any(first and second for first, second in pairwise(reading))
    assert all(sum(size) <= 32 + FEW for size in sizes)
    assert all(sum(size) <= FEW for size, read in zip(sizes, reading, strict=True) if not read)


def test_a_common_beginning_is_computed_once(in_c):
    beginning = STORY * 2
    prompts = [
        beginning + end for end in ("The dog ran to the lake", "Her mother called her home", "Then it began")
    ]
    in_c.remembered.clear()
    texts = in_c.generate(prompts, n_predict=3, seed=1)
    shared = len(in_c.tokens(beginning))
    assert [text.timings.n_remembered >= shared - FEW - 2 for text in texts] == [False, True, True]
    assert_same_bits(texts, alone(in_c, prompts, [{"n_predict": 3, "seed": 1}] * 3))


def test_texts_that_do_not_fit_wait(in_c, monkeypatch):
    together, run = [], tinyllama.Llama.run

    def noted(self, steps, **options):
        together.append(len(steps))
        return run(self, steps, **options)

    monkeypatch.setattr(tinyllama.Llama, "run", noted)
    room = in_c.backend.cache_bytes(in_c.config, 50)
    monkeypatch.setattr(type(in_c.backend), "cache_room", lambda *_: room)
    expected = alone(in_c, ["Tom"] * 5, [{"seed": n, "n_predict": 20} for n in range(5)])
    together.clear()
    texts = in_c.generate(["Tom"] * 5, each=[{"seed": n} for n in range(5)], n_predict=20)
    assert max(together) == 2 and texts == expected
    assert in_c.generate(["Tom"] * 2, each=[{"n_predict": 60}] * 2)[0].stop_reason == "length"  # one by one


def test_a_text_that_does_not_even_fit_alone_is_refused_with_the_figures(llama, free_memory):
    free_memory(2**20)
    with pytest.raises(TinyllamaError, match=r"a context of 512 tokens needs .* MB .* are free"):
        llama.generate(["Tom", "Tim"], n_predict=-1, ctx_size=512)


def test_one_text_can_be_stopped_and_the_others_go_on(llama):
    run = llama.stream(["Tom", "The cat", STORY], n_predict=20, temp=0)
    expected = llama.generate("The cat", n_predict=20, temp=0)
    next(run)
    run.stop(0)
    first, second, third = run.finish()
    assert first.stop_reason == "cancelled" and len(first.tokens) < 20
    assert second == expected and third.stop_reason == "length"


def test_a_flag_stops_all(llama):
    flag = threading.Event()
    run = llama.stream(["Tom", "The cat"], n_predict=20, cancel=flag)
    next(run)
    flag.set()
    assert {text.stop_reason for text in run.finish()} == {"cancelled"}


def test_each_text_knows_how_long_its_passes_took(llama):
    for text in llama.generate(["Tom", STORY], n_predict=5):
        took = text.timings
        assert took.n_prompt > 0 and took.n_predict == 4
        assert took.total >= took.prompt + took.predict > took.predict > 0


def test_settings_of_each_replace_those_of_all(llama):
    texts = llama.generate(["Tom"] * 3, n_predict=4, each=[{}, {"n_predict": 2}, {"n_predict": 0}])
    assert [len(text.tokens) for text in texts] == [4, 2, 0]
    with pytest.raises(TinyllamaError, match="each names 1 texts, and there are 2"):
        llama.generate(["Tom", "Tim"], each=[{}])
    with pytest.raises(TinyllamaError, match="each has settings of several prompts"):
        llama.generate("Tom", each=[{}])
    with pytest.raises(TinyllamaError, match="temp must be"):
        llama.generate(["Tom", "Tim"], each=[{}, {"temp": -1}])


def test_token_ids_and_texts_may_be_mixed(llama):
    ids = llama.tokens("Tom")
    one, other = llama.generate([ids, "Tom"], n_predict=5, temp=0)
    assert one == other


def test_another_thread_may_add_texts_while_one_computes(in_c):
    schedule = Schedule(in_c.run, 2**30)
    texts = [in_c.stream("Tom", n_predict=20, seed=n) for n in range(6)]
    expected = in_c.generate(["Tom"] * 6, each=[{"seed": n} for n in range(6)], n_predict=20)
    schedule.add(texts[0], 0)
    adding = threading.Thread(target=lambda: [schedule.add(text, 0) for text in texts[1:]])
    schedule.turn()
    adding.start()
    adding.join()
    while len(schedule):
        schedule.turn()
    assert [text.completion() for text in texts] == expected


def test_a_text_that_nobody_holds_gives_its_memory_back_at_once(in_c):
    gc.collect()
    gc.disable()
    try:
        for together in (False, True):
            in_c.remembered.clear()
            run = in_c.stream(["Tom", "The"] if together else "Tom", n_predict=3)
            texts = [weakref.ref(text) for text in getattr(run, "generations", [run])]
            run.finish()
            del run
            assert [text() for text in texts] == [None] * len(texts)
    finally:
        gc.enable()


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("n_texts", [3, 7, 40])
def test_as_many_passes_are_under_way_as_there_are_machines(in_c, depth, n_texts):
    n_open, at_end = 0, []

    def start(steps):
        nonlocal n_open
        n_open, found = n_open + 1, in_c.run(steps)

        def end():
            nonlocal n_open
            at_end.append(n_open)
            n_open -= 1
            return found

        return end

    schedule = Schedule(start, 2**30, depth=depth)
    settings = [{"prompt": "Tom", "n_predict": 20, "seed": n, "temp": 0.5} for n in range(n_texts)]
    texts = [in_c.stream(**one) for one in settings]
    for text in texts:
        schedule.add(text, 0)
    while len(schedule):
        schedule.turn()
    assert at_end.count(depth) > 0.8 * len(at_end) and max(at_end) == depth
    assert [text.completion() for text in texts] == [in_c.generate(**one) for one in settings]
