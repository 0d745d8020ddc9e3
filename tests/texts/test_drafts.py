"""Drafts: texts stay the same to the bit, and guesses that don't pay aren't made."""

import random
import threading

import mixed
import numpy as np
import pytest

import tinyllama
from tinyllama.backends import available
from tinyllama.errors import TinyllamaError
from tinyllama.ops import FEW
from tinyllama.settings import Settings
from tinyllama.texts.drafts import DraftModel, Drafts, Lookup, Pace

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog. "
REPEATED = STORY * 3
LOOPING = {"temp": 0, "repeat_penalty": 0.7}  # so that the text repeats itself
BACKENDS = [name for name, reason in available().items() if not reason]


def paid(llama):
    """The model, of which was measured that a pass takes a second, whatever it computes: guesses pay."""
    for n_tokens in [*range(1, FEW + 1)] * 3:
        llama.pace.note(n_tokens, 1.0)
    return llama


@pytest.fixture(scope="module")
def in_c():
    if reason := available()["c"]:
        pytest.skip(reason)
    return tinyllama.load("small", "c", 2)


@pytest.fixture
def seconds(monkeypatch):
    """Every pass takes a second."""
    note = Pace.note
    monkeypatch.setattr(Pace, "note", lambda self, n_tokens, _: note(self, n_tokens, 1.0))


def assert_same_bits(text, expected):
    assert (text, text.ids, text.probs) == (expected, expected.ids, expected.probs)
    assert text.stop_reason == expected.stop_reason


def with_and_without(llama, prompt, drafts=None, **settings):
    """A text with drafts, which must be the same without."""
    settings = {"seed": 3, "n_predict": 60, "remember": False} | settings
    expected = llama.generate(prompt, **settings)
    text = paid(llama).generate(prompt, **settings, **(drafts or {"draft_lookup": True}))
    assert_same_bits(text, expected)
    assert expected.timings.n_drafted == 0
    return text


# --- the same text ----------------------------------------------------------------------------------

KINDS = {
    "greedy": {"temp": 0},
    "greedy, penalized": {"temp": 0, "repeat_penalty": 1.3},
    "greedy, repeating": LOOPING,
    "sampled": {"temp": 0.8},
    "sampled, penalized": {"temp": 0.7, "repeat_penalty": 1.2, "repeat_last_n": 10},
    "sampled of all": {"temp": 1.0, "top_k": 0, "top_p": 1},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "drafts", [{"draft_lookup": True}, {"spec_draft_model": "small"}], ids=["lookup", "model"]
)
def test_a_text_is_the_same_bits_with_drafts(in_c, seconds, kind, drafts):
    n_accepted = 0
    for seed in range(4):
        text = with_and_without(in_c, REPEATED, drafts, seed=seed, **KINDS[kind])
        assert text.timings.n_drafted >= text.timings.n_accepted
        assert text.timings.n_accepted == sum(token.drafted for token in text.tokens)
        n_accepted += text.timings.n_accepted
    assert n_accepted > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_writes_the_same_text_within_its_tolerance(backend, seconds):
    llama = tinyllama.load("small", backend, 2)
    how = {"n_predict": 30, "remember": False}  # nor what tests before this one have left
    expected = llama.generate(REPEATED, **LOOPING, **how)
    text = paid(llama).generate(REPEATED, **LOOPING, **how, draft_lookup=True)
    assert text.timings.n_accepted > 5 and text.ids == expected.ids
    np.testing.assert_allclose(text.probs, expected.probs, rtol=1e-3)


def test_both_kinds_of_guesses_can_be_made(in_c, seconds):
    drafts = {"draft_lookup": True, "spec_draft_model": "small", "spec_draft_n_max": 4}
    assert with_and_without(in_c, REPEATED, drafts, temp=0).timings.n_accepted > 20


def test_guesses_of_the_same_model_are_all_right(in_c, seconds):
    text = with_and_without(in_c, STORY, {"spec_draft_model": "small"}, temp=0)
    assert text.timings.n_drafted == text.timings.n_accepted > 40


