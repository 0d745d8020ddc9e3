"""GGUF files that hold no model but float32 arrays: importance matrices, control vectors.

gguf.py describes the layout; one key says which of the two a file is.
"""

from pathlib import Path

import numpy as np

from ..errors import check_cancelled, naming, require
from ..machine.files import MappedFile, kind_of, written
from ..machine.limits import require_memory
from ..quant import TYPES
from ..tensor import Piece
from .gguf import check_layout, read_part, recognizes
from .headers import gguf_start
from .key_values import Metadata, shown


def read(path: str | Path, key: str, value: str, what: str) -> tuple[Metadata, dict[str, np.ndarray]]:
    """The key-values and the arrays of a file whose `key` is `value`.

    Args:
        what: such a file is, for messages: "a control vector".
    Raises:
        TinyllamaError: names the file, where it is something else, damaged, larger than memory, or holds NaN.
    """
    file = MappedFile(path)
    with naming(file.path):
        require(recognizes(file), f"is not {what} but {kind_of(file)}")
        part = read_part(file)
        found = shown(part.metadata.get(key, ""))
        require(part.metadata.get(key) == value, f"is not {what}: its {key} is {found}, not {value!r}")
        pieces = {}
        for name, (shape, type_id, offset) in part.infos.items():
            require(type_id == TYPES["f32"].gguf_id, f"the tensor {name} must hold float32 numbers")
            pieces[name] = Piece(file, part.start + offset, "f32", shape)
        check_layout(pieces, part)
        require_memory(sum(piece.nbytes for piece in pieces.values()), "reading it")
        arrays = {name: np.array(piece.blocks()) for name, piece in pieces.items()}
        for name, array in arrays.items():
            require(np.isfinite(array).all(), f"the tensor {name} holds NaN or infinity: the file is damaged")
    return part.metadata, arrays


def write(path: str | Path, metadata: Metadata, arrays: dict[str, np.ndarray]) -> None:
    """Write the whole file, or none. Raises TinyllamaError where it can't be written."""
    infos = [(name, "f32", array.shape) for name, array in arrays.items()]
    head, offsets, size = gguf_start(metadata, infos)
    with written(path) as (unfinished,), unfinished.open("r+b") as file:
        file.write(head)
        for offset, array in zip(offsets, arrays.values(), strict=True):
            check_cancelled()
            file.seek(offset)
            file.write(np.ascontiguousarray(array, "<f4"))
        file.truncate(size)
