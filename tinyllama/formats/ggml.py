"""The ggml file of March 2023, llama.cpp's first: ggml-model-f16.bin, ggml-model-q4_0.bin.

Little-endian, nothing padded or aligned. int32 unless it says otherwise.

    magic                    0x67676d6c, which reads "lmgg" in the file
    n_vocab n_embd n_mult n_head n_layer n_rot ftype
                             vocab_size, dim, multiple_of, n_heads, n_layers, head_dim; and the type of
                             most weights: 0 f32, 1 f16, 2 q4_0, 3 q4_1
    n_vocab times:           len, then so many bytes: the text of a token
    until the file ends:     n_dims, len of name, ftype of this tensor
                             ne[n_dims], **innermost first**: [n_in, n_out]
                             name (Meta's), then the weights, row after row

hidden_dim follows from n_embd and n_mult; norm_eps, rope_theta and n_kv_heads have no field, so only the
first LLaMA fits. A checkpoint of several parts becomes as many files, `name`, `name.1`, `name.2`, ...,
each with the whole header and vocabulary (see parts.py).

Two builds of llama.cpp disagree on q4_0, and no field tells their files apart: on 10 March a row stored
all its scales and then all its nibbles ("planar"), from 12 March on whole blocks follow each other
("blocks"). Read the wrong way, nibbles become absurd scales, which is how `read` finds out. q4_1 is
planar in both.

The text of a token is what SentencePiece decodes it to: byte tokens come out as "�" and there are no
scores. But LLaMA's ids are in order: unknown, bos, eos, the 256 bytes, then pieces as they were merged
in training. So all that is needed can be rebuilt (`rebuild_vocabulary`).
"""

import re
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from glob import escape
from pathlib import Path

import numpy as np

from ..config import PRESETS, Config, hidden_dim_of
from ..errors import TinyllamaError, naming, require
from ..machine.files import MappedFile, kind_of
from ..quant import TYPES
from ..tensor import Piece
from ..tokenizer import BYTE, BYTE_PIECES, CONTROL, NORMAL, UNKNOWN, Vocabulary
from . import Checkpoint
from .checked import checked
from .cursor import Cursor
from .folders import read_json
from .meta import config_of
from .parts import count_parts, merge
from .tokenizer_model import vocabulary_from_model
from .vocabulary import vocabulary_files

MAGIC = 0x67676D6C
LATER_MAGICS = {
    b"fmgg": "a ggmf file, of 20 March 2023 or later",
    b"tjgg": "a ggjt file, of 31 March 2023 or later",
    b"algg": "a ggla file, a LoRA adapter",
}

#: The number of each type that these files have, and the type of each number.
FTYPES = {
    kind.name: TYPES[kind.prepared].file_type
    for kind in TYPES.values()
    if kind.name in ("f32", "f16") or "_2023" in kind.name
}
TYPE_OF = {number: name for name, number in reversed(FTYPES.items())}
Q4_0_LAYOUTS = {"blocks": "q4_0_2023", "planar": "q4_0_2023_planar"}

LARGEST_SCALE = 65504.0  # weights were float16 before
LONGEST_TOKEN = 1 << 16  # bytes, far beyond any
FIRST_PIECE = 3 + 256  # unknown, bos, eos and the bytes come first
LOOKED_AT = 1 << 16  # scales that tell the layout
LAST = -1e9  # a score below that of any merge


@dataclass
class Part:
    """One file."""

    file: MappedFile
    config: Config
    ftype: int
    texts: list[bytes]  # of all tokens
    header_size: int  # bytes before the first tensor
    pieces: dict[str, Piece]  # of every tensor what this part holds, by Meta's names, in the file's order

    @cached_property
    def n_parts(self) -> int:
        """How many parts make a whole."""
        return count_parts(self.pieces, self.config)


def recognizes(file: MappedFile) -> bool:
    """Whether a file starts with ggml's magic, or with that of one of its first successors."""
    return file[:4] in (struct.pack("<i", MAGIC), *LATER_MAGICS)


def stamp(path: Path) -> list[Path]:
    """The files that `read` looks at."""
    beside = [path.parent / "params.json", _tokenizer(path)]
    paths = [path, *sorted(path.parent.glob(f"{escape(path.name)}.[1-9]*")), *beside]
    return [path for path in paths if path and path.is_file()]


