"""Importance matrices, as llama-imatrix writes them: how large the inputs of each matrix are on some text.

An error of a weight costs more where the inputs that it is multiplied with are large. So llama-quantize takes
the mean square of each input for the weight of its column's errors.

Today's file is GGUF (gguf.py has the layout):

    general.type          "imatrix"
    imatrix.datasets      array of strings: the files that the text came from
    imatrix.chunk_count   u32: pieces of text
    imatrix.chunk_size    u32: tokens in each
    NAME.in_sum2          F32 [n_in]: the sum of the squares of each input of the matrix NAME
    NAME.counts           F32 [1]: the number of tokens they are of

NAME is GGUF's, "blk.0.attn_q.weight". The older file, often called imatrix.dat, is i32 numbers and f32 ones:
the number of matrices; for each the length of its name, the name, n_chunks, n_in, and n_in times the mean
square * n_chunks; then perhaps the number of chunks, the length of the text's file name, and the name. It
doesn't say how long its chunks are: 512 tokens, which is usual, is assumed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import naming, require
from ..machine.files import MappedFile
from ..machine.limits import require_memory
from . import arrays
from .cursor import LONGEST_NAME, STRING, U32, Cursor
from .gguf import MOST, recognizes
from .key_values import Metadata, shown

WHAT = "an importance matrix"
DATASETS, CHUNKS, SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
USUAL, MOST_CHUNKS = 512, 1 << 24  # tokens in a chunk; so many chunks can still be counted in float32


@dataclass(frozen=True)
class ImportanceMatrix:
    """How large the inputs of each matrix of a model were on a text."""

    sums: dict[str, np.ndarray]  # of the squares of each input, by GGUF's name of the matrix: [n_in]
    counts: dict[str, int]  # the tokens that each sum is of
    datasets: tuple[str, ...]  # the files that the text came from
    n_chunks: int
    chunk_size: int  # tokens in each

    def means(self) -> dict[str, np.ndarray]:
        """The mean square of each input, by GGUF's name of the matrix: float32 [n_in]."""
        return {name: sums / np.float32(self.counts[name]) for name, sums in self.sums.items()}

    def write(self, path: str | Path) -> None:
        """Write a GGUF file that llama.cpp reads, too: the whole file, or none."""
        metadata = Metadata({"general.type": "imatrix"})
        metadata.set(DATASETS, list(self.datasets), STRING)
        metadata.set(CHUNKS, self.n_chunks, U32)
        metadata.set(SIZE, self.chunk_size, U32)
        found = {}
        for name in sorted(self.sums):  # as llama-imatrix has them
            found[name + SUMS] = self.sums[name]
            found[name + COUNTS] = np.array([self.counts[name]], np.float32)
        arrays.write(path, metadata, found)


def read(path: str | Path) -> ImportanceMatrix:
    """An importance matrix from a GGUF file, or one of the older kind.

    Raises TinyllamaError, naming the file, where it is none, or damaged.
    """
    file = MappedFile(path)
    return _read_gguf(file) if recognizes(file) else _read_older(file)


def _read_gguf(file: MappedFile) -> ImportanceMatrix:
    metadata, found = arrays.read(file, "general.type", "imatrix", WHAT)
    with naming(file.path):
        for key in (CHUNKS, SIZE):
            value = metadata.get(key)
            fine = type(value) is int and 0 <= value < 1 << 32
            require(fine, f"the key {key} must be a whole number, not {shown(value)}")
        sums = {name.removesuffix(SUMS): array for name, array in found.items() if name.endswith(SUMS)}
        require(sums, f"holds no tensor that ends in {SUMS}")
        counts = {}
        for name, array in sums.items():
            count = found.get(name + COUNTS, np.empty(0))
            require(count.size, f"the tensor {name + COUNTS} is missing")
            require(count.size == array.ndim == 1, f"{name} is of experts, which aren't supported")
            require(count[0] >= 1 and array.min() >= 0, f"{name} can't be sums of squares")
            counts[name] = round(float(count[0]))
    datasets = metadata.get(DATASETS)
    datasets = tuple(map(str, datasets)) if isinstance(datasets, list) else ()
    return ImportanceMatrix(sums, counts, datasets, metadata[CHUNKS], metadata[SIZE])


def _read_older(file: MappedFile) -> ImportanceMatrix:
    cursor, sums, counts, datasets = Cursor(file), {}, {}, []
    cursor.limit = len(file)
    with naming(file.path):
        require_memory(len(file), "reading it")
    with naming(file.path), naming(f"is not {WHAT}, or damaged"):
        (n_matrices,) = cursor.numbers("I", "the number of matrices")
        require(0 < n_matrices <= MOST, f"{n_matrices} matrices can't be right")
        for index in range(n_matrices):
            (text,) = cursor.texts(1, f"the name of matrix {index}", LONGEST_NAME - len(SUMS), "I")
            name = text.decode()
            n_chunks, n_in = cursor.numbers("II", name)
            start = cursor.skip(4 * n_in, name)
            with np.errstate(over="ignore", invalid="ignore"):
                found = np.frombuffer(file, "<f4", n_in, start) * np.float32(USUAL)
            fine = n_in and 0 < n_chunks < MOST_CHUNKS and np.isfinite(found).all() and found.min() >= 0
            require(fine, f"{name} can't be sums of squares")
            require(name not in sums, f"{name} is there twice")
            sums[name], counts[name] = found, USUAL * n_chunks
        n_chunks = max(counts.values()) // USUAL
        if cursor.offset < cursor.size:
            (n_chunks,) = cursor.numbers("I", "the number of chunks")
        if cursor.offset < cursor.size:
            datasets = cursor.texts(1, "the name of the text", code="I")
        return ImportanceMatrix(sums, counts, tuple(map(bytes.decode, datasets)), n_chunks, USUAL)
