"""A .pth file: one part of a checkpoint, as torch.save writes it, read without torch.

It is a zip archive whose members are stored, not compressed:

    consolidated/data.pkl      a pickled dict: tensor's name -> how to rebuild it
    consolidated/data/0        the bytes of the first storage, little-endian, nothing around them
    consolidated/data/1        ...
    consolidated/version       and other small things that nobody needs

(The folder's name differs from file to file.) data.pkl is a program for Python's pickle machine. For
each tensor it pushes a persistent id

    ("storage", torch.HalfStorage, "0", "cpu", number of elements)

and calls torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, ...), counted in elements.
A pickle could call anything at all, so ours answers to the few names that a checkpoint needs, with
functions that only take notes, and refuses every other name. What remains is to find where the bytes of
`data/0` begin: a member has a local header of 30 bytes, then its name and an extra field (torch pads
with it, so that storages begin at multiples of 64), and then the weights. They are mapped, not read.

Tensors named `*freqs` are tables of RoPE, which everybody computes afresh.
"""

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from io import BytesIO
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..blocks import TYPES
from ..errors import TinyllamaError
from ..quant import Tensor
from ..resources import written_beside
from .parts import Entry, Part, map_file, what_it_is

LARGEST_PICKLE = 64 << 20  # bytes; 65B's is 0.2 MB


def read_part(path: Path) -> Part:
    """Map one .pth file and find its tensors.

    Raises TinyllamaError where it is no such file, wants to run code, or holds less than it says.
    """
    buffer = map_file(path)
    _check_ends(path, buffer)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, buffer, archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, KeyError) as error:
        raise TinyllamaError(f"{path} is damaged: {error}") from None


def _check_ends(path: Path, buffer: mmap) -> None:
    """A zip archive begins with a member and ends with 22 bytes that say where its directory is."""
    head, tail = buffer[:512], buffer[-22:]
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        raise TinyllamaError(f"{path} is of torch older than 1.6: load it there and save it again as a zip")
    if not head.startswith(b"PK\x03\x04"):
        raise TinyllamaError(f"{path} is no checkpoint but {what_it_is(head)}")
    if not tail.startswith(b"PK\x05\x06"):
        raise TinyllamaError(f"{path} is cut short or has something appended: no zip archive ends like this")


