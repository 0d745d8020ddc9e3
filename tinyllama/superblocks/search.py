"""The searches: which scale (and minimum) makes the weights of a part err least.

A part is 16 or 32 weights x that become small integers q and come back as scale * q, or scale * q + minimum.
The scale that just fits the largest weight is seldom the best: with a slightly smaller one that weight is
clipped a little, while the many small ones fall closer to a step. So a search tries several scales, and
judges each by the sum of squared errors, in which some weights count more than others: mostly the larger
ones.

Which scale suits given q best needs no search: it is where the derivative of that sum is 0 (weighted least
squares). Write <a> for the sum of a over the part, each times what its weight counts. Without a minimum

    scale = <qx> / <qq>                 what is left of the error is <xx> - <qx>² / <qq>

and with one, D being <1><qq> - <q>²,

    scale = (<1><qx> - <q><x>) / D      minimum = (<qq><x> - <q><qx>) / D

These are ggml's searches (the `make_*_quants` of ggml-quants.c), to the byte: everything is float32, and sums
take one product after another. What they equal is that C without FMA, every product rounded before it is
added, as llama.cpp builds this file for any x86-64 processor, even where it builds its kernels for one. With
FMA, which compilers for ARM may use unasked, up to 16 of 1000 blocks come out otherwise (measured), and no
worse.

Arrays are [n, n_parts], a part to a column: adding a row to another adds one weight to the sums of all parts.
"""

from collections.abc import Callable, Iterable

import numpy as np

TINY = np.float32(1e-15)  # a part whose largest magnitude is below this is all zeros


