"""Weights from files to files, in little memory: what `convert` and `quantize` have in common.

Everything about a file to be written is known beforehand: its size, its headers, and for every tensor
where the weights come from, what type they get and where they go. So a few threads take portions of rows and
go through each in chunks,

    read some rows  ->  to another type  ->  write them where they belong

in any order, and what is in memory at a time is a chunk a thread, however large the model.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..backends import get_backend
from ..blocks import TYPES
from ..errors import TinyllamaError
from ..quant import is_finite
from ..machine.limits import disk_needed, human, require_disk, require_memory
from ..machine.threads import results_of
from ..machine.files import NO_ROOM, Unchanged, blamed, reserve, written_beside

PORTION = 1 << 24  # bytes of source that a thread takes at a time
CHUNK = 1 << 20  # and reads at a time: it stays in the L2 cache until it has been written
WRITE = 1 << 17  # bytes in one write: for more, Linux looks for large pages, slow when files fill its memory
N_THREADS = min(4, os.cpu_count() or 1)

MEMORY = 200_000_000  # bytes: Python, NumPy and the chunks of all threads
WRITING_SPEED = 500e6  # bytes a second of an ordinary SSD, for the estimate
QUANTIZING_SPEED = 100e6  # weights a second and thread, likewise


@dataclass(frozen=True)
class Source:
    """Where rows of weights lie in a file, `n_cols` weights of a type in each."""

    path: Path
    offset: int
    type: str
    n_cols: int

    @property
    def row_bytes(self) -> int:
        return TYPES[self.type].row_bytes(self.n_cols)

    def skip(self, n_rows: int) -> "Source":
        return replace(self, offset=self.offset + n_rows * self.row_bytes)


@dataclass(frozen=True)
class Rows:
    """Rows to be moved into a file.

    Attributes:
        name: of the tensor, for error messages.
        sources: one, or of a tensor cut by columns the pieces that make up a row, left to right.
        n_rows: how many rows.
        type: that they get.
        offset: in the file to be written.
    """

    name: str
    sources: tuple[Source, ...]
    n_rows: int
    type: str
    offset: int

    @property
    def n_cols(self) -> int:
        return sum(source.n_cols for source in self.sources)

    @property
    def row_bytes(self) -> int:
        return TYPES[self.type].row_bytes(self.n_cols)

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes

    def cut(self, n_bytes: int) -> Iterator["Rows"]:
        """The same in pieces of about so many bytes of source."""
        step = max(1, n_bytes // sum(source.row_bytes for source in self.sources))
        for start in range(0, self.n_rows, step):
            sources = tuple(source.skip(start) for source in self.sources)
            n_rows, offset = min(step, self.n_rows - start), self.offset + start * self.row_bytes
            yield replace(self, sources=sources, n_rows=n_rows, offset=offset)


@dataclass
class Output:
    """A file to be written: its size in bytes, its headers as (offset, bytes), and its weights."""

    path: Path
    size: int
    headers: list[tuple[int, bytes]]
    rows: list[Rows] = field(default_factory=list)


def write(
    outputs: list[Output],
    verb: str,
    sources: Unchanged,
    check: Callable[[threading.Event], None] | None = None,
) -> list[Path]:
    """Write files. They appear under their names when all are whole, and not at all if anything fails.

    Args:
        outputs: what to write.
        verb: "convert" or "quantize", for the progress bar.
        sources: the files that it is made from, as they were before anything was read from them.
        check: runs beside the writing, and makes it fail by raising; is given an event that says: give up.
    Returns:
        the paths of the files.
    Raises TinyllamaError where the disk hasn't the room, a file can't be read or written, a source is
    changed meanwhile, or another run writes the same files.
    """
    total = sum(output.size for output in outputs)
    with _beside(outputs) as unfinished:
        _announce(outputs, verb)
        with tqdm(total=total, desc=verb, unit="B", unit_scale=True) as bar:
            _fill(unfinished, bar, check)
        sources.check()
    return [output.path for output in outputs]


def _fill(
    unfinished: list[tuple[Path, Output]], bar: tqdm, check: Callable[[threading.Event], None] | None
) -> None:
    """Write headers and weights, while the check runs beside."""
    for path, output in unfinished:
        with blamed(path):
            bar.update(_write_headers(path, output))
    portions = [
        (path, portion)
        for path, output in unfinished
        for rows in output.rows
        for portion in rows.cut(PORTION)
    ]
    with closing(_in_parallel(portions, check)) as moved:
        for n_bytes in islice(moved, len(portions)):
            bar.update(n_bytes)
        bar.set_postfix_str("checking" if check else "")
        for _ in moved:  # nothing more: this waits for the check
            pass
    bar.set_postfix_str("")
    bar.update(bar.total - bar.n)  # padding


def _announce(outputs: list[Output], verb: str) -> None:
    """Say what it will need, and refuse what the machine doesn't have."""
    size = sum(output.size for output in outputs)
    every_row = [rows for output in outputs for rows in output.rows]
    quantized = sum(rows.n_rows * rows.n_cols for rows in every_row if TYPES[rows.type].block > 1)
    seconds = max(size / WRITING_SPEED, quantized / (QUANTIZING_SPEED * N_THREADS))
    names, folder = _where(outputs)
    needs = f"takes about {seconds:.0f} s and {human(MEMORY)} of memory"
    # The line's end with the line: print writes it on its own, and an interrupt can come between.
    sys.stderr.write(f"{verb}: writes {names}, {human(size)}; {needs}\n")
    require_disk(size, folder, f"writing {names}")
    require_memory(MEMORY, f"writing {names}")


