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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..blocks import TYPES
from ..config import PRESETS, Config, hidden_dim_of
from ..errors import TinyllamaError
from ..vocabulary import Vocabulary, vocabulary_from_model
from ..machine.files import newest
from . import Checkpoint
from .meta import find_tokenizer, read_params
from .parts import Entry, Part, check, count_parts, map_file, merge, what_it_is

MAGIC = 0x67676D6C
LATER_MAGICS = {
    b"fmgg": "a ggmf file, of 20 March 2023 or later",
    b"tjgg": "a ggjt file, of 31 March 2023 or later",
    b"algg": "a ggla file, a LoRA adapter",
}
FTYPES = {"f32": 0, "f16": 1, "q4_0_2023": 2, "q4_0_2023_planar": 2, "q4_1_2023": 3}
Q4_0_LAYOUTS = {"blocks": "q4_0_2023", "planar": "q4_0_2023_planar"}
LARGEST_SCALE = 65504.0  # weights were float16 before
LONGEST_TOKEN = 1 << 16  # bytes, far beyond any
LARGEST_VOCABULARY = 1 << 26
LENGTH = struct.Struct("<i")
FIRST_PIECE = 3 + 256  # unknown, bos, eos and the bytes come first
LOOKED_AT = 1 << 16  # scales that tell the layout
LAST = -1e9  # a score below that of any merge


@dataclass(frozen=True)
class Header:
    """What stands before the first tensor. `size` is its length in bytes."""

    config: Config
    ftype: int
    vocabulary: list[bytes]
    size: int


def read(path: str | Path, layout: str | None = None) -> Checkpoint:
    """Open a ggml file, and its other parts beside it.

    Args:
        path: the first part.
        layout: of q4_0 rows, "blocks" or "planar"; None finds out.
    Raises TinyllamaError, naming the file, where one is missing or isn't what it says.
    """
    path = Path(path)
    number, paths = find_parts(path, layout)
    if number:
        first = path.with_name(path.name.removesuffix(f".{number}"))
        raise TinyllamaError(f"{path} is part {number + 1} of {len(paths)}: name the first one, {first}")
    header, _ = read_part(paths[0], layout)
    parts = []
    for part_path in paths:
        other, part = read_part(part_path, layout)
        if other.config != header.config:
            raise TinyllamaError(f"{part_path} doesn't belong to {path}: it has other hyper-parameters")
        if other != header:
            raise TinyllamaError(
                f"{part_path} doesn't belong to {path}: it has other tokens, or another type"
            )
        parts.append(part)
    vocabulary = _own_tokenizer(path, header.config) or rebuild_vocabulary(path, header.vocabulary)
    metadata = {"ftype": header.ftype}
    return Checkpoint(path, "ggml", header.config, merge(parts, header.config), vocabulary, paths, metadata)


def find_parts(path: Path, layout: str | None = None) -> tuple[int, list[Path]]:
    """Which part a file is, counted from 0, and the paths of all.

    Raises TinyllamaError where the file is the first and another is missing.
    """
    header, part = read_part(newest(path), layout)
    n_parts = count_parts(part, header.config)
    number = re.search(r"\.([1-9]\d*)$", path.name)
    if number and int(number[1]) < n_parts and not part_path(path, 1).exists():
        first = path.with_name(path.name.removesuffix(number[0]))
        return int(number[1]), [part_path(first, other) for other in range(n_parts)]
    paths = [newest(part_path(path, other)) for other in range(n_parts)]
    for other in paths:
        if not other.exists():
            raise TinyllamaError(f"{other} is missing: {path.name} is the first of {n_parts} parts")
    return 0, paths


def part_path(first: Path, number: int) -> Path:
    """ggml-model-f16.bin, ggml-model-f16.bin.1, ..."""
    return first.with_name(f"{first.name}.{number}") if number else first


# --- reading --------------------------------------------------------------------------------------


