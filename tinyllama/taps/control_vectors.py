"""Control vectors: directions that are added to the residual stream, and llama.cpp's files of them.

    happy = ControlVector.of(llama, [("I feel wonderful.", "I feel terrible."), ...])
    with llama.edit(happy.edit(strength=4)):
        print(llama.generate("Today I"))

How they are made: arXiv:2310.01405, section 3.1. Such a file is GGUF (formats/gguf.py has the layout):

    general.architecture       "controlvector"
    controlvector.model_hint   string: the architecture it was made for, "llama"
    controlvector.layer_count  i32: how many directions there are
    direction.N                F32 [dim], N from 1: is added to what layer N gives, N counting from 0

So layer 0 can't be in a file. A direction is added after the layer that it was found after, as in files of
the repeng package; llama.cpp's cvector-generator writes what it found after layer N as direction.N+1.
"""

import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np

from ..config import Config
from ..errors import TinyllamaError, naming, require
from ..formats import arrays
from ..formats.cursor import I32
from ..formats.key_values import Metadata
from ..llama import Llama, load
from ..model import Step
from .edits import Place
from .interventions import Edit

KIND = "controlvector"
METHODS = ("pca", "mean")
MOST, CLOSE = 1000, 1e-6  # steps of the power iteration, as llama.cpp has them; the change that ends it
ROUNDING = 1e-5  # of sums of float32 numbers
LONGEST = 1e18  # of what is added: the squares of what a norm gets are added up, and float32 ends at 3e38


@dataclass(frozen=True)
class ControlVector:
    """A direction for each of some layers."""

    directions: dict[int, np.ndarray]  # by layer: [dim]
    model_hint: str = ""  # the family of models it was made for
    name: str = "the control vector"  # its file, for messages

    def __post_init__(self):
        """Raises TinyllamaError where it holds no direction, or what can be none."""
        with naming(self.name):
            require(self.directions, "holds no direction")
            shapes = {np.shape(array) for array in self.directions.values()}
            alike = len(shapes) == 1 and len(*shapes) == 1
            require(alike, f"its directions should be alike, [dim], not {sorted(shapes)}")
            for layer, direction in self.directions.items():
                require(np.isfinite(direction).all(), f"its direction of layer {layer} holds NaN or infinity")

    @classmethod
    def read(cls, path: str | Path) -> "ControlVector":
        """From a file. Raises TinyllamaError, naming it, where it is none, or damaged."""
        require(isinstance(path, str | os.PathLike), f"a control vector is in a file, not in {path!r:.60}")
        metadata, found = arrays.read(path, "general.architecture", KIND, "a control vector")
        with naming(path):
            layers = {name: re.fullmatch(r"direction\.([1-9]\d{0,3})", name) for name in found}
            for name, layer in layers.items():
                require(layer, f"the tensor {name} is none of direction.1, direction.2, ...")
            directions = {int(layers[name][1]): array for name, array in found.items()}
        return cls(dict(sorted(directions.items())), str(metadata.get(f"{KIND}.model_hint", "")), str(path))

    def write(self, path: str | Path) -> None:
        """Write a file that llama.cpp reads, too: the whole file, or none."""
        first = min(self.directions)
        require(first > 0, f"{path}: a file can't hold a direction of layer {first}: they begin with layer 1")
        metadata = Metadata({"general.architecture": KIND, f"{KIND}.model_hint": self.model_hint})
        metadata.set(f"{KIND}.layer_count", len(self.directions), I32)
        arrays.write(path, metadata, {f"direction.{n}": array for n, array in self.directions.items()})

    @classmethod
    def of(
        cls, llama, pairs: Sequence[tuple[str, str]], method: str = "pca", progress: Callable = iter
    ) -> "ControlVector":
        """What tells the first texts of pairs from the second, as llama.cpp's cvector-generator finds it.

        The shorter text of a pair is filled up with spaces. Of each layer but the first the residual streams
        of both texts are subtracted, token by token, and all differences become one direction of length 1,
        which leads from the second texts to the first ones.

        Args:
            llama: a `Llama`, or what `load` takes.
            pairs: (positive, negative): texts or lists of ids, about as long, which differ in what is meant.
            method: "pca", the first principal component of the differences; or "mean", their mean.
            progress: wraps the iteration over the pairs, as tqdm does.
        Raises:
            TinyllamaError: a text is empty, or all this doesn't fit into memory.
        """
        require(method in METHODS, f"method must be {' or '.join(METHODS)}, not {method!r:.60}")
        require(pairs, "there is no pair of texts")
        for pair in pairs:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2
            require(is_pair, f"a pair is (positive, negative), not {pair!r:.60}")
        llama = llama if isinstance(llama, Llama) else load(llama)
        texts = [_of_one_length(llama, *pair) for pair in pairs]
        layers, lengths = range(1, llama.config.n_layers), [len(positive) for positive, _ in texts]
        n_bytes = 4 * len(layers) * llama.config.dim * (sum(lengths) + max(lengths))
        cache = llama.new_cache(max(lengths), at_once=max(lengths), n_bytes=n_bytes)
        found: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
        for positive, negative in progress(texts):
            ours, theirs = (_residuals(llama, ids, cache, layers) for ids in (positive, negative))
            for layer in layers:
                found[layer].append(ours[layer] - theirs[layer])
        make, directions = _first_component if method == "pca" else _mean, {}
        for layer in layers:
            differences = np.concatenate(found.pop(layer))
            require(differences.any(), "both texts of every pair are the same")
            directions[layer] = make(differences)
        return cls(directions, llama.config.family)

    def edit(self, strength: float = 1.0, layers: Iterable[int] | None = None) -> Edit:
        """For `Llama.edit`: what adds strength * direction after each layer, or after some."""
        require(isinstance(strength, Real), f"{self.name}: strength must be a number, not {strength!r:.60}")
        try:
            chosen = [*map(operator.index, self.directions if layers is None else layers)]
        except TypeError:
            raise TinyllamaError(f"{self.name}: layers are numbers, [2, 3], not {layers!r:.60}") from None
        lacks = [layer for layer in chosen if layer not in self.directions]
        require(not lacks, f"{self.name}: has no direction of layer {lacks[:1]}: of {[*self.directions]}")
        longest = max(np.linalg.norm(np.asarray(some, float)) for some in self.directions.values())
        too_long = f"{self.name}: {strength:g} times its directions, up to {longest:.3g} long, overflows"
        require(longest * abs(strength) < LONGEST, too_long)
        added = {layer: np.float32(strength) * self.directions[layer] for layer in chosen}

        def steered(array: np.ndarray, at: Place) -> np.ndarray | None:
            layer = int(at.name.split(".")[1])
            with naming(f"edit of {at.name}"):
                self._require_fits(at.config)
            return array + added[layer] if layer in added else None

        return Edit({"layers.*.residual": [steered]})

    def check(self, llama) -> None:
        """Warn where it was made for another family of models.

        Raises TinyllamaError where it can't be of this model: another dim, or more layers.
        """
        self._require_fits(llama.config)
        other = f"{self.name}: was made for {self.model_hint}, and this model is {llama.config.family}"
        if self.model_hint not in ("", llama.config.family):
            warnings.warn(other, stacklevel=2)

    def _require_fits(self, config: Config) -> None:
        last = max(self.directions)
        (n,) = self.directions[last].shape
        its = f"{self.name}: is of another model: its"
        require(n == config.dim, f"{its} directions have {n} numbers, and this model's dim is {config.dim}")
        require(last < config.n_layers, f"{its} layers go to {last}, this model's to {config.n_layers - 1}")


