"""Values inside a model that are replaced while it runs.

    with llama.edit({"layers.5.residual": lambda x: 2 * x}):
        print(llama.generate("Once upon a time"))

An edit is a dict: a name, or a pattern, and the function that changes what is called so. interventions.py
makes such dicts. An edit holds in the thread (or asyncio task) of its `with`, for one model, until that ends.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..config import Config
from ..errors import Cancelled, TinyllamaError, require
from ..model import Step
from ..ops import INNER, Tap
from .names import matching

Edit = dict[str, Callable]  # by a name or pattern: f(array) or f(array, at), as `Llama.edit` takes it


@dataclass(frozen=True)
class Place:
    """Where a value was computed, for functions that take it as their second argument."""

    name: str  # ours: "layers.5.residual"
    positions: np.ndarray  # of its tokens in their text, [n_tokens]
    config: Config

    @property
    def is_inner(self) -> bool:
        """It is [n_heads, n_tokens, n_past]; all others begin with n_tokens."""
        return self.name.endswith(INNER)

    @property
    def heads_axis(self) -> tuple[int, int] | None:
        """Which axis holds the heads, and how many there are; None of a value that has none."""
        what, config = self.name.rpartition(".")[2], self.config
        if ".attention." not in self.name or what in ("norm", "output"):
            return None
        return 0 if self.is_inner else 1, config.n_kv_heads if what in (
            "k",
            "v",
            "k_rope",
        ) else config.n_heads


# --- while it holds -------------------------------------------------------------------------------

_edits: ContextVar[tuple] = ContextVar("edits", default=())  # (model, edit by our names), the oldest first


@contextmanager
def editing(llama, edit: Mapping[str, Callable]) -> Iterator[None]:
    """What `Llama.edit` says."""
    require(isinstance(edit, Mapping), f"an edit is a dict, name -> function, not {edit!r:.60}")
    ours: dict[str, list[Callable]] = {}
    for pattern in edit:
        functions = [_with_place(function) for function in functions_of(edit, pattern)]
        for name in dict.fromkeys(matching(llama.config, [pattern]).values()):
            ours.setdefault(name, []).extend(functions)
    token = _edits.set((*_edits.get(), (llama, ours)))
    try:
        yield
    finally:
        _edits.reset(token)


def functions_of(edit: Mapping, name: str) -> list[Callable]:
    """What changes a value: one function, or several."""
    found = edit.get(name, [])
    found = found if isinstance(found, list | tuple) else [found]
    wrong = [function for function in found if not callable(function)]
    require(not wrong, f"edit of {name!r}: {wrong[:1]} isn't a function")
    return [*found]


def _with_place(function: Callable) -> Callable:
    """f(array, at), of a function that may take the array alone."""
    try:
        required = [
            one for one in inspect.signature(function).parameters.values() if one.default is one.empty
        ]
    except ValueError:  # of NumPy's own functions nobody knows
        required = []
    positional = [one for one in required if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return function if len(positional) > 1 else lambda array, at: function(array)


def is_edited(llama) -> bool:
    """Whether values of a model are replaced, here and now."""
    return any(edited is llama for edited, _ in _edits.get())


def edited(llama, step: Step) -> Step:
    """A step whose taps are also those of all edits that hold: each edit sees what those before it made."""
    functions: dict[str, list[Callable]] = {}
    for model, edit in _edits.get():
        for name in edit if model is llama else ():
            functions.setdefault(name, []).extend(edit[name])
    n_past = len(step.cache) + len(step.tokens)
    change = partial(_changed, config=llama.config, n_past=n_past)
    taps = {name: partial(change, name, some, step.taps.get(name)) for name, some in functions.items()}
    step.cache.edited = True  # whoever remembers texts leaves this one out
    return replace(step, taps=step.taps | taps)


def _changed(
    name: str, functions: list[Callable], then: Tap | None, array: np.ndarray, config: Config, n_past: int
) -> np.ndarray:
    """What the functions make of a value, and what a tap `then` makes of that."""
    n_tokens = array.shape[name.endswith(INNER)]
    at = Place(name, np.arange(n_past - n_tokens, n_past), config)
    for function in functions:
        given = array.copy()
        try:
            new = function(given, at)
        except Exception as error:
            named = isinstance(error, TinyllamaError) and str(error).startswith(f"edit of {name}")
            if named or isinstance(error, Cancelled):
                raise
            cause = " ".join(str(error).split())
            raise TinyllamaError(f"edit of {name}: {type(error).__name__}: {cause}") from error
        array = _checked(name, given if new is None else new, array)
    seen = then and then(array)
    return array if seen is None else seen


def _checked(name: str, new: object, old: np.ndarray) -> np.ndarray:
    """What came back as float32. Scores may be -infinity, where a token doesn't look."""
    if not (isinstance(new, np.ndarray) and new.dtype.kind in "biuf"):  # an array takes long to spell out
        raise TinyllamaError(f"edit of {name}: an array of numbers must come back, not {new!r:.60}")
    require(new.shape == old.shape, f"edit of {name}: {old.shape} went in and {new.shape} came back")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(new, np.float32)
    wrong = np.isnan(numbers) | np.isinf(numbers) & (numbers != old)
    if name.endswith("scores"):
        wrong &= numbers != -np.inf
    require(not wrong.any(), f"edit of {name}: NaN or infinity came back")
    return numbers