def _read_archive(path: Path, buffer: mmap, archive: zipfile.ZipFile) -> Part:
    members = {info.filename: info for info in archive.infolist()}
    pickled = next((info for name, info in members.items() if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
    if pickled is None:
        raise TinyllamaError(f"{path} is a zip archive without data.pkl, no checkpoint")
    root = pickled.filename.removesuffix("data.pkl")
    if f"{root}byteorder" in members and _bytes(path, buffer, members[f"{root}byteorder"]) != b"little":
        raise TinyllamaError(f"{path} was saved on a big-endian machine: save it again on another")
    if pickled.file_size > LARGEST_PICKLE:
        raise TinyllamaError(f"{path} is damaged: its data.pkl has {pickled.file_size:,} bytes")
    entries = {}
    for name, tensor in _unpickle(path, _bytes(path, buffer, pickled)).items():
        if not name.endswith("freqs"):
            entries[name] = _entry(
                path, buffer, name, tensor, members.get(f"{root}data/{tensor.storage.key}")
            )
    return Part(path, buffer, entries)


def _bytes(path: Path, buffer: mmap, info: zipfile.ZipInfo) -> bytes:
    offset = _data_offset(path, buffer, info)
    return buffer[offset : offset + info.file_size]


def _data_offset(path: Path, buffer: mmap, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin, after its local header, name and extra field."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise TinyllamaError(
            f"{path}: {info.filename} is compressed or encrypted: save it again with torch.save"
        )
    header = info.header_offset
    if buffer[header : header + 4] != b"PK\x03\x04":
        raise TinyllamaError(f"{path} is damaged: {info.filename} isn't where the zip directory says")
    offset = header + 30 + sum(struct.unpack_from("<HH", buffer, header + 26))
    if offset + info.file_size > len(buffer):
        raise TinyllamaError(f"{path} is cut short within {info.filename}")
    return offset


def _entry(path: Path, buffer: mmap, name: str, tensor: "_Tensor", info: zipfile.ZipInfo | None) -> Entry:
    """Where the weights of a tensor lie in the file, once everything said about them holds."""
    storage, start, shape, stride = tensor
    where = f"{path}: the tensor {name}"
    if storage.type not in _TYPES:
        raise TinyllamaError(
            f"{where} is a {_one_line(storage.type)}; float16, bfloat16 and float32 can be read"
        )
    if not _is_shape(shape) or not _is_shape((start,), smallest=0):
        raise TinyllamaError(
            f"{where} has the shape {_one_line(shape)}; one or two positive axes can be read"
        )
    if stride != (*shape[1:], 1):
        raise TinyllamaError(f"{where} isn't contiguous: save it again after .contiguous()")
    if info is None:
        raise TinyllamaError(f"{path} lacks the weights of {name}")
    itemsize = TYPES[_TYPES[storage.type]].block_bytes
    entry = Entry(name, _TYPES[storage.type], shape, _data_offset(path, buffer, info) + start * itemsize)
    if start * itemsize + entry.nbytes > info.file_size:
        raise TinyllamaError(f"{where} needs more bytes than {info.filename} holds")
    return entry


def _is_shape(shape, smallest: int = 1) -> bool:
    is_tuple = isinstance(shape, tuple) and len(shape) in (1, 2)
    return is_tuple and all(type(n) is int and smallest <= n < 1 << 48 for n in shape)


# --- the pickle -----------------------------------------------------------------------------------

_TYPES = {"HalfStorage": "f16", "BFloat16Storage": "bf16", "FloatStorage": "f32"}


class _Storage(NamedTuple):
    type: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage, start, shape, stride, *_):
    return _Tensor(storage, start, shape, stride)


def _rebuild_parameter(tensor, *_):
    return tensor


class _Unpickler(pickle.Unpickler):
    """Python's pickle machine with nothing to call but the functions above."""

    def find_class(self, module, name):
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
            "torch._utils._rebuild_parameter": _rebuild_parameter,
        }
        if f"{module}.{name}" in known:
            return known[f"{module}.{name}"]
        if module == "torch" and re.fullmatch(r"[A-Z]\w*Storage", name):
            return name
        raise TinyllamaError(f"wants to run {_one_line(f'{module}.{name}')}")

    def persistent_load(self, saved_id):
        _, type, key, *_ = saved_id
        return _Storage(str(type), str(key))


def _one_line(what: object) -> str:
    return " ".join(str(what).split())[:80]


def _unpickle(path: Path, data: bytes) -> dict[str, _Tensor]:
    """Tensors by name. Whatever a crafted pickle does to the machine, it ends here."""
    try:
        tensors = _Unpickler(BytesIO(data)).load()
    except TinyllamaError as error:
        raise TinyllamaError(
            f"{path} {error}: that is no checkpoint, don't open it elsewhere either"
        ) from None
    except Exception as error:
        raise TinyllamaError(f"{path} is damaged: its data.pkl can't be read ({_one_line(error)})") from None
    is_checkpoint = isinstance(tensors, dict) and all(
        isinstance(name, str)
        and name.isprintable()
        and isinstance(tensor, _Tensor)
        and isinstance(tensor.storage, _Storage)
        for name, tensor in tensors.items()
    )
    if not is_checkpoint or not tensors:
        raise TinyllamaError(f"{path} is a torch file but no checkpoint: it holds no dict of tensors")
    return tensors


# --- writing ---------------------------------------------------------------------------------------


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors of one part each and of plain numbers as a .pth file."""
    try:
        import torch
    except ImportError:
        raise TinyllamaError(f"{path}: writing a checkpoint needs torch (pip install torch)") from None
    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    state = {}
    for name, tensor in tensors.items():
        raw = torch.from_numpy(np.array(tensor.parts[0], order="C").view(np.uint8))
        state[name] = raw.view(dtypes[tensor.type])
    try:
        with written_beside(path) as unfinished:
            torch.save(state, unfinished)
    except (OSError, RuntimeError) as error:
        raise TinyllamaError(f"{path} can't be written: {_one_line(error)}") from None
