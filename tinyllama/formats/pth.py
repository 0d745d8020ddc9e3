"""A .pth file: one part of a checkpoint, as torch.save writes it, read without torch.

It is a zip archive whose members are stored, not compressed:

    consolidated/data.pkl      a pickled dict: tensor's name -> how to rebuild it
    consolidated/data/0        the bytes of the first storage, little-endian, nothing around them
    consolidated/data/1        ...
    consolidated/version       and other small things that nobody needs

(The folder's name differs from file to file.) data.pkl is a program for Python's pickle machine; unpickle.py
runs it on one that only takes notes. What remains is to find where the bytes of `data/0` begin: a member has
a local header of 30 bytes, then its name and an extra field (torch pads with it, so that storages begin at
multiples of 64), and then the weights. They are mapped, not read.

Tensors named `*freqs` are tables of RoPE, which everybody computes afresh.
"""

import re
import struct
import zipfile
from io import FileIO
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from zlib import crc32

import numpy as np

from ..blocks import TYPES
from ..errors import TinyllamaError
from ..quant import Tensor
from ..machine.files import blamed
from .parts import Entry, Part, map_file, what_it_is
from .unpickle import SavedTensor, read_tensors

LARGEST_PICKLE = 1 << 18  # bytes; a tensor takes about a hundred, 65B has 723
LARGEST_DIRECTORY = 1 << 21  # bytes; 65B's is 0.1 MB

#: What may follow a member: the next one, the directory, what ends a member of unknown size, zip64's end.
NEXT = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08", b"PK\x06\x06")


def read_part(path: Path) -> Part:
    """Map one .pth file and find its tensors.

    Raises TinyllamaError where it is no such file, wants to run code, or holds less than it says.
    """
    buffer = map_file(path)
    _check_ends(path, buffer)
    try:
        with _Opened(path) as file, zipfile.ZipFile(file) as archive:
            return _read_archive(path, buffer, archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, KeyError) as error:
        raise TinyllamaError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise TinyllamaError(f"{path}: {error.strerror}") from None