def read(source: str | Path | MappedFile, layout: str | None = None) -> Checkpoint:
    """Open a ggml file, and its other parts beside it.

    Args:
        source: the first part.
        layout: of q4_0 rows, "blocks" or "planar"; None finds out.
    Raises TinyllamaError, naming the file, where one is missing or isn't what it says.
    """
    parts = read_parts(source, layout)
    first, n_parts, path = parts[0], parts[0].n_parts, parts[0].file.path
    alone = f"{path}: one of {n_parts} parts; name the first one, {path.with_suffix('')}"
    require(len(parts) == n_parts, alone)
    with naming(path):
        tensors = merge([part.pieces for part in parts], first.config)
        vocabulary = _own_tokenizer(path, first.config) or rebuild_vocabulary(first.texts)
    config, files = _with_params(first.config, path.parent), [part.file for part in parts]
    return Checkpoint(path, "ggml", config, tensors, vocabulary, files, {"ftype": first.ftype})


def read_parts(source: str | Path | MappedFile, layout: str | None = None) -> list[Part]:
    """The file and, if it is the first one, its other parts. A later part is read alone."""
    first = read_part(source, layout)
    path = first.file.path
    number = re.search(r"\.([1-9]\d*)$", path.name)
    if number and int(number[1]) < first.n_parts and not part_path(path, 1).exists():
        return [first]
    parts = [first]
    for other in (part_path(path, number) for number in range(1, first.n_parts)):
        require(other.exists(), f"{other}: is missing; {path.name} is the first of {first.n_parts} parts")
        parts.append(part := read_part(other, layout))
        same = (part.config, part.ftype, part.texts) == (first.config, first.ftype, first.texts)
        why = "it has other hyper-parameters, tokens or types"
        require(same, f"{other}: doesn't belong to {path.name}, {why}")
    return parts


def part_path(first: Path, number: int) -> Path:
    """ggml-model-f16.bin, ggml-model-f16.bin.1, ..."""
    return first.with_name(f"{first.name}.{number}") if number else first


def read_part(source: str | Path | MappedFile, layout: str | None = None) -> Part:
    """Map one file and find its tensors; arguments and errors as of `read`."""
    file = MappedFile(source)
    with naming(file.path):
        require(layout in (None, *Q4_0_LAYOUTS), f"the layout of q4_0 is blocks or planar, not {layout}")
        cursor = Cursor(file)
        config, ftype = _read_header(cursor)
        texts = list(cursor.texts(config.vocab_size, "the vocabulary", LONGEST_TOKEN, "I"))
        header_size, cursor.limit = cursor.offset, cursor.size
        n_tensors, pieces = len(config.tensor_shapes()), {}
        while cursor.offset < cursor.size:
            left = cursor.size - cursor.offset
            require(len(pieces) < n_tensors, f"damaged: {left:,} bytes follow its last tensor")
            name, piece = _read_tensor(cursor)
            require(name not in pieces, f"damaged: it holds {name} twice")
            right = len(piece.shape) == 1 or FTYPES[piece.type] == ftype
            require(right, f"damaged: {name} isn't of the type that the header names")
            pieces[name] = piece
        require(len(pieces) == n_tensors, f"cut short: it ends after {len(pieces)} of {n_tensors} tensors")
        part = Part(file, config, ftype, texts, header_size, _with_layout(pieces, layout))
        require(part.n_parts, "of no part")
    return part


def _read_header(cursor: Cursor) -> tuple[Config, int]:
    """The hyper-parameters and the ftype."""
    magic = cursor.data[:4]
    require(magic not in LATER_MAGICS, f"{LATER_MAGICS.get(magic)}: convert the checkpoint again")
    require(magic == struct.pack("<i", MAGIC), f"no ggml file but {kind_of(cursor.data)}")
    _, vocab_size, dim, multiple_of, n_heads, n_layers, head_dim, ftype = cursor.numbers("8i", "the header")
    require(ftype in TYPE_OF, f"damaged or no LLaMA: its header names the type {ftype}")
    sane = min(vocab_size, dim, multiple_of, n_heads, n_layers) > 0 and head_dim == dim // n_heads
    require(sane, "damaged: its hyper-parameters contradict each other")
    hidden_dim, norm_eps = hidden_dim_of(dim, multiple_of), published_norm_eps(dim)
    config = Config(dim, n_layers, n_heads, vocab_size, hidden_dim, n_heads, multiple_of, norm_eps)
    # The smallest token takes 4 bytes, the smallest tensor 24: what can't fit needn't be looped over.
    room = 4 * vocab_size + 24 * 9 * n_layers <= cursor.size - cursor.offset
    require(room, f"cut short: no room for {vocab_size:,} tokens, {n_layers} layers")
    return config, ftype