@pytest.mark.parametrize("most", [1, 3, 15])
def test_no_more_are_guessed_than_asked_for(in_c, seconds, monkeypatch, most):
    sizes, run = [], tinyllama.Llama.run

    def noted(self, steps, **options):
        sizes.append(len(steps[0].tokens))
        return run(self, steps, **options)

    monkeypatch.setattr(tinyllama.Llama, "run", noted)
    paid(in_c).generate(REPEATED, **LOOPING, n_predict=60, draft_lookup=True, spec_draft_n_max=most)
    assert max(sizes[1:]) == 1 + most


@pytest.mark.parametrize("n_predict", range(1, 24))
def test_the_number_of_tokens_ends_a_text_within_a_draft(in_c, seconds, n_predict):
    assert len(with_and_without(in_c, REPEATED, temp=0, n_predict=n_predict).tokens) == n_predict


@pytest.mark.parametrize("room", range(1, 24, 3))
def test_the_context_ends_a_text_within_a_draft(in_c, seconds, room):
    ctx_size = len(in_c.tokens(REPEATED)) + room
    for drafts in ({"draft_lookup": True}, {"spec_draft_model": "small"}):
        text = with_and_without(in_c, REPEATED, drafts, temp=0, n_predict=-1, ctx_size=ctx_size)
        assert (len(text.tokens), text.stop_reason) == (room + 1, "context")


@pytest.mark.parametrize("at", range(10, 60, 7))
def test_a_stop_string_ends_a_text_within_a_draft(in_c, seconds, at):
    whole = in_c.generate(STORY, **LOOPING, n_predict=60)
    for drafts in ({"draft_lookup": True}, {"spec_draft_model": "small"}):
        text = with_and_without(in_c, STORY, drafts, **LOOPING, stop=whole[at : at + 6])
        assert text.stop_reason == "stop"


@pytest.mark.parametrize("number", range(4, 30, 5))
def test_the_end_token_ends_a_text_within_a_draft(in_c, seconds, monkeypatch, number):
    whole = in_c.generate(STORY, temp=0, n_predict=60)
    monkeypatch.setattr(in_c.tokenizer, "stop_ids", (whole.ids[number],))
    text = with_and_without(in_c, STORY, {"spec_draft_model": "small"}, temp=0)
    assert text.stop_reason == "eos" and text.ids == whole.ids[: whole.ids.index(whole.ids[number])]


def test_stages_are_recorded_of_guesses_too(in_c, seconds):
    text = with_and_without(in_c, REPEATED, **LOOPING, stages=True, n_predict=30)
    assert any(token.drafted for token in text.tokens)
    assert all(token.stages[-1].kept[0] == token.id for token in text.tokens)


def test_a_prompt_that_is_remembered_goes_on_with_drafts(in_c, seconds):
    settings = LOOPING | {"n_predict": 40}
    for drafts in ({"draft_lookup": True}, {"spec_draft_model": "small"}):
        in_c.remembered.clear()
        expected = in_c.generate(REPEATED, remember=False, **settings)
        texts = [paid(in_c).generate(REPEATED, **settings, **drafts) for _ in range(2)]
        assert texts[1].timings.n_remembered > 20 and texts[1].timings.n_accepted > 5
        for text in texts:
            assert_same_bits(text, expected)


def test_a_text_that_was_written_with_drafts_can_be_gone_on_from(in_c, seconds):
    settings = LOOPING | {"n_predict": 30}
    first = paid(in_c).generate(REPEATED, draft_lookup=True, **settings)
    ids = [*in_c.tokens(REPEATED), *first.ids, *in_c.tokens(" Then Tom came.")[1:]]
    in_c.remembered.clear()
    expected = [in_c.generate(one, **settings) for one in (REPEATED, ids)]
    in_c.remembered.clear()
    found = [in_c.generate(one, draft_lookup=True, **settings) for one in (REPEATED, ids)]
    for text, other in zip(found, expected, strict=True):
        assert_same_bits(text, other)


