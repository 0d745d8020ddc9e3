"""Ready-made edits, each a dict for `Llama.edit`; `|` joins them.

    with llama.edit(ablate("layers.3.attention.heads", heads=[2]) | steer(vector, layer=4)):
        print(llama.generate("Once upon a time"))

Layers, heads, dims and positions count from 0.
"""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from numbers import Integral, Real

import numpy as np

from ..errors import TinyllamaError, require
from .edits import Place, functions_of
from .names import synonyms


class Edit(dict[str, list[Callable]]):
    """By a name or pattern, the functions f(array, at) that change the value, one after the other."""

    def __or__(self, other: Mapping) -> "Edit":
        """Both; what they have in common is changed by this one first."""
        return Edit(
            {name: functions_of(self, name) + functions_of(other, name) for name in {**self, **other}}
        )

    __ior__ = __or__

    def __ror__(self, other: Mapping) -> "Edit":
        return Edit(other) | self


def ablate(at, heads=None, dims=None, positions=None, value: float | str = 0.0) -> Edit:
    """Switch a value off: all of it, or what is named. Weights and scores of attention stay masked.

    Args:
        at: a name or pattern, or several. "layers.3.attention.heads" with heads=[2] is what head 2 has found;
            "layers.3.attention.output" and "layers.3.feed_forward.output" are all that a layer adds.
        heads: numbers of heads, of a value that has them.
        dims: numbers along the last axis.
        positions: of tokens in their text.
        value: what takes its place: a number, or "mean": the mean of the tokens that are computed together.
    """
    value = value if isinstance(value, str) and value == "mean" else _number("value", value, ' or "mean"')
    part = _part(heads, dims, positions)

    def switched_off(array: np.ndarray, place: Place) -> np.ndarray:
        return np.where(_mask(array, place, *part), _mean(array, place) if value == "mean" else value, array)

    return _edit(at, switched_off)


def scale(at, times: float, heads=None, dims=None, positions=None) -> Edit:
    """Multiply a value, or a part of it; arguments as of `ablate`."""
    times, part = _number("times", times), _part(heads, dims, positions)

    def scaled(array: np.ndarray, place: Place) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.multiply(array, times, out=array.copy(), where=_mask(array, place, *part))

    return _edit(at, scaled)


def patch(taps: Mapping[str, np.ndarray], at: str = "*", positions=None) -> Edit:
    """Put values of another run in place of this one's: activation patching (arXiv:2202.05262, section 2).

    Args:
        taps: what `Llama.trace` gave for the other prompt.
        at: which of them: a name or pattern.
        positions: of which tokens; None: of all that both have. A dict: position here -> position there.
            Negative ones count from the other prompt's end.
    """
    require(isinstance(taps, Mapping), f"taps must be what trace gave, a dict, not {taps!r:.60}")
    chosen = [name for name in taps if any(fnmatchcase(one, at) for one in synonyms(name))]
    has = ", ".join([*taps][:5])
    require(chosen, f"none of the values that were traced is named {at!r}: there are {has}")
    pairs = positions
    if positions is not None:
        is_dict = isinstance(positions, Mapping)
        keys = _numbers(positions, least=None)
        pairs = dict(zip(keys, _numbers(positions.values(), least=None) if is_dict else keys, strict=True))

    def from_other(values: np.ndarray, array: np.ndarray, place: Place) -> np.ndarray:
        n_there = values.shape[int(place.is_inner)]
        rows = {int(here): row for row, here in enumerate(place.positions)}
        wanted = {here: here for here in rows if here < n_there} if pairs is None else pairs
        for here, there in wanted.items():
            here, there = (n + n_there if n < 0 else n for n in (here, there))
            require(0 <= there < n_there, f"edit of {place.name}: the other prompt has no token {there}")
            if here in rows:
                _put_row(array, values, rows[here], here, there, place)
        return array

    return Edit({name: [partial(from_other, taps[name])] for name in chosen})


def _put_row(array: np.ndarray, values: np.ndarray, row: int, here: int, there: int, place: Place) -> None:
    if not place.is_inner:
        fits = values.shape[1:] == array.shape[1:]
        require(fits, f"edit of {place.name}: {values.shape[1:]} of a token can't replace {array.shape[1:]}")
        array[row] = values[there]
        return
    fits = len(values) == len(array) and here == there
    require(fits, f"edit of {place.name}: what token {there} looks at can't be what token {here} looks at")
    array[:, row, : here + 1] = values[:, there, : here + 1]


