"""Files that a command is to write: looked at before anything takes time."""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

from ..errors import TinyllamaError, naming, require
from ..formats import stamp
from ..machine.files import require_place, written


def require_new(outputs: Iterable[str | Path | None], inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise TinyllamaError where an output has no place, or would replace an input or another output.

    Args:
        outputs: paths; None stands for no file.
        inputs: paths of files, or models: paths or names, all files of which count.
    """
    outputs = [path for path in outputs if path is not None]
    for path in outputs:
        require_place(Path(os.path.realpath(path)), path)
    for path, other in combinations(outputs, 2):
        require(not _is_same(path, other), f"{path}: is to be written twice: name another file to write")
    old = [path for path in outputs if os.path.exists(path)]  # without any, no name of a model is looked up
    sources = [file for source in (inputs if old else ()) for file in _files(source)]
    for path in old:
        made_from = any(_is_same(path, file) for file in sources)
        require(not made_from, f"{path}: would replace what it is made from: name another file to write")


def _is_same(one: str | Path, other: str | Path) -> bool:
    both_exist = os.path.exists(one) and os.path.exists(other)
    return os.path.samefile(one, other) if both_exist else os.path.realpath(one) == os.path.realpath(other)


def _files(source: str | Path | None) -> list[str | Path]:
    """A file, and, of a model, all that reading it looks at."""
    try:
        return [source or "", *(name for name, *_ in stamp(source)[1:])]
    except TinyllamaError:  # no model, or one that isn't here: whoever reads it says so
        return [source or ""]


def require_picture(path: str | Path | None) -> None:
    """Raise TinyllamaError where matplotlib isn't here, or doesn't draw such a file; None stands for none."""
    if path is not None:
        require(find_spec("matplotlib"), "--plot needs matplotlib: pip install 'tinyllama-lab[notebooks]'")
        from matplotlib.backend_bases import FigureCanvasBase

        endings = [*FigureCanvasBase.get_supported_filetypes()]
        drawn = f"{path}: the name of a picture ends in .png, or in one of {', '.join(endings)}"
        require(_ending(path) in endings, drawn)


def save_picture(figure, path: str | Path) -> None:
    """Write a figure of matplotlib: the whole file, or none."""
    require_picture(path)
    with naming(path), written(path) as (unfinished,):
        figure.savefig(unfinished, format=_ending(path))


def _ending(path: str | Path) -> str:
    return Path(path).suffix[1:].lower()
