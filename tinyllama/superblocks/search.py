"""The searches: which scale (and minimum) makes a few weights err least.

A part is 16 or 32 weights x that become small integers q and come back as scale * q (+ minimum). Dividing by what
just fits the largest weight is where each search starts, and it isn't the best: with a slightly other scale one
weight may be clipped, while all the others fall closer to a step. So a search tries several, and judges each by
the squared error, in which some weights count more than others (`weights`, mostly the larger the weight itself).

For given q the best scale needs no search: it is where the derivative of that error is 0. Write <a> for a sum
over the part, of a times the weights. Then (weighted least squares)

    scale = <qx> / <qq>                        without a minimum; the error left is <xx> - <qx>² / <qq>

    scale   = (<1><qx> - <q><x>) / D           with one,  D = <1><qq> - <q>²
    minimum = (<qq><x> - <q><qx>) / D

Everything is float32, and a sum adds one product after another: that is what makes the bytes ggml's. They are
those of its C code where a product and a sum are two roundings (as any compiler for x86-64 makes them unless told
to use FMA; the libggml-base of llama.cpp's and of llama-cpp-python's builds has no FMA, whatever the processor).

Arrays are [n, n_parts]: the weights of a part stand below each other, so that a row of NumPy's adds to the sums
of all parts at once.
"""

from collections.abc import Callable, Iterable

import numpy as np

TINY = np.float32(1e-15)  # a part whose largest magnitude is below this is all zeros


def nearest(v: np.ndarray) -> np.ndarray:
    """The nearest integers of float32 numbers, ties to even: int32.

    At 1.5 * 2^23 a float32 has no bits left for a fraction, so adding it rounds, and leaves the integer in the
    lowest 23 bits. Beyond 2^22 this gives something else, NaN gives 0 and infinity -2^22, as in ggml.
    """
    bits = (v + np.float32(3 << 22)).view(np.int32)
    bits &= (1 << 23) - 1
    bits -= 1 << 22
    return bits


def steps(v: np.ndarray, low: int, high: int) -> np.ndarray:
    """The nearest integers between two, as float32."""
    q = nearest(v)
    return np.clip(q, low, high, out=q).astype(np.float32)


def total(products: np.ndarray) -> np.ndarray:
    """[n, n_parts] -> [n_parts], added from top to bottom."""
    result = products[0] + np.float32(0)
    for row in products[1:]:
        result += row
    return result


def largest(x: np.ndarray) -> np.ndarray:
    """The element of largest magnitude of each column with its sign, of equals the first; NaN counts as 0."""
    magnitude = np.fmax(np.abs(x), np.float32(0))
    first = np.take_along_axis(x, magnitude.argmax(0)[None], 0)[0]
    return np.where(first == first, first, np.float32(0))


def affine(x, weights, top: int, first: float, n_trials: int, absolute: bool):
    """scale * q + minimum with q from 0 to top: the scale, the minimum (both [n_parts]) and q [n, n_parts].

    The minimum is never above 0: it is stored as a positive multiple of what is *subtracted*, and so that 0 stays
    a value that a block can hold. Trials measure x, from the minimum on, in steps of
    (maximum - minimum) / (top + first + 0.1 i), i < n_trials; the q that they give have a best scale and minimum,
    and where their error is smaller than any before these are kept, the next trial beginning at the new minimum.
    `absolute` judges by the absolute error instead of the squared one.
    """
    low, high = np.minimum(x.min(0), np.float32(0)), x.max(0)
    flat, start = low == high, low

    def error(q, scale, low):
        difference = scale * q
        difference += low
        difference -= x
        np.abs(difference, out=difference) if absolute else np.square(difference, out=difference)
        difference *= weights
        return total(difference)

    sum_1, sum_x = total(weights), total(weights * x)
    per_step = np.float32(top) / (high - low)
    scale = np.float32(1) / per_step
    best_q = steps(per_step * (x - low), 0, top)
    best = error(best_q, scale, low)
    for i in range(n_trials):
        per_step = (np.float32(first) + np.float32(0.1) * np.float32(i) + np.float32(top)) / (high - low)
        q = steps(per_step * (x - low), 0, top)
        weighted = weights * q
        sum_q, sum_qq, sum_qx = total(weighted), total(weighted * q), total(weighted * x)
        determinant = sum_1 * sum_qq - sum_q * sum_q
        fitted = (sum_1 * sum_qx - sum_x * sum_q) / determinant
        minimum = (sum_qq * sum_x - sum_q * sum_qx) / determinant
        above = minimum > 0
        fitted[above], minimum[above] = (sum_qx / sum_qq)[above], 0
        found = error(q, fitted, minimum)
        better = (determinant > 0) & (found < best)
        for kept, new in ((best, found), (scale, fitted), (low, minimum), (best_q, q)):
            np.copyto(kept, new, where=better)
    return np.where(flat, 0, scale), np.where(flat, start, low), np.where(flat, 0, best_q)


def symmetric(x, per_step: Iterable[np.ndarray], round_to: Callable, sums: Callable):
    """scale * q: the scale [n_parts] and q [n, n_parts].

    per_step: of each trial, 1 / scale [n_parts]. round_to: x / scale -> q. sums: q -> <qx> and <qq>.
    The larger <qx>² / <qq>, the smaller the error.
    """
    scale = best = best_q = None
    for inverse in per_step:
        q = round_to(inverse * x)
        sum_qx, sum_qq = sums(q)
        fitted = np.where(sum_qq > 0, sum_qx / sum_qq, np.float32(0))
        if scale is None:
            scale, best, best_q = fitted, fitted * sum_qx, q
            continue
        better = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        for kept, new in ((scale, fitted), (best, fitted * sum_qx), (best_q, q)):
            np.copyto(kept, new, where=better)
    return scale, best_q


def descent(x, low: int, high: int):
    """scale * q as above, with weights x²; the scale and q.

    Five times each q in turn becomes what is best while the others stay, if the error gets smaller by it.
    """
    weights = x * x
    q = steps(np.float32(low) / largest(x) * x, low, high)
    sum_qx, sum_qq = total(weights * x * q), total(weights * q * q)
    for _ in range(5):
        for x_i, w, q_i in zip(x, weights, q, strict=True):
            others_qx, others_qq = sum_qx - w * x_i * q_i, sum_qq - w * q_i * q_i
            new = steps(x_i * others_qq / others_qx, low, high)
            new_qx, new_qq = others_qx + w * x_i * new, others_qq + w * new * new
            better = (others_qx > 0) & (new != q_i) & (new_qq > 0)
            better &= new_qx * new_qx * sum_qq > sum_qx * sum_qx * new_qq
            for kept, changed in ((q_i, new), (sum_qx, new_qx), (sum_qq, new_qq)):
                np.copyto(kept, changed, where=better)
    return np.where(sum_qq > 0, sum_qx / sum_qq, np.float32(0)), q
