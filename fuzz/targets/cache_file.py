"""Prompt caches: safetensors files of ids, keys and values that say which model's they are; a checksum."""

import json
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st
from safetensors import safe_open

from tinyllama.config import Config
from tinyllama.formats import cache_file
from tinyllama.ops import KVCache

from .. import contract
from ..damage import Field, Number, damaged, pack

READS = ("tinyllama.formats.cache_file",)
WORDS = [b'"__metadata__"', b'"version": "', b'"model": "', b'"dtype": "float16"', b'"n_tokens": "', b'"ids"']
WORDS += [b'"n_many": "', b'"crc32"', b'"layers.0.keys"', b'"layers.1.values"', b'"data_offsets": [0, 8]']

CONFIG = Config(8, 2, 2, 5, 24, 1)
WEIGHTS = SimpleNamespace(type="f16", shape=(2, 8), nbytes=32, data=bytes(range(32)), offset=0, order=None)
TENSORS = {"output.weight": SimpleNamespace(axis=0, pieces=[WEIGHTS])}
#: What a cache must know of its model. Its hyper-parameters are a word: the seeds stay when Config changes.
MODEL = SimpleNamespace(path=Path("m.gguf"), config="tiny", tensors=TENSORS, check_unchanged=lambda: None)
DTYPES = {"float16": "F16", "float32": "F32"}


def check(data: bytes) -> bool:
    """What is read is what the file says, of the model's shape and finite; with a right checksum, too."""
    return sum(_check(some, dtype) for some in (data, checked(data)) for dtype in DTYPES) > 0  # not any: all


def _check(data: bytes, dtype: str) -> bool:
    with contract.folder({"prompt.cache": data}) as folder:
        path = folder / "prompt.cache"
        for mapped in (True, False):
            how = {"cache": KVCache(CONFIG, 64, dtype, MODEL), "vocab_size": CONFIG.vocab_size}
            cache = contract.opened(partial(cache_file.read, **how, mapped=mapped), path)
            if cache is None:
                return False
            fits(cache, len(data))
        contract.must(data == checked(data), "accepted with a wrong checksum")
        agrees(path, cache)
    return True


def fits(cache: KVCache, n_bytes: int) -> None:
    """A cache holds what its length and its model ask for, which lies in a file of so many bytes."""
    n = len(cache)
    contract.must(n > 0 and 0 <= cache.n_many <= n, "numbers of tokens that make no sense")
    contract.must(all(0 <= token < CONFIG.vocab_size for token in cache.ids), "no ids of the vocabulary")
    for array in (*cache.keys, *cache.values):
        n_kv_heads, room, head_dim = array.shape
        shape = n_kv_heads, head_dim
        contract.must(room >= n and shape == (CONFIG.n_kv_heads, CONFIG.head_dim), "another shape")
        contract.must(array[:, :n].nbytes < n_bytes, "more than the file holds")
        contract.must(np.isfinite(array[:, :n]).all(), "NaN or infinity")


def agrees(path: Path, cache: KVCache) -> None:
    """The safetensors package finds the same, of this model; and saved again, it is the same."""
    n = len(cache)
    with safe_open(path, "np") as file:
        about = file.metadata()
        known = about["version"] == cache_file.VERSION and about["model"] == cache_file.identity(MODEL)
        contract.must(known, "accepted of another model or version")
        contract.must(file.get_tensor("ids").tolist() == cache.ids, "other ids")
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            for name, array in (("keys", keys), ("values", values)):
                same = np.array_equal(file.get_tensor(f"layers.{layer}.{name}"), array[:, :n])
                contract.must(same, "not what the safetensors package reads", f"{name} of layer {layer}")
    again = path.with_name("again.cache")
    cache.save(again)
    reread = cache_file.read(again, KVCache(CONFIG, 64, cache.dtype, MODEL), CONFIG.vocab_size)
    contract.must((reread.ids, reread.n_many) == (cache.ids, cache.n_many), "another cache when saved again")


# --- nearly valid files ---------------------------------------------------------------------------


