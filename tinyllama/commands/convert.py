"""Any model -> one f16 (or f32, bf16) file; any such model -> a file of quantized blocks.

    models/7B/consolidated.00.pth   13.5 GB   as Meta gave it
    models/7B/ggml-model-f16.bin    13.5 GB   convert: the same weights in one file that needs no pickle
    models/7B/ggml-model-q4_0.bin    4.2 GB   quantize

Both only plan (plans.py): which rows of which tensor go where, as what. Then a few threads carry it out,

    read some rows  ->  cast them  ->  write them where they belong

in any order, and what is in memory at a time is a chunk a thread, however large the model. The ggml files are
byte for byte what llama.cpp's converter and quantizer wrote on 12 March 2023, one for each part of the
checkpoint. A GGUF is always one file, its parts merged, and holds all that other programs need; the blocks of
a quantized one are those that today's llama-quantize writes, and mixes.py says of which types.
"""

import hashlib
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..backends import get_backend
from ..config import OUTPUT
from ..errors import cancellable, check_cancelled, naming, require
from ..formats import Checkpoint, format_of, ggml, meta, open_checkpoint
from ..formats.imatrix import ImportanceMatrix
from ..machine.files import MappedFile, reserve, written
from ..machine.interrupts import interruptible
from ..machine.limits import human, require_disk, require_memory
from ..machine.places import find
from ..quant import TYPES
from ..tensor import Piece
from . import plans
from .importance_matrix import NO_IMPORTANCE, importance_of
from .mixes import MIXES, UNWEIGHED, Choice, find_mix, find_type
from .outputs import require_new
from .plans import Output, Rows

PLAIN = {0: "f32", 1: "f16", "f32": "f32", "f16": "f16", "bf16": "bf16"}  #: what convert's ftype may be

PORTION = 1 << 24  # bytes of source that a thread takes at a time
CHUNK = 1 << 20  # and reads at a time: it stays in the L2 cache until it has been written
WRITE = 1 << 17  # bytes in one write: for more, Linux looks for large pages, slow when files fill its memory
N_THREADS = min(4, os.cpu_count() or 1)

MEMORY = 200_000_000  # bytes: Python, NumPy and the chunks of all threads
WRITING_SPEED = 500e6  # bytes a second of an ordinary SSD, for the estimate
QUANTIZING_SPEED = 80e6  # weights a second and thread, of the slowest types
WEIGHED_SPEED = 25e6  # with an importance matrix, whose searches try more


def convert(
    source: str | Path,
    ftype: int | str | None = None,
    outfile: str | Path | None = None,
    format: str | None = None,
) -> list[Path]:
    """Write a model as GGUF, or as the ggml of March 2023.

    Args:
        source: any model: a folder of Hugging Face's or Meta's, a GGUF or ggml file (the first part of
            several), or a name.
        ftype: 1 or "f16" stores matrices as f16, 0 or "f32" as f32, "bf16" as bf16; by default f16, but what
            is quantized in a GGUF file stays as it is. Vectors are f32.
        outfile: by default ggml-model-f16.gguf (-f32, .bin) in the folder, or beside the file. Further parts
            of ggml append .1, .2, ...
        format: "gguf" or "ggml" (one file a part); by default ggml of Meta's folders, GGUF of all others.
    Returns the files written. Raises TinyllamaError where the model isn't whole, differs from its
    checklist.chk, or has no place in this format; then no file is written or changed.
    """
    known = ftype in (None, *PLAIN) and format in (None, "ggml", "gguf")
    has = "convert writes ggml or gguf of type 0 (f32) or 1 (f16) or bf16"
    require(known, f"{has}, not {format or 'gguf'} of {ftype!r}")
    with interruptible():
        checkpoint, type = open_checkpoint(source), PLAIN.get(ftype)
        format = format or ("ggml" if checkpoint.format == "meta" else "gguf")
        outfile = Path(outfile or _beside(source, checkpoint, type or "f16", format))
        if format == "ggml":
            outputs = plans.ggml_files(checkpoint, outfile, type or "f16")
        else:
            types, file_type = plans.plain_types(checkpoint, type)
            outputs = [plans.gguf_file(checkpoint, outfile, types, file_type)]
        return _write("convert", outputs, [source])


def quantize(
    source: str | Path,
    target: str | Path,
    type: int | str,
    *,
    pure: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    imatrix: str | Path | ImportanceMatrix | dict[str, np.ndarray] | None = None,
) -> list[Path]:
    """Write a model of f16, bf16 or f32 weights with its matrices in blocks.

    Args:
        source: any model, as of `convert`. Of a ggml model in several parts, the first means all; a later one
            means that part alone.
        target: the file to write, of a ggml model likewise a ggml file (of all parts, the first), else GGUF.
        type: a key of mixes.MIXES such as "Q4_K_M", in upper or lower case, or llama_ftype's number; of a
            ggml file "Q4_0" (2) or "Q4_1" (3).
        pure: the same type for all matrices.
        output_tensor_type, token_embedding_type: of these two, whatever the mix says: one of mixes.TYPES.
        imatrix: an importance matrix, a file or what `tinyllama.imatrix` gives, or the mean square of each
            input by GGUF's names of matrices: an error of a weight counts the more, the larger its input is.
    Returns the files written. Raises TinyllamaError where the source isn't whole, is quantized already, or
    has no place in this format; then no file is written or changed.
    """
    mix, target = find_mix(type), Path(target)
    asked = [find_type(type) if type else None for type in (output_tensor_type, token_embedding_type)]
    with interruptible():
        path = find(source)
        with naming(path):
            module, opened = format_of(path)
        if module is ggml:
            one_type = f"{path}: a ggml file holds matrices of one type: convert it to GGUF first"
            require(not any(asked), one_type)
            require(imatrix is None, f"{path}: an importance matrix needs a GGUF file: convert it first")
            return _write("quantize", plans.quantized_ggml_files(opened, target, mix), [source])
        with naming(path):
            checkpoint = module.read(opened)
        importance = NO_IMPORTANCE if imatrix is None else importance_of(imatrix, checkpoint)
        tied, weighed = OUTPUT not in checkpoint.tensors, imatrix is not None
        choice = Choice(mix, checkpoint.config, tied, pure, *asked, weighed)
        types = plans.mixed_types(checkpoint, choice, importance.means)
        if weighed and set(types.values()) <= UNWEIGHED:
            warnings.warn(f"{mix} makes no use of an importance matrix", stacklevel=2)
        output = plans.gguf_file(checkpoint, target, types, MIXES[mix].number, importance)
        made_from = [source, imatrix] if isinstance(imatrix, (str, Path)) else [source]
        return _write("quantize", [output], made_from, plans.notes(checkpoint, choice, types))