class _Cursor:
    """Reads a mapped file from front to back, and never past its end."""

    def __init__(self, path: Path):
        self.path, self.buffer, self.offset = path, map_file(path), 0

    def left(self) -> int:
        return len(self.buffer) - self.offset

    def skip(self, n_bytes: int, what: str) -> None:
        if not 0 <= n_bytes <= self.left():
            raise TinyllamaError(
                f"{self.path} is cut short or damaged: {what} at byte {self.offset:,} needs {n_bytes:,} "
                f"bytes, {self.left():,} are left"
            )
        self.offset += n_bytes

    def take(self, n_bytes: int, what: str) -> bytes:
        start = self.offset
        self.skip(n_bytes, what)
        return self.buffer[start : self.offset]

    def ints(self, count: int, what: str) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", self.take(4 * count, what))


def read_part(path: str | Path, layout: str | None = None) -> tuple[Header, Part]:
    """Map one file and find its tensors: all that a LLaMA of the header's size must have, or their shares."""
    cursor = _Cursor(Path(path))
    header = _read_header(cursor)
    n_tensors, entries = 3 + 9 * header.config.n_layers, {}
    while cursor.left():
        if len(entries) == n_tensors:
            raise TinyllamaError(f"{path} has {cursor.left():,} bytes after its last tensor")
        entry = _read_entry(cursor)
        if entry.name in entries:
            raise TinyllamaError(f"{path} is damaged: it holds {entry.name} twice")
        entries[entry.name] = entry
    if len(entries) < n_tensors:
        raise TinyllamaError(f"{path} is cut short: it ends after {len(entries)} of {n_tensors} tensors")
    part = Part(cursor.path, cursor.buffer, entries)
    check(part, header.config, count_parts(part, header.config))
    for entry in entries.values():
        if len(entry.shape) == 2 and FTYPES[entry.type] != header.ftype:
            raise TinyllamaError(f"{path} is damaged: {entry.name} isn't of the type that the header names")
    if any(entry.type == "q4_0_2023" for entry in entries.values()):
        part = _with_layout(part, layout or _find_layout(part))
    return header, part


def _read_header(cursor: _Cursor) -> Header:
    path, head = cursor.path, cursor.buffer[:512]
    if head[:4] in LATER_MAGICS:
        raise TinyllamaError(f"{path} is {LATER_MAGICS[head[:4]]}: convert the checkpoint again")
    if head[:4] != struct.pack("<i", MAGIC):
        raise TinyllamaError(f"{path} is no model file (ggml or GGUF) but {what_it_is(head)}")
    _, *hparams, ftype = cursor.ints(8, "the header")
    if ftype not in FTYPES.values():
        raise TinyllamaError(f"{path} is damaged or no LLaMA: its header names the type {ftype}")
    config = _config(path, *hparams)
    # The smallest token takes 4 bytes, the smallest tensor 24: what can't fit needn't be looped over.
    if 4 * config.vocab_size + 24 * 9 * config.n_layers > cursor.left():
        raise TinyllamaError(
            f"{path} is cut short: no room for {config.vocab_size:,} tokens, {config.n_layers} layers"
        )
    return Header(config, ftype, _read_tokens(cursor, config.vocab_size), cursor.offset)


def _read_tokens(cursor: _Cursor, count: int) -> list[bytes]:
    """The texts of all tokens, in one tight loop: there may be a million."""
    data, at, end, texts = cursor.buffer, cursor.offset, len(cursor.buffer), []
    for token in range(count):
        start = at + LENGTH.size
        (length,) = LENGTH.unpack_from(data, at) if start <= end else (-1,)
        if not 0 <= length <= LONGEST_TOKEN or start + length > end:
            raise TinyllamaError(
                f"{cursor.path} is cut short or damaged: token {token} at byte {at:,} has {length:,} bytes"
            )
        at = start + length
        texts.append(data[start:at])
        if at > LARGEST_VOCABULARY:
            raise TinyllamaError(f"{cursor.path} is damaged: its vocabulary goes on after byte {at:,}")
    cursor.offset = at
    return texts


