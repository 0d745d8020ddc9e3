"""Meta's checkpoint -> one f16 (or f32) file, and such a file -> a file of 4-bit blocks.

    models/7B/consolidated.00.pth   13.5 GB   as Meta gave it
    models/7B/ggml-model-f16.bin    13.5 GB   convert: the same weights in one file that needs no pickle
    models/7B/ggml-model-q4_0.bin    4.2 GB   quantize

Both only plan: which rows of which tensor go where, as what. Then a few threads carry the plan out,

    read some rows  ->  cast them  ->  write them where they belong

in any order, and what is in memory at a time is a chunk a thread, however large the model. The ggml files are
byte for byte what llama.cpp's converter and quantizer wrote on 12 March 2023, one for each part of the
checkpoint; a GGUF is always one file, its parts merged.
"""

import hashlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..backends import get_backend
from ..errors import cancellable, check_cancelled, naming, require
from ..formats import Checkpoint, ggml, gguf, headers, meta
from ..machine.files import MappedFile, reserve, written
from ..machine.interrupts import interruptible
from ..machine.limits import human, require_disk, require_memory
from ..quant import BLOCK, TYPES
from ..tensor import Piece
from ..tokenizer import token_texts

PLAIN = {TYPES[type].file_type: type for type in ("f32", "f16")}
QUANTIZED = {kind.file_type: kind.name for kind in TYPES.values() if kind.block > 1 and kind.file_type}
QUANTIZED_2023 = {type: f"{type}_2023" for type in QUANTIZED.values() if f"{type}_2023" in TYPES}

PORTION = 1 << 24  # bytes of source that a thread takes at a time
CHUNK = 1 << 20  # and reads at a time: it stays in the L2 cache until it has been written
WRITE = 1 << 17  # bytes in one write: for more, Linux looks for large pages, slow when files fill its memory
N_THREADS = min(4, os.cpu_count() or 1)

