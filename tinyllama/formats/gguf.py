"""GGUF, today's file of llama.cpp: everything that a model needs in one file that can be mapped into memory.

Little-endian. A **string** is a u64 length and that many bytes of UTF-8. In order:

1. **Header**: the bytes `GGUF`, u32 version (3; 2 is laid out alike), u64 number of tensors, u64 number of
   key-values.
2. **Key-values**: string key, u32 type, value. The types are 0 u8, 1 i8, 2 u16, 3 i16, 4 u32, 5 i32, 6 f32,
   7 bool (a byte), 8 string, 9 array, 10 u64, 11 i64, 12 f64; an array is the u32 type of its elements, their
   u64 number, and the elements. `general.*` says what the file is, the architecture's keys (`llama.*`) give
   the hyper-parameters, `tokenizer.ggml.*` the whole vocabulary: arrays of `tokens`, their `token_type`, and
   `scores` (SentencePiece) or `merges` (byte-level BPE).
3. **Tensor infos**: string name, u32 number of axes, u64 length of each axis, **innermost first** (the
   reverse of our [n_out, n_in]), u32 type (the `gguf_id` of quant.TYPES), u64 offset into the data.
4. **Padding** with zeros to a multiple of `general.alignment`, 32 where that key is missing.
5. **Data**: the blocks of each tensor at its offset, each padded to the alignment in turn.

Without a tensor `output.weight` the output matrix is `token_embd.weight`. wq and wk lie as Meta's do, in
interleaved RoPE pairs. Source: docs/gguf.md of the ggml repository.
"""

import math
from pathlib import Path

from ..config import FAMILIES, STEPS, Config, tensor_names
from ..errors import naming, require
from ..machine.files import MappedFile
from ..quant import TYPES
from ..tensor import Piece, Tensor
from ..tokenizer import CONTROL, Vocabulary
from . import Checkpoint
from .cursor import ARRAY, F32, I32, STRING, Cursor

MAGIC = b"GGUF"

TYPE_OF_ID = {kind.gguf_id: kind for kind in TYPES.values() if kind.gguf_id is not None}
OTHER_TYPES = {16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 21: "iq3_s", 22: "iq2_s"}

