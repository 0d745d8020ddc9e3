"""Prompt caches on disk: the keys and values of a text's tokens, which needn't be read again.

A safetensors file (safetensors.py has the layout), which the safetensors package opens, too:

    __metadata__      strings: "format" and "version" of what the file holds; "model", which is the model's
                      `identity`, and its "name" for messages; "dtype" of the numbers; "n_tokens"; "n_many"
    ids               I32 [n_tokens]
    layers.N.keys     F32 or F16, as the backend keeps them, turned by RoPE: [n_kv_heads, n_tokens, head_dim]
    layers.N.values   likewise
    crc32             U32 [1]: zlib.crc32 of all bytes before it

Keys and values mean nothing to other weights than those that made them. So the file names its model, by a
hash of the hyper-parameters and of each tensor's name, type, shape and samples: SAMPLES times SAMPLE bytes
at equal distances, from the first byte to the last; small tensors, such as norms, whole. A hash of all bytes
would take seconds for a model of 7B, as long as reading a short prompt, and would fetch all of a mapped file
from the disk; the samples take milliseconds. Another training or quantization differs in nearly every block.
Only a file of which somebody has changed single weights may be taken for the one before. Path and time don't
count: a copy of a file is the same model.
"""

import json
import math
import zlib
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np

from ..errors import Cancelled, TinyllamaError, check_cancelled, naming, require
from ..machine.files import MappedFile, kind_of, reserve, written
from ..quant import TYPES, BlockType
from . import Checkpoint
from .folders import parse_json

VERSION = "1"  # of what the arrays hold: another order of RoPE's pairs, say, is another version
MAGIC = b'{"__metadata__": {"format": "tinyllama prompt cache"'  # what the header begins with
LARGEST_HEADER = 1 << 20  # bytes; a layer takes 200
SAMPLES, SAMPLE = 4, 4096
STEP = 1 << 20  # bytes that are checked at a time: they stay in the processor's cache
#: -> its names in the file, in TYPES.
PRECISIONS = {"float16": ("F16", "f16"), "bfloat16": ("BF16", "bf16"), "float32": ("F32", "f32")}


def identity(checkpoint: Checkpoint) -> str:
    """What tells a model from all others: 64 hexadecimal digits.

    Raises TinyllamaError where the model has been closed, or its file was changed since it was opened.
    """
    with naming(checkpoint.path):
        require(checkpoint.tensors, "has been closed: save caches of it before")
        found = sha256(repr(checkpoint.config).encode())
        for name, tensor in sorted(checkpoint.tensors.items()):
            for piece in tensor.pieces:
                lies = f"{name} {piece.type} {piece.shape} {tensor.axis} {piece.order is None}"
                found.update(lies.encode())
                data = memoryview(piece.data)[piece.offset : piece.offset + piece.nbytes]
                whole = piece.nbytes <= SAMPLES * SAMPLE
                places = np.linspace(0, piece.nbytes - SAMPLE, SAMPLES, dtype=np.int64)
                for some in [data] if whole else [data[at : at + SAMPLE] for at in places]:
                    found.update(some)
        checkpoint.check_unchanged()
    return found.hexdigest()


def _entries(cache, n_tokens: int) -> dict[str, dict]:
    """What the header says of each tensor of such a cache, in the file's order."""
    n_kv_heads, _, head_dim = cache.keys[0].shape
    dtype, _ = PRECISIONS[cache.dtype]
    layers = range(len(cache.keys))
    names = [f"layers.{layer}.{what}" for layer in layers for what in ("keys", "values")]
    tensors = {"ids": ("I32", [n_tokens])}
    tensors |= dict.fromkeys(names, (dtype, [n_kv_heads, n_tokens, head_dim])) | {"crc32": ("U32", [1])}
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + int(dtype[-2:]) // 8 * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return entries


# --- writing --------------------------------------------------------------------------------------