def checked(data: bytes) -> bytes:
    """The same file with the checksum of its bytes."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


@st.composite
def inputs(draw) -> bytes:
    """Caches of one to five tokens with something damaged; the checksum is right where that isn't a field."""
    n_tokens, dtype = draw(st.integers(1, 5)), draw(st.sampled_from(list(DTYPES)))
    what = draw(st.sampled_from(["about", "entries", "header", "ids", "numbers", "fields", "nothing"]))
    header, ids, arrays = header_of(n_tokens, dtype), [Number("i", token) for token in range(n_tokens)], b""
    if what == "about":
        key = draw(st.sampled_from([*header["__metadata__"], "n_many", "n_many", "n_tokens", "other"]))
        header["__metadata__"][key] = draw(st.sampled_from(TEXTS) | VALUES)
    elif what == "entries":
        name = draw(st.sampled_from(list(header)))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        header[name] = draw(st.sampled_from([header[name] | {key: draw(VALUES)}, draw(VALUES)]))
    elif what == "ids":
        ids[draw(st.integers(0, n_tokens - 1))] = Number("i", draw(st.integers(-(2**31), 2**31 - 1)))
    arrays = numbers(n_tokens, dtype)
    if what == "numbers":
        at = draw(st.integers(0, len(arrays) - 1))
        arrays = arrays[:at] + draw(st.sampled_from(NOT_FINITE) | st.binary(max_size=8)) + arrays[at:]
        arrays = arrays[: len(numbers(n_tokens, dtype))]
    encoded = json.dumps(header).encode()
    cut = [encoded[start : start + 16] for start in range(0, len(encoded), 16)]
    encoded = draw(damaged(cut)) if what == "header" else encoded
    whole = [Number("Q", len(encoded)), encoded, *ids, arrays, bytes(4)]
    return draw(damaged(whole)) if what == "fields" else checked(pack(whole))


NOT_FINITE = [np.array(value, dtype).tobytes() for value in (np.nan, -np.inf) for dtype in DTYPES]
TEXTS = [
    "",
    "0",
    "1",
    "2",
    "3",
    "5",
    "6",
    "007",
    "10",
    "64",
    "-1",
    "1e3",
    "٣",
    "9" * 9,
    "9" * 5000,
    "float16",
    "float32",
]
TEXTS += ["float64", "x" * 3000, "\x1b[2J\n", cache_file.VERSION]
ODD = [0, -1, 1, 8, 2**31, 2**63, 10**400, 1.0, float("nan"), None, True, "F16", "I64", [], {}, [0, 8]]
VALUES = st.sampled_from([*ODD, [8, 0], [-8, 0], [1, 1, 1], [0], [2, 5, 4], [[0, 8]], [2**40, 2**40 + 8]])


def header_of(n_tokens: int, dtype: str) -> dict:
    """The header of a cache, without its packing."""
    about = {"format": "tinyllama prompt cache", "version": cache_file.VERSION}
    about |= {"model": cache_file.identity(MODEL), "name": "m.gguf", "dtype": dtype}
    about |= {"n_tokens": str(n_tokens), "n_many": str(n_tokens // 2)}
    shape = [CONFIG.n_kv_heads, n_tokens, CONFIG.head_dim]
    layers = [f"layers.{layer}.{what}" for layer in range(CONFIG.n_layers) for what in ("keys", "values")]
    tensors = [("ids", "I32", [n_tokens]), *((name, DTYPES[dtype], shape) for name in layers)]
    header, end = {"__metadata__": about}, 0
    for name, kind, axes in [*tensors, ("crc32", "U32", [1])]:
        start, end = end, end + int(np.prod(axes)) * int(kind[1:]) // 8
        header[name] = {"dtype": kind, "shape": axes, "data_offsets": [start, end]}
    return header


def numbers(n_tokens: int, dtype: str) -> bytes:
    """Keys and values of all layers, no two alike."""
    n = 2 * CONFIG.n_layers * CONFIG.kv_dim * n_tokens
    return (np.arange(n) / 64).astype(dtype).tobytes()


def file(n_tokens: int, dtype: str) -> bytes:
    """A whole file."""
    header = json.dumps(header_of(n_tokens, dtype)).encode()
    fields: list[Field] = [Number("Q", len(header)), header, np.arange(n_tokens, dtype="<i4").tobytes()]
    return checked(pack([*fields, numbers(n_tokens, dtype), bytes(4)]))


def seeds() -> dict[str, bytes]:
    """One of each precision."""
    return {dtype: file(3, dtype) for dtype in DTYPES}