MEMORY = 200_000_000  # bytes: Python, NumPy and the chunks of all threads
WRITING_SPEED = 500e6  # bytes a second of an ordinary SSD, for the estimate
QUANTIZING_SPEED = 100e6  # weights a second and thread, likewise


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor to be moved into a file."""

    name: str  # the tensor's, for messages
    pieces: tuple[Piece, ...]  # one, or of a tensor that is cut by columns those of a row, left to right
    type: str  # that they get
    offset: int  # in the file to be written

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


def convert(
    folder: str | Path, ftype: int = 1, outfile: str | Path | None = None, format: str = "ggml"
) -> list[Path]:
    """Write the checkpoint in a folder as ggml (one file a part) or GGUF (one file).

    Args:
        folder: with (or one of) consolidated.NN.pth, params.json, and tokenizer.model there or one folder up.
        ftype: 1 stores matrices as f16, 0 as f32. Norms are f32 either way.
        outfile: by default ggml-model-f16.bin (-f32, .gguf) in the folder. Further parts append .1, .2, ...
        format: "ggml" or "gguf".
    Returns the files written. Raises TinyllamaError where the checkpoint isn't whole, differs from its
    checklist.chk, or has no place in this format; then no file is written or changed.
    """
    known = ftype in PLAIN and format in ("ggml", "gguf")
    require(known, f"convert writes ggml or gguf of type 0 (f32) or 1 (f16), not {format} of {ftype!r}")
    with interruptible():
        checkpoint, type = meta.read(folder), PLAIN[ftype]
        folder, vocabulary, vocab_size = checkpoint.path, checkpoint.vocabulary, checkpoint.config.vocab_size
        has = f"it has {len(vocabulary.pieces)} tokens, but {checkpoint.files[0].path} embeds {vocab_size}"
        require(len(vocabulary.pieces) == vocab_size, f"{vocabulary.path}: another model's, {has}")
        outfile = Path(outfile or folder / f"ggml-model-{type}.{'bin' if format == 'ggml' else 'gguf'}")
        outputs = (_merged if format == "gguf" else _part_by_part)(checkpoint, outfile, type)
        beside = folder / "params.json", vocabulary.path
        return _write("convert", outputs, meta.read_checklist(folder), *beside)


def quantize(source: str | Path, target: str | Path, type: int | str) -> list[Path]:
    """Write a ggml or GGUF file of f16, bf16 or f32 weights again, its matrices in blocks of a type.

    Args:
        source: of a ggml model in several parts, the first means all; a later one means that part alone.
        target: the file to write; of all parts, the first.
        type: "q4_0" (2) or "q4_1" (3), and of GGUF also "q5_0", "q5_1", "q8_0".
    Returns the files written. Raises TinyllamaError where the source isn't whole, is quantized already, or
    has rows that don't divide into blocks; then no file is written or changed.
    """
    target, type = Path(target), QUANTIZED.get(int(type), type) if str(type).isdigit() else type
    require(type in QUANTIZED.values(), f"quantize to {', '.join(QUANTIZED.values())}, not to {type}")
    with interruptible():
        file = MappedFile(source)
        if gguf.recognizes(file):
            outputs = _merged(gguf.read(file), target, type)
        else:
            known = f"a ggml file can be quantized to {' or '.join(QUANTIZED_2023)}"
            require(type in QUANTIZED_2023, f"{source}: {known}, not to {type}")
            parts, type = ggml.read_parts(file), QUANTIZED_2023[type]
            header = headers.with_ftype(file[: parts[0].header_size], ggml.FTYPES[type])
            outputs = _ggml_files([part.pieces for part in parts], header, target, type)
        for rows in (rows for output in outputs for rows in output.rows):
            found, n_cols = rows.pieces[0].type, rows.shape[1]
            with naming(rows.pieces[0].data.path):
                again = f"quantized already ({rows.name} is {found}): start from an f16 file"
                require(TYPES[found].block == 1, again)
                whole = n_cols % TYPES[rows.type].block == 0
                require(whole, f"rows of {rows.name}, {n_cols} weights, don't divide into blocks of {BLOCK}")
        return _write("quantize", outputs, {})


def _part_by_part(checkpoint: Checkpoint, path: Path, type: str) -> list[Output]:
    """One file a part, each with all of the header and vocabulary, and a whole copy of every norm."""
    config, n_parts = checkpoint.config, len(checkpoint.files)
    with naming(checkpoint.path):
        header = headers.ggml_header(config, token_texts(checkpoint.vocabulary), ggml.FTYPES[type])
    if config.norm_eps != (implied := ggml.published_norm_eps(config.dim)):
        lost = f"a ggml file can't hold norm_eps {config.norm_eps:g}, and {implied:g} will be taken"
        hint = "unless params.json lies beside it; a GGUF file holds it"
        warnings.warn(f"{path}: {lost} {hint}", stacklevel=3)
    tensors = checkpoint.tensors.items()
    parts = [{name: (tensor.pieces * n_parts)[i] for name, tensor in tensors} for i in range(n_parts)]
    return _ggml_files(parts, header, path, type)


def _ggml_files(parts: list[dict[str, Piece]], header: bytes, path: Path, type: str) -> list[Output]:
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


def _merged(checkpoint: Checkpoint, path: Path, type: str) -> list[Output]:
    """One GGUF file with all tensors whole: their pieces side by side or one below the other."""
    config, tensors, rows = checkpoint.config, checkpoint.tensors.values(), []
    infos = [(tensor.name, type if len(tensor.shape) == 2 else "f32", tensor.shape) for tensor in tensors]
    kept, name = checkpoint.metadata if checkpoint.format == "gguf" else None, checkpoint.path.resolve().name
    vocabulary, file_type = checkpoint.vocabulary, TYPES[type].file_type
    header, offsets, size = headers.gguf_header(config, vocabulary, infos, file_type, name, kept)
    for tensor, (_, tensor_type, _), offset in zip(tensors, infos, offsets, strict=True):
        for pieces in [tensor.pieces] if tensor.axis else [(piece,) for piece in tensor.pieces]:
            rows.append(Rows(tensor.name, pieces, tensor_type, offset))
            offset = rows[-1].end
    return [Output(path, size, [(0, header)], rows)]


def _write(verb: str, outputs: list[Output], sums: dict[str, str], *beside: Path) -> list[Path]:
    """Write files. They appear under their names when all are whole, and not at all if anything fails.

    Args:
        verb: for the announcement and the progress bar.
        sums: md5 sums by the names of the files that the weights are read from; they are checked meanwhile.
        beside: further files that must not be replaced.
    """
    targets, total = [output.path for output in outputs], sum(output.size for output in outputs)
    pieces = (piece for output in outputs for rows in output.rows for piece in rows.pieces)
    sources = list(dict.fromkeys(piece.data for piece in pieces))
    for target in filter(Path.exists, targets):
        made_from = any(target.samefile(path) for path in [*(file.path for file in sources), *beside])
        require(not made_from, f"{target}: would replace what it is made from: name another file to write")
    with written(*targets) as paths, ExitStack() as files:
        _announce(verb, outputs, total)
        jobs, checks = [], [(file, sums[file.path.name]) for file in sources if file.path.name in sums]
        for path, output in zip(paths, outputs, strict=True):
            file = files.enter_context(path.open("r+b", buffering=0))
            reserve(file, output.size)
            for offset, data in output.headers:
                _put(file.fileno(), data, offset)
            jobs += [(file.fileno(), portion) for rows in output.rows for portion in rows.cut(PORTION)]
        with tqdm(total=total, desc=verb, unit="B", unit_scale=True) as bar:
            for n_bytes in _carried_out(jobs, checks):
                bar.update(n_bytes)
            bar.update(total - bar.n)  # headers and padding
        for source in sources:
            source.check()
    return targets


def _announce(verb: str, outputs: list[Output], total: int) -> None:
    """Say what it will need, and refuse what the machine doesn't have."""
    quantized = [rows.shape for output in outputs for rows in output.rows if TYPES[rows.type].block > 1]
    n_weights = sum(n_rows * n_cols for n_rows, n_cols in quantized)
    seconds = max(total / WRITING_SPEED, n_weights / (QUANTIZING_SPEED * N_THREADS))
    first, last = outputs[0].path, outputs[-1].path
    names = first.name if first == last else f"{first.name} … {last.name}"
    needs = f"takes about {seconds:.0f} s and {human(MEMORY)} of memory"
    print(f"{verb}: writes {names}, {human(total)}; {needs}", file=sys.stderr)
    require_disk(total, Path(os.path.realpath(first)).parent, f"writing {names}")
    require_memory(MEMORY, f"writing {names}")


