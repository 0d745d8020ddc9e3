"""Meta's checkpoint: consolidated.00.pth, consolidated.01.pth, ... beside params.json.

A .pth file is a zip archive whose members are stored, not compressed, as torch.save writes it:

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

Beside the parts: params.json (hyper-parameters), checklist.chk (md5 sums), and, there or one folder
up, tokenizer.model. Tensors named `*freqs` are tables of RoPE, which everybody computes afresh.
"""

import json
import pickle
import re
import shutil
import struct
import zipfile
from collections import OrderedDict
from io import BytesIO
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import Config
from ..errors import TinyllamaError
from ..quant import TYPES, Tensor
from ..vocabulary import Vocabulary
from . import Checkpoint
from .parts import Entry, Part, count_parts, cut, map_file, merge, split_axis, what_it_is

LARGEST_PICKLE = 64 << 20  # bytes; 65B's is 0.2 MB


def read(folder: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder: every part, params.json, and tokenizer.model there or one folder up.

    Raises TinyllamaError, naming the file, where one is missing or doesn't hold what a LLaMA needs.
    """
    folder = Path(folder)
    parts = [read_part(path) for path in part_paths(folder)]
    params = read_params(folder)
    config = _config(folder, params, parts[0])
    _check_count(folder, parts, config)
    model = find_tokenizer(folder)
    if model is None:
        raise TinyllamaError(f"{folder / 'tokenizer.model'} is missing, and it isn't one folder up either")
    vocabulary = Vocabulary("sentencepiece", model=model)
    files = [part.path for part in parts]
    return Checkpoint(folder, "meta", config, merge(parts, config), vocabulary, files, params)


# --- the files around the weights -----------------------------------------------------------------


def read_params(folder: Path) -> dict:
    """params.json of a folder."""
    path = folder / "params.json"
    try:
        params = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TinyllamaError(f"{path} is missing") from None
    except (ValueError, RecursionError):
        raise TinyllamaError(f"{path} isn't JSON") from None
    except OSError as error:
        raise TinyllamaError(f"{path}: {error.strerror}") from None
    if not isinstance(params, dict):
        raise TinyllamaError(f"{path} holds no hyper-parameters")
    return params


def find_tokenizer(folder: Path) -> Path | None:
    """tokenizer.model in a folder or, where Meta puts it, in its parent."""
    candidates = (folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model")
    return next((path for path in candidates if path.is_file()), None)


def read_checklist(folder: Path) -> dict[str, str]:
    """File name -> md5 in hex, from Meta's checklist.chk; empty where there is none."""
    path = folder / "checklist.chk"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="ascii", errors="replace")
    return {
        name: md5.lower() for md5, name in re.findall(r"^([0-9a-fA-F]{32})[ *]+(\S+)\s*$", text, re.MULTILINE)
    }


def _config(folder: Path, params: dict, part: Part) -> Config:
    path, name = folder / "params.json", "tok_embeddings.weight"
    if name not in part.entries:
        raise TinyllamaError(f"{part.path} lacks the tensor {name}: it holds no LLaMA")
    vocab_size = part.entries[name].shape[0]
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise TinyllamaError(
            f"{path}: vocab_size is {params['vocab_size']}, but {part.path} embeds {vocab_size}"
        )
    try:
        config = Config.from_params(params, vocab_size)
    except KeyError as error:
        raise TinyllamaError(f"{path} lacks {error}") from None
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, TinyllamaError) as error:
        raise TinyllamaError(f"{path}: {error}") from None
    if config.n_layers > len(part.entries):
        raise TinyllamaError(
            f"{path} speaks of {config.n_layers} layers; {part.path} doesn't hold as many tensors"
        )
    return config


def _check_count(folder: Path, parts: list[Part], config: Config) -> None:
    """Every part says by its shapes how many there must be."""
    n_parts = count_parts(parts[0], config)
    if len(parts) < n_parts:
        missing = folder / part_name(len(parts))
        raise TinyllamaError(f"{missing} is missing: this checkpoint is cut into {n_parts} parts")
    if len(parts) > n_parts:
        raise TinyllamaError(
            f"{parts[n_parts].path} is one part too many: {parts[0].path.name} is 1 of {n_parts}"
        )


# --- the parts ------------------------------------------------------------------------------------


def part_name(number: int) -> str:
    """consolidated.00.pth, consolidated.01.pth, ..."""
    return f"consolidated.{number:02d}.pth"


def part_paths(folder: Path) -> list[Path]:
    """Every consolidated.NN.pth of a folder, 00 first, without a hole."""
    if not folder.is_dir():
        raise TinyllamaError(f"{folder}: no such folder")
    found = {path.name for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", path.name)}
    paths = [folder / part_name(number) for number in range(max(len(found), 1))]
    for path in paths:
        if path.name not in found:
            raise TinyllamaError(f"{path} is missing")
    return paths


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
        raise TinyllamaError(f"{where} is a {storage.type}; float16, bfloat16 and float32 can be read")
    if not _is_shape(shape) or not _is_shape((start,), smallest=0):
        raise TinyllamaError(f"{where} has the shape {shape}; one or two positive axes can be read")
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
        raise TinyllamaError(f"wants to run {module}.{name}")

    def persistent_load(self, saved_id):
        _, type, key, *_ = saved_id
        return _Storage(str(type), str(key))


def _unpickle(path: Path, data: bytes) -> dict[str, _Tensor]:
    """Tensors by name. Whatever a crafted pickle does to the machine, it ends here."""
    try:
        tensors = _Unpickler(BytesIO(data)).load()
    except TinyllamaError as error:
        raise TinyllamaError(
            f"{path} {error}: that is no checkpoint, don't open it elsewhere either"
        ) from None
    except Exception as error:
        raise TinyllamaError(f"{path} is damaged: its data.pkl can't be read ({error})") from None
    is_checkpoint = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, _Tensor) and isinstance(tensor.storage, _Storage)
        for name, tensor in tensors.items()
    )
    if not is_checkpoint or not tensors:
        raise TinyllamaError(f"{path} is a torch file but no checkpoint: it holds no dict of tensors")
    return tensors


# --- cutting --------------------------------------------------------------------------------------


def split(folder: str | Path, out_folder: str | Path, n_parts: int) -> list[Path]:
    """Cut a checkpoint of one part into several, as Meta cut 13B and larger (needs torch to write them).

    Returns the new parts. params.json and tokenizer.model are copied beside them. Raises TinyllamaError
    where the tensors don't divide.
    """
    folder, out_folder = Path(folder), Path(out_folder)
    checkpoint = read(folder)
    if n_parts < 1 or len(checkpoint.files) > 1:
        raise TinyllamaError(f"{folder}: {len(checkpoint.files)} part(s) can't be cut into {n_parts}")
    if out_folder.resolve() == folder.resolve():
        raise TinyllamaError(f"{out_folder}: the parts would replace the checkpoint itself")
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2 and tensor.shape[split_axis(name)] % n_parts:
            raise TinyllamaError(f"{folder}: {name} {list(tensor.shape)} doesn't divide into {n_parts} parts")
    out_folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "params.json", out_folder)
    shutil.copy(checkpoint.vocabulary.model, out_folder)
    paths = [out_folder / part_name(number) for number in range(n_parts)]
    for number, path in enumerate(paths):
        save({name: cut(tensor, number, n_parts) for name, tensor in checkpoint.tensors.items()}, path)
    return paths


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
    torch.save(state, path)