def _beside(source: str | Path, checkpoint: Checkpoint, type: str, format: str) -> Path:
    """Where a converted model goes if nobody says."""
    there = Path(source).expanduser().exists()
    require(there, f"{source}: say where to write it (outfile), there is no folder of yours to put it in")
    path, ending = checkpoint.path, f"{type}.{'bin' if format == 'ggml' else format}"
    if path.is_dir():
        return path / f"ggml-model-{ending}"
    return path.with_name(f"{re.sub('-00001-of-[0-9]{5}$', '', path.stem)}-{ending}")


def _write(verb: str, outputs: list[Output], made_from: list, notes: Iterable[str] = ()) -> list[Path]:
    """Write files. They appear under their names when all are whole, and not at all if anything fails.

    Args:
        verb: for the announcement and the progress bar.
        made_from: the model, and other files: none of all these is replaced. The md5 sums in the model's
            checklist.chk, if it has one, are checked meanwhile.
        notes: lines to print before.
    """
    targets, total = [output.path for output in outputs], sum(output.size for output in outputs)
    pieces = (piece for output in outputs for rows in output.rows for piece in rows.pieces)
    sources = list({id(piece.data): piece.data for piece in pieces if _is_mapped(piece)}.values())
    require_new(targets, [*made_from, *(file.path for file in sources)])
    sums = meta.read_checklist(sources[0].path.parent) if sources[0].path.suffix == ".pth" else {}
    with written(*targets) as paths, ExitStack() as files:
        _announce(verb, outputs, total, notes)
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
        for file in sources:
            file.check()
    return targets


def _is_mapped(piece: Piece) -> bool:
    return isinstance(piece.data, MappedFile)


def _announce(verb: str, outputs: list[Output], total: int, notes: Iterable[str]) -> None:
    """Say what it will need and become, and refuse what the machine doesn't have."""
    quantized = [rows for output in outputs for rows in output.rows if TYPES[rows.type].block > 1]
    speeds = [QUANTIZING_SPEED if rows.importance is None else WEIGHED_SPEED for rows in quantized]
    computing = sum(math.prod(rows.shape) / speed for rows, speed in zip(quantized, speeds, strict=True))
    seconds = max(total / WRITING_SPEED, computing / N_THREADS)
    first, last = outputs[0].path, outputs[-1].path
    names = first.name if first == last else f"{first.name} … {last.name}"
    needs = f"takes about {seconds:.0f} s and {human(MEMORY)} of memory"
    print(f"{verb}: writes {names}, {human(total)}; {needs}", *notes, sep="\n", file=sys.stderr)
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
        path = getattr(rows.pieces[0].data, "path", rows.name)
        with naming(path), naming(rows.name, OverflowError):
            parts, type = [_read(piece) for piece in chunk.pieces], rows.pieces[0].type
            blocks = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            require(type != rows.type or TYPES[type].is_finite(blocks), "NaN or infinity")
            blocks = blocks if type == rows.type else cast(blocks, type, rows.type, rows.importance)
        _put(target, memoryview(blocks).cast("B"), chunk.offset)
    return rows.end - rows.offset


def _put(target: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes into a file."""
    while data:
        n_bytes = os.pwrite(target, data[:WRITE], offset)
        data, offset = data[n_bytes:], offset + n_bytes


def _read(piece: Piece) -> np.ndarray:
    """Its rows. Reading, unlike mapping, leaves nothing in this process's memory. A vector is one row."""
    kind, order, is_vector = piece.kind, piece.order, len(piece.shape) == 1
    if not _is_mapped(piece):
        return np.ascontiguousarray(piece.blocks()[None] if is_vector else piece.blocks())
    first, stop = (0, piece.shape[0]) if order is None else (order.min(), order.max() + 1)
    size = kind.row_bytes(1) if is_vector else piece.row_bytes
    data = np.empty((stop - first) * size, np.uint8)
    n_bytes = os.preadv(piece.data.fd, [data], piece.offset + first * size)
    require(n_bytes == len(data), "became shorter while it was read")
    blocks = kind.view(data, (1, stop - first) if is_vector else (stop - first, piece.shape[1]))
    if order is None:
        return blocks
    return blocks[:, order - first] if is_vector else blocks[order - first]


def _check_md5(file: MappedFile, expected: str) -> None:
    """20 s for 13 GB."""
    digest = hashlib.md5(usedforsecurity=False)
    with naming(file.path):
        for offset in range(0, len(file), CHUNK):
            check_cancelled()
            digest.update(os.pread(file.fd, CHUNK, offset))
        right = digest.hexdigest() == expected
        require(right, "damaged: its md5 isn't the one in checklist.chk; download it again")
