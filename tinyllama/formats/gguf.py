"""GGUF, today's file of llama.cpp: everything that a model needs in one file that can be mapped into memory.

Strings, numbers and key-values are laid out as gguf_metadata.py says, little-endian. In order:

1. **Header**: the bytes `GGUF`, u32 version (3; 2 is laid out alike), u64 number of tensors, u64 number of
   key-values.
2. **Key-values**: `general.*` says what the file is, `llama.*` gives the hyper-parameters, `tokenizer.ggml.*`
   the whole vocabulary: arrays of `tokens`, their `token_type`, and `scores` (SentencePiece) or `merges`
   (byte-level BPE).
3. **Tensor infos**: string name, u32 number of axes, u64 length of each axis, **innermost first** (the
   reverse of our [n_out, n_in]), u32 type (the `gguf_id` of quant.TYPES), u64 offset into the data.
4. **Padding** with zeros to a multiple of `general.alignment`, 32 where that key is missing.
5. **Data**: the blocks of each tensor at its offset, each padded to the alignment in turn.

Without a tensor `output.weight` the output matrix is `token_embd.weight`. wq and wk lie as Meta's do, in
interleaved RoPE pairs. Source: docs/gguf.md of the ggml repository.
"""

import re
import struct
from pathlib import Path

from ..blocks import TYPES, BlockType
from ..config import Config, tensor_names
from ..errors import TinyllamaError
from ..machine.opening import open_file
from ..quant import Tensor
from ..vocabulary import CONTROL, Vocabulary, vocabulary_from_model
from . import Checkpoint
from .gguf_metadata import (
    F32,
    I32,
    MOST_KEYS,
    MOST_TENSORS,
    STRING,
    U32,
    Cursor,
    Metadata,
    pack_metadata,
    pack_string,
    read_metadata,
    shown,
)
from .parts import map_file

MAGIC = b"GGUF"

#: What general.file_type says when most tensors are of this type (llama.h, llama_ftype).
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}

TYPE_OF_ID = {kind.gguf_id: kind for kind in TYPES.values() if kind.gguf_id is not None}
OTHER_TYPES = {10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 20: "iq4_nl", 23: "iq4_xs"}

#: Arrays that become a Vocabulary: its field, and the type of the elements.
ARRAYS = {
    "tokenizer.ggml.tokens": ("pieces", STRING),
    "tokenizer.ggml.scores": ("scores", F32),
    "tokenizer.ggml.token_type": ("types", I32),
    "tokenizer.ggml.merges": ("merges", STRING),
}

#: Control pieces that end a text whether or not a key says so; llama.cpp goes by such a list, too.
END_PIECES = {"<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"}

#: Of "llama.": a key that nobody knows may change what a model computes, and is refused.
KNOWN_KEYS = re.compile(
    r"llama\.(vocab_size|context_length|embedding_length|block_count|feed_forward_length|tensor_data_layout"
    r"|use_parallel_residual|expert(_used)?_count|rope\.(dimension_count|freq_base|scaling\.\w+)"
    r"|attention\.(head_count(_kv)?|layer_norm(_rms)?_epsilon|key_length|value_length|causal))"
)

#: Values with which known keys change nothing; any other is refused.
WITHOUT_EFFECT = {
    "llama.attention.causal": (True,),
    "llama.use_parallel_residual": (False,),
    "llama.rope.scaling.attn_factor": (0.0, 1.0),
}

#: Those of keys by which llama.cpp scales linearly where no type is named.
LINEAR = {"llama.rope.scaling.factor": (0.0, 1.0)}

ROPE_FREQS = "rope_freqs.weight"  # of Llama 3.1: a divisor for each RoPE frequency, [head_dim / 2]


def is_gguf(path: str | Path) -> bool:
    """Whether a file starts with GGUF's magic. Raises TinyllamaError where it can't be read."""
    with open_file(path) as file:
        try:
            return file.read(len(MAGIC)) == MAGIC
        except OSError as error:
            raise TinyllamaError(f"{path}: {error.strerror}") from None


def read(path: str | Path) -> Checkpoint:
    """Open a GGUF file of the llama architecture; its weights stay on disk, mapped into memory.

    Raises TinyllamaError, naming the file, where it isn't one, where a count, length, offset or shape in it
    can't be true, and where it holds something that isn't supported.
    """
    path = Path(path)
    if not is_gguf(path):
        raise TinyllamaError(f"{path}: not a GGUF file, it doesn't start with the bytes GGUF")
    try:
        return _read(path, Cursor(map_file(path)))
    except TinyllamaError as error:
        raise TinyllamaError(f"{path}: {error}") from None


