"""Control vectors on the command line: files of them are added while a text is written, or one is made."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import or_
from pathlib import Path

from ..errors import naming, require
from ..llama import Llama
from ..machine.files import read_file
from .printing import unescape

LARGEST = 50_000_000  # bytes of prompts


class ControlVectors:
    """The files that --control-vector and --control-vector-scaled name."""

    def __init__(self, args: argparse.Namespace):
        """Raises TinyllamaError where one can't be read, or a scale makes no sense."""
        self._vectors = [(_read(path), 1.0) for path in args.control_vector]
        for path, scale in args.control_vector_scaled:
            vector = _read(path)
            with naming("--control-vector-scaled"):
                vector.edit(scale)
            self._vectors.append((vector, scale))
        self._first, self._last = args.control_vector_layer_range or (0, -1)

    def applied(self, llama: Llama) -> AbstractContextManager:
        """Inside they steer a model. Raises TinyllamaError, at once, where one can't be of this model."""
        return llama.edit(self._edit(llama)) if self._vectors else nullcontext()

    def _edit(self, llama: Llama) -> dict:
        n_layers, edits = llama.config.n_layers, []
        first, last = self._first, n_layers - 1 if self._last == -1 else self._last  # as llama.cpp has it
        has = f"this model's layers are 0 to {n_layers - 1}, and START comes first"
        fine = 0 <= first <= last < n_layers
        require(fine, f"--control-vector-layer-range {self._first} {self._last}: {has}")
        for vector, scale in self._vectors:
            vector.check(llama)
            layers = [layer for layer in vector.directions if first <= layer <= last]
            some = f"{min(vector.directions)} to {max(vector.directions)}"
            require(layers, f"{vector.name}: has directions of layers {some}, and none of {first} to {last}")
            edits.append(vector.edit(scale, layers))
        return reduce(or_, edits)


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
