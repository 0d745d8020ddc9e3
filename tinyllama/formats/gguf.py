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
interleaved RoPE pairs; of qwen2 and qwen3 as Hugging Face's, in halves. A model may be split into files
`NAME-00001-of-0000N.gguf`: the first has the key-values, each some of the tensors, and `split.no`,
`split.count` and `split.tensors.count` say which. Source: docs/gguf.md of the ggml repository; what a missing
or a strange value means is what llama.cpp makes of it.
"""

from pathlib import Path
from typing import NamedTuple

from ..config import FAMILIES, STEPS, Config, tensor_names
from ..errors import naming, require
from ..machine.files import MappedFile
from ..quant import TYPES
from ..tensor import Piece, Tensor, turned_order
from . import Checkpoint
from .cursor import ARRAY, Cursor
from .key_values import Metadata, config_of
from .others import refusal, type_refusal
from .split_files import all_parts, part_names
from .vocabulary import from_gguf, padded

MAGIC = b"GGUF"
TYPE_OF_ID = {kind.gguf_id: kind for kind in TYPES.values() if kind.gguf_id is not None}

TEMPLATE = "tokenizer.chat_template"
ROPE_FREQS = "rope_freqs.weight"  # of Llama 3.1: a divisor for each RoPE frequency, [head_dim / 2]
FREQUENCIES = "attn_rot_embd"  # in names of tensors that older converters wrote: they follow from rope_theta
MOST = 1 << 14  # tensors, or key-values: several times what any model has

# --- reading --------------------------------------------------------------------------------------


def recognizes(file: MappedFile) -> bool:
    """Whether a file starts with GGUF's magic."""
    return file[: len(MAGIC)] == MAGIC


def stamp(path: Path) -> list[Path]:
    """The files that `read` looks at."""
    return [part for part in part_names(path) if part.exists()]


class Info(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]  # outermost axis first
    type_id: int
    offset: int  # into the data


class Part(NamedTuple):
    """What stands before the data of one file."""

    file: MappedFile
    metadata: Metadata
    infos: dict[str, Info]  # by GGUF's names
    start: int  # of the data


def read(source: str | Path | MappedFile) -> Checkpoint:
    """Open a GGUF file of a known architecture, or any part of one that was split; its weights stay on disk,
    mapped into memory. Warns of what is ignored.

    Raises TinyllamaError, naming the file, where it isn't one, where a count, length, offset or shape in it
    can't be true, where a part is missing, and where it holds something that isn't supported.
    """
    opened = read_part(MappedFile(source))
    with naming(opened.file.path):
        parts = all_parts(opened, read_part)
        metadata, infos = parts[0].metadata, dict(pair for part in parts for pair in part.infos.items())
        family, template = metadata.value("general.architecture", str, ""), metadata.value(TEMPLATE, str, "")
        require(family in FAMILIES, refusal(family))
        vocabulary = from_gguf(metadata)
        shapes = {name: info.shape for name, info in infos.items()}
        config = config_of(metadata, shapes, len(vocabulary.pieces))
        names = _names(config, shapes)
        tensors = {name: tensor for part in parts for name, tensor in _tensors(part, names, config).items()}
        vocabulary = padded(vocabulary, config.vocab_size)
    path, files = parts[0].file.path, [part.file for part in parts]
    return Checkpoint(path, "gguf", config, tensors, vocabulary, files, metadata, template)


def read_part(file: MappedFile) -> Part:
    """What stands before the data of a file, which may be no model's."""
    with naming(file.path):
        cursor = Cursor(file)
        n_tensors, n_keys = _read_header(cursor)
        metadata, infos = _read_metadata(cursor, n_keys), _read_infos(cursor, n_tensors)
        return Part(file, metadata, infos, align(cursor.offset, metadata.alignment()))


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


def _read_infos(cursor: Cursor, n_tensors: int) -> dict[str, Info]:
    infos = {}
    for index in range(n_tensors):
        name = cursor.name(f"the name of tensor {index} of {n_tensors}")
        what = f"the tensor {name}"
        require(name not in infos, f"{what} is there twice")
        (n_axes,) = cursor.numbers("I", what)
        require(1 <= n_axes <= 4, f"{what} has {n_axes} axes: 1 to 4 are possible")
        *axes, type_id, offset = cursor.numbers(f"{n_axes}QIQ", what)
        while len(axes) > 1 and axes[-1] == 1:
            axes.pop()
        infos[name] = Info(tuple(reversed(axes)), type_id, offset)
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


# --- tensors --------------------------------------------------------------------------------------


def _names(config: Config, found: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """GGUF's name of each tensor -> Meta's; all of them are there and have the right shapes."""
    shapes = config.tensor_shapes() | {ROPE_FREQS: (config.head_dim // 2,)}
    names = {name: meta for meta, name, _ in tensor_names(config.n_layers, STEPS) if meta in shapes}
    missing = names.keys() - found.keys() - {"output.weight"}  # which tied embeddings don't have
    require(not missing, f"{len(missing)} tensors are missing, {min(missing, default='')} among them")
    names[ROPE_FREQS] = ROPE_FREQS
    for name, shape in found.items():
        require(name in names or FREQUENCIES in name, f"the tensor {name} is none of a LLaMA's")
        expected = shapes[names[name]] if name in names else shape
        require(shape == expected, f"the tensor {name} is {list(shape)}, it should be {list(expected)}")
    return names


def _tensors(part: Part, names: dict[str, str], config: Config) -> dict[str, Tensor]:
    """The tensors of a file, by Meta's names."""
    pieces, in_halves = {}, FAMILIES[config.family].halves
    for name, (shape, type_id, offset) in part.infos.items():
        require(type_id in TYPE_OF_ID, f"the tensor {name} is {type_refusal(type_id)}")
        kind, order = TYPE_OF_ID[type_id], None
        fits = shape[-1] % kind.block == 0 and (len(shape) == 2 or kind.block == 1)
        require(fits, f"the tensor {name} is {list(shape)}, which can't be of type {kind.name}")
        if in_halves and name in names:
            order = turned_order(names[name], shape[0], config.head_dim)
        pieces[name] = Piece(part.file, part.start + offset, kind.name, shape, order)
    check_layout(pieces, part)
    kept = {names[name]: piece for name, piece in pieces.items() if name in names}
    return {name: Tensor(name, piece.shape, (piece,)) for name, piece in kept.items()}


def check_layout(pieces: dict[str, Piece], part: Part) -> None:
    """Tensors lie aligned, one right behind the other, and up to the end of the file."""
    size, end, alignment = len(part.file), part.start, part.metadata.alignment()
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