def _where(outputs: list[Output]) -> tuple[str, Path]:
    """The names of the outputs, for messages, and their folder."""
    first, last = outputs[0].path, outputs[-1].path
    names = first.name + (f" … {last.name}" if len(outputs) > 1 else "")
    return names, Path(os.path.realpath(first)).parent


# --- files that appear when they are whole --------------------------------------------------------


@contextmanager
def _beside(outputs: list[Output]) -> Iterator[list[tuple[Path, Output]]]:
    """Files beside the outputs to write to; they become the outputs at the end, or vanish at a failure."""
    names, folder = _where(outputs)
    if not folder.is_dir():
        raise TinyllamaError(f"{outputs[0].path}: there is no folder {folder}")
    try:
        with written_beside(*(output.path for output in outputs)) as paths:
            yield list(zip(paths, outputs, strict=True))
    except OSError as error:
        cause = f"{error.filename}: {error.strerror}"
        if error.errno in NO_ROOM:
            size = sum(output.size for output in outputs)
            cause += f"; {disk_needed(size, folder, f'writing {names}')}"
        raise TinyllamaError(cause) from None


def _write_headers(path: Path, output: Output) -> int:
    """Fill the file with zeros and put its headers in. Returns their bytes."""
    with path.open("r+b") as file:
        reserve(file, output.size)
        for offset, data in output.headers:
            file.seek(offset)
            file.write(data)
    return sum(len(data) for _, data in output.headers)


# --- threads --------------------------------------------------------------------------------------


def _in_parallel(
    portions: list[tuple[Path, Rows]], check: Callable[[threading.Event], None] | None
) -> Iterator[int]:
    """Move every portion; yields the bytes of each, and ends when the check has ended as well.

    After a failure or an interrupt the rest isn't moved.
    """
    _keep_freed_memory()
    cast, give_up, waiting = get_backend().cast, threading.Event(), iter(portions)

    def move_portions() -> Iterator[int]:
        for path, rows in takewhile(lambda _: not give_up.is_set(), waiting):
            yield _move(path, rows, cast, give_up)

    def run_check() -> Iterator[int]:
        check(give_up)
        yield from ()

    jobs = [move_portions() for _ in range(N_THREADS)] + ([run_check()] if check else [])
    return results_of(jobs, give_up.set)


def _keep_freed_memory() -> None:
    """Spare every chunk hundreds of page faults.

    glibc's malloc gives blocks as large as a chunk back to the system whenever one is freed, until it has
    seen a larger one come and go (mallopt(3), M_MMAP_THRESHOLD).
    """
    np.empty(24 << 20, np.uint8)


def _move(path: Path, rows: Rows, cast: Callable, give_up: threading.Event) -> int:
    """Read, turn into the wanted type, write, until told to give up. `cast` is a backend's."""
    with ExitStack() as stack:
        files = [stack.enter_context(source.path.open("rb", buffering=0)) for source in rows.sources]
        target = stack.enter_context(path.open("r+b", buffering=0))
        target.seek(rows.offset)
        for chunk in rows.cut(CHUNK):
            if give_up.is_set():  # a disk that others keep busy can make a portion wait for half a minute
                break
            pieces = [
                _read(file, source, chunk.n_rows) for file, source in zip(files, chunk.sources, strict=True)
            ]
            blocks = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
            if rows.type != rows.sources[0].type:
                blocks = _cast(blocks, rows, cast)
            elif not is_finite(blocks, rows.type):
                raise TinyllamaError(f"{rows.sources[0].path}: {rows.name} holds NaN or infinity")
            with blamed(path):
                _write(target, blocks)
    return rows.nbytes


def _read(file: FileIO, source: Source, n_rows: int) -> np.ndarray:
    """Rows as they lie in their file. Reading, unlike mapping, leaves nothing in this process's memory."""
    data = np.empty(n_rows * source.row_bytes, np.uint8)
    with blamed(source.path):
        file.seek(source.offset)
        n_bytes = file.readinto(data)
    if n_bytes < data.nbytes:
        raise TinyllamaError(f"{source.path} became shorter while it was read")
    return TYPES[source.type].view(data, (n_rows, source.n_cols))


def _write(file: FileIO, blocks: np.ndarray) -> None:
    data = memoryview(blocks).cast("B")
    while data:
        data = data[file.write(data[:WRITE]) :]


def _cast(blocks: np.ndarray, rows: Rows, cast: Callable) -> np.ndarray:
    """As `rows.type`."""
    try:
        return cast(blocks, rows.sources[0].type, rows.type)
    except OverflowError as error:
        raise TinyllamaError(f"{rows.sources[0].path}: {rows.name} holds {error}") from None
