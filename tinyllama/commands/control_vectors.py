"""Control vectors on the command line: files of them are added while a text is written, or one is made."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import naming, require
from ..llama import Llama
from ..machine.files import read_file
from .printing import unescape

LARGEST = 50_000_000  # bytes of prompts


class ControlVectors:
    """The files that --control-vector and --control-vector-scaled name."""

    def __init__(self, args: argparse.Namespace):
        """Raises TinyllamaError where one can't be read."""
        scaled = [*((path, 1.0) for path in args.control_vector), *args.control_vector_scaled]
        self._vectors = [(_read(path), scale) for path, scale in scaled]
        self._first, self._last = args.control_vector_layer_range or (1, 0)

    @contextmanager
    def applied(self, llama: Llama) -> Iterator[None]:
        """Inside they steer a model. Raises TinyllamaError where one can't be of this model."""
        last = self._last if self._last > 0 else llama.config.n_layers - 1  # as llama.cpp has it
        with ExitStack() as edits:
            for vector, scale in self._vectors:
                vector.check(llama)
                layers = [layer for layer in vector.directions if self._first <= layer <= last]
                some = f"{min(vector.directions)} to {max(vector.directions)}"
                lacks = f"{vector.name}: has directions of layers {some}, and none of {self._first} to {last}"
                require(layers, lacks)
                edits.enter_context(llama.edit(vector.edit(scale, layers)))
            yield


def _read(path: str):
    from ..taps.control_vectors import ControlVector  # here: most texts do without

    return ControlVector.read(path)


def read_pairs(positive: str | Path, negative: str | Path) -> list[tuple[str, str]]:
    """The prompts of two files, line by line. Raises TinyllamaError where they don't go together."""
    ours, theirs = _prompts(positive), _prompts(negative)
    many = f"{positive} has {len(ours)} prompts, and {negative} {len(theirs)}: each needs its counterpart"
    require(len(ours) == len(theirs), many)
    return [*zip(ours, theirs, strict=True)]


def _prompts(path: str | Path) -> list[str]:
    r"""The lines of a file that aren't empty, with \n in them for newlines."""
    with naming(path):
        lines = read_file(path, LARGEST).decode().replace("\r\n", "\n").split("\n")
        prompts = [unescape(line) for line in lines if line]
        require(prompts, "there is no prompt in it")
    return prompts


def make(llama: Llama, pairs: list[tuple[str, str]], method: str, path: str | Path) -> None:
    """Write a control vector made of pairs of prompts, with a bar."""
    from tqdm.auto import tqdm  # here, since whoever writes a text needs none

    from ..taps.control_vectors import ControlVector

    ControlVector.of(llama, pairs, method, lambda texts: tqdm(texts, "cvector", unit=" pairs")).write(path)
