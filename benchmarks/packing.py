"""How fast backend c packs each type of weights here: GB/s of the file's blocks.

    python benchmarks/packing.py [--types q4_0,q4_k] [--shape 4096,14336] [--threads 2] [--rounds 9]

Of a file that the system has in memory (page cache), mapped anew in every round as by a process that has
just begun, and of memory. The columns "strip" are what a thread does when it multiplies by a mapped weight:
strip by strip, each into the same place. The columns "weight" are what all threads do when a weight gets
memory of its own: memory that was used before and, as "fresh", what the system has yet to give. All types
take turns in every round, and the best round counts.
"""

import argparse
import mmap
import tempfile
import time
from pathlib import Path

import numpy as np

from tinyllama import _native
from tinyllama.quant import TYPES

TYPES_IN_FILES = "q4_0,q4_1,q5_0,q5_1,q8_0,q2_k,q3_k,q4_k,q5_k,q6_k,iq4_nl,iq4_xs"
COLUMNS = "strip, file", "strip, memory", "weight, file", "weight, memory", "weight, fresh"


def random_blocks(type: str, shape: tuple[int, int]) -> np.ndarray:
    """The bytes of blocks whose scales are all alike."""
    data = np.random.default_rng(0).integers(0, 256, TYPES[type].nbytes(shape), np.uint8)
    blocks = TYPES[type].view(data, shape)
    for name in {"d", "m", "dmin"} & set(blocks.dtype.names):
        blocks[name] = 0.01
    return data


def pack_strips(type: str, data: np.ndarray, shape: tuple[int, int], strip: "_native.Weight") -> float:
    """Seconds of packing every strip into the same memory, in this thread."""
    (n_rows, n_cols), at_once = shape, _native.STRIP * TYPES[type].row_bytes(shape[1])
    started = time.perf_counter()
    for start in range(0, n_rows // _native.STRIP * at_once, at_once):
        _native.pack(type, data[start : start + at_once], _native.STRIP, n_cols, strip, 0, 0, 1)
    return time.perf_counter() - started


def pack_all(type: str, data: np.ndarray, shape: tuple[int, int], weight, threads: int) -> float:
    """Seconds of packing all of a weight."""
    started = time.perf_counter()
    _native.pack(type, data, *shape, weight, 0, 0, threads)
    return time.perf_counter() - started


def measure(type: str, file: Path, shape: tuple[int, int], weights: tuple, threads: int) -> list[float]:
    """GB/s, one for each of COLUMNS."""
    strip, weight = weights
    with file.open("rb") as opened:
        first, second = (mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) for _ in range(2))
    mapped, again, data = (np.frombuffer(buffer, np.uint8) for buffer in (first, second, file.read_bytes()))
    seconds = [
        pack_strips(type, mapped, shape, strip),
        pack_strips(type, data, shape, strip),
        pack_all(type, again, shape, weight, threads),
        pack_all(type, data, shape, weight, threads),
        pack_all(type, data, shape, _native.Weight(TYPES[type].prepared, *shape), threads),
    ]
    return [len(data) / each / 1e9 for each in seconds]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", default=TYPES_IN_FILES)
    parser.add_argument("--shape", default="14336,4096", help="rows, columns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    types, shape = args.types.split(","), tuple(int(n) for n in args.shape.split(","))
    with tempfile.TemporaryDirectory() as folder:
        files = {type: Path(folder, type) for type in types}
        for type, file in files.items():
            file.write_bytes(random_blocks(type, shape))
        rows = {"strip": (_native.STRIP, shape[1]), "weight": shape}
        weights = {
            type: [_native.Weight(TYPES[type].prepared, *rows[name]) for name in rows] for type in types
        }
        turns = [(type, file, shape, weights[type], args.threads) for type, file in files.items()]
        best = np.max([[measure(*turn) for turn in turns] for _ in range(args.rounds)], axis=0)
    print(f"GB/s, {shape[0]} x {shape[1]}: strips in 1 thread, weights in {args.threads}")
    print(f"{'type':8}" + "".join(f"{name:>16}" for name in COLUMNS))
    for type, speeds in zip(types, best, strict=True):
        print(f"{type:8}" + "".join(f"{speed:16.1f}" for speed in speeds))


if __name__ == "__main__":
    main()
