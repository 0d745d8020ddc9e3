"""A checkpoint cut into parts: Meta cut LLaMA for several GPUs, 13B in two, 30B in four, 65B in eight.

Every part names every tensor and holds its share of it:

| Cut                | Tensors                                | Share of one part           |
|--------------------|----------------------------------------|-----------------------------|
| by rows            | wq wk wv w1 w3 output                  | `[n_out / n_parts, n_in]`   |
| by columns         | tok_embeddings wo w2                   | `[n_out, n_in / n_parts]`   |
| not at all         | attention_norm ffn_norm norm           | `[dim]`, the same in each   |

A GPU that holds some rows of w1 and w3 and the same columns of w2 computes its share of the whole
feed-forward layer alone; only then are the shares added up. So it is with wq, wk, wv and wo.

The ggml files of March 2023 keep the cut. Here the shares of a tensor become one Tensor again.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..blocks import TYPES
from ..config import Config
from ..errors import TinyllamaError
from ..machine.opening import open_file
from ..machine.mapped import MappedFile
from ..quant import Tensor

MOST_PARTS = 100  # consolidated.00.pth to .99; Meta cut into 8
CUT_BY_COLUMNS = ("tok_embeddings.weight", "attention.wo.weight", "feed_forward.w2.weight")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `shape` weights of a type, row after row, from byte `offset` on."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return TYPES[self.type].nbytes(self.shape)


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint, mapped into memory: its tensors by Meta's names, in the file's order."""

    path: Path
    buffer: MappedFile
    entries: dict[str, Entry]

    def blocks(self, name: str):
        entry = self.entries[name]
        return TYPES[entry.type].view(self.buffer, entry.shape, entry.offset)


def map_file(path: Path) -> MappedFile:
    """A file as bytes that are read only when they are looked at."""
    try:
        with open_file(path) as file:
            return MappedFile(path, file)
    except ValueError:
        raise TinyllamaError(f"{path} is empty") from None
    except OSError as error:
        raise TinyllamaError(f"{path}: {error.strerror}") from None


def what_it_is(head: bytes) -> str:
    """For error messages: what a file with a wrong beginning seems to be."""
    if head[:256].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, probably an error message of the site it came from"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file that it points to (git lfs pull)"
    if not head.strip(b"\0"):
        return "nothing but zeros: its download was never finished"
    known = {
        b"PK": "a zip archive",
        b"GGUF": "a GGUF file",
        b"lmgg": "a ggml file",
        b"\x80": "a Python pickle",
    }
    return next((what for magic, what in known.items() if head.startswith(magic)), "something else")


def split_axis(name: str) -> int:
    """The axis of [n_out, n_in] along which the parts of a tensor follow each other."""
    return 1 if name.endswith(CUT_BY_COLUMNS) else 0


def count_parts(part: Part, config: Config) -> int:
    """How many parts make a whole: tok_embeddings is cut by columns, and dim of them are needed."""
    if "tok_embeddings.weight" not in part.entries:
        raise TinyllamaError(f"{part.path} lacks the tensor tok_embeddings.weight: it holds no LLaMA")
    shape = part.entries["tok_embeddings.weight"].shape
    if len(shape) != 2 or config.dim % shape[1]:
        raise TinyllamaError(
            f"{part.path}: tok_embeddings.weight is {list(shape)}, no share of dim {config.dim}"
        )
    if config.dim // shape[1] > MOST_PARTS:
        raise TinyllamaError(f"{part.path} would be one of {config.dim // shape[1]} parts: it is damaged")
    return config.dim // shape[1]


def merge(parts: list[Part], config: Config) -> dict[str, Tensor]:
    """The shares of all parts as whole tensors, in the order of the first part; nothing is copied.

    Raises TinyllamaError where a part lacks a tensor, has one too many or one of the wrong shape.
    """
    for part in parts:
        check(part, config, len(parts))
    shapes = config.tensor_shapes()
    return {name: _merged(name, shapes[name], parts) for name in parts[0].entries}


def check(part: Part, config: Config, n_parts: int) -> None:
    """Raises TinyllamaError unless a part holds its share of every tensor, and nothing else."""
    shapes = config.tensor_shapes()
    for name, shape in shapes.items():
        if name not in part.entries:
            raise TinyllamaError(f"{part.path} lacks the tensor {name}")
        if len(shape) == 2 and shape[split_axis(name)] % n_parts:
            raise TinyllamaError(f"{part.path}: {name} {list(shape)} doesn't divide into {n_parts} parts")
        found, expected = part.entries[name].shape, share(name, shape, n_parts)
        if found != expected:
            raise TinyllamaError(f"{part.path}: {name} has the shape {list(found)}, not {list(expected)}")
    for name in part.entries:
        if name not in shapes:
            raise TinyllamaError(f"{part.path} holds a tensor that no LLaMA of this size has: {name}")


def share(name: str, shape: tuple[int, ...], n_parts: int) -> tuple[int, ...]:
    """The shape of one part of a tensor."""
    if len(shape) == 1:
        return shape
    n_out, n_in = shape
    return (n_out, n_in // n_parts) if split_axis(name) == 1 else (n_out // n_parts, n_in)


def cut(tensor: Tensor, number: int, n_parts: int) -> Tensor:
    """One share of a whole tensor."""
    (array,), axis = tensor.parts, tensor.split
    if array.ndim == 1:
        return tensor
    piece = np.split(array, n_parts, axis)[number]
    return Tensor(tensor.name, tensor.type, piece.shape, (piece,), axis)


def _merged(name: str, shape: tuple[int, ...], parts: list[Part]) -> Tensor:
    shares = parts[:1] if len(shape) == 1 else parts
    types = {part.entries[name].type for part in shares}
    if len(types) > 1:
        raise TinyllamaError(
            f"{parts[-1].path}: {name} is {' here and '.join(sorted(types))} in another part"
        )
    return Tensor(name, types.pop(), shape, tuple(part.blocks(name) for part in shares), split_axis(name))