def nearest(v: np.ndarray) -> np.ndarray:
    """The nearest integers of float32 numbers, ties to even: int32.

    At 1.5 * 2^23 a float32 has no bits left for a fraction: adding it rounds, and leaves the integer in the
    lowest 23 bits. Beyond 2^22 that is another integer, for infinity it is -2^22 and for NaN 0: so it is in
    ggml.
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


def affine(x, weights, top: int, first: float, n_trials: int, absolute: bool, step: float = 0.1):
    """scale * q + minimum with q from 0 to top: the scale, the minimum (both [n_parts]) and q [n, n_parts].

    The minimum is clamped to at most 0: a block stores it as an unsigned integer that is *subtracted*. So a
    part of positive weights counts its steps from 0, or from below it.

    Trial i rounds x - minimum to steps of (maximum - minimum) / (top + first + step i): for q4_k, whose first
    is -1, 21 trials go from 14 steps in the range to 16, of which the last is clipped. The q of a trial get
    their best scale and minimum; if these err less than all before they are kept, and the next trial starts
    from that minimum. `absolute` judges by the sum of absolute errors, not of squared ones.
    """
    low, high = np.take_along_axis(x, x.argmin(0)[None], 0)[0], x.max(0)  # of +0 and -0 the first
    low[low > 0] = 0
    size = np.abs if absolute else np.square

    def error(q, scale, low):
        difference = scale * q
        difference += low
        difference -= x
        return total(weights * size(difference, out=difference))

    sum_1, sum_x = total(weights), total(weights * x)
    per_step = np.float32(top) / (high - low)
    scale = np.float32(1) / per_step + np.float32(0)  # never -0, which zeros of both signs give
    best_q = steps(per_step * (x - low), 0, top)
    best = error(best_q, scale, low)
    for i in range(n_trials):
        per_step = (np.float32(first) + np.float32(step) * np.float32(i) + np.float32(top)) / (high - low)
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
    return scale, low, best_q


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
        if best is None:
            scale, best, best_q = fitted, fitted * sum_qx, q
        better = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        for kept, new in ((scale, fitted), (best, fitted * sum_qx), (best_q, q)):
            np.copyto(kept, new, where=better)
    return scale, best_q


def signed(x, weights, zero: int):
    """scale * q with q from -zero to zero - 1: the scale and q.

    The weight of largest magnitude becomes -zero, or what rounds to it or is clipped to it.
    """
    peak = largest(x)
    tenths = np.array([0, *range(-9, 0), *range(1, 10)], np.float32)
    scale, q = symmetric(
        x,
        (-(np.float32(zero) + np.float32(0.1) * i) / peak for i in tenths),
        lambda v: steps(v, -zero, zero - 1),
        lambda q: (total(weights * x * q), total(weights * q * q)),
    )
    nothing = np.abs(peak) < TINY
    return np.where(nothing, np.float32(0), scale), np.where(nothing, np.float32(-zero), q)


def descent(x, weights, q, sums, round_to: Callable, is_byte: bool = False):
    """Five times each q in turn becomes what is best while the others stay, if the error gets smaller by it.

    sums: <qx> and <qq> of the q to begin with; x / scale -> q as round_to says. Returns the scale and q.
    is_byte: q is kept in an unsigned byte, and what others leave of <qq> must be positive.
    """
    sum_qx, sum_qq = sums
    for _ in range(5):
        for x_i, w, q_i in zip(x, weights, q, strict=True):
            others_qx, others_qq = sum_qx - w * x_i * q_i, sum_qq - w * q_i * q_i
            new = round_to(x_i * others_qq / others_qx)
            new_qx, new_qq = others_qx + w * x_i * new, others_qq + w * new * new
            better = (others_qx > 0) & (new != q_i) & ((others_qq if is_byte else new_qq) > 0)
            better &= new_qx * new_qx * sum_qq > sum_qx * sum_qx * new_qq
            for kept, changed in ((q_i, new % 256 if is_byte else new), (sum_qx, new_qx), (sum_qq, new_qq)):
                np.copyto(kept, changed, where=better)
    return np.where(sum_qq > 0, sum_qx / sum_qq, np.float32(0)), q


def clipped(x, low: int, high: int):
    """scale * q with q from low to high; weights x². At first the x of largest magnitude becomes low."""
    weights = x * x
    q = steps(np.float32(low) / largest(x) * x, low, high)
    sums = total(weights * x * q), total(weights * q * q)
    return descent(x, weights, q, sums, lambda v: steps(v, low, high))


def fitting(x, weights, top: int):
    """As `unsigned`, but the largest x becomes top, whatever its errors count."""
    peak = np.fmax.reduce(x, axis=0, initial=0) + np.float32(0)  # never -0
    return peak / np.float32(top), nearest(np.where(peak > 0, np.float32(top) / peak, 0) * x) & 255


def unsigned(x, weights, top: int):
    """scale * q with q from 0 to top: the scale and q. Of x below 0, which only rounding makes, -1 is 255.

    Nine trials are judged by their errors, the largest x becoming top, or up to 0.4 more or less; then the
    descent begins from the best.
    """
    peak = np.fmax.reduce(x, axis=0, initial=0)
    best_per_step = np.float32(top) / peak

    def error(q, per_step):
        difference = x - np.float32(1) / per_step * q
        return total(weights * difference * difference)

    best = error((nearest(best_per_step * x) & 255).astype(np.float32), best_per_step)
    for i in (-4, -3, -2, -1, 1, 2, 3, 4):
        per_step = (np.float32(0.1) * np.float32(i) + np.float32(top)) / peak
        found = error(up_to(per_step * x, top), per_step)
        better = found < best
        best, best_per_step = np.where(better, found, best), np.where(better, per_step, best_per_step)
    q = up_to(best_per_step * x, top)
    sums = total(weights * x * q), total(weights * q * q)
    scale, q = descent(x, weights, q % 256, sums, lambda v: up_to(v, top), is_byte=True)
    nothing = peak < TINY
    return np.where(nothing, np.float32(0), scale), np.where(nothing, np.float32(0), q)


def up_to(v: np.ndarray, top: int) -> np.ndarray:
    """The nearest integers up to a largest, as float32."""
    return np.minimum(nearest(v), top).astype(np.float32)