#: The architecture's keys (behind "llama.") and the fields of Config that they give.
FIELDS = {
    "block_count": "n_layers",
    "context_length": "max_seq_len",
    "embedding_length": "dim",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
#: Keys that say again what follows from others or the vocabulary. The first two are written.
IMPLIED = {"rope.dimension_count": "head_dim", "vocab_size": "vocab_size"}
IMPLIED |= {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
#: Keys that change nothing, whatever they say, and those that change nothing with these values.
IGNORED = {"tensor_data_layout", "expert_used_count", "attention.layer_norm_epsilon"}
IGNORED |= {"rope.scaling.finetuned", "rope.scaling.original_context_length"}
WITHOUT_EFFECT = {
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
}

#: Arrays that become a Vocabulary: its field, and the type of the elements.
ARRAYS = {
    "tokenizer.ggml.tokens": ("pieces", STRING),
    "tokenizer.ggml.scores": ("scores", F32),
    "tokenizer.ggml.token_type": ("types", I32),
    "tokenizer.ggml.merges": ("merges", STRING),
}
#: Control pieces that end a text whether or not a key says so; llama.cpp goes by such a list, too.
END_PIECES = {"<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"}

ROPE_FREQS = "rope_freqs.weight"  # of Llama 3.1: a divisor for each RoPE frequency, [head_dim / 2]

# Several times what any model has; a file that claims more is damaged.
LARGEST_ALIGNMENT = 1 << 16  # bytes; so many are written between header and data
MOST = 1 << 14  # tensors, or key-values

WANTED = {int: "a positive whole number", float: "a positive number", bool: "true or false", str: "a string"}


class Metadata(dict):
    """Key-values as plain Python values that remember their GGUF types, so that writing them loses nothing.

    `types[key]` is the number of a value's type, or of its elements' type where the value is a list.
    """

    def __init__(self, values=(), types: dict[str, int] | None = None):
        super().__init__(values)
        self.types = dict(types or {})

    def set(self, key: str, value, kind: int) -> None:
        """Give a key a value of a type (a list: of elements of this type)."""
        self[key], self.types[key] = value, kind

    def value(self, key: str, kind: type, default=None):
        """A string, a bool, or a positive int or float; raises TinyllamaError where it isn't one."""
        value = self.get(key, default)
        require(value is not None, f"the key {key} is missing")
        right = type(value) is kind and (kind in (bool, str) or 0 < value < math.inf)
        require(right, f"the key {key} must be {WANTED[kind]}, not {shown(value)}")
        return value

    def alignment(self) -> int:
        """What the offsets of tensors are multiples of, in bytes."""
        alignment = self.value("general.alignment", int, 32)
        fine = alignment <= LARGEST_ALIGNMENT and alignment & (alignment - 1) == 0
        require(fine, f"general.alignment is {alignment}, not a power of two up to {LARGEST_ALIGNMENT}")
        return alignment


def shown(value: object) -> str:
    """A value for an error message."""
    return f"an array of {len(value)}" if isinstance(value, list) else repr(value)[:40]


# --- reading --------------------------------------------------------------------------------------


def recognizes(file: MappedFile) -> bool:
    """Whether a file starts with GGUF's magic."""
    return file[: len(MAGIC)] == MAGIC


def stamp(path: Path) -> list[Path]:
    """The files that `read` looks at."""
    return [path]


def read(source: str | Path | MappedFile) -> Checkpoint:
    """Open a GGUF file of a known architecture; its weights stay on disk, mapped into memory.

    Raises TinyllamaError, naming the file, where it isn't one, where a count, length, offset or shape in it
    can't be true, and where it holds something that isn't supported.
    """
    file = MappedFile(source)
    with naming(file.path):
        cursor = Cursor(file)
        n_tensors, n_keys = _read_header(cursor)
        metadata = _read_metadata(cursor, n_keys)
        infos = _read_infos(cursor, n_tensors)
        _check_keys(metadata)
        vocabulary = _vocabulary(metadata)
        config = _config(metadata, len(vocabulary.pieces))
        tensors = _tensors(cursor, infos, config, metadata.alignment())
    return Checkpoint(file.path, "gguf", config, tensors, vocabulary, [file], metadata)


def _read_header(cursor: Cursor) -> tuple[int, int]:
    """The numbers of tensors and of key-values."""
    require(cursor.data[: len(MAGIC)] == MAGIC, "not a GGUF file, it doesn't start with the bytes GGUF")
    _, version = cursor.numbers("II", "the version")
    require(version & 0xFFFF, "a big-endian GGUF file, which isn't supported")
    require(version in (2, 3), f"version {version} of GGUF isn't supported, only 2 and 3")
    n_tensors, n_keys = cursor.numbers("QQ", "the header")
    fit = 32 * n_tensors + 13 * n_keys <= cursor.size and max(n_tensors, n_keys) <= MOST
    require(fit, f"{n_tensors} tensors and {n_keys} key-values can't be in a file of {cursor.size} bytes")
    return n_tensors, n_keys


def _read_infos(cursor: Cursor, n_tensors: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """GGUF's name of each tensor -> (shape outermost first, type id, offset into the data)."""
    infos = {}
    for index in range(n_tensors):
        name = cursor.name(f"the name of tensor {index} of {n_tensors}")
        what = f"the tensor {name}"
        require(name not in infos, f"{what} is there twice")
        (n_axes,) = cursor.numbers("I", what)
        require(1 <= n_axes <= 4, f"{what} has {n_axes} axes: 1 to 4 are possible")
        *axes, type_id, offset = cursor.numbers(f"{n_axes}QIQ", what)
        infos[name] = tuple(reversed(axes)), type_id, offset
    return infos


def _read_metadata(cursor: Cursor, n_keys: int) -> Metadata:
    """Read n_keys key-values. Raises TinyllamaError naming the key that is wrong."""
    metadata = Metadata()
    for index in range(n_keys):
        key = cursor.name(f"key {index} of {n_keys}")
        what = f"the key {key}"
        require(key not in metadata, f"{what} is there twice")
        (kind,) = cursor.numbers("I", what)
        if kind == ARRAY:
            kind, count = cursor.numbers("IQ", what)
            metadata.set(key, cursor.values(kind, count, what), kind)
        else:
            metadata.set(key, cursor.values(kind, 1, what)[0], kind)
    return metadata


# --- what the key-values mean ---------------------------------------------------------------------


def _check_keys(metadata: Metadata) -> None:
    """Refuse what would have to be computed in another way."""
    family, known = metadata.value("general.architecture", str, ""), ", ".join(map(repr, FAMILIES))
    require(family in FAMILIES, f"a model of the architecture {family!r}: only {known} is supported")
    parts = metadata.get("split.count", 1)
    require(parts in (0, 1), "one part of a split model: join them with llama.cpp's llama-gguf-split --merge")
    known = FIELDS | IMPLIED | dict.fromkeys(IGNORED)
    for key, value in metadata.items():
        prefix, _, name = key.partition(".")
        if prefix == family:
            allowed = WITHOUT_EFFECT.get(name, [value] if name in known else [])
            why = "this may change what a model computes, and isn't supported"
            require(value in allowed, f"the key {key} is {shown(value)}: {why}")


def _config(metadata: Metadata, vocab_size: int) -> Config:
    family = metadata["general.architecture"]
    defaults = {"n_kv_heads": metadata.get(f"{family}.attention.head_count"), "rope_theta": 10000.0}
    found = {
        field: metadata.value(f"{family}.{key}", Config.__annotations__[field], defaults.get(field))
        for key, field in FIELDS.items()
    }
    config = Config(**found, vocab_size=vocab_size, family=family)
    for key, field in IMPLIED.items():
        number, implied = metadata.get(f"{family}.{key}"), getattr(config, field)
        require(number in (None, implied), f"{family}.{key} is {number}, but {field} is {implied}")
    return config


def _vocabulary(metadata: Metadata) -> Vocabulary:
    """Take the vocabulary's arrays out of the metadata. Missing ids and flags are as llama.cpp has them."""
    model, arrays, ids = metadata.value("tokenizer.ggml.model", str, ""), {}, {}
    known = model in ("llama", "gpt2")
    require(known, f"a tokenizer of the kind {model!r}: only 'llama' and 'gpt2' are supported")
    is_spm = model == "llama"
    for key, (field, kind) in ARRAYS.items():
        arrays[field] = metadata.pop(key, [])
        right = isinstance(arrays[field], list) and metadata.types.pop(key, kind) == kind
        require(right, f"the key {key} isn't an array of values of type {kind}")
    require(arrays["pieces"], "there is no vocabulary in it (tokenizer.ggml.tokens)")
    for name, default in {"bos": 1, "eos": 2, "unknown": 0, "eot": None, "eom": None}.items():
        key = f"tokenizer.ggml.{name}_token_id"
        ids[name] = found = metadata.get(key, default if is_spm else None)
        require(type(found) in (int, type(None)), f"the key {key} must be a whole number, not {shown(found)}")
    ends = [ids["eot"], ids["eom"]]  # then those known by their spelling
    rows = enumerate(zip(arrays["pieces"], arrays["types"], strict=False))
    ends += [token_id for token_id, (piece, kind) in rows if kind == CONTROL and piece in END_PIECES]
    pre = "" if is_spm else metadata.value("tokenizer.ggml.pre", str, "")
    return Vocabulary(
        kind="sentencepiece" if is_spm else "bpe",
        **{field: tuple(array) for field, array in arrays.items()},
        pre=pre,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids["unknown"],
        stop_ids=tuple(dict.fromkeys(end for end in ends if end not in (None, ids["eos"]))),
        add_bos=metadata.value("tokenizer.ggml.add_bos_token", bool, is_spm or pre == "llama-bpe"),
        add_space_prefix=metadata.value("tokenizer.ggml.add_space_prefix", bool, is_spm),
    )


# --- tensors --------------------------------------------------------------------------------------


def _tensors(cursor: Cursor, infos: dict, config: Config, alignment: int) -> dict[str, Tensor]:
    """Every tensor by Meta's name."""
    shapes = config.tensor_shapes()
    names = {name: meta_name for meta_name, name, _ in tensor_names(config.n_layers, STEPS)}
    names = {name: meta_name for name, meta_name in names.items() if meta_name in shapes}
    missing = names.keys() - infos.keys() - {"output.weight"}  # which tied embeddings don't have
    require(not missing, f"{len(missing)} tensors are missing, {min(missing, default='')} among them")
    names[ROPE_FREQS], shapes[ROPE_FREQS] = ROPE_FREQS, (config.head_dim // 2,)
    start, pieces = align(cursor.offset, alignment), {}
    known = ", ".join(kind.name for kind in TYPE_OF_ID.values())
    for name, (shape, type_id, offset) in infos.items():
        require(name in names, f"the tensor {name} is none of a LLaMA's")
        expected = shapes[names[name]]
        require(shape == expected, f"the tensor {name} is {list(shape)}, it should be {list(expected)}")
        other = OTHER_TYPES.get(type_id, f"number {type_id}")
        require(type_id in TYPE_OF_ID, f"the tensor {name} is of type {other}: supported are {known}")
        kind = TYPE_OF_ID[type_id]
        fits = shape[-1] % kind.block == 0 and (len(shape) == 2 or kind.block == 1)
        require(fits, f"the tensor {name} is {list(shape)}, which can't be of type {kind.name}")
        pieces[name] = Piece(cursor.data, start + offset, kind.name, shape)
    _check_layout(pieces, start, alignment, cursor.size)
    return {names[name]: Tensor(names[name], piece.shape, (piece,)) for name, piece in pieces.items()}


def _check_layout(pieces: dict[str, Piece], end: int, alignment: int, size: int) -> None:
    """Tensors lie aligned, one right behind the other, and up to the end of the file."""
    for name, piece in sorted(pieces.items(), key=lambda item: item[1].offset):
        start, n_bytes = piece.offset, piece.nbytes
        it, whole = f"the tensor {name} at offset {start}", start + n_bytes <= size
        require(whole, f"truncated or damaged: {it} takes {n_bytes} bytes, but the file ends at {size}")
        require(start == end, f"damaged: {it} should begin at {end}, right behind the one before it")
        end = align(start + n_bytes, alignment)
    require(size <= end, f"damaged: {size - end} bytes too many after the last tensor, at {end}")


def align(offset: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // alignment) * alignment