def published_norm_eps(dim: int) -> float:
    """What the first LLaMA of this width has, which the file itself doesn't say."""
    return next((preset.norm_eps for preset in PRESETS.values() if preset.dim == dim), 1e-6)


def _with_params(config: Config, folder: Path) -> Config:
    """What the file itself can't say, as params.json beside it has it, if that is this model's."""
    path = folder / "params.json"
    params = read_json(path) if path.is_file() else {}
    if (params.get("dim"), params.get("n_layers")) != (config.dim, config.n_layers):
        return config
    with naming(path):
        beside = config_of(params, config.vocab_size)
    fields = ("norm_eps", "rope_theta", "rope_scaling", "max_seq_len")
    return replace(config, **{field: getattr(beside, field) for field in fields})


def _read_tensor(cursor: Cursor) -> tuple[str, Piece]:
    start = cursor.offset
    n_dims, name_length, ftype = cursor.numbers("3i", "a tensor's header")
    right = n_dims in (1, 2) and 0 < name_length < 256 and ftype in TYPE_OF
    found = f"{n_dims} axes, a name of {name_length} bytes, type {ftype}"
    require(right, f"damaged: no tensor begins at byte {start:,} ({found})")
    shape = cursor.numbers(f"{n_dims}i", "a tensor's shape")[::-1]
    (encoded,) = cursor.numbers(f"{name_length}s", "a tensor's name")
    name, kind = encoded.decode("utf-8", "backslashreplace"), TYPES[TYPE_OF[ftype]]
    right = name.isprintable() and min(shape) > 0 and shape[-1] % kind.block == 0
    right = right and (n_dims == 2 or kind.block == 1)
    require(right, f"damaged: {name!r} has the shape {list(shape)} and the type {kind.name}")
    return name, Piece(cursor.data, cursor.skip(kind.nbytes(shape), name, cursor.size), kind.name, shape)


def _with_layout(pieces: dict[str, Piece], layout: str | None) -> dict[str, Piece]:
    """Of q4_0's two layouts the wanted one, or else that by which every scale is a small number."""
    quantized = {name: piece for name, piece in pieces.items() if piece.type == "q4_0_2023"}
    if not quantized:
        return pieces
    # Rows of one block are the same in both.
    name, widest = max(quantized.items(), key=lambda item: item[1].shape[-1])
    n_rows = max(1, 32 * LOOKED_AT // widest.shape[-1])
    for type in [Q4_0_LAYOUTS[layout]] if layout else Q4_0_LAYOUTS.values():
        d = replace(widest, type=type).blocks(0, n_rows)["d"]
        if layout or (np.isfinite(d).all() and (d <= LARGEST_SCALE).all() and not np.signbit(d).any()):
            return pieces | {name: replace(piece, type=type) for name, piece in quantized.items()}
    raise TinyllamaError(f"damaged: the scales of {name} are absurd in either layout of q4_0")


def _tokenizer(path: Path) -> Path | None:
    beside = vocabulary_files(path.parent)
    return next((file for file in beside if file.name == "tokenizer.model" and file.is_file()), None)


def _own_tokenizer(path: Path, config: Config) -> Vocabulary | None:
    """tokenizer.model beside the file or one folder up, unless it is another model's."""
    model = _tokenizer(path)
    vocabulary = model and vocabulary_from_model(model)
    return vocabulary if vocabulary and len(vocabulary.pieces) == config.vocab_size else None


def rebuild_vocabulary(texts: list[bytes]) -> Vocabulary:
    """SentencePiece's pieces, scores and types from the texts of the tokens.

    The earlier a piece was merged in training, the higher its score: -(id - 259). LLaMA's runs of spaces
    come last, or the space before a word would be lost to them.
    """
    enough = len(texts) > FIRST_PIECE
    require(enough, f"{len(texts)} tokens can't be rebuilt; put tokenizer.model beside the file")
    pieces = ["<unk>", "<s>", "</s>", *BYTE_PIECES]
    pieces += [text.decode("utf-8", "replace").replace(" ", "▁") for text in texts[FIRST_PIECE:]]
    ranks = enumerate(pieces[FIRST_PIECE:])
    scores = [0.0] * FIRST_PIECE + [float(-rank) if piece.strip("▁") else LAST for rank, piece in ranks]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(texts) - FIRST_PIECE)
    rows = {"pieces": tuple(pieces), "scores": tuple(scores), "types": tuple(types)}
    return checked(Vocabulary("sentencepiece", **rows, prefixed="text"))