def _config(path: Path, vocab_size, dim, multiple_of, n_heads, n_layers, head_dim) -> Config:
    """The header's numbers, with norm_eps and rope_theta from elsewhere."""
    sane = min(vocab_size, dim, multiple_of, n_heads, n_layers) > 0 and head_dim == dim // n_heads
    if not sane:
        raise TinyllamaError(f"{path} is damaged: its hyper-parameters contradict each other")
    try:
        hidden_dim = hidden_dim_of(dim, multiple_of)
        norm_eps, rope_theta = _not_in_the_file(path, dim, n_layers)
        return Config(
            dim, n_layers, n_heads, vocab_size, hidden_dim, n_heads, multiple_of, norm_eps, rope_theta
        )
    except TinyllamaError as error:
        raise TinyllamaError(f"{path}: {error}") from None


def _not_in_the_file(path: Path, dim: int, n_layers: int) -> tuple[float, float]:
    """norm_eps and rope_theta: of params.json beside the file, if it is this model's, else as published."""
    if (path.parent / "params.json").is_file():
        params = read_params(path.parent)
        if (params.get("dim"), params.get("n_layers")) == (dim, n_layers):
            try:
                config = Config.from_params(params, 1)
            except TinyllamaError as error:
                raise TinyllamaError(f"{path.parent / 'params.json'}: {error}") from None
            return config.norm_eps, config.rope_theta
    return published_norm_eps(dim), 10000.0


def published_norm_eps(dim: int) -> float:
    """What the first LLaMA of this width has, which the file itself doesn't say."""
    return next((preset.norm_eps for preset in PRESETS.values() if preset.dim == dim), 1e-6)


def _read_entry(cursor: _Cursor) -> Entry:
    where = cursor.offset
    n_dims, name_length, ftype = cursor.ints(3, "a tensor's header")
    types = [type for type, number in FTYPES.items() if number == ftype]
    if n_dims not in (1, 2) or not 0 < name_length < 256 or not types:
        raise TinyllamaError(
            f"{cursor.path} is damaged: no tensor begins at byte {where:,} "
            f"({n_dims} axes, a name of {name_length} bytes, type {ftype})"
        )
    shape = cursor.ints(n_dims, "a tensor's shape")[::-1]
    name = cursor.take(name_length, "a tensor's name").decode("utf-8", "backslashreplace")
    block = TYPES[types[0]].block
    if not name.isprintable() or min(shape) < 1 or shape[-1] % block or (n_dims == 1 and block > 1):
        raise TinyllamaError(
            f"{cursor.path} is damaged: {name!r} has the shape {list(shape)} and the type {types[0]}"
        )
    entry = Entry(name, types[0], shape, cursor.offset)
    cursor.skip(entry.nbytes, name)
    return entry


