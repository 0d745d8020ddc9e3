"""Ready-made edits, each a dict for `Llama.edit`; `|` joins them.

    with llama.edit(ablate("layers.3.attention.heads", heads=[2]) | steer(vector, layer=4)):
        print(llama.generate("Once upon a time"))

Layers, heads, dims and positions count from 0.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

import numpy as np

from ..errors import TinyllamaError, require
from .edits import Place, functions_of


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


def ablate(at: str, heads=None, dims=None, positions=None, value: float | str = 0.0) -> Edit:
    """Switch a value off: all of it, or what is named.

    Args:
        at: a name or pattern. "layers.3.attention.heads" with heads=[2] is what head 2 has found;
            "layers.3.attention.output" and "layers.3.feed_forward.output" are all that a layer adds.
        heads: numbers of heads, of a value that has them.
        dims: numbers along the last axis.
        positions: of tokens in their text; negative ones aren't known while a text is written.
        value: what takes its place: a number, or "mean": the mean of the tokens that are computed together.
    """
    fine = value == "mean" or (isinstance(value, int | float) and np.isfinite(value))
    require(fine, f'value must be a number or "mean", not {value!r:.60}')
    heads, dims, positions = (_numbers(some) for some in (heads, dims, positions))

    def switched_off(array: np.ndarray, place: Place) -> np.ndarray:
        wanted = _mask(array, place, heads, dims, positions)
        tokens = int(place.is_inner)
        new = array.mean(axis=tokens, keepdims=True) if value == "mean" else np.float32(value)
        return np.where(wanted & np.isfinite(array), new, array)

    return Edit({at: [switched_off]})


def scale(at: str, times: float, heads=None, dims=None, positions=None) -> Edit:
    """Multiply a value, or a part of it; arguments as of `ablate`."""
    require(np.isfinite(times), f"times must be a number, not {times!r:.60}")
    heads, dims, positions = (_numbers(some) for some in (heads, dims, positions))

    def scaled(array: np.ndarray, place: Place) -> np.ndarray:
        return np.where(_mask(array, place, heads, dims, positions), np.float32(times) * array, array)

    return Edit({at: [scaled]})


def patch(
    taps: Mapping[str, np.ndarray], at: str = "*", positions: Sequence[int] | dict | None = None
) -> Edit:
    """Put values of another run in place of this one's: activation patching (arXiv:2202.05262, section 2).

    Args:
        taps: what `Llama.trace` gave for the other prompt.
        at: which of them: a name or pattern, as `trace` was asked for.
        positions: of which tokens; None: of all that both have. A dict: position here -> position there.
            Negative ones count from the other prompt's end.
    """
    chosen = {name: values for name, values in taps.items() if fnmatchcase(name, at)}
    has = ", ".join([*taps][:5])
    require(chosen, f"none of the values that were traced is named {at!r}: there are {has}")
    if not (positions is None or isinstance(positions, Mapping)):
        positions = {n: n for n in _numbers(positions)}

    def from_other(values: np.ndarray, array: np.ndarray, place: Place) -> np.ndarray:
        n_there = values.shape[int(place.is_inner)]
        rows = {int(here): row for row, here in enumerate(place.positions)}
        wanted = positions or {here: here for here in rows if here < n_there}
        for here, there in wanted.items():
            here, there = (n + n_there if n < 0 else n for n in (here, there))
            require(0 <= there < n_there, f"edit of {place.name}: the other prompt has no token {there}")
            if here in rows:
                _put_row(array, values, rows[here], here, there, place)
        return array

    return Edit({name: [partial(from_other, values)] for name, values in chosen.items()})


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
    direction, positions = np.asarray(vector, np.float32), _numbers(positions)
    require(np.isfinite(strength), f"strength must be a number, not {strength!r:.60}")

    def steered(array: np.ndarray, place: Place) -> np.ndarray:
        wrong = f"a vector of {direction.shape} can't be added to [dim] = {array.shape[1:]}"
        require(direction.shape == array.shape[1:], f"edit of {place.name}: {wrong}")
        there = _mask(array, place, None, None, positions)
        return np.where(there, array + np.float32(strength) * direction, array)

    return Edit({f"layers.{operator.index(layer)}.residual": [steered]})


def _numbers(some) -> list[int] | None:
    """One whole number or several, as a list."""
    if some is None:
        return None
    try:
        return [operator.index(one) for one in np.atleast_1d(np.asarray(some)).tolist()]
    except TypeError:
        raise TinyllamaError(f"heads, dims and positions are whole numbers, not {some!r:.60}") from None


def _mask(array: np.ndarray, place: Place, heads, dims, positions) -> np.ndarray:
    """True where a value belongs to these heads, dims and positions (None: to all)."""
    mask = np.ones(array.shape, bool)
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


def _along(which: np.ndarray, axis: int, array: np.ndarray) -> np.ndarray:
    """[n] so that it spreads over all other axes of an array."""
    return which.reshape([-1 if n == axis else 1 for n in range(array.ndim)])


def _require_in(place: Place, what: str, numbers: list[int], n: int) -> None:
    wrong = [one for one in numbers if not 0 <= one < n]
    require(not wrong, f"edit of {place.name}: {what} {wrong[:1]} is not in 0..{n - 1}")
