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
"""

import re
import struct
import zipfile
from pathlib import Path
from zlib import crc32

from ..errors import naming, require
from ..machine.files import MappedFile, kind_of
from ..quant import TYPES
from ..tensor import Piece
from .parts import Part, check_shape
from .unpickle import SavedTensor, read_tensors

LARGEST_PICKLE = 1 << 19  # bytes; a tensor takes 100 to 250, 65B has 723, an optimizer three for each
LARGEST_DIRECTORY = 1 << 21  # bytes; 65B's is 0.1 MB
STORAGES = {"torch HalfStorage": "f16", "torch BFloat16Storage": "bf16", "torch FloatStorage": "f32"}

#: What may follow a member: the next one, the directory, what ends a member of unknown size, zip64's end.
NEXT = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08", b"PK\x06\x06")


def read_part(path: Path) -> Part:
    """Map one .pth file and find its tensors.

    Raises TinyllamaError, naming the file, where it is another, wants to run code, or lacks what it names.
    """
    with naming(path):
        file = MappedFile(path)
        members = _members(file)
        program = next((name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
        require(program, "a zip archive without data.pkl, no checkpoint")
        root = program.removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        little = order is None or _content(file, order) == b"little"
        require(little, "was saved on a big-endian machine: save it again on another")
        part = {}
        for name, tensor in read_tensors(_content(file, members[program])).items():
            with naming(f"the tensor {name}"):
                if not name.endswith("freqs"):
                    part[name] = _piece(file, tensor, members.get(f"{root}data/{tensor.key}"))
        return part


class _Bounded:
    """What zipfile sees of a file: no more at a time than a directory may have, whatever its end says."""

    def __init__(self, file: MappedFile):
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = LARGEST_DIRECTORY) -> bytes:
        require(size <= LARGEST_DIRECTORY, f"it would have {size:,} bytes")
        return self._file.read(size)


def _members(file: MappedFile) -> dict[str, zipfile.ZipInfo]:
    """The zip directory. An archive begins with a member and ends with 22 bytes that say where that is."""
    head, tail = file[:4], file[-22:]
    is_old = re.match(rb"\x80[\x02-\x05]", head)
    require(not is_old, "of torch older than 1.6: load it there and save it again as a zip")
    require(head == b"PK\x03\x04", f"no checkpoint but {kind_of(file)}")
    whole = tail.startswith(b"PK\x05\x06")
    require(whole, "is cut short or has something appended: no zip archive ends like this")
    with naming("its zip directory is damaged", zipfile.BadZipFile, NotImplementedError, struct.error):
        infos = zipfile.ZipFile(_Bounded(file)).infolist()
        members = {info.filename: info for info in infos}
        require(len(members) == len(infos), "it names a member twice")
    return members


def _content(file: MappedFile, info: zipfile.ZipInfo) -> bytes:
    """A small member. Its CRC is 0 where torch.save was told to compute none."""
    offset = _data_offset(file, info)
    require(info.file_size <= LARGEST_PICKLE, f"is damaged: {info.filename} has {info.file_size:,} bytes")
    data = file[offset : offset + info.file_size]
    right = info.CRC in (0, crc32(data))
    require(right, f"is damaged: {info.filename} at byte {offset:,} doesn't match its checksum")
    return data


def _data_offset(file: MappedFile, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin, after its local header, name and extra field."""
    is_stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    require(is_stored, f"{info.filename} is compressed or encrypted: save it again with torch.save")
    at, name = info.header_offset, info.orig_filename.encode("utf-8")
    n_name, n_extra = struct.unpack("<HH", file[at + 26 : at + 30].ljust(4, b"\0")) if at >= 0 else (0, 0)
    found = n_name and file[at : at + 4] == b"PK\x03\x04" and file[at + 30 : at + 30 + n_name] == name
    require(found, f"is damaged: {info.filename} isn't where the zip directory says")
    offset = at + 30 + n_name + n_extra
    end = offset + info.file_size
    require(end <= len(file), f"is cut short within {info.filename}")
    right = file[end : end + 4] in NEXT
    require(right, f"is damaged: {info.filename} doesn't end at byte {end:,} as it should")
    return offset


def _piece(file: MappedFile, tensor: SavedTensor, info: zipfile.ZipInfo | None) -> Piece:
    """Where the weights of a tensor lie, once everything said about them holds."""
    storage, _, n_elements, start, shape, stride = tensor
    require(storage in STORAGES, f"{storage[:80]} can't be read; float16, bfloat16 and float32 can")
    check_shape(shape)
    require(stride == (*shape[1:], 1), "isn't contiguous: save it again after .contiguous()")
    require(info, "its weights are missing")
    itemsize = TYPES[STORAGES[storage]].dtype.itemsize
    piece = Piece(file, _data_offset(file, info) + start * itemsize, STORAGES[storage], shape)
    whole = n_elements * itemsize == info.file_size
    require(whole, f"{info.filename} isn't {n_elements:,} of {storage}: the file is damaged")
    inside = start >= 0 and start * itemsize + piece.nbytes <= info.file_size
    require(inside, f"isn't inside of {info.filename}")
    return piece