def _find_layout(part: Part) -> str:
    """Of q4_0's two layouts the one by which every scale is a small number."""
    quantized = [entry for entry in part.entries.values() if entry.type == "q4_0_2023"]
    name = max(quantized, key=lambda entry: entry.shape[-1]).name  # rows of one block are the same in both
    for layout in Q4_0_LAYOUTS:
        d = _with_layout(part, layout).blocks(name)["d"]
        d = d[: max(1, LOOKED_AT // d.shape[1])]
        if np.all(np.isfinite(d)) and np.all(d <= LARGEST_SCALE) and not np.any(np.signbit(d)):
            return layout
    raise TinyllamaError(f"{part.path} is damaged: the scales of {name} are absurd in either layout of q4_0")


def _with_layout(part: Part, layout: str) -> Part:
    if layout not in Q4_0_LAYOUTS:
        raise TinyllamaError(f"{part.path}: the layout of q4_0 is blocks or planar, not {layout}")
    entries = {
        name: Entry(name, Q4_0_LAYOUTS[layout], entry.shape, entry.offset)
        if entry.type == "q4_0_2023"
        else entry
        for name, entry in part.entries.items()
    }
    return Part(part.path, part.buffer, entries)


# --- the vocabulary -------------------------------------------------------------------------------


def _own_tokenizer(path: Path, config: Config) -> Vocabulary | None:
    """tokenizer.model beside the file or one folder up, unless it is another model's."""
    model = find_tokenizer(path.parent)
    if model is None or len(vocabulary_from_model(model).pieces) != config.vocab_size:
        return None
    return Vocabulary("sentencepiece", model=model)


def rebuild_vocabulary(path: Path, texts: list[bytes]) -> Vocabulary:
    """SentencePiece's pieces, scores and types from the texts of the tokens.

    The earlier a piece was merged in training, the higher its score: -(id - 259). LLaMA's runs of spaces
    come last, or the space before a word would be lost to them.
    """
    if len(texts) <= FIRST_PIECE:
        raise TinyllamaError(
            f"{path}: {len(texts)} tokens can't be rebuilt; put tokenizer.model beside the file"
        )
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [text.decode("utf-8", "replace").replace(" ", "▁") for text in texts[FIRST_PIECE:]]
    ranks = enumerate(pieces[FIRST_PIECE:])
    scores = [0.0] * FIRST_PIECE + [float(-rank) if piece.strip("▁") else LAST for rank, piece in ranks]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(texts) - FIRST_PIECE)
    return Vocabulary("sentencepiece", pieces=tuple(pieces), scores=tuple(scores), types=tuple(types))


def token_texts(model: Path) -> list[bytes]:
    """The text of every token of a tokenizer.model as llama.cpp's converter wrote it.

    That is what "." and the token decode to, without the ".": alone, a token would lose its space.
    """
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        dot = processor.piece_to_id(".")
        decoded = processor.decode([[dot], *([dot, token] for token in range(processor.vocab_size()))])
    except (OSError, RuntimeError):
        raise TinyllamaError(f"{model} is no SentencePiece model") from None
    except UnicodeDecodeError:  # of a piece, or of the message that there is an odd one
        raise TinyllamaError(f"{model} has a piece that isn't UTF-8") from None
    if decoded.pop(0) != ".":
        raise TinyllamaError(f"{model} has no piece for '.', which the ggml format needs")
    return [text.encode("utf-8")[1:] for text in decoded]


# --- writing --------------------------------------------------------------------------------------


def header(config: Config, vocabulary: list[bytes], ftype: int) -> bytes:
    """All that stands before the first tensor.

    Raises TinyllamaError for a model that has more to say than the header has fields for.
    """
    if config.n_kv_heads != config.n_heads or config.rope_theta != 10000.0:
        raise TinyllamaError(
            f"a ggml file has no field for n_kv_heads {config.n_kv_heads} or rope_theta "
            f"{config.rope_theta:g}: use --format gguf"
        )
    if config.hidden_dim != hidden_dim_of(config.dim, config.multiple_of):
        raise TinyllamaError(
            f"a ggml file has no field for hidden_dim {config.hidden_dim}: use --format gguf"
        )
    hparams = (
        config.vocab_size,
        config.dim,
        config.multiple_of,
        config.n_heads,
        config.n_layers,
        config.head_dim,
    )
    tokens = b"".join(struct.pack("<i", len(text)) + text for text in vocabulary)
    return struct.pack("<8i", MAGIC, *hparams, ftype) + tokens


def record(name: str, type: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the weights of a tensor."""
    encoded = name.encode()
    numbers = (len(shape), len(encoded), FTYPES[type], *shape[::-1])
    return struct.pack(f"<{len(numbers)}i", *numbers) + encoded


def with_ftype(header: bytes, ftype: int) -> bytes:
    """The same header with another ftype, its eighth number."""
    return header[:28] + struct.pack("<i", ftype) + header[32:]
