"""How long convert and quantize take and how much memory, beside reading what they read and writing what they
write.

    python benchmarks/synthetic.py 7B /tmp/7B --tokenizer path/to/tokenizer.model
    python benchmarks/files.py /tmp/7B

"copy" reads the input from front to back and writes a file of the output's size, 128 KB at a time, as cp
does. All take turns, each in a process of its own that has imported everything. Before each its output is
removed, its input is read, so that it is in the page cache as far as memory allows, and what was written
before reaches the disk; none waits for the disk itself. Needs room for two more copies of the checkpoint.
With a checklist.chk (`--checklist`) convert also computes md5 sums.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama.commands.convert import convert, quantize
from tinyllama.formats import meta
from tinyllama.machine.limits import human

STEP = 1 << 17  # bytes that are copied at a time


@dataclass
class Task:
    """Work from files to files, and what each run took: seconds of the clock, seconds of all cores, bytes."""

    name: str
    work: Callable[[], object]
    inputs: list[Path]
    outputs: list[Path]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    def run(self) -> None:
        for path in self.outputs:
            path.unlink(missing_ok=True)
        read_all(self.inputs)
        os.sync()
        start = time.perf_counter()
        child = os.fork()
        if not child:
            os.environ["TQDM_DISABLE"] = "1"
            self.work()
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        self.wall.append(time.perf_counter() - start)
        if status:
            sys.exit(f"{self.name} failed")
        self.cpu.append(usage.ru_utime + usage.ru_stime)
        self.peak.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))

    def row(self, floor: "Task") -> str:
        seconds = statistics.median(self.wall)
        of_floor = seconds / statistics.median(floor.wall)
        all_runs = " ".join(f"{wall:.2f}" for wall in self.wall)
        return (
            f"| {self.name:16} | {seconds:7.2f} | {of_floor:7.2f} | {statistics.median(self.cpu):7.2f} "
            f"| {human(max(self.peak)):>8} | {all_runs} |"
        )


def make_tasks(folder: Path, out: Path, type: str, format: str) -> list[Task]:
    """Each task behind its floor."""
    parts, copied, f16, quantized = (
        meta.part_paths(folder),
        out / "copy",
        out / "f16.bin",
        out / f"{type}.bin",
    )
    # Once before it counts, because the floors ask for the sizes of what is written.
    f16_files, quantized_files = convert(folder, 1, f16, format), quantize(f16, quantized, type)
    f16_size, quantized_size = size_of(f16_files), size_of(quantized_files)
    return [
        Task("copy", lambda: copy(parts, f16_size, copied), parts, [copied]),
        Task("convert", lambda: convert(folder, 1, f16, format), parts, f16_files),
        Task("copy", lambda: copy(f16_files, quantized_size, copied), f16_files, [copied]),
        Task(f"quantize to {type}", lambda: quantize(f16, quantized, type), f16_files, quantized_files),
    ]


def copy(inputs: list[Path], size: int, output: Path) -> None:
    """Read the inputs and meanwhile write so many bytes."""
    read, written, to_read = 0, 0, size_of(inputs)
    data = memoryview(bytearray(STEP))
    with output.open("wb", buffering=0) as target:
        for path in inputs:
            with path.open("rb", buffering=0) as source:
                while n_bytes := source.readinto(data):
                    read += n_bytes
                    while written < size * read // to_read:
                        written += target.write(data[: size * read // to_read - written])


def size_of(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def read_all(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a checkpoint in Meta's layout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--format", choices=("ggml", "gguf"), default="ggml")
    args = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="benchmark-", dir=args.folder))
    try:
        tasks = make_tasks(args.folder, out, args.type, args.format)
        for _ in range(args.rounds):
            for task in tasks:
                task.run()
    finally:
        shutil.rmtree(out)
    size = human(size_of(meta.part_paths(args.folder)))
    print(f"{size}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, median of {args.rounds}\n")
    print("| Task             | Seconds | of copy | CPU s   | Memory   | All runs |")
    print("|------------------|---------|---------|---------|----------|----------|")
    for floor, task in (tasks[:2], tasks[2:]):
        print(floor.row(floor))
        print(task.row(floor))


if __name__ == "__main__":
    main()