def _of_one_length(llama, positive: str | list[int], negative: str | list[int]) -> list[list[int]]:
    """The ids of both, the shorter with spaces at its end."""
    both = [llama.tokens(text) for text in (positive, negative)]
    space, longest = llama.tokenizer.encode(" ", bos=False)[-1:], max(map(len, both))
    return [ids + space * (longest - len(ids)) for ids in both]


def _residuals(llama, ids: list[int], cache, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """The residual stream after each of some layers: [n_tokens, dim]."""
    found: dict[int, np.ndarray] = {}

    def kept(layer: int) -> Callable:
        return lambda array: found.update({layer: array.copy()})

    cache.trim(0)
    llama.run([Step(ids, cache, 1, {f"layers.{layer}.residual": kept(layer) for layer in layers})])
    return found


def _mean(differences: np.ndarray) -> np.ndarray:
    """The direction of the mean row: [n, dim] -> [dim]."""
    mean = differences.mean(axis=0)
    length = np.linalg.norm(mean)
    is_one = length > ROUNDING * np.abs(differences).max()
    require(is_one, "the differences of all pairs cancel out: the positive text must come first in each")
    return mean / length


def _first_component(differences: np.ndarray) -> np.ndarray:
    """The direction in which rows reach farthest from 0, by power iteration: [n, dim] -> [dim].

    It begins with the mean row and so ends on its side.
    """
    direction = _mean(differences)
    for _ in range(MOST):
        before, direction = direction, (differences @ direction) @ differences
        direction /= np.linalg.norm(direction)
        if np.linalg.norm(direction - before) < CLOSE:
            break
    return direction