def _carried_out(jobs: list[tuple[int, Rows]], checks: list[tuple[MappedFile, str]]) -> Iterator[int]:
    """Move all rows, several portions at a time; yields the bytes of each. Checks run beside."""
    # Spare every chunk hundreds of page faults: glibc's malloc gives memory back to the system at each free,
    # until it has seen a larger block come and go (mallopt(3), M_MMAP_THRESHOLD).
    np.empty(24 << 20, np.uint8)
    cast, failed = get_backend().cast, threading.Event()
    with cancellable(failed):
        flags = copy_context()  # each thread looks at the flags of this one, and stops at the next chunk
    n_threads = N_THREADS + min(len(checks), N_THREADS)
    with ThreadPoolExecutor(n_threads, initializer=lambda: [var.set(flags[var]) for var in flags]) as pool:
        try:
            checking = [pool.submit(_check_md5, *check) for check in checks]
            yield from pool.map(lambda job: _move(*job, cast), jobs)
            for check in checking:
                check.result()
        finally:
            failed.set()


def _move(target: int, rows: Rows, cast: Callable) -> int:
    """Read, turn into the wanted type, write; returns how many bytes. `cast` is a backend's."""
    for chunk in rows.cut(CHUNK):
        check_cancelled()
        with naming(rows.pieces[0].data.path), naming(rows.name, OverflowError):
            parts, type = [_read(piece) for piece in chunk.pieces], rows.pieces[0].type
            blocks = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            require(type != rows.type or TYPES[type].is_finite(blocks), "NaN or infinity")
            blocks = blocks if type == rows.type else cast(blocks, type, rows.type)
        _put(target, memoryview(blocks).cast("B"), chunk.offset)
    return rows.end - rows.offset


def _put(target: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes into a file."""
    while data:
        n_bytes = os.pwrite(target, data[:WRITE], offset)
        data, offset = data[n_bytes:], offset + n_bytes


def _read(piece: Piece) -> np.ndarray:
    """Rows as they lie in their file. Reading, unlike mapping, leaves nothing in this process's memory."""
    data = np.empty(piece.nbytes, np.uint8)
    n_bytes = os.preadv(piece.data.fd, [data], piece.offset)
    require(n_bytes == piece.nbytes, "became shorter while it was read")
    return piece.kind.view(data, (piece.nbytes // piece.row_bytes, piece.shape[-1]))  # a vector: one row


def _check_md5(file: MappedFile, expected: str) -> None:
    """20 s for 13 GB."""
    digest = hashlib.md5(usedforsecurity=False)
    with naming(file.path):
        for offset in range(0, len(file), CHUNK):
            check_cancelled()
            digest.update(os.pread(file.fd, CHUNK, offset))
        right = digest.hexdigest() == expected
        require(right, "damaged: its md5 isn't the one in checklist.chk; download it again")