@pytest.mark.parametrize("n", [2, 5, 17])
def test_several_texts_with_drafts_are_what_each_is_alone_and_take_no_more_passes(
    in_c, seconds, monkeypatch, n
):
    rng, sizes, run = random.Random(n), [], tinyllama.Llama.run
    prompts = [STORY * rng.randint(1, 3) + rng.choice(["", "Tom", "Lily"]) for _ in range(n)]
    each = [{"seed": i, "temp": rng.choice([0, 0.5]), "n_predict": rng.randint(5, 40)} for i in range(n)]
    expected = [in_c.generate(p, remember=False, **own) for p, own in zip(prompts, each, strict=True)]

    def noted(self, steps, **options):
        sizes.append((len(steps), sum(len(step.tokens) for step in steps)))
        return run(self, steps, **options)

    monkeypatch.setattr(tinyllama.Llama, "run", noted)
    plain = paid(in_c).generate(prompts, each=each, remember=False)
    n_plain = len(sizes)
    sizes.clear()
    texts = in_c.generate(prompts, each=each, remember=False, draft_lookup=True)
    for text, other, company in zip(texts, expected, plain, strict=True):
        assert_same_bits(text, other)
        assert_same_bits(company, other)
    assert sum(text.timings.n_accepted for text in texts) > 0
    assert len(sizes) < n_plain
    assert all(n_tokens <= FEW for n_texts, n_tokens in sizes if n_texts > 1)


def test_a_flag_cancels_a_text_with_drafts(in_c, seconds):
    for drafts in ({"draft_lookup": True}, {"spec_draft_model": "small"}):
        flag = threading.Event()
        run = paid(in_c).stream(REPEATED, cancel=flag, n_predict=60, seed=1, temp=0, **drafts)
        shown = next(run) + next(run)
        flag.set()
        shown += "".join(run)
        whole = in_c.generate(REPEATED, n_predict=60, temp=0)
        assert run.stop_reason == "cancelled" and whole.startswith(shown)
        assert run.completion() == shown and len(run.tokens) < 60


def test_a_flag_that_is_set_while_the_small_model_guesses_ends_the_text(in_c, monkeypatch):
    flag, forward = threading.Event(), tinyllama.Llama.forward

    def stopped(self, *args, **options):
        flag.set()
        return forward(self, *args, **options)

    run = paid(in_c).stream(STORY, cancel=flag, n_predict=60, seed=1, spec_draft_model="small")
    next(run)
    monkeypatch.setattr(tinyllama.Llama, "forward", stopped)
    "".join(run)
    assert flag.is_set() and run.stop_reason == "cancelled" and len(run.tokens) < 60


def test_the_call_of_a_text_asks_for_drafts_again(in_c, seconds, tmp_path):
    path = mixed.write(tmp_path / "model.gguf", dim=64, n_layers=1)
    text = tinyllama.generate([5, 6, 7], path, n_predict=9, temp=0, draft_lookup=True, spec_draft_model=path)
    assert "draft_lookup=True" in text.call() and f"spec_draft_model={str(path)!r}" in text.call()
    assert eval(text.call()) == text


# --- who guesses ------------------------------------------------------------------------------------


def first(source, ids, n):
    return [token for token, _ in zip((token for token, _ in source.guesses(ids)), range(n), strict=False)]


def test_what_came_after_the_longest_match_is_guessed_of_equal_ones_the_latest():
    lookup = Lookup()
    assert first(lookup, [1, 2, 3], 3) == []
    assert first(lookup, [1, 2, 3, 9, 2, 4, 1, 2], 3) == [3, 9, 2]
    assert first(lookup, [1, 2, 3, 9, 2, 4, 1, 2, 3, 8, 2], 2) == [3, 8]
    assert first(Lookup(), [7, 5, 7, 6, 7], 1) == [6]


def test_a_text_that_repeats_its_last_tokens_is_continued_beyond_its_end():
    assert first(Lookup(), [3, 1, 2, 1, 2], 7) == [1, 2, 1, 2, 1, 2, 1]


def test_longer_matches_are_trusted_more():
    ids = [*range(20), *range(4)]
    sure = [confidence for (_, confidence), _ in zip(Lookup().guesses(ids), range(6), strict=False)]
    assert sure == sorted(sure) and sure[0] < sure[3]


def test_another_text_is_looked_up_anew():
    lookup = Lookup()
    first(lookup, [1, 2, 3, 1], 1)
    assert first(lookup, [1, 5, 6, 1], 1) == [5]


