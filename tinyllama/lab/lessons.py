"""What the notebooks need to keep their promises: is it the same, and what is wrong with this answer?"""

import numpy as np

from ..backends import INT8_LIMIT, OPERATIONS


def same(mine: np.ndarray, real: np.ndarray, llama, n_steps: int = 1) -> bool:
    """Whether a result built by hand is what the model computed, as exactly as its backend computes.

    On NumPy only the order of float32 sums may differ. The C backend keeps keys and values in half precision,
    and multiplies quantized weights by 8-bit integers: `Backend.tolerance` has the limits.

    Args:
        mine, real: arrays of one shape.
        llama: the loaded model that `real` is from.
        n_steps: how many operations by hand lie between them; errors add up.
    """
    types = {tensor.type for tensor in llama.checkpoint.tensors.values()}
    limit = max(llama.backend.tolerance(operation, types) for operation in OPERATIONS)
    return np.shape(mine) == np.shape(real) and _error(mine, real) <= n_steps * limit


def _error(mine: np.ndarray, real: np.ndarray) -> float:
    """Mean squared difference, as a fraction of the mean square; infinities have to be the same."""
    mine, real = np.asarray(mine, np.float64), np.asarray(real, np.float64)
    finite = np.isfinite(real)
    if not np.array_equal(mine[~finite], real[~finite]):
        return np.inf
    square = np.mean(real[finite] ** 2)
    return float(np.mean((mine[finite] - real[finite]) ** 2) / (square or 1))


def check(answer, expected, axes: str = "", mistakes: dict | None = None, hint: str = "") -> None:
    """Say whether an exercise's answer is right, and if not, what is wrong with it.

    Args:
        answer: yours: a number or an array; `...` where there is none yet.
        expected: what tinyllama says.
        axes: the names of the expected array's axes, "n_heads, n_tokens, n_past".
        mistakes: what to say -> the answer that deserves it, for mistakes that are easily made.
        hint: what to say beside what is wrong, if it is none of these mistakes.
    """
    print(_verdict(answer, expected, axes, mistakes or {}, hint))


def _verdict(answer, expected, axes: str, mistakes: dict, hint: str) -> str:
    if answer is ... or answer is None:
        return "Not answered yet: write your answer where the ... stands, and run this cell again."
    try:
        answer = np.asarray(answer, np.float64)
    except (TypeError, ValueError):
        return f"Expected numbers, but this is {type(answer).__name__}: {answer!r:.60}"
    expected = np.asarray(expected)
    if _close(answer, expected):
        return f"Right, {_shape(expected, axes)}." if expected.ndim else "Right."
    for mistake, wrong in mistakes.items():
        if _close(answer, np.asarray(wrong)):
            return mistake
    for find in (_wrong_shape, _nan, _wrong_scale, _largest_difference):
        if reason := find(answer, expected, axes):
            return f"{reason} {hint}".rstrip()


def _close(answer: np.ndarray, expected: np.ndarray) -> bool:
    """Whole numbers exactly, another one to a thousandth, arrays of them as 8-bit arithmetic leaves them."""
    if expected.dtype.kind in "iu":
        return np.array_equal(answer, expected)
    if not expected.ndim:
        return not answer.ndim and bool(np.isclose(answer, expected, rtol=1e-3))
    return answer.shape == expected.shape and _error(answer, expected) <= INT8_LIMIT


def _wrong_shape(answer, expected, axes) -> str:
    if answer.shape == expected.shape:
        return ""
    hint = ""
    if sorted(answer.shape) == sorted(expected.shape):
        hint = " The axes are there, in another order."
    elif answer.size == expected.size:
        hint = " The numbers are as many: a reshape is missing, or one too much."
    return f"Wrong shape: yours is {list(answer.shape)}, expected is {_shape(expected, axes)}.{hint}"


def _nan(answer, expected, axes) -> str:
    wrong = np.isnan(answer) & ~np.isnan(expected)
    said = f"{wrong.sum()} of {wrong.size} are not a number (NaN), the first at {_place(wrong, axes)}."
    return said if wrong.any() else ""


def _wrong_scale(answer, expected, axes) -> str:
    sizes = np.abs(answer).sum(), np.abs(expected).sum()
    if not all(0 < size < np.inf for size in sizes):
        return ""
    factor = sizes[0] / sizes[1]
    if not answer.ndim and not np.isclose(np.log2(factor), round(np.log2(factor)), atol=1e-3):
        return ""  # any number is a multiple of any other: only powers of 2 tell something
    for sign in (1, -1):
        if abs(sign * factor - 1) > 0.02 and _close(sign * answer / factor, expected.astype(np.float64)):
            what = "Everything" if answer.ndim else "This"
            return f"{what} is {sign * factor:.4g} times what is expected."
    return ""


def _largest_difference(answer, expected, axes) -> str:
    if not answer.ndim:
        return f"Not yet: {answer:.6g} is too {'large' if answer > expected else 'small'}."
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(np.abs(answer - expected), nan=0, posinf=np.inf)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    wrong = difference > (0 if expected.dtype.kind in "iu" else 1e-3 * largest)
    worst = difference == difference.max()
    yours, right = answer.flat[worst.argmax()], expected.flat[worst.argmax()]
    where = f"{wrong.sum()} of {wrong.size} numbers differ, most at {_place(worst, axes)}"
    return f"{where}: yours is {yours:.6g}, expected is {right:.6g}."


def _shape(array: np.ndarray, axes: str) -> str:
    if not array.ndim:
        return "one number"
    return f"[{axes}] = {list(array.shape)}" if axes else str(list(array.shape))


def _place(wrong: np.ndarray, axes: str) -> str:
    """Where the first true one stands, with the names of the axes."""
    at = np.unravel_index(int(wrong.argmax()), wrong.shape)
    names = axes.split(", ") if axes else [f"axis {number}" for number in range(len(at))]
    return ", ".join(f"{name} {index}" for name, index in zip(names, at, strict=True))
