"""A model as a function of many prompts, which Dask, joblib and Ray send to their processes.

texts = bag.map_partitions(tinyllama.Mapper("smollm2", n_predict=40, seed=1)).compute()
"""

import sys
import threading
from collections.abc import Iterable

import numpy as np

from ..backends import OPTIONS, over_forks
from ..errors import require
from ..llama import LOADING, load
from ..texts.completion import Completion
from ..texts.keywords import settings_of, with_settings

_turn = over_forks(threading.Lock())  # of those that a process has, one computes, with all threads


class Mapper:
    """mapper(prompts) -> their continuations, of which all are written together.

    It is small and can be pickled: the model is loaded where the first prompts are, once in each process.
    What it takes and gives:

        a list, or another iterable             a list of Completions
        a pandas Series                         a Series of texts with the same index
        a DataFrame, or a dict of arrays        the same with a column "text"

    With a seed, the first prompt has it, the next one has the next, and so on; those of a Series or DataFrame
    whose index is of whole numbers have the seed plus their index, in whatever partition they are.
    """

    @with_settings(*LOADING[:-2])
    def __init__(self, model=None, *, column: str = "prompt", **settings):
        """Args:
            model: of `tinyllama.load`, and so are backend, mmap and the backend's options among the settings;
                threads: None for those of a Dask worker, elsewhere one a core.
            column: which one of a table has the prompts.
            settings: as of `tinyllama.generate`.
        Raises TinyllamaError for a name that no setting has, or a value that it can't have.
        """
        names = ("backend", "threads", "mmap", *OPTIONS)
        self._loading = {name: settings.pop(name) for name in names if name in settings}
        self._model, self._column, self._settings = model, column, settings
        self._seed = settings_of(**settings).seed

    def __call__(self, prompts):
        """Continue prompts, as above. Raises TinyllamaError as `tinyllama.generate`."""
        require(
            not isinstance(prompts, str | bytes),
            "a Mapper takes a list of prompts, not a text (map_partitions)",
        )
        pandas = sys.modules.get("pandas")
        if isinstance(prompts, dict) or (pandas and isinstance(prompts, pandas.DataFrame)):
            there_is = (
                f"no column {self._column!r}: there is {', '.join(map(str, prompts))[:80]}; column= names it"
            )
            require(self._column in prompts, there_is)
        if isinstance(prompts, dict):
            return prompts | {"text": np.array(self._texts(prompts[self._column]), object)}
        if pandas and isinstance(prompts, pandas.DataFrame):
            return prompts.assign(text=self(prompts[self._column]))
        if pandas and isinstance(prompts, pandas.Series):
            numbered = pandas.api.types.is_integer_dtype(prompts.index) and (prompts.index >= 0).all()
            texts = self._texts(prompts, prompts.index if numbered else None)
            return pandas.Series(texts, prompts.index, "str", "text")
        return self._write(list(prompts))

    def _texts(self, prompts: Iterable, places: Iterable[int] | None = None) -> list[str]:
        return [str(text) for text in self._write(list(prompts), places)]

    def _write(self, prompts: list, places: Iterable[int] | None = None) -> list[Completion]:
        if not prompts:
            return []
        for number, prompt in enumerate(prompts):
            right = isinstance(prompt, str | list | tuple)
            require(right, f"prompt {number} is no text, and no list of ids, but {prompt!r:.60}")
        places = range(len(prompts)) if places is None else places
        each = [{"seed": self._seed + int(place)} if self._seed >= 0 else {} for place in places]
        with _turn:
            llama = load(self._model, **{"threads": _threads_of_worker()} | self._loading)
            return llama.generate(prompts, each=each, **self._settings)

    def __repr__(self) -> str:
        given = [repr(self._model), *(f"{name}={value!r}" for name, value in self._settings.items())]
        return f"Mapper({', '.join(given)})"


def _threads_of_worker() -> int | None:
    """Those of the Dask worker that this runs in, if there is one."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker().state.nthreads
    except ValueError:
        return None