class _Opened(FileIO):
    """Reads no more at a time than a directory may have, whatever a file says that its own has."""

    def read(self, size: int = -1) -> bytes:
        if size > LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"its zip directory has {size:,} bytes")
        try:
            return super().read(size if size >= 0 else LARGEST_DIRECTORY)
        except OSError as error:  # zipfile would say that this is no zip archive
            raise TinyllamaError(f"{self.name}: {error.strerror}") from None


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
    members = _members(path, archive)
    pickled = next((info for name, info in members.items() if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
    if pickled is None:
        raise TinyllamaError(f"{path} is a zip archive without data.pkl, no checkpoint")
    root = pickled.filename.removesuffix("data.pkl")
    if f"{root}byteorder" in members and _bytes(path, buffer, members[f"{root}byteorder"]) != b"little":
        raise TinyllamaError(f"{path} was saved on a big-endian machine: save it again on another")
    entries = {}
    for name, tensor in _tensors(path, _bytes(path, buffer, pickled)).items():
        if not name.endswith("freqs"):
            entries[name] = _entry(
                path, buffer, name, tensor, members.get(f"{root}data/{tensor.storage.key}")
            )
    _check_apart(path, entries)
    return Part(path, buffer, entries)


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members = {info.filename: info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise TinyllamaError(f"{path} is damaged: its zip directory names a member twice")
    return members


def _tensors(path: Path, data: bytes) -> dict[str, SavedTensor]:
    try:
        return read_tensors(data)
    except TinyllamaError as error:
        raise TinyllamaError(f"{path} {error}") from None


def _bytes(path: Path, buffer: mmap, info: zipfile.ZipInfo) -> bytes:
    """A small member. Its CRC is 0 where torch.save was told to compute none."""
    offset = _data_offset(path, buffer, info)
    if info.file_size > LARGEST_PICKLE:
        raise TinyllamaError(f"{path} is damaged: {info.filename} has {info.file_size:,} bytes")
    data = buffer[offset : offset + info.file_size]
    if info.CRC not in (0, crc32(data)):
        raise TinyllamaError(
            f"{path} is damaged: {info.filename} at byte {offset:,} doesn't match its checksum"
        )
    return data


def _data_offset(path: Path, buffer: mmap, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin, after its local header, name and extra field."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise TinyllamaError(
            f"{path}: {info.filename} is compressed or encrypted: save it again with torch.save"
        )
    header, name = info.header_offset, info.orig_filename.encode("utf-8")
    n_name, n_extra = struct.unpack("<HH", buffer[header + 26 : header + 30].ljust(4, b"\0"))
    if (
        header < 0
        or buffer[header : header + 4] != b"PK\x03\x04"
        or buffer[header + 30 : header + 30 + n_name] != name
    ):
        raise TinyllamaError(f"{path} is damaged: {info.filename} isn't where the zip directory says")
    offset = header + 30 + n_name + n_extra
    end = offset + info.file_size
    if end > len(buffer):
        raise TinyllamaError(f"{path} is cut short within {info.filename}")
    if buffer[end : end + 4] not in NEXT:
        raise TinyllamaError(
            f"{path} is damaged: {info.filename} doesn't end at byte {end:,}, where it should"
        )
    return offset


def _entry(path: Path, buffer: mmap, name: str, tensor: SavedTensor, info: zipfile.ZipInfo | None) -> Entry:
    """Where the weights of a tensor lie in the file, once everything said about them holds."""
    storage, start, shape, stride = tensor
    where = f"{path}: the tensor {name}"
    if storage.type not in _TYPES:
        raise TinyllamaError(f"{where} is a {storage.type[:80]}; float16, bfloat16 and float32 can be read")
    if len(shape) not in (1, 2) or 0 in shape:
        raise TinyllamaError(f"{where} has the shape {list(shape)}; one or two positive axes can be read")
    if stride != (*shape[1:], 1):
        raise TinyllamaError(f"{where} isn't contiguous: save it again after .contiguous()")
    if info is None:
        raise TinyllamaError(f"{path} lacks the weights of {name}")
    itemsize = TYPES[_TYPES[storage.type]].block_bytes
    entry = Entry(name, _TYPES[storage.type], shape, _data_offset(path, buffer, info) + start * itemsize)
    if storage.n_elements * itemsize != info.file_size:
        raise TinyllamaError(
            f"{path} is damaged: {info.filename} isn't {storage.n_elements:,} {storage.type}"
        )
    if start * itemsize + entry.nbytes > info.file_size:
        raise TinyllamaError(f"{where} needs more bytes than {info.filename} holds")
    return entry


def _check_apart(path: Path, entries: dict[str, Entry]) -> None:
    """Two tensors may be one and the same, as tied embeddings are, but not overlap otherwise."""
    in_order = sorted(entries.values(), key=lambda entry: entry.offset)
    for one, other in pairwise(in_order):
        is_same = (one.offset, one.shape, one.type) == (other.offset, other.shape, other.type)
        if other.offset < one.offset + one.nbytes and not is_same:
            raise TinyllamaError(f"{path} is damaged: {other.name} overlaps {one.name}")


_TYPES = {"HalfStorage": "f16", "BFloat16Storage": "bf16", "FloatStorage": "f32"}


def _one_line(what: object) -> str:
    return " ".join(str(what).split())[:80]


# --- writing ---------------------------------------------------------------------------------------


def write_part(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors of one part each and of plain numbers as a .pth file."""
    try:
        import torch
    except ImportError:
        raise TinyllamaError("writing a checkpoint needs torch (pip install torch)") from None
    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    state = {}
    for name, tensor in tensors.items():
        raw = torch.from_numpy(np.array(tensor.parts[0], order="C").view(np.uint8))
        state[name] = raw.view(dtypes[tensor.type])
    with blamed(path), path.open("wb") as file:  # a file, for whose errors torch has the system's words
        torch.save(state, file)