def _read(path: Path, cursor: Cursor) -> Checkpoint:
    n_tensors, n_keys = _read_header(cursor)
    metadata = read_metadata(cursor, n_keys)
    infos = _read_infos(cursor, n_tensors)
    _check_architecture(metadata)
    vocabulary = _vocabulary(metadata)
    config = _config(metadata, len(vocabulary.pieces), n_tensors)
    _check_names_and_shapes(infos, config)
    data_start = _align(cursor.offset, metadata.alignment())
    tensors = _tensors(cursor, infos, config, data_start)
    _check_layout(infos, tensors, data_start, metadata.alignment(), cursor.size)
    return Checkpoint(path, "gguf", config, tensors, vocabulary, [path], metadata)


def _read_header(cursor: Cursor) -> tuple[int, int]:
    cursor.skip(len(MAGIC), "the magic")
    (version,) = cursor.numbers("I", "the version")
    if version & 0xFFFF == 0:
        raise TinyllamaError("a big-endian GGUF file, which isn't supported")
    if version not in (2, 3):
        raise TinyllamaError(f"version {version} of GGUF isn't supported, only 2 and 3")
    n_tensors, n_keys = cursor.numbers("QQ", "the header")
    if 32 * n_tensors + 13 * n_keys > cursor.size or n_tensors > MOST_TENSORS or n_keys > MOST_KEYS:
        raise TinyllamaError(
            f"{n_tensors} tensors and {n_keys} key-values can't be in a file of {cursor.size} bytes"
        )
    return n_tensors, n_keys


def _read_infos(cursor: Cursor, n_tensors: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """GGUF's name of each tensor -> (shape outermost first, type id, offset into the data)."""
    infos = {}
    for index in range(n_tensors):
        name = cursor.name(f"the name of tensor {index} of {n_tensors}")
        if name in infos:
            raise TinyllamaError(f"the tensor {name} is there twice")
        (n_axes,) = cursor.numbers("I", f"the tensor {name}")
        if not 1 <= n_axes <= 4:
            raise TinyllamaError(f"the tensor {name} has {n_axes} axes: 1 to 4 are possible")
        *axes, type_id, offset = cursor.numbers(f"{n_axes}QIQ", f"the tensor {name}")
        infos[name] = tuple(reversed(axes)), type_id, offset
    return infos


# --- what the key-values mean ---------------------------------------------------------------------


def _check_architecture(metadata: Metadata) -> None:
    architecture = metadata.text("general.architecture")
    if architecture != "llama":
        raise TinyllamaError(f"a model of the architecture {architecture!r}: only 'llama' is supported")
    scaling = metadata.text("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise TinyllamaError(f"RoPE scaling of type {scaling!r} (llama.rope.scaling.type) isn't supported")
    for key in metadata:
        if key.startswith("llama.") and not KNOWN_KEYS.fullmatch(key):
            raise TinyllamaError(f"the key {key}, which may change what a model computes, isn't supported")
    fixed = WITHOUT_EFFECT if "llama.rope.scaling.type" in metadata else WITHOUT_EFFECT | LINEAR
    for key, values in fixed.items():
        if metadata.get(key, values[0]) not in values:
            raise TinyllamaError(f"the key {key} is {shown(metadata[key])}, which isn't supported")
    if metadata.get("llama.expert_count"):
        raise TinyllamaError("a mixture of experts (llama.expert_count), which isn't supported")
    if metadata.get("split.count", 1) not in (0, 1):
        raise TinyllamaError("one part of a split model: join them with llama.cpp's llama-gguf-split --merge")


def _config(metadata: Metadata, vocab_size: int, n_tensors: int) -> Config:
    n_layers = metadata.count("llama.block_count")
    if n_layers > n_tensors:
        raise TinyllamaError(f"llama.block_count is {n_layers}, but there are only {n_tensors} tensors")
    n_heads = metadata.count("llama.attention.head_count")
    config = Config(
        dim=metadata.count("llama.embedding_length"),
        n_layers=n_layers,
        n_heads=n_heads,
        vocab_size=vocab_size,
        hidden_dim=metadata.count("llama.feed_forward_length"),
        n_kv_heads=metadata.count("llama.attention.head_count_kv", n_heads),
        norm_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.number("llama.rope.freq_base", 10000.0),
        max_seq_len=metadata.count("llama.context_length"),
    )
    if metadata.count("llama.vocab_size", vocab_size) != vocab_size:
        raise TinyllamaError(
            f"llama.vocab_size is {metadata['llama.vocab_size']}, but it has {vocab_size} tokens"
        )
    for key in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"):
        if metadata.count(key, config.head_dim) != config.head_dim:
            raise TinyllamaError(f"{key} is {metadata[key]}, not the width of a head, {config.head_dim}")
    return config


def _vocabulary(metadata: Metadata) -> Vocabulary:
    """Take the vocabulary's arrays out of the metadata. Where keys are missing it is as llama.cpp has it."""
    model = metadata.text("tokenizer.ggml.model")
    if model not in ("llama", "gpt2"):
        raise TinyllamaError(f"a tokenizer of the kind {model!r}: only 'llama' and 'gpt2' are supported")
    arrays = {field: _take_array(metadata, key, kind) for key, (field, kind) in ARRAYS.items()}
    if not arrays["pieces"]:
        raise TinyllamaError("there is no vocabulary in it (tokenizer.ggml.tokens)")
    is_spm = model == "llama"
    pre = "" if is_spm else metadata.text("tokenizer.ggml.pre")
    eos_id = _token_id(metadata, "eos", 2 if is_spm else None)
    return Vocabulary(
        kind="sentencepiece" if is_spm else "bpe",
        **arrays,
        pre=pre,
        bos_id=_token_id(metadata, "bos", 1 if is_spm else None),
        eos_id=eos_id,
        unk_id=_token_id(metadata, "unknown", 0 if is_spm else None),
        stop_ids=_stop_ids(metadata, arrays["pieces"], arrays["types"], eos_id),
        add_bos=metadata.flag("tokenizer.ggml.add_bos_token", is_spm or pre == "llama-bpe"),
        add_space_prefix=metadata.flag("tokenizer.ggml.add_space_prefix", is_spm),
    )


def _take_array(metadata: Metadata, key: str, kind: int) -> tuple:
    value = metadata.pop(key, [])
    if not isinstance(value, list) or metadata.types.pop(key, kind) != kind:
        raise TinyllamaError(f"the key {key} isn't an array of values of type {kind}")
    return tuple(value)


def _token_id(metadata: Metadata, name: str, default: int | None) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    if value is not None and type(value) is not int:
        raise TinyllamaError(
            f"the key tokenizer.ggml.{name}_token_id must be a whole number, not {shown(value)}"
        )
    return value


def _stop_ids(metadata: Metadata, pieces: tuple, types: tuple, eos_id: int | None) -> tuple[int, ...]:
    """Ends of a text beside eos: the tokens that keys name, then those known by their spelling."""
    ids = [_token_id(metadata, name, None) for name in ("eot", "eom")]
    rows = enumerate(zip(pieces, types, strict=False))
    ids += [token_id for token_id, (piece, kind) in rows if kind == CONTROL and piece in END_PIECES]
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id not in (None, eos_id)))


