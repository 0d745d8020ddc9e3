import math

import numpy as np
import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.sampling import Settings, draw, repetition_penalty, sample, temperature, top_k, top_p

N_DRAWS = 20_000
LOGITS = np.log(np.array([0.4, 0.05, 0.25, 0.2, 0.1], np.float32))


def frequencies(settings: Settings, logits=LOGITS, recent=()) -> np.ndarray:
    rng = np.random.default_rng(4)
    drawn = [sample(logits, settings, list(recent), rng) for _ in range(N_DRAWS)]
    return np.bincount(drawn, minlength=len(logits)) / N_DRAWS


def assert_distributed(found: np.ndarray, expected) -> None:
    """Pearson's chi-squared test at one in 100,000: the seed is fixed, so it fails for a reason or never."""
    expected = np.asarray(expected)
    assert not found[expected == 0].any()
    possible = expected > 0
    statistic = N_DRAWS * np.sum((found - expected)[possible] ** 2 / expected[possible])
    degrees = possible.sum() - 1
    limit = degrees + 2 * math.sqrt(degrees * math.log(1e5)) + 2 * math.log(1e5)  # Laurent & Massart's bound
    assert statistic < limit


def powered(probs, exponent):
    probs = np.asarray(probs) ** exponent
    return probs / probs.sum()


def test_without_any_stage_tokens_come_as_their_probabilities():
    assert_distributed(frequencies(Settings(temp=1, top_k=0, top_p=1)), [0.4, 0.05, 0.25, 0.2, 0.1])


@pytest.mark.parametrize("temp", [0.5, 2.0])
def test_temperature_raises_probabilities_to_its_inverse_power(temp):
    found = frequencies(Settings(temp=temp, top_k=0, top_p=1))
    assert_distributed(found, powered([0.4, 0.05, 0.25, 0.2, 0.1], 1 / temp))
    np.testing.assert_allclose(temperature(LOGITS, temp), LOGITS / temp, rtol=1e-6)


def test_top_k_draws_from_the_k_likeliest():
    found = frequencies(Settings(temp=1, top_k=2, top_p=1))
    assert_distributed(found, np.array([0.4, 0, 0.25, 0, 0]) / 0.65)


def test_top_k_gives_the_largest_first_and_of_equals_the_smaller_id():
    np.testing.assert_array_equal(top_k(np.array([1.0, 3.0, 2.0, 3.0, 3.0]), 2), [1, 3])
    np.testing.assert_array_equal(top_k(np.array([1.0, 3.0, 2.0]), 0), [1, 2, 0])
    np.testing.assert_array_equal(top_k(np.array([1.0, 3.0]), 9), [1, 0])


@pytest.mark.parametrize("k", [1, 40, 3000, 0])
def test_top_k_of_a_large_vocabulary_is_the_beginning_of_a_stable_sort(k):
    logits = np.random.default_rng(3).standard_normal(49_152).astype(np.float32)
    logits = np.round(logits, 2)  # many are equal, and some are -0
    logits[::7] = -np.inf
    expected = np.argsort(-logits, kind="stable")[: k or None]
    np.testing.assert_array_equal(top_k(logits, k), expected)


def test_top_p_draws_from_the_fewest_that_reach_p():
    found = frequencies(Settings(temp=1, top_k=0, top_p=0.7))
    assert_distributed(found, np.array([0.4, 0, 0.25, 0.2, 0]) / 0.85)


def test_top_p_keeps_at_least_one_and_at_one_all():
    assert top_p(np.array([0.9, 0.1]), 0.01) == 1
    assert top_p(np.array([0.5, 0.25, 0.25]), 0.75) == 2
    assert top_p(np.array([0.5, 0.25, 0.25]), 1.0) == 3


def test_top_p_never_counts_past_the_end_through_rounding():
    probs = np.full(3, np.float32(1 / 3) * np.float32(0.999999))
    assert top_p(probs, 0.9999999) <= 3


