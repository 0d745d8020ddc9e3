"""What stands before the weights in the files that `convert` and `quantize` write; gguf.py and ggml.py, which
read them, describe their layout byte by byte.
"""

import struct

from ..config import STEPS, Config, hidden_dim_of, tensor_names
from ..errors import require
from ..quant import TYPES
from ..tokenizer import Vocabulary
from . import ggml
from .cursor import ARRAY, BOOL, F32, NUMBERS, STRING, U32
from .gguf import ARRAYS, FIELDS, IMPLIED, MAGIC, Metadata, align


def gguf_header(
    config: Config, vocabulary: Vocabulary, infos: list, file_type: int, name: str, metadata=None
) -> tuple[bytes, list[int], int]:
    """Everything before the data, and where the data goes.

    Args:
        infos: (Meta's name, key of quant.TYPES, shape) of each tensor, in the order of the data.
        file_type: a BlockType's.
        name: of the model, for general.name.
        metadata: of the GGUF file that this one is made from: it is kept.
    Returns:
        the bytes up to the first tensor; each tensor's offset in the file; the file's size. Gaps are zeros.
    """
    metadata = Metadata(metadata or _derived(config, vocabulary, name), metadata and metadata.types)
    metadata.set("general.file_type", file_type, U32)
    metadata.set("general.quantization_version", 2, U32)
    for key, (field, kind) in ARRAYS.items():
        if getattr(vocabulary, field):
            metadata.set(key, list(getattr(vocabulary, field)), kind)
    names = {meta_name: name for meta_name, name, _ in tensor_names(config.n_layers, STEPS)}
    alignment, offsets, end = metadata.alignment(), [], 0
    head = MAGIC + struct.pack("<IQQ", 3, len(infos), len(metadata)) + _pack_metadata(metadata)
    for tensor, type, shape in infos:
        numbers = (len(shape), *reversed(shape), TYPES[type].gguf_id, end)
        head += _pack_string(names.get(tensor, tensor)) + struct.pack(f"<I{len(shape)}QIQ", *numbers)
        offsets.append(end)
        end = align(end + TYPES[type].nbytes(shape), alignment)
    start = align(len(head), alignment)
    return head.ljust(start, b"\0"), [start + offset for offset in offsets], start + end


def _derived(config: Config, vocabulary: Vocabulary, name: str) -> dict:
    """The key-values of a model that comes without."""
    is_spm = vocabulary.kind == "sentencepiece"
    written = [*FIELDS.items(), *IMPLIED.items()][:-2]
    stop_id = vocabulary.stop_ids[0] if vocabulary.stop_ids else None
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unknown": vocabulary.unk_id, "eot": stop_id}
    return {
        "general.architecture": config.family,
        "general.type": "model",
        "general.name": name,
        **{f"{config.family}.{key}": getattr(config, field) for key, field in written},
        "tokenizer.ggml.model": "llama" if is_spm else "gpt2",
        "tokenizer.ggml.pre": "default" if is_spm else vocabulary.pre,
        "tokenizer.ggml.add_bos_token": vocabulary.add_bos,
        "tokenizer.ggml.add_space_prefix": vocabulary.add_space_prefix,
        **{f"tokenizer.ggml.{key}_token_id": token for key, token in ids.items() if token is not None},
    }


def _pack_metadata(metadata: Metadata) -> bytes:
    """A value without a type gets the usual one of its Python type."""
    usual, packed = {bool: BOOL, int: U32, float: F32, str: STRING}, []
    for key, value in metadata.items():
        kind, is_array = metadata.types.get(key, usual.get(type(value))), isinstance(value, list)
        values = value if is_array else [value]
        packed.append(_pack_string(key))
        packed.append(struct.pack("<IIQ", ARRAY, kind, len(value)) if is_array else struct.pack("<I", kind))
        if kind == STRING:
            packed += map(_pack_string, values)
        else:
            packed.append(struct.pack(f"<{len(values)}{NUMBERS[kind]}", *values))
    return b"".join(packed)


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def ggml_header(config: Config, texts: list[bytes], ftype: int) -> bytes:
    """All that stands before the first tensor; `texts` are those of the tokens.

    Raises TinyllamaError for a model that has more to say than the header has fields for.
    """
    for name, implied in {
        "n_kv_heads": config.n_heads,
        "rope_theta": 10000.0,
        "hidden_dim": hidden_dim_of(config.dim, config.multiple_of),
    }.items():
        number = getattr(config, name)
        require(number == implied, f"a ggml file has no field for {name} {number:g}: use --format gguf")
    numbers = (config.vocab_size, config.dim, config.multiple_of, config.n_heads, config.n_layers)
    tokens = b"".join(struct.pack("<i", len(text)) + text for text in texts)
    return struct.pack("<8i", ggml.MAGIC, *numbers, config.head_dim, ftype) + tokens


def ggml_record(name: str, type: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the weights of a tensor."""
    encoded = name.encode()
    numbers = (len(shape), len(encoded), ggml.FTYPES[type], *shape[::-1])
    return struct.pack(f"<{len(numbers)}i", *numbers) + encoded


def with_ftype(header: bytes, ftype: int) -> bytes:
    """The same header with another ftype, its eighth number."""
    return header[:28] + struct.pack("<i", ftype) + header[32:]