# --- tensors --------------------------------------------------------------------------------------


def _check_names_and_shapes(infos: dict, config: Config) -> None:
    """Exactly the tensors of a LLaMA must be there; tied embeddings have no output.weight."""
    shapes = config.tensor_shapes()
    expected = {gguf_name: shapes[name] for name, gguf_name, _ in tensor_names(config.n_layers)}
    missing = expected.keys() - infos.keys() - {"output.weight"}
    if missing:
        raise TinyllamaError(f"{len(missing)} tensors are missing, {min(missing)} among them")
    expected[ROPE_FREQS] = (config.head_dim // 2,)
    for name, (shape, _, _) in infos.items():
        if name not in expected:
            raise TinyllamaError(f"the tensor {name} is none of a LLaMA's")
        if shape != expected[name]:
            raise TinyllamaError(f"the tensor {name} is {list(shape)}, it should be {list(expected[name])}")


def _tensors(cursor: Cursor, infos: dict, config: Config, data_start: int) -> dict[str, Tensor]:
    """Every tensor, by Meta's name, as a view of the mapped file."""
    meta_names = {gguf_name: name for name, gguf_name, _ in tensor_names(config.n_layers)}
    tensors = {}
    for gguf_name, (shape, type_id, offset) in infos.items():
        name, kind = meta_names.get(gguf_name, gguf_name), _block_type(gguf_name, type_id, shape)
        start, n_bytes = data_start + offset, kind.nbytes(shape)
        if start + n_bytes > cursor.size:
            raise TinyllamaError(
                f"truncated or damaged: the tensor {gguf_name} at offset {start} takes {n_bytes} bytes, "
                f"but the file ends at {cursor.size}"
            )
        tensors[name] = Tensor(name, kind.name, shape, (kind.view(cursor.data, shape, start),))
    return tensors


def _block_type(name: str, type_id: int, shape: tuple[int, ...]) -> BlockType:
    kind = TYPE_OF_ID.get(type_id)
    if kind is None:
        known = ", ".join(kind.name for kind in TYPE_OF_ID.values())
        what = OTHER_TYPES.get(type_id, f"number {type_id}")
        raise TinyllamaError(f"the tensor {name} is of type {what}: supported are {known}")
    if shape[-1] % kind.block or (len(shape) == 1 and kind.block > 1):
        raise TinyllamaError(f"the tensor {name} is {list(shape)}, which can't be of type {kind.name}")
    return kind


def _check_layout(infos: dict, tensors: dict[str, Tensor], start: int, alignment: int, size: int) -> None:
    """Tensors must lie aligned, one right behind the other, and up to the end of the file."""
    offsets = [offset for _, _, offset in infos.values()]
    sizes = [tensor.nbytes for tensor in tensors.values()]
    end = 0
    for offset, n_bytes, name in sorted(zip(offsets, sizes, infos, strict=True)):
        if offset % alignment:
            raise TinyllamaError(f"the tensor {name} at offset {start + offset} isn't aligned to {alignment}")
        if offset < end:
            raise TinyllamaError(f"the tensor {name} at offset {start + offset} overlaps the one before it")
        if offset > _align(end, alignment):
            raise TinyllamaError(
                f"damaged: the tensor {name} should begin at {start + _align(end, alignment)}, "
                f"not at {start + offset}"
            )
        end = offset + n_bytes
    if size > start + _align(end, alignment):
        raise TinyllamaError(f"{size - start - end} bytes too many after the last tensor, at {start + end}")


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


# --- writing --------------------------------------------------------------------------------------


def header(
    config: Config,
    vocabulary: Vocabulary,
    infos: list[tuple[str, str, tuple[int, ...]]],
    file_type: int,
    name: str,
    metadata: Metadata | None = None,
) -> tuple[bytes, list[int], int]:
    """Everything before the data, and where the data goes.

    Args:
        infos: (Meta's name, key of quant.TYPES, shape) of each tensor, in the order of the data.
        file_type: a value of FILE_TYPES.
        name: of the model, for general.name.
        metadata: of the GGUF file that this one is made from: it is kept. Without it the key-values are
            derived from `config` and `vocabulary`.
    Returns:
        the bytes up to the first tensor; each tensor's offset from the start of the file; the size of the
        file. Bytes between tensors and after the last one are zeros.
    """
    if vocabulary.model is not None:
        vocabulary = vocabulary_from_model(vocabulary.model)
    metadata = _derived_metadata(config, vocabulary, name) if metadata is None else metadata.copy()
    metadata.set("general.file_type", file_type, U32)
    metadata.set("general.quantization_version", 2, U32)
    for key, (field, kind) in ARRAYS.items():
        if getattr(vocabulary, field):
            metadata.set(key, list(getattr(vocabulary, field)), kind)
    alignment = metadata.alignment()
    infos_bytes, offsets, data_size = _pack_infos(infos, config, alignment)
    head = MAGIC + struct.pack("<IQQ", 3, len(infos), len(metadata)) + pack_metadata(metadata) + infos_bytes
    start = _align(len(head), alignment)
    return head.ljust(start, b"\0"), [start + offset for offset in offsets], start + data_size


def _pack_infos(infos: list, config: Config, alignment: int) -> tuple[bytes, list[int], int]:
    """The tensor infos as bytes, each tensor's offset into the data, and the data's size."""
    gguf_names = {name: gguf_name for name, gguf_name, _ in tensor_names(config.n_layers)}
    packed, offsets, end = [], [], 0
    for name, kind_name, shape in infos:
        kind = TYPES[kind_name]
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        packed += [pack_string(gguf_names.get(name, name)), axes, struct.pack("<IQ", kind.gguf_id, end)]
        offsets.append(end)
        end = _align(end + kind.nbytes(shape), alignment)
    return b"".join(packed), offsets, end


def _derived_metadata(config: Config, vocabulary: Vocabulary, name: str) -> Metadata:
    is_spm = vocabulary.kind == "sentencepiece"
    metadata = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": name,
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "llama" if is_spm else "gpt2",
        "tokenizer.ggml.pre": "default" if is_spm else vocabulary.pre,
        "tokenizer.ggml.add_bos_token": vocabulary.add_bos,
        "tokenizer.ggml.add_space_prefix": vocabulary.add_space_prefix,
    }
    stop_id = vocabulary.stop_ids[0] if vocabulary.stop_ids else None
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unknown": vocabulary.unk_id, "eot": stop_id}
    return Metadata(
        metadata
        | {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items() if value is not None}
    )