def test_a_small_model_s_cache_follows_the_text(in_c):
    ids, small = in_c.tokens(REPEATED), DraftModel(in_c, Settings(), 256)
    expected = in_c.generate(ids, temp=0, n_predict=5, remember=False).ids
    assert first(small, ids, 5) == expected
    assert first(small, [*ids, expected[0]], 4) == expected[1:]  # one was right,
    other = [*ids[:40], *in_c.tokens("Tom ran.")[1:]]
    assert first(small, other, 5) == first(
        DraftModel(in_c, Settings(), 256), other, 5
    )  # or it goes on otherwise
    assert first(small, ids, 5) == expected


def test_a_small_model_with_another_vocabulary_is_refused_in_one_line_that_names_both_files(in_c, tmp_path):
    path = mixed.write(tmp_path / "other.gguf", dim=64, n_layers=1)
    with pytest.raises(TinyllamaError, match=r"other.gguf can't guess for .*small: their vocab") as refused:
        in_c.generate(STORY, spec_draft_model=path)
    assert "\n" not in str(refused.value)
    with pytest.raises(TinyllamaError, match="gone"):
        in_c.generate(STORY, spec_draft_model=tmp_path / "gone.gguf")


def test_a_small_model_whose_cache_does_not_fit_is_refused(in_c, free_memory):
    free_memory(2_000_000)
    with pytest.raises(TinyllamaError, match="memory"):
        in_c.generate(STORY, spec_draft_model="small", ctx_size=2048)


@pytest.mark.parametrize("n", [0, 16, 1.5])
def test_numbers_of_guesses_are_checked(in_c, n):
    with pytest.raises(TinyllamaError, match="spec_draft_n_max must be"):
        in_c.generate(STORY, spec_draft_n_max=n)


# --- the distribution -------------------------------------------------------------------------------

LIMIT = 72.05  # what chi-square of 39 degrees of freedom exceeds once in a thousand times
N_TEXTS = 800


def probs_behind(llama, prompt):
    """A function of the tokens behind a prompt: the probabilities of the next, [vocab_size]."""
    cache = llama.new_cache(len(prompt) + 2)
    llama.forward(prompt[:-1], cache, last=True)

    def probs(*tokens):
        cache.trim(len(prompt) - 1)
        logits = llama.forward([prompt[-1], *tokens], cache, last=True)[0].astype(np.float64)
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    return probs


@pytest.mark.parametrize("drafts", ["lookup", "the same model", "a small model"])
def test_sampled_texts_have_the_model_s_distribution(tmp_path, seconds, drafts):
    models = {
        "the same model": mixed.write(tmp_path / "model.gguf", n_layers=1),
        "a small model": mixed.write(tmp_path / "small.gguf", dim=64, n_layers=1),
    }
    asked = {"draft_lookup": True} if drafts == "lookup" else {"spec_draft_model": models[drafts]}
    kinds = range(mixed.VOCAB_SIZE)
    prompt = [*kinds[3:]]
    llama = paid(tinyllama.load(models["the same model"], threads=1))
    llama.tokenizer.stop_ids = frozenset()  # so that all texts have three tokens
    settings = {"temp": 1, "top_k": 0, "top_p": 1, "n_predict": 3, "ctx_size": 100, "remember": False} | asked
    texts = [llama.generate(prompt, seed=seed, **settings) for seed in range(N_TEXTS)]
    probs = probs_behind(llama, prompt)
    first, second = probs(), [probs(one) for one in kinds]
    third = sum(first[one] * second[one][two] * probs(one, two) for one in kinds for two in kinds)
    for number, expected in enumerate((first, first @ second, third)):
        found = np.bincount([text.ids[number] for text in texts], minlength=len(kinds))
        chi_square = ((found - N_TEXTS * expected) ** 2 / (N_TEXTS * expected)).sum()
        assert chi_square < LIMIT, f"token {number}"
    n_drafted, n_accepted = (
        sum(getattr(text.timings, name) for text in texts) for name in ("n_drafted", "n_accepted")
    )
    assert n_drafted > N_TEXTS * 0.9 and n_accepted > N_TEXTS / 100
    if drafts == "lookup":  # which guesses the token that follows in the prompt: accepted as often as likely
        chance = np.mean([second[text.ids[0]][text.ids[0] + 1] for text in texts if 3 <= text.ids[0] < 39])
        assert abs(n_accepted / n_drafted - chance) < 4 * (chance / n_drafted) ** 0.5


