"""What stands before the weights in the files that `convert` and `quantize` write; gguf.py and ggml.py, which
read them, describe their layout byte by byte.
"""

import struct
from dataclasses import replace

from ..config import STEPS, Config, hidden_dim_of, tensor_names
from ..errors import require
from ..quant import TYPES
from ..tokenizer import Vocabulary
from . import ggml
from .cursor import ARRAY, BOOL, F32, NUMBERS, STRING, U32
from .gguf import MAGIC, ROPE_FREQS, align
from .key_values import FIELDS, IMPLIED, Metadata
from .vocabulary import ARRAYS

OWN = "general.quantization_version", "general.file_type"  # of this file, whatever the one before said


def gguf_names(config: Config) -> dict[str, str]:
    """GGUF's name of each tensor, by Meta's."""
    names = {name: gguf_name for name, gguf_name, _ in tensor_names(config.n_layers, STEPS)}
    return names | {ROPE_FREQS: ROPE_FREQS}


def gguf_header(
    config: Config,
    vocabulary: Vocabulary,
    infos: list,
    file_type: int,
    name: str,
    metadata=None,
    template="",
    notes: dict[str, str | int] | None = None,
) -> tuple[bytes, list[int], int]:
    """Everything before the data, and where the data goes.

    Args:
        infos: (Meta's name, key of quant.TYPES, shape) of each tensor, in the order of the data.
        file_type: llama_ftype's number, a BlockType's or a mix's.
        name: of the model, for general.name.
        metadata: of the GGUF file that this one is made from: it is kept, but for what tells of its parts.
        template: of a chat, where there is no such file.
        notes: further key-values, of how the file was made.
    Returns:
        the bytes up to the first tensor; each tensor's offset in the file; the file's size. Gaps are zeros.
    """
    metadata = Metadata(metadata or _derived(config, vocabulary, name, template), metadata and metadata.types)
    for key, (field, kind) in ARRAYS.items():
        needed = field != "merges" or vocabulary.kind == "bpe"  # SentencePiece has scores for them
        if needed and (values := getattr(vocabulary, field)):
            metadata.set(key, list(values), kind)
    own = dict(zip(OWN, (2, file_type), strict=True)) | (notes or {})  # last, as llama-quantize has them
    for key in [key for key in metadata if key in own or key.startswith("split.")]:
        del metadata[key]
    for key, value in own.items():
        metadata.set(key, value, STRING if isinstance(value, str) else U32)
    names = gguf_names(config)
    return gguf_start(metadata, [(names[tensor], type, shape) for tensor, type, shape in infos])


def gguf_start(metadata: Metadata, infos: list) -> tuple[bytes, list[int], int]:
    """As `gguf_header`, of key-values as they are and infos by GGUF's names."""
    head = MAGIC + struct.pack("<IQQ", 3, len(infos), len(metadata)) + _pack_metadata(metadata)
    alignment, offsets, end = metadata.alignment(), [], 0
    for name, type, shape in infos:
        numbers = (len(shape), *reversed(shape), TYPES[type].gguf_id, end)
        head += _pack_string(name) + struct.pack(f"<I{len(shape)}QIQ", *numbers)
        offsets.append(end)
        end = align(end + TYPES[type].nbytes(shape), alignment)
    start = align(len(head), alignment)
    return head.ljust(start, b"\0"), [start + offset for offset in offsets], start + end


def _derived(config: Config, vocabulary: Vocabulary, name: str, template: str) -> dict:
    """The key-values of a model that comes without."""
    is_spm, ids = vocabulary.kind == "sentencepiece", _special_ids(vocabulary)
    named = "its tokenizer cuts text into words by a rule that has no name in GGUF (tokenizer.ggml.pre)"
    require(is_spm or vocabulary.pre, f"{named}: llama.cpp would take another")
    return {
        "general.architecture": config.family,
        "general.type": "model",
        "general.name": name,
        **{f"{config.family}.{key}": value for key, value in _hyper_parameters(config).items()},
        "tokenizer.ggml.model": "llama" if is_spm else "gpt2",
        "tokenizer.ggml.pre": "default" if is_spm else vocabulary.pre,
        "tokenizer.ggml.add_bos_token": vocabulary.add_bos,
        "tokenizer.ggml.add_space_prefix": vocabulary.add_space_prefix,
        **{f"tokenizer.ggml.{key}_token_id": token for key, token in ids.items() if token is not None},
        **({"tokenizer.chat_template": template} if template else {}),
    }


def _hyper_parameters(config: Config) -> dict[str, int | float | str]:
    """Values of the architecture's keys. What a file without a key means anyway isn't written."""
    values = {key: getattr(config, field) for key, field in [*FIELDS.items(), *IMPLIED.items()]}
    values["vocab_size"] = config.vocab_size
    if config.q_dim == config.dim:
        del values["attention.key_length"], values["attention.value_length"]
    if not config.sliding_window:
        del values["attention.sliding_window"]
    scaling = config.rope_scaling
    if scaling and scaling.kind != "llama3":  # of which the tensor rope_freqs.weight tells
        values |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling and scaling.kind == "yarn":
        usual = replace(scaling, attn_factor=None).magnitude
        values |= {
            "rope.scaling.original_context_length": scaling.original_context,
            "rope.scaling.attn_factor": scaling.magnitude / usual,
            "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }
    return values


def _special_ids(vocabulary: Vocabulary) -> dict[str, int | None]:
    """The tokens that keys name; llama.cpp finds further ends by their spelling, as we do."""
    ends = {vocabulary.pieces[end]: end for end in vocabulary.stop_ids}
    message = ends.pop("<|eom_id|>", None)
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unknown": vocabulary.unk_id}
    return ids | {"eot": next(iter(ends.values()), None), "eom": message}


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
    plain = Config(config.dim, config.n_layers, config.n_heads, config.vocab_size, 1, config.n_heads)
    steps = "rope_scaling", "sliding_window", "biases", "output_bias", "qk_norms"
    for name in ("family", "head_dim", "n_kv_heads", "rope_theta", *steps):
        value = getattr(config, name)
        no_field = f"a ggml file has no field for {name} {value}: use --format gguf"
        require(value == getattr(plain, name), no_field)
    implied = hidden_dim_of(config.dim, config.multiple_of)
    no_field = f"a ggml file has no field for hidden_dim {config.hidden_dim}: use --format gguf"
    require(config.hidden_dim == implied, no_field)
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
