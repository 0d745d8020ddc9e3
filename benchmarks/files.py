"""How long convert and quantize take and how much memory, beside `cp` of the same checkpoint.

    python benchmarks/synthetic.py 7B /tmp/7B --checklist --tokenizer path/to/tokenizer.model
    python benchmarks/files.py /tmp/7B

The three take turns, each in a process of its own, and every round begins by reading the checkpoint, so
that it is in the page cache as far as memory allows. Needs room for two more copies of the checkpoint.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama.formats import meta
from tinyllama.resources import human


@dataclass
class Task:
    """A command, and what each run of it took: seconds of the clock, seconds of all cores, bytes."""

    name: str
    command: list[str]
    outputs: list[Path]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    def run(self) -> None:
        for path in self.outputs:
            path.unlink(missing_ok=True)
        start = time.perf_counter()
        process = subprocess.Popen(self.command, env=os.environ | {"TQDM_DISABLE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.wall.append(time.perf_counter() - start)
        if process.returncode:
            sys.exit(f"{self.name} failed")
        self.cpu.append(usage.ru_utime + usage.ru_stime)
        self.peak.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))

    def row(self, cp_seconds: float) -> str:
        seconds = statistics.median(self.wall)
        all_runs = " ".join(f"{wall:.1f}" for wall in self.wall)
        return (
            f"| {self.name:8} | {seconds:7.1f} | {seconds / cp_seconds:5.2f} "
            f"| {statistics.median(self.cpu):7.1f} | {human(max(self.peak)):>8} | {all_runs} |"
        )


def make_tasks(folder: Path, out: Path, type: str) -> list[Task]:
    parts = meta.part_paths(folder)
    copies = [out / path.name for path in parts]
    f16 = [out / ("f16.bin" + (f".{number}" if number else "")) for number in range(len(parts))]
    quantized = [path.with_name(path.name.replace("f16", type)) for path in f16]
    python = [sys.executable, "-c"]
    convert = f"from tinyllama.convert import convert; convert({str(folder)!r}, 1, {str(f16[0])!r})"
    quantize = (
        f"from tinyllama.convert import quantize; quantize({str(f16[0])!r}, {str(quantized[0])!r}, {type!r})"
    )
    return [
        Task("cp", ["cp", *map(str, parts), str(out)], copies),
        Task("convert", [*python, convert], f16),
        Task("quantize", [*python, quantize], quantized),
    ]


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
    args = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="benchmark-", dir=args.folder))
    try:
        tasks = make_tasks(args.folder, out, args.type)
        for _ in range(args.rounds):
            for task in tasks:
                read_all(meta.part_paths(args.folder) if task.name != "quantize" else tasks[1].outputs)
                os.sync()
                task.run()
                if task.name == "cp":
                    shutil.rmtree(out)
                    out.mkdir()
    finally:
        shutil.rmtree(out)
    size = sum(path.stat().st_size for path in meta.part_paths(args.folder))
    print(f"{human(size)}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, median of {args.rounds}\n")
    print("| Task     | Seconds | of cp | CPU s   | Memory   | All runs |")
    print("|----------|---------|-------|---------|----------|----------|")
    for task in tasks:
        print(task.row(statistics.median(tasks[0].wall)))


if __name__ == "__main__":
    main()
