"""What the notebooks need to keep their promises: is it the same, and what is wrong with this answer?"""

from collections.abc import Callable, Mapping

import numpy as np

from ..commands.compare import FLOAT_LIMIT, HALF_LIMIT, INT8_LIMIT


def same(mine: np.ndarray, real: np.ndarray, llama, n_steps: int = 1) -> bool:
    """Whether a result built by hand is what the model computed, as exactly as its backend computes.

    On NumPy only the order of float32 sums may differ. The C backend keeps keys and values in half precision,
    and multiplies quantized weights by 8-bit integers; `compare` explains the three limits.

    Args:
        mine, real: arrays of one shape.
        llama: the loaded model that `real` is from.
        n_steps: how many operations by hand lie between them; errors add up.
    """
    mine, real = np.asarray(mine), np.asarray(real)
    return mine.shape == real.shape and _error(mine, real) <= n_steps * _limit(llama)


def _error(mine: np.ndarray, real: np.ndarray) -> float:
    """Mean squared difference, as a fraction of the mean square; infinities have to be the same."""
    mine, real = np.asarray(mine, np.float64), np.asarray(real, np.float64)
    finite = np.isfinite(real)
    if not np.array_equal(mine[~finite], real[~finite]):
        return np.inf
    square = np.mean(real[finite] ** 2)
    return float(np.mean((mine[finite] - real[finite]) ** 2) / (square or 1))


def _limit(llama) -> float:
    if llama.backend.name != "c":
        return FLOAT_LIMIT
    quantized = any(tensor.type.startswith("q") for tensor in llama.checkpoint.tensors.values())
    return INT8_LIMIT if quantized else HALF_LIMIT


def check(
    answer, expected, axes: str = "", mistakes: Mapping[str, object] | None = None, hint: str = ""
) -> None:
    """Say whether an exercise's answer is right, and if not, what is wrong with it.

    Args:
        answer: yours: a number or an array; `...` where there is none yet.
        expected: what tinyllama says.
        axes: the names of the expected array's axes, "n_heads, n_tokens, n_past".
        mistakes: what to say -> the answer that deserves it, for mistakes that are easily made.
        hint: what to say beside what is wrong, if it is none of these mistakes.
    """
    print(_verdict(answer, expected, axes, mistakes or {}, hint))


def _verdict(answer, expected, axes: str, mistakes: Mapping[str, object], hint: str) -> str:
    if answer is ... or answer is None:
        return "Not answered yet: write your answer where the ... stands, and run this cell again."
    try:
        answer = np.asarray(answer, np.float64)
    except (TypeError, ValueError):
        return f"Expected numbers, but this is {type(answer).__name__}: {answer!r:.60}"
    expected = np.asarray(expected)
    for find in (_same, _known_mistake(mistakes)):
        if verdict := find(answer, expected, axes):
            return verdict
    reasons = (_wrong_shape, _wrong_kind, _wrong_scale, _largest_difference)
    reason = next(found for find in reasons if (found := find(answer, expected, axes)))
    return f"{reason} {hint}".rstrip()


def _close(answer: np.ndarray, expected: np.ndarray) -> bool:
    """Whole numbers exactly, another one to a thousandth, arrays of them as 8-bit arithmetic leaves them."""
    if expected.dtype.kind in "iu":
        return np.array_equal(answer, expected)
    if not expected.ndim:
        return not answer.ndim and bool(np.isclose(answer, expected, rtol=1e-3))
    return answer.shape == expected.shape and _error(answer, expected) <= INT8_LIMIT


def _same(answer, expected, axes) -> str | None:
    shape = f", {_shape(expected, axes)}" if expected.ndim else ""
    return f"Right{shape}." if _close(answer, expected) else None


def _wrong_shape(answer, expected, axes) -> str | None:
    if answer.shape == expected.shape:
        return None
    hint = ""
    if sorted(answer.shape) == sorted(expected.shape):
        hint = " The axes are there, in another order."
    elif answer.size == expected.size:
        hint = " The numbers are as many: a reshape is missing, or one too much."
    return f"Wrong shape: yours is {list(answer.shape)}, expected is {_shape(expected, axes)}.{hint}"


def _wrong_kind(answer, expected, axes) -> str | None:
    wrong = np.isnan(answer) & ~np.isnan(expected)
    if not wrong.any():
        return None
    return f"{wrong.sum()} of {wrong.size} are not a number (NaN), the first at {_place(wrong, axes)}."


def _known_mistake(mistakes: Mapping[str, object]) -> Callable:
    def find(answer, expected, axes):
        known = (what for what, wrong in mistakes.items() if _close(answer, np.asarray(wrong)))
        return next(known, None)

    return find


def _wrong_scale(answer, expected, axes) -> str | None:
    sizes = np.abs(answer).sum(), np.abs(expected).sum()
    if not all(0 < size < np.inf for size in sizes):
        return None
    factor = sizes[0] / sizes[1]
    if not answer.ndim and not np.isclose(np.log2(factor), round(np.log2(factor)), atol=1e-3):
        return None  # any number is a multiple of any other: only powers of 2 tell something
    for sign in (1, -1):
        if abs(sign * factor - 1) > 0.02 and _close(sign * answer / factor, expected.astype(np.float64)):
            return (
                f"{'Everything is' if answer.ndim else 'This is'} {sign * factor:.4g} times what is expected."
            )
    return None


def _largest_difference(answer, expected, axes) -> str:
    if not answer.ndim:
        return f"Not yet: {answer:.6g} is too {'large' if answer > expected else 'small'}."
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(np.abs(answer - expected), nan=0, posinf=np.inf)
    least = (
        0 if expected.dtype.kind in "iu" else 1e-3 * np.abs(expected[np.isfinite(expected)]).max(initial=0)
    )
    wrong = difference > least
    worst = difference == difference.max()
    at = np.unravel_index(int(worst.argmax()), worst.shape)
    return (
        f"{wrong.sum()} of {wrong.size} numbers differ, most at {_place(worst, axes)}: "
        f"yours is {answer[at]:.6g}, expected is {expected[at]:.6g}."
    )


def _shape(array: np.ndarray, axes: str) -> str:
    if not array.ndim:
        return "one number"
    return f"[{axes}] = {list(array.shape)}" if axes else str(list(array.shape))


def _place(wrong: np.ndarray, axes: str) -> str:
    """Where the first true one stands, with the names of the axes."""
    at = np.unravel_index(int(wrong.argmax()), wrong.shape)
    names = axes.split(", ") if axes else [f"axis {number}" for number in range(len(at))]
    return ", ".join(f"{name} {index}" for name, index in zip(names, at, strict=True))
