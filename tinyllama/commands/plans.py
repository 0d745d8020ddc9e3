"""Plans for files that `convert` and `quantize` write: which rows of which tensor go where, as what."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np

from ..config import EMBEDDING, FAMILIES, OUTPUT, Config, hidden_dim_of
from ..errors import naming, require
from ..formats import Checkpoint, ggml, gguf, headers
from ..machine.files import MappedFile
from ..ops import rope_factors
from ..quant import BLOCK, TYPES
from ..tensor import Piece, Tensor, turned_order
from ..tokenizer import token_texts
from .importance_matrix import NO_IMPORTANCE, Importance
from .mixes import Choice, block, file_order, needs_importance
from .printing import counted
from .tables import type_table

QUANTIZED_2023 = {"Q4_0": "q4_0_2023", "Q4_1": "q4_1_2023"}


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor to be moved into a file."""

    name: str  # the tensor's, for messages
    pieces: tuple[Piece, ...]  # one, or of a tensor that is cut by columns those of a row, left to right
    type: str  # that they get
    offset: int  # in the file to be written
    importance: np.ndarray | None = None  # of each column, [n_cols], to a quantizer

    @property
    def shape(self) -> tuple[int, int]:
        """[n_rows, n_cols]; a vector is one row."""
        n_rows = self.pieces[0].shape[0] if len(self.pieces[0].shape) == 2 else 1
        return n_rows, sum(piece.shape[-1] for piece in self.pieces)

    @property
    def end(self) -> int:
        """The offset behind them."""
        return self.offset + TYPES[self.type].nbytes(self.shape)

    def cut(self, n_bytes: int) -> Iterator["Rows"]:
        """The same rows in portions of about so many bytes of source."""
        n_rows, n_cols = self.shape
        step = max(1, n_bytes // sum(piece.row_bytes for piece in self.pieces))
        for start, stop in pairwise([*range(0, n_rows, step), n_rows]):
            pieces = tuple(piece.rows(start, stop) for piece in self.pieces)
            yield replace(self, pieces=pieces, offset=self.offset + TYPES[self.type].nbytes((start, n_cols)))


@dataclass
class Output:
    """A file to be written."""

    path: Path
    size: int
    headers: list[tuple[int, bytes]]  # what isn't weights, each at its offset
    rows: list[Rows]


# --- ggml -----------------------------------------------------------------------------------------


def ggml_files(checkpoint: Checkpoint, path: Path, type: str) -> list[Output]:
    """One file a part, each with all of the header and vocabulary, and a whole copy of every norm."""
    tensors = checkpoint.tensors
    n_parts = len(checkpoint.files) if checkpoint.format == "meta" else 1
    with naming(checkpoint.path):
        require(type in ggml.FTYPES, f"a ggml file can't hold {type}: use --format gguf")
        config = _with_multiple(checkpoint.config)
        header = headers.ggml_header(config, _texts(checkpoint), ggml.FTYPES[type])
        has_factors = gguf.ROPE_FREQS in tensors
        require(not has_factors, "a ggml file has no field for factors of RoPE: use --format gguf")
    if abs(config.norm_eps / (implied := ggml.published_norm_eps(config.dim)) - 1) > 1e-6:
        lost = f"a ggml file can't hold norm_eps {config.norm_eps:g}, and {implied:g} will be taken"
        hint = "unless params.json lies beside it; a GGUF file holds it"
        warnings.warn(f"{path}: {lost} {hint}", stacklevel=3)
    tied = {} if OUTPUT in tensors else {OUTPUT: tensors[EMBEDDING]}
    whole = {name: tensor.pieces * n_parts for name, tensor in (tensors | tied).items()}
    parts = [{name: pieces[i] for name, pieces in whole.items()} for i in range(n_parts)]
    return _in_records(parts, header, path, type)


def _with_multiple(config: Config) -> Config:
    """With a multiple_of that gives hidden_dim, if there is one: only Meta's folders name it."""
    tried = [config.multiple_of, *(1 << i for i in range(10, -1, -1))]
    found = next((n for n in tried if hidden_dim_of(config.dim, n) == config.hidden_dim), config.multiple_of)
    return replace(config, multiple_of=found)


def _texts(checkpoint: Checkpoint) -> list[bytes]:
    """What ggml files tell of a vocabulary, from which the rest must follow."""
    vocabulary = checkpoint.vocabulary
    require(vocabulary.kind == "sentencepiece", "a ggml file can't hold byte-level BPE: use --format gguf")
    texts = token_texts(vocabulary)
    if checkpoint.format != "meta":  # in whose folder tokenizer.model lies, too
        rebuilt = ggml.rebuild_vocabulary(texts)
        same = (rebuilt.pieces, rebuilt.types) == (vocabulary.pieces, vocabulary.types)
        require(same, "its vocabulary can't be told from the texts that a ggml file holds: use --format gguf")
    return texts


def quantized_ggml_files(file: MappedFile, path: Path, mix: str) -> list[Output]:
    """The parts of a ggml model, or the later part alone that this file is."""
    with naming(file.path):
        known = f"a ggml file can be quantized to {' or '.join(QUANTIZED_2023)}"
        require(mix in QUANTIZED_2023, f"{known}, not to {mix}: convert it to GGUF first")
    parts, type = ggml.read_parts(file), QUANTIZED_2023[mix]
    header = headers.with_ftype(file[: parts[0].header_size], ggml.FTYPES[type])
    with naming(file.path):
        for name, piece in parts[0].pieces.items():
            _require_plain(name, piece.type)
            whole = len(piece.shape) == 1 or piece.shape[1] % BLOCK == 0
            lie = f"rows of {name}, {piece.shape[-1]} weights, don't divide into blocks of {BLOCK}"
            require(whole, f"{lie}: convert it to GGUF first, where they may stay f16")
    return _in_records([part.pieces for part in parts], header, path, type)


def _in_records(parts: list[dict[str, Piece]], header: bytes, path: Path, type: str) -> list[Output]:
    """The tensors of a part one after the other, each behind its record."""
    outputs = []
    for number, pieces in enumerate(parts):
        records, rows, end = [(0, header)], [], len(header)
        for name, piece in pieces.items():
            tensor_type = type if len(piece.shape) == 2 else "f32"  # vectors are small, and used everywhere
            records.append((end, headers.ggml_record(name, tensor_type, piece.shape)))
            rows.append(Rows(name, (piece,), tensor_type, end + len(records[-1][1])))
            end = rows[-1].end
        outputs.append(Output(ggml.part_path(path, number), end, records, rows))
    return outputs


def _require_plain(name: str, type: str) -> None:
    require(TYPES[type].block == 1, f"quantized already ({name} is {type}): start from an f16 file")


# --- GGUF -----------------------------------------------------------------------------------------


def plain_types(checkpoint: Checkpoint, type: str | None) -> tuple[dict[str, str], int]:
    """The type of each tensor, and the file's number: of None f16, or all as it is if GGUF has its blocks."""
    tensors, plain = checkpoint.tensors, type or "f16"
    blocks = [tensor for tensor in tensors.values() if TYPES[tensor.type].block > 1]
    if blocks and not type and all(TYPES[tensor.type].gguf_id is not None for tensor in blocks):
        said = checkpoint.metadata.get("general.file_type")
        number = said if said in range(1 << 16) else TYPES["f16"].file_type
        return {name: tensor.type for name, tensor in tensors.items()}, number
    if blocks:
        larger = f"quantized weights become {plain}, which takes more room and makes them no better"
        warnings.warn(f"{checkpoint.path}: {larger}", stacklevel=3)
    types = {name: plain if len(tensor.shape) == 2 else "f32" for name, tensor in tensors.items()}
    return types, TYPES[plain].file_type


def mixed_types(checkpoint: Checkpoint, choice: Choice, known: Iterable[str] = ()) -> dict[str, str]:
    """The type of each tensor as llama-quantize chooses it, in its order.

    known: the matrices of which an importance matrix tells.
    """
    names, types = headers.gguf_names(checkpoint.config), {}
    ordered = {names[name]: tensor for name, tensor in checkpoint.tensors.items()}
    with naming(checkpoint.path):
        for tensor in (ordered[name] for name in file_order(ordered)):
            _require_plain(tensor.name, tensor.type)
            kept = tensor.type if checkpoint.format == "gguf" else "f32"  # of vectors
            is_matrix = len(tensor.shape) == 2
            types[tensor.name] = choice.type_of(tensor.name, tensor.shape[1]) if is_matrix else kept
        lacking = needs_importance(choice.mix, types.items(), known)
        bad = f"{choice.mix} of {lacking} is bad without an importance matrix that knows it"
        require(not lacking, f"{bad}: give one (--imatrix), or choose Q2_K")
    return types


def notes(checkpoint: Checkpoint, choice: Choice, types: dict[str, str]) -> Iterator[str]:
    """Which tensors become what, how many bits a weight takes, and which types take another's place."""
    shapes = {name: checkpoint.tensors[name].shape for name in types}
    sizes = {name: TYPES[type].nbytes(shapes[name]) for name, type in types.items()}
    yield from type_table((name, type, sizes[name]) for name, type in types.items())
    instead: dict[tuple[str, str], list[int]] = {}
    for name, n_cols in ((name, shape[1]) for name, shape in shapes.items() if len(shape) == 2):
        if (wanted := choice.wanted(name, n_cols)) != types[name]:
            instead.setdefault((wanted, types[name]), []).append(n_cols)
    for (wanted, type), widths in instead.items():
        many = counted(len(widths), "tensor")
        rows = f"rows of {' and '.join(map(str, sorted(set(widths))))} weights"
        yield f"  {type} stands in for {wanted} in {many}: {rows} don't divide into blocks of {block(wanted)}"
    yield f"  {8 * sum(sizes.values()) / sum(map(prod, shapes.values())):.2f} bits per weight"


def gguf_file(
    checkpoint: Checkpoint,
    path: Path,
    types: dict[str, str],
    file_type: int,
    importance: Importance = NO_IMPORTANCE,
) -> Output:
    """Tensors whole and in the order of `types`: their pieces side by side or one below the other."""
    config, rows = checkpoint.config, []
    if config.output_bias and config.family != "llama":
        warnings.warn(f"{path}: llama.cpp can't open it: its {config.family} has no bias of wo", stacklevel=4)
    tensors = [_as_in_gguf(checkpoint.tensors[name], config) for name in types]
    if config.rope_scaling and config.rope_scaling.kind == "llama3":  # which no key tells
        tensors.append(Tensor.from_array(gguf.ROPE_FREQS, rope_factors(config).astype(np.float32)))
    infos = [(tensor.name, types.get(tensor.name, "f32"), tensor.shape) for tensor in tensors]
    kept = checkpoint.metadata if checkpoint.format == "gguf" else None
    described = config, checkpoint.vocabulary, infos, file_type, _name(checkpoint.path)
    header, offsets, size = headers.gguf_header(*described, kept, checkpoint.template, importance.keys)
    for tensor, (_, type, _), offset in zip(tensors, infos, offsets, strict=True):
        for pieces in [tensor.pieces] if tensor.axis else [(piece,) for piece in tensor.pieces]:
            rows.append(Rows(tensor.name, pieces, type, offset, importance.means.get(tensor.name)))
            offset = rows[-1].end
    return Output(path, size, [(0, header)], rows)


def _name(path: Path) -> str:
    """A model's, from its folder or file; in Hugging Face's cache from that of the repository."""
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    own = path.resolve().stem if path.is_file() else path.resolve().name
    return cached.split("--")[-1] if cached else own


def _as_in_gguf(tensor: Tensor, config: Config) -> Tensor:
    """A tensor whose rows lie as GGUF files of the family have them: of some, in halves."""
    order = turned_order(tensor.name, tensor.shape[0], config.head_dim)
    if order is None or not FAMILIES[config.family].halves:
        return tensor
    back = np.argsort(order)
    return replace(tensor, pieces=tuple(_reordered(piece, back) for piece in tensor.pieces))


def _reordered(piece: Piece, rows: np.ndarray) -> Piece:
    """These rows of a piece, in this order."""
    order = rows if piece.order is None else piece.order[rows]
    return replace(piece, order=None if np.array_equal(order, np.arange(len(order))) else order)