def steer(vector: np.ndarray, layer: int, strength: float = 1.0, positions=None) -> Edit:
    """Add a direction to the residual stream after a layer (arXiv:2308.10248).

    Args:
        vector: [dim]; the difference of two residuals of `trace`, say.
        layer: its number.
        positions: of which tokens; None: of all.
    """
    try:
        direction = np.asarray(vector, np.float32)
    except (TypeError, ValueError):
        raise TinyllamaError(f"a vector is an array of numbers, [dim], not {vector!r:.60}") from None
    strength, part, layers = _number("strength", strength), _part(None, None, positions), _numbers(layer)
    require(len(layers) == 1, f"layer is one number, not {layer!r:.60}")

    def steered(array: np.ndarray, place: Place) -> np.ndarray:
        wrong = f"a vector of {direction.shape} can't be added to [dim] = {array.shape[1:]}"
        require(direction.shape == array.shape[1:], f"edit of {place.name}: {wrong}")
        with np.errstate(over="ignore"):
            return np.where(_mask(array, place, *part), array + strength * direction, array)

    return Edit({f"layers.{layers[0]}.residual": [steered]})


# --- their arguments ------------------------------------------------------------------------------


def _edit(at, function: Callable) -> Edit:
    return Edit({name: [function] for name in ([at] if isinstance(at, str) else at)})


def _number(name: str, value, more: str = "") -> np.float32:
    """One that float32 holds."""
    with np.errstate(over="ignore"):
        fine = isinstance(value, Real) and np.isfinite(np.float32(value))
    require(fine, f"{name} must be a number{more}, not {value!r:.60}")
    return np.float32(value)


def _part(heads, dims, positions) -> tuple:
    return tuple(some if some is None else _numbers(some) for some in (heads, dims, positions))


def _numbers(some, least: int | None = 0) -> list[int]:
    """One whole number or several, as a list."""
    found = [*some] if isinstance(some, Iterable) and not isinstance(some, str) else [some]
    whole = all(isinstance(one, Integral) for one in found)  # NumPy's bool isn't, and Python's is
    whole = whole and not any(isinstance(one, bool) for one in found)
    what = "whole numbers" if least is None else "whole numbers from 0 on"
    fine = whole and all(least is None or one >= least for one in found)
    require(fine, f"heads, dims, positions and layers are {what}, not {some!r:.60}")
    return [int(one) for one in found]


def _mask(array: np.ndarray, place: Place, heads, dims, positions) -> np.ndarray:
    """True where a value belongs to these heads, dims and positions (None: to all) and a token sees it."""
    mask = np.ones(array.shape, bool)
    if place.is_inner:
        mask &= place.seen(array.shape[-1])
    if heads is not None:
        require(place.heads_axis, f"edit of {place.name}: it has no heads")
        axis, n_heads = place.heads_axis
        _require_in(place, "head", heads, n_heads)
        each = array.shape[axis] // n_heads  # numbers of a head; 1 where heads are an axis of their own
        mask &= _along(np.repeat(np.isin(np.arange(n_heads), heads), each), axis, array)
    if dims is not None:
        _require_in(place, "dim", dims, array.shape[-1])
        mask &= np.isin(np.arange(array.shape[-1]), dims)
    if positions is not None:
        mask &= _along(np.isin(place.positions, positions), int(place.is_inner), array)
    return mask


def _mean(array: np.ndarray, place: Place) -> np.ndarray:
    """Over the tokens; of weights and scores, over those that see the other one."""
    axis, counted = int(place.is_inner), _mask(array, place, None, None, None)
    total = np.where(counted, array, 0).sum(axis=axis, keepdims=True)
    return total / np.maximum(counted.sum(axis=axis, keepdims=True), 1).astype(np.float32)


def _along(which: np.ndarray, axis: int, array: np.ndarray) -> np.ndarray:
    """[n] so that it spreads over all other axes of an array."""
    return which.reshape([-1 if n == axis else 1 for n in range(array.ndim)])


def _require_in(place: Place, what: str, numbers: list[int], n: int) -> None:
    wrong = [one for one in numbers if not 0 <= one < n]
    require(not wrong, f"edit of {place.name}: {what} {wrong[:1]} is not in 0..{n - 1}")
