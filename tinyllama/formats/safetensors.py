"""safetensors, Hugging Face's file of weights, which can be mapped into memory.

    u64                the length of the header, little-endian
    header             JSON, padded with spaces: name -> {"dtype": "BF16", "shape": [n_out, n_in],
                       "data_offsets": [begin, end]}; "__metadata__" may hold strings about the file
    data               the bytes of each tensor, row by row, little-endian, at its offsets, which are counted
                       from the end of the header; without holes, and up to the end of the file

A large model is cut into files `model-00001-of-0000N.safetensors`; in `model.safetensors.index.json` the
"weight_map" says which of them holds which tensor. Source: the README of huggingface/safetensors.
"""

from collections.abc import Callable
from pathlib import Path

from ..errors import naming, require
from ..machine.files import MappedFile, kind_of
from ..tensor import Piece
from .folders import parse_json, read_json
from .parts import Part, check_shape

LARGEST_HEADER = 1 << 22  # bytes; a tensor takes about 120, 405B has 1138 of them
LARGEST_INDEX = 1 << 22
DTYPES = {"F16": "f16", "BF16": "bf16", "F32": "f32"}


def read_tensors(path: Path) -> Part:
    """Map one file and find its tensors.

    Raises TinyllamaError, naming the file, where it is another, or says what can't be true of it.
    """
    with naming(path):
        file = MappedFile(path)
        length = int.from_bytes(file[:8], "little")
        starts = len(file) >= 10 and file[8:9] == b"{"
        require(starts, f"no safetensors file but {kind_of(file)}")
        require(length <= LARGEST_HEADER, f"is damaged: it says that its header has {length:,} bytes")
        start = 8 + length
        require(start <= len(file), "is cut short within its header")
        header = parse_json(file[8:start])
        header.pop("__metadata__", None)
        require(header, "holds no tensors")
        part = {}
        for name, entry in header.items():
            with naming(f"the tensor {name}"):
                part[name] = _piece(file, start, entry)
        _check_layout(part, start, len(file))
        return part


def _piece(file: MappedFile, start: int, entry: object) -> Piece:
    """Where the weights of a tensor lie, as the header says."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    require(isinstance(dtype, str) and _whole(shape) and _whole(offsets) and len(offsets) == 2, "is damaged")
    known = ", ".join(DTYPES)
    require(dtype in DTYPES, f"is of the type {dtype[:40]}, which can't be read; {known} can")
    check_shape(shape)
    piece = Piece(file, start + offsets[0], DTYPES[dtype], tuple(shape))
    right = offsets[1] - offsets[0] == piece.nbytes
    require(right, f"has {piece.nbytes:,} bytes, but lies at {offsets[0]:,} to {offsets[1]:,}")
    return piece


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(part: Part, end: int, size: int) -> None:
    """Tensors lie one right behind the other, and up to the end of the file."""
    for name, piece in sorted(part.items(), key=lambda item: item[1].offset):
        require(piece.offset == end, f"is damaged: {name} begins at byte {piece.offset:,}, not at {end:,}")
        end += piece.nbytes
        require(end <= size, f"is cut short: {name} ends at byte {end:,}, the file at {size:,}")
    require(end == size, f"is damaged: {size - end:,} bytes follow its last tensor")


def read_shards(folder: Path, name: str, read: Callable[[Path], Part] = read_tensors) -> Part:
    """The tensors of a model: of the file `name`, or of all those that its index names.

    Raises TinyllamaError, naming the file, where one is missing, or two hold a tensor of one name.
    """
    tensors = {}
    for path in shard_paths(folder, name):
        with naming(path):
            named = f"; {name}.index.json names it" if path.name != name else ""
            require(path.exists(), f"is missing{named}")
            part = read(path)
            twice = part.keys() & tensors.keys()
            require(not twice, f"holds {min(twice, default='')}, as another file does")
        tensors |= part
    return tensors


def shard_paths(folder: Path, name: str) -> list[Path]:
    """The file `name`, or where there's none all those that its index names."""
    index = folder / f"{name}.index.json"
    if (folder / name).exists() or not index.exists():
        return [folder / name]
    places = read_json(index, LARGEST_INDEX).get("weight_map")
    with naming(index):
        names = list(places.values()) if isinstance(places, dict) else [None]
        plain = all(isinstance(name, str) and name == Path(name).name for name in names)
        require(plain, "its weight_map doesn't name files of this folder")
    return [folder / name for name in dict.fromkeys(names)]
