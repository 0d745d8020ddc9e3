"""One target under atheris, libFuzzer for Python, in a process of its own.

Most inputs are known ones with some bytes changed, as libFuzzer does it; every tenth is a new one from the
target's hypothesis strategy. Either kind is kept and changed again when it reaches code that none before it
reached. What breaks the contract is written down, and the fuzzing goes on.
"""

import hashlib
import json
import random
import sys
import time
import traceback
from pathlib import Path

import atheris
from hypothesis import HealthCheck, given, settings

NEW = 0.1  # the share of inputs that are made anew
CHOICES = 4096  # bytes that a strategy may draw from
EVERY = 1.0  # seconds between two writings of what has been done


class Maker:
    """Inputs from a hypothesis strategy, chosen by a seed."""

    def __init__(self, strategy):
        @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def keep(data):
            self._made = data

        self._draw = keep.hypothesis.fuzz_one_input

    def make(self, seed: int) -> bytes | None:
        """An input, or None where the choices didn't reach to its end."""
        self._made = None
        self._draw(random.Random(seed).randbytes(CHOICES))
        return self._made


class Fuzzed:
    """A target, and what has become of its inputs so far."""

    def __init__(self, target, folder: Path, findings: Path):
        self.target, self.folder, self.findings = target, folder, findings
        self.maker, self.inputs, self.accepted, self.written = Maker(target.inputs()), 0, 0, 0.0

    def try_one(self, data: bytes) -> None:
        """Check an input; note it down if the contract doesn't hold."""
        self.inputs += 1
        try:
            self.accepted += bool(self.target.check(data))
        except BaseException as error:  # a Rust panic is none of the Exceptions
            note(self.findings, data, error)
        if time.monotonic() - self.written > EVERY:
            self.written = time.monotonic()
            done = {"inputs": self.inputs, "accepted": self.accepted}
            (self.folder / "done.json").write_text(json.dumps(done))

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """The next input, from an old one or from nothing."""
        made = self.maker.make(seed) if random.Random(seed).random() < NEW else None
        return made if made and len(made) <= max_size else atheris.Mutate(data, max_size)


def note(findings: Path, data: bytes, error: BaseException) -> Path:
    """Keep an input that breaks the contract, the smallest of those that break it at the same place."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tinyllama" in frame.filename]
    place = "".join(f"{frame.name}:{frame.lineno}\n" for frame in frames[-3:])
    if type(error).__name__ == "Broken":
        place += error.args[0]
    name = f"{type(error).__name__}-{hashlib.md5(place.encode()).hexdigest()[:8]}"
    path = findings / name
    if not path.exists() or len(data) < path.stat().st_size:
        findings.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
    return path


def main(name: str, folder: str, findings: str, *options: str) -> None:
    """Fuzz until libFuzzer's options say stop. Doesn't return."""
    with atheris.instrument_imports(include=["tinyllama"]):
        from . import targets

        target = targets.load(name)
    fuzzed = Fuzzed(target, Path(folder), Path(findings))
    atheris.Setup(["fuzz", *options], fuzzed.try_one, custom_mutator=fuzzed.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