# --- how many are guessed -----------------------------------------------------------------------------


class Guessing:
    """Guesses that are all trusted by half."""

    read = staticmethod(lambda ids: None)

    def guesses(self, ids):
        while True:
            yield 7, 0.5


COSTS = {
    "a pass costs the same": lambda n: 1.0,
    "as of 7B": lambda n: 1 + 0.04 * (n - 1),
    "as of a small model": lambda n: 1 + 0.15 * (n - 1),
    "by tokens": lambda n: float(n),
    "steps of 8": lambda n: 1.0 + (n > 8),
}
RIGHT = {
    "never": lambda n: 0.0,
    "seldom": lambda n: 0.1,
    "half": lambda n: 0.5,
    "mostly": lambda n: 0.9,
    "at first": lambda n: 0.95 * (n < 200),
    "in turns": lambda n: 0.95 * (n // 50 % 2),
}


def written(cost, right, n_predict, seed):
    """How a text goes: (made-up seconds, guesses in each pass)."""
    rng, drafts, n, seconds, sizes = random.Random(seed), Drafts([Guessing()], Pace()), 1, 0.0, []
    while n < n_predict:
        guesses, n_accepted = drafts.guess([1, 2], n_predict - n - 1), 0
        while n_accepted < len(guesses) and rng.random() < right(n + n_accepted):
            n_accepted += 1
        took = cost(1 + len(guesses))
        drafts.learn(len(guesses), n_accepted, took)
        n, seconds = n + 1 + n_accepted, seconds + took
        sizes.append(len(guesses))
    return seconds, sizes


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("cost", COSTS)
def test_no_text_is_more_than_3_percent_slower_however_its_guesses_turn_out(cost, right):
    for n_predict in (20, 128, 600):
        for seed in range(5):
            seconds, _ = written(COSTS[cost], RIGHT[right], n_predict, seed)
            assert seconds <= 1.03 * n_predict


@pytest.mark.parametrize(
    "cost, gain", [("a pass costs the same", 4), ("as of 7B", 3), ("as of a small model", 1.6)]
)
def test_guesses_that_are_right_save_time(cost, gain):
    assert np.mean([written(COSTS[cost], RIGHT["mostly"], 600, n)[0] for n in range(5)]) < 600 / gain


def test_where_passes_cost_little_as_many_as_allowed_are_guessed_and_by_tokens_hardly_any():
    assert written(COSTS["as of 7B"], lambda n: 1.0, 600, 0)[1].count(FEW - 1) > 20
    assert sum(written(COSTS["by tokens"], RIGHT["half"], 600, 0)[1]) < 20


def test_guesses_that_fail_become_rare_and_are_tried_again():
    _, sizes = written(COSTS["as of a small model"], RIGHT["never"], 600, 0)
    tried = [number for number, size in enumerate(sizes) if size]
    assert 3 < len(tried) < 60 and tried[-1] > 400
    _, sizes = written(COSTS["as of 7B"], lambda n: 0.95 * (n > 300), 900, 0)
    assert sum(sizes[:280]) < 100 < sum(sizes[-40:])  # once they are right, they are many


def test_nothing_is_guessed_before_a_pass_was_measured_and_what_is_stale_is_measured_anew():
    pace = Pace()
    drafts, sizes = Drafts([Guessing()], pace), []
    for _ in range(200):
        sizes.append(len(drafts.guess([1], 100)))
        drafts.learn(sizes[-1], sizes[-1], 1.0)
    assert sizes[0] == 0 and 3 < sizes[1:].count(0) < 10
    assert Drafts([Guessing()], pace).guess([1], 100)  # another text of the model knows what passes take


def test_texts_that_are_written_together_share_the_room_for_guesses():
    pace = Pace()
    for n_tokens in range(1, FEW + 1):
        pace.note(n_tokens, 1.0)
    counts = [len(Drafts([Guessing()], pace).guess([1], 100, n_texts)) for n_texts in (1, 2, 5, 8, 9, 32)]
    assert counts == [15, 7, 2, 1, 0, 0]
