import numpy as np
import pytest

import tinyllama
from tinyllama.lab.lessons import check, same

TRUTH = np.random.default_rng(0).standard_normal((2, 3, 4))
AXES = "n_heads, n_tokens, n_past"


@pytest.fixture
def verdict(capsys):
    def say(answer, expected=TRUTH, axes=AXES, **options):
        check(answer, expected, axes, **options)
        return capsys.readouterr().out.strip()

    return say


def test_the_right_answer_is_right_up_to_rounding(verdict):
    assert verdict(TRUTH + 1e-6) == "Right, [n_heads, n_tokens, n_past] = [2, 3, 4]."
    assert verdict(1.00001, 1.0, axes="") == "Right."


@pytest.mark.parametrize("nothing", [..., None])
def test_no_answer_yet_is_no_wrong_answer(verdict, nothing):
    assert verdict(nothing).startswith("Not answered yet")


def test_what_is_no_number_is_named(verdict):
    assert "str: 'many'" in verdict("many")


def test_axes_in_another_order_are_named(verdict):
    assert verdict(TRUTH.swapaxes(0, 2)) == (
        "Wrong shape: yours is [4, 3, 2], expected is [n_heads, n_tokens, n_past] = [2, 3, 4]. "
        "The axes are there, in another order."
    )


def test_a_missing_reshape_is_named(verdict):
    assert "a reshape is missing" in verdict(TRUTH.reshape(6, 4))


def test_nan_is_named_with_its_place(verdict):
    answer = TRUTH.copy()
    answer[1, 2, 3] = np.nan
    assert verdict(answer) == "1 of 24 are not a number (NaN), the first at n_heads 1, n_tokens 2, n_past 3."


def test_a_known_mistake_gets_its_own_words(verdict):
    assert verdict(TRUTH + 1, mistakes={"One too much.": TRUTH + 1}) == "One too much."


def test_a_factor_is_found(verdict):
    assert verdict(TRUTH * np.sqrt(32)) == "Everything is 5.657 times what is expected."
    assert verdict(-2.0, 1.0, axes="") == "This is -2 times what is expected."


def test_of_two_numbers_only_a_power_of_two_is_worth_a_word(verdict):
    assert verdict(0.5, 1.0, axes="") == "This is 0.5 times what is expected."
    assert verdict(7.0, 1.0, axes="", hint="Look there.") == "Not yet: 7 is too large. Look there."


def test_a_hint_goes_with_a_wrong_shape(verdict):
    assert verdict(TRUTH[0], hint="There are two heads.").endswith("There are two heads.")


def test_several_numbers_in_the_place_of_one_are_named(verdict):
    assert verdict([1, 2], 1, axes="") == "Wrong shape: yours is [2], expected is one number."


def test_a_known_mistake_may_have_another_shape(verdict):
    assert verdict(TRUTH[0], mistakes={"That is one head.": TRUTH[0]}) == "That is one head."


def test_a_known_mistake_in_half_precision_is_compared_without_overflow(verdict):
    answer, far_off = TRUTH + 1, (TRUTH * 1e4).astype(np.float16)
    assert "numbers differ" in verdict(answer, mistakes={"Far off.": far_off})


def test_the_worst_number_is_named_with_its_place_and_the_hint(verdict):
    answer = TRUTH.copy()
    answer[0, 1, 2] = 9
    assert verdict(answer, hint="Look there.") == (
        f"1 of 24 numbers differ, most at n_heads 0, n_tokens 1, n_past 2: yours is 9, "
        f"expected is {TRUTH[0, 1, 2]:.6g}. Look there."
    )


def test_infinities_have_to_stand_where_they_are_expected(verdict):
    masked = np.where(TRUTH > 1, -np.inf, TRUTH)
    assert verdict(masked, masked).startswith("Right")
    assert "numbers differ" in verdict(TRUTH, masked)


def test_whole_numbers_have_to_be_exact(verdict):
    assert verdict([1000, 1001], [1000, 1001], axes="n_tokens").startswith("Right")
    assert verdict([1000, 1002], [1000, 1001], axes="n_tokens").startswith("1 of 2 numbers differ")
    assert verdict(1e6, 10**6, axes="") == "Right."


def test_same_allows_rounding_and_nothing_else_on_numpy():
    llama = tinyllama.load("small", backend="numpy")
    assert same(TRUTH.astype(np.float32), TRUTH, llama)
    assert not same(TRUTH * 1.001, TRUTH, llama)
    assert not same(TRUTH[0], TRUTH, llama)
    assert not same(TRUTH, np.where(TRUTH > 1, -np.inf, TRUTH), llama)
