"""Settings as keywords of Python: what help shows of them, and what becomes of a name that there isn't."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields

from ..errors import TinyllamaError
from ..settings import Settings

#: What other programs call a setting.
OTHER_NAMES = {"max_tokens": "n_predict", "max_new_tokens": "n_predict", "num_predict": "n_predict"}
OTHER_NAMES |= {"temperature": "temp", "n_ctx": "ctx_size", "repetition_penalty": "repeat_penalty"}


def nearest(name: str, names: Iterable[str]) -> str:
    """Which of some names somebody meant, "" if it is like none; settings also by OTHER_NAMES."""
    from difflib import get_close_matches  # here: few ask

    bare = {known.lstrip("-"): known for known in names}
    meant = {other: bare[known] for other, known in OTHER_NAMES.items() if known in bare} | bare
    name = name.lstrip("-").replace("-", "_")
    return next((meant[found] for found in get_close_matches(name, list(meant), 1)), "")


def settings_of(**given) -> Settings:
    """Settings by their names. Raises TinyllamaError, with the nearest, for a name that none has."""
    for name in sorted(given.keys() - Settings.__annotations__.keys()):
        meant = nearest(name, [*Settings.__annotations__, "model", "backend", "threads", "mmap", "each"])
        others = f"did you mean {meant}?" if meant else f"there are {', '.join(Settings.__annotations__)}"
        raise TinyllamaError(f"there is no setting {name!r}: {others}")
    return Settings(**given)


def with_settings(*more: str) -> Callable[[Callable], Callable]:
    """Have help and completion show what a function takes as **settings: the settings, and `more`."""

    def shown(function: Callable) -> Callable:
        signature, kind = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
        *others, _ = signature.parameters.values()
        mine = [inspect.Parameter(name, kind, default=None) for name in more]
        for one in fields(Settings):
            mine.append(inspect.Parameter(one.name, kind, default=one.default, annotation=one.type))
        function.__signature__ = signature.replace(parameters=[*others, *mine])
        listed = "\n".join(f"    {one.name}: {one.metadata['help']}" for one in fields(Settings))
        function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\nSettings:\n{listed}\n"
        return function

    return shown