def write(cache, path: str | Path, n_tokens: int | None = None) -> None:
    """Save a `KVCache` of a model, or its first n_tokens: the whole file, or none.

    The arrays go to the disk from where they are; no copy of them is made.
    """
    ids = np.array(cache.ids[:n_tokens], "<i4")
    with naming(path):
        require(len(ids), "a cache without tokens has nothing to save")
        require(cache.model, "a cache of no model can't be saved: `Llama.new_cache` makes one that can")
        require(not cache.edited, "what `Llama.edit` has changed isn't the model's: it can't be saved")
        about = {"format": "tinyllama prompt cache", "version": VERSION, "model": identity(cache.model)}
        about |= {"name": cache.model.path.name, "dtype": cache.dtype}
        about |= {"n_tokens": str(len(ids)), "n_many": str(min(cache.n_many, len(ids)))}
    entries = _entries(cache, len(ids))
    header = json.dumps({"__metadata__": about, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with written(path) as (unfinished,), unfinished.open("r+b") as file:
        reserve(file, 8 + len(header) + entries["crc32"]["data_offsets"][1])
        crc = 0
        for data in chain([len(header).to_bytes(8, "little"), header, ids], _rows(cache, len(ids))):
            check_cancelled()
            crc = zlib.crc32(data, crc)
            file.write(data)
        file.write(crc.to_bytes(4, "little"))


def _rows(cache, n_tokens: int) -> Iterator[np.ndarray]:
    """The keys and values of each head, layer by layer: [n_tokens, head_dim], contiguous."""
    _, type = PRECISIONS[cache.dtype]
    for layer in zip(cache.keys, cache.values, strict=True):
        for head in chain(*layer):
            yield np.ascontiguousarray(TYPES[type].quantize(cache.to_numpy(head[:n_tokens])))


# --- reading --------------------------------------------------------------------------------------


def opened(path: str | Path | MappedFile) -> MappedFile:
    """A prompt cache, mapped. Raises TinyllamaError, naming the file, where it is none at all."""
    file = MappedFile(path)
    is_cache = file[8 : 8 + len(MAGIC)] == MAGIC
    require(is_cache, f"{file.path}: is no prompt cache but {kind_of(file)}: name another file")
    return file


def read(path: str | Path | MappedFile, cache, vocab_size: int, mapped: bool = False):
    """The `KVCache` that `write` has put into a file.

    Args:
        cache: an empty one of the model that is to go on; it is filled.
        mapped: leave keys and values in the file, read-only, for `Remembered.keep`: who goes on from there
            copies what it needs. Else they are in memory, with room for more.
    Raises:
        TinyllamaError: names the file and what is wrong with it: of another model, precision or version;
            damaged, cut short, with NaN or infinity; with ids that are none of the vocabulary's; no cache.
    """
    file = opened(path)
    try:
        with naming(file.path):
            _fill(cache, file)
            ids, n = cache.ids, len(cache.ids)
            require(min(ids) >= 0 and max(ids) < vocab_size, "holds ids that the vocabulary doesn't have")
            cache.n_ctx = max(cache.n_ctx, n * mapped)  # they take no memory
            fits = n <= cache.n_ctx
            file.check()
    except Cancelled:
        raise
    except TinyllamaError as error:
        raise TinyllamaError(f"{error}: the text has to be read again") from None
    require(
        fits, f"{file.path}: holds {n} tokens, and there is room for {cache.n_ctx}: say n_ctx={n} or more"
    )
    return cache if mapped else cache.fork()


def _fill(cache, file: MappedFile) -> None:
    """Ids, keys and values, once all that the file says and holds has been checked."""
    start = 8 + int.from_bytes(file[:8], "little")
    require(start <= min(len(file), LARGEST_HEADER), "is damaged or cut short within its header")
    with naming("is damaged"):
        header = parse_json(file[8:start])
    n_tokens, n_many = _about(cache, header.pop("__metadata__"))
    entries = _entries(cache, n_tokens)
    for name in entries | header:
        found = f"is damaged: {name} isn't what this model's cache has"
        require(header.get(name) == entries.get(name), found)
    size = start + entries["crc32"]["data_offsets"][1]
    require(size == len(file), f"is damaged or cut short: it has {len(file):,} bytes, and needs {size:,}")
    arrays = start + entries["ids"]["data_offsets"][1]
    _, type = PRECISIONS[cache.dtype]
    _check(file, arrays, TYPES[type])
    cache.ids, cache.n_many = np.frombuffer(file, "<i4", n_tokens, start).tolist(), n_many
    for layer in range(len(cache.keys)):
        for what, kept in (("keys", cache.keys), ("values", cache.values)):
            entry = entries[f"layers.{layer}.{what}"]
            numbers = TYPES[type].view(file, entry["shape"], start + entry["data_offsets"][0])
            kept[layer] = TYPES[type].dequantize(numbers) if type == "bf16" else numbers  # NumPy has none
    cache.in_file = True


def _about(cache, about: object) -> tuple[int, int]:
    """How many tokens the file says it holds, and how many of them were computed among many."""
    strings = isinstance(about, dict) and all(isinstance(text, str) for text in about.values())
    require(strings, "is damaged: its metadata are no strings")
    version, dtype = about.get("version"), about.get("dtype")
    require(version == VERSION, f"is of the version {version}, and this tinyllama reads {VERSION}")
    ours = about.get("model") == identity(cache.model)
    require(ours, f"is of another model, {about.get('name')}, not of {cache.model.path.name}")
    wanted = cache.dtype
    right = dtype == wanted
    require(right, f"is of a backend that keeps {dtype}, and this one keeps {wanted}")
    numbers = [about.get(key, "") for key in ("n_tokens", "n_many")]
    plain = all(text.isascii() and text.isdigit() and len(text) < 10 for text in numbers)
    n_tokens, n_many = map(int, numbers) if plain else (0, 0)
    require(n_many <= n_tokens > 0, "is damaged: its numbers of tokens make no sense")
    return n_tokens, n_many


def _check(file: MappedFile, arrays: int, kind: BlockType) -> None:
    """Raises TinyllamaError unless the checksum is right, and all numbers behind byte `arrays` finite."""
    end = len(file) - 4
    data = memoryview(file)[:end]
    crc = zlib.crc32(data[:arrays])
    for at in range(arrays, end, STEP):
        check_cancelled()
        some = data[at : min(at + STEP, end)]
        crc = zlib.crc32(some, crc)
        finite = kind.is_finite(np.frombuffer(some, kind.dtype))
        require(finite, "holds NaN or infinity")
    require(crc == int.from_bytes(file[end:], "little"), "is damaged: its checksum isn't that of its bytes")