def test_the_repetition_penalty_makes_recent_tokens_rarer():
    logits = np.array([2.0, -1.0, 1.0, 0.5], np.float32)
    found = frequencies(Settings(temp=1, top_k=0, top_p=1, repeat_penalty=2), logits, recent=[0, 1, 1])
    expected = np.exp([1.0, -2.0, 1.0, 0.5])
    assert_distributed(found, expected / expected.sum())


def test_the_repetition_penalty_counts_a_token_once_and_leaves_its_input_alone():
    logits = np.array([2.0, -1.0, 1.0], np.float32)
    np.testing.assert_allclose(repetition_penalty(logits, [0, 0, 1], 2.0), [1.0, -2.0, 1.0])
    assert logits[0] == 2.0


def test_only_the_last_n_tokens_are_penalized():
    rng, logits = np.random.default_rng(0), np.array([1.0, 1.2], np.float32)
    settings = Settings(temp=0, repeat_penalty=2, repeat_last_n=1)
    assert sample(logits, settings, [1, 0], rng) == 1
    assert sample(logits, settings, [0, 1], rng) == 0


@pytest.mark.parametrize("temp", [0, 1e-46, 1e-40])
def test_greedy_takes_the_likeliest_and_draws_nothing(temp):
    rng = np.random.default_rng(5)
    assert sample(LOGITS, Settings(temp=temp), [], rng) == 0
    assert rng.random() == np.random.default_rng(5).random()


def test_one_seed_gives_one_text():
    drawn = [
        [sample(LOGITS, Settings(), [], rng) for _ in range(50)]
        for rng in map(np.random.default_rng, (6, 6, 7))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_draw_stays_inside_when_probabilities_do_not_sum_to_one():
    class Highest:
        def random(self):
            return np.nextafter(1.0, 0.0)

    assert draw(np.array([0.3, 0.3], np.float32), Highest()) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temp": math.nan},
        {"temp": -1},
        {"temp": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"repeat_penalty": 0},
        {"repeat_penalty": math.nan},
        {"repeat_last_n": -1},
        {"n_predict": -2},
        {"seed": 1.5},
        {"seed": None},
        {"top_k": 2.5},
        {"ctx_size": 0},
        {"ctx_size": 9.5},
        {"batch_size": 0},
        {"stop": [3]},
        {"stop": ""},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(TinyllamaError, match=next(iter(wrong))):
        Settings(**wrong)


def test_stages_tell_what_each_kept_and_removed():
    stages = []
    sample(
        LOGITS,
        Settings(temp=0.8, top_k=3, top_p=0.7, repeat_penalty=1.1),
        [2],
        np.random.default_rng(0),
        stages,
    )
    logits, penalty, temp, k, p = stages
    assert [stage.name for stage in stages] == ["logits", "repeat_penalty", "temp", "top_k", "top_p"]
    np.testing.assert_allclose(logits.probs, [0.4, 0.25, 0.2, 0.1, 0.05], rtol=1e-6)
    assert penalty.probs[list(penalty.kept).index(2)] < 0.25
    assert temp.probs[0] > penalty.probs[0]
    assert (k.n_kept, k.n_removed, list(k.removed)) == (3, 2, [4, 1])
    assert (p.n_kept, p.n_removed, list(p.removed)) == (2, 1, [3])
    for stage in stages:
        assert stage.probs.sum() == pytest.approx(1)


@pytest.mark.parametrize("k, p", [(0, 1.0), (40, 1.0), (0, 0.5), (40, 0.5)])
def test_stages_list_the_likeliest_with_probabilities_of_all_that_are_kept(k, p):
    logits, stages = np.random.default_rng(0).standard_normal(2000, dtype=np.float32) * 2, []
    sample(logits, Settings(temp=1, top_k=k, top_p=p), [], np.random.default_rng(0), stages)
    order = np.argsort(-logits)
    for stage in stages:
        probs = np.exp(logits[order[: stage.n_kept]].astype(np.float64))
        np.testing.assert_array_equal(stage.kept, order[: min(stage.n_kept, 50)])
        np.testing.assert_allclose(stage.probs, (probs / probs.sum())[:50], rtol=1e-5)
        np.testing.assert_array_equal(stage.removed, order[stage.n_kept :][: min(stage.n_removed, 50)])
