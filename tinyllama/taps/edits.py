"""Values inside a model that are replaced while it runs.

    with llama.edit({"layers.5.residual": lambda x: 2 * x}):
        print(llama.generate("Once upon a time"))

An edit is a dict: a name, or a pattern, and the function that changes what is called so. interventions.py
makes such dicts. An edit holds in the thread (or asyncio task) of its `with`, for one model, until that ends.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..config import Config
from ..errors import Cancelled, TinyllamaError, require
from ..model import Step
from ..ops import INNER, Tap
from .names import matching


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
        n_heads = config.n_kv_heads if what in ("k", "v", "k_rope") else config.n_heads
        return 0 if self.is_inner else 1, n_heads

    def seen(self, n_past: int) -> np.ndarray:
        """Of an inner value, which past tokens each token sees: [n_tokens, n_past]."""
        age = self.positions[:, None] - np.arange(n_past)
        return (age >= 0) & (age < (self.config.sliding_window or n_past))


# --- while it holds -------------------------------------------------------------------------------

_held: ContextVar[tuple["Held", ...]] = ContextVar("held", default=())  # the oldest first


class Editing(AbstractContextManager):
    """What `Llama.edit` gives: inside of each `with` of it, an edit holds.

    Raises TinyllamaError, when it is made, where a name matches nothing or something isn't a function.
    """

    def __init__(self, llama, edit: Mapping[str, Callable]):
        require(isinstance(edit, Mapping), f"an edit is a dict, name -> function, not {edit!r:.60}")
        self.llama, self.functions, self._open = llama, {}, []
        for pattern in edit:
            functions = [_with_place(function) for function in functions_of(edit, pattern)]
            for name in dict.fromkeys(matching(llama.config, [pattern]).values()):
                self.functions.setdefault(name, []).extend(functions)

    def __enter__(self) -> None:
        held = Held(self)
        self._open.append(held)
        _held.set((*_held.get(), held))

    def __exit__(self, *_) -> None:
        mine = [held for held in _held.get() if held.by is self and held.holds]
        last = (mine or self._open)[-1]  # a generator may be closed by another thread than began it
        last.holds = False
        self._open.remove(last)
        _held.set(tuple(held for held in _held.get() if held.holds))


@dataclass(eq=False)
class Held:
    """An edit during one `with`. Threads and tasks that were begun inside see that it ends."""

    by: Editing
    holds: bool = True


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
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # NumPy's own functions have no signature
        parameters = ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [one for one in parameters if one.default is one.empty and one.kind in positional]
    return function if len(required) > 1 else lambda array, at: function(array)


def is_edited(llama) -> bool:
    """Whether values of a model are replaced, here and now."""
    return any(held.by.llama is llama and held.holds for held in _held.get())


def edited(llama, step: Step) -> Step:
    """A step whose taps are also those of all edits that hold: each edit sees what those before it made."""
    functions: dict[str, list[Callable]] = {}
    for held in _held.get():
        for name in held.by.functions if held.by.llama is llama and held.holds else ():
            functions.setdefault(name, []).extend(held.by.functions[name])
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
        given, outside = array.copy(), _held.set(())  # what a function computes itself isn't edited
        try:
            new = function(given, at)
        except Exception as error:
            named = isinstance(error, TinyllamaError) and str(error).startswith(f"edit of {name}")
            if named or isinstance(error, Cancelled):
                raise
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
            raise TinyllamaError(f"edit of {name}: {cause}") from error
        finally:
            _held.reset(outside)
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
        looks = (numbers > -np.inf).any(axis=-1).all()
        require(looks or wrong.any(), f"edit of {name}: a token is left that looks at nothing")
    require(not wrong.any(), f"edit of {name}: NaN or infinity came back")
    return numbers
