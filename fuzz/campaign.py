"""Several targets, so many minutes each, some of them at once; then a table of what came of it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import replay, targets

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "fuzz"  # what the inputs of a run are kept in, from one run to the next
FINDINGS = ROOT / "fuzz" / "findings"
LARGEST = 32768  # bytes of an input
TOO_LONG = 60  # seconds that libFuzzer lets an input take on a busy computer; the contract is stricter


@dataclass
class Run:
    """One target's progress."""

    target: str
    seconds: float = 0.0
    cpu: float = 0.0
    inputs: int = 0
    accepted: int = 0
    edges: int = 0
    last_new: float = 0.0
    covered: dict = field(default_factory=dict)
    _before: tuple[int, int] = (0, 0)

    @property
    def findings(self) -> list[Path]:
        folder = FINDINGS / self.target
        return sorted(path for path in folder.glob("*") if path.suffix != ".txt")

    def fuzz(self, minutes: float) -> None:
        """Run the engine, and again if an input ends its process, until the time is up."""
        folder, start, deaths = BUILD / self.target, time.monotonic(), 0
        for name in ("inputs", "deaths"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        while (left := 60 * minutes - (time.monotonic() - start)) > 1 and deaths < 20:
            self._before = self.inputs, self.accepted
            deaths += self._once(folder, start, int(left))
        self.seconds = time.monotonic() - start
        self.covered = replay.coverage_of(self.target)
        with open(BUILD / "runs.jsonl", "a") as log:
            named = {key: value for key, value in asdict(self).items() if key[0] != "_"}
            log.write(json.dumps(named | {"findings": len(self.findings)}) + "\n")

    def _once(self, folder: Path, start: float, seconds: int) -> bool:
        """One process. Returns whether it died of an input."""
        (folder / "done.json").unlink(missing_ok=True)  # of the process before, counted already
        target = targets.load(self.target)
        dictionary = folder / "words"
        dictionary.write_text("\n".join(map(_quoted, getattr(target, "WORDS", ()))))
        options = [
            folder / "inputs",
            ROOT / "fuzz" / "corpus" / self.target,
            f"-dict={dictionary}",
            f"-max_total_time={seconds}",
            f"-max_len={LARGEST}",
            f"-timeout={TOO_LONG}",
            f"-report_slow_units={TOO_LONG}",
            "-rss_limit_mb=4096",
            f"-artifact_prefix={folder / 'deaths'}/",
        ]
        command = [sys.executable, "-m", "fuzz.engine", self.target, folder, FINDINGS / self.target, *options]
        environment = os.environ | getattr(target, "environment", dict)()
        with (
            subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            ) as process,
            open(folder / "log", "w") as log,
        ):
            for line in process.stderr:
                log.write(line)
                self._listen(folder, line, start)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu += usage.ru_utime + usage.ru_stime
        return self._bury(folder) or process.returncode != 0

    def _listen(self, folder: Path, line: str, start: float) -> None:
        self.seconds = time.monotonic() - start
        found = re.match(r"#(\d+)\s.*cov: (\d+)", line)
        if found and int(found[2]) > self.edges:
            self.edges, self.last_new = int(found[2]), self.seconds
        self.update(folder)

    def update(self, folder: Path) -> None:
        """Take over what the engine says it has done."""
        try:
            done = json.loads((folder / "done.json").read_text())
            self.inputs, self.accepted = (
                old + done[key] for old, key in zip(self._before, done, strict=True)
            )
        except (OSError, ValueError):
            pass  # it hasn't begun, or is writing this very moment

    def _bury(self, folder: Path) -> bool:
        """Inputs that ended the process (a crash, a hang, a lack of memory) are findings, too."""
        dead = list((folder / "deaths").iterdir())
        for path in dead:
            (FINDINGS / self.target).mkdir(parents=True, exist_ok=True)
            path.rename(FINDINGS / self.target / path.name)
        return bool(dead)


def _quoted(word: bytes) -> str:
    """As libFuzzer's dictionaries spell bytes."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"'


def run(names: list[str], minutes: float, jobs: int) -> int:
    """Fuzz the targets with these names. Returns how many findings there are."""
    if importlib.util.find_spec("atheris") is None:
        sys.exit("fuzzing needs atheris, which exists for Linux: pip install atheris, or make fuzz")
    runs = [Run(name) for name in names]
    stop = threading.Event()
    watcher = threading.Thread(target=_report, args=(runs, stop), daemon=True)
    watcher.start()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: run.fuzz(minutes), runs))
    stop.set()
    watcher.join()
    print(table(runs))
    for each in runs:
        for path in each.findings:
            print(f"found; try it with: python -m fuzz try {each.target} {path.relative_to(ROOT)}")
    return sum(len(each.findings) for each in runs)


def table(runs: list[Run]) -> str:
    """What came of it, a line a target."""
    rows = [
        (
            "target",
            "inputs",
            "accepted",
            "minutes",
            "CPU min",
            "edges",
            "last new",
            "lines",
            "branches",
            "findings",
        )
    ]
    for each in runs:
        rows.append(
            (
                each.target,
                f"{each.inputs:,}",
                f"{each.accepted:,}",
                f"{each.seconds / 60:.1f}",
                f"{each.cpu / 60:.1f}",
                f"{each.edges:,}",
                f"{each.last_new / 60:.1f}",
                each.covered.get("lines", ""),
                each.covered.get("branches", ""),
                str(len(each.findings)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _report(runs: list[Run], stop: threading.Event) -> None:
    """A line that keeps itself up to date on a terminal, and one a minute in a file."""
    on_terminal = sys.stdout.isatty()
    while not stop.wait(1 if on_terminal else 60):
        parts = [
            f"{each.target} {each.seconds / 60:.1f} min {each.inputs:,} inputs cov {each.edges} "
            f"found {len(each.findings)}"
            for each in runs
            if each.seconds and not each.covered
        ]
        print("\r\033[K" * on_terminal + " | ".join(parts), end="" if on_terminal else "\n", flush=True)
    print("\r\033[K" * on_terminal, end="", flush=True)


def merge(name: str) -> None:
    """Put into the corpus, of the inputs kept so far, the fewest that reach all that they reach."""
    command = [sys.executable, "-m", "fuzz.engine", name, BUILD / name, FINDINGS / name, "-merge=1"]
    command += [f"-max_len={LARGEST}", ROOT / "fuzz" / "corpus" / name, BUILD / name / "inputs"]
    environment = os.environ | getattr(targets.load(name), "environment", dict)()
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True)
