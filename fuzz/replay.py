"""Inputs tried again: one that was found, the corpus, and which lines of a reader the corpus reaches."""

import json
import os
import subprocess
import sys
from pathlib import Path

from . import targets

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "fuzz" / "corpus"
KEPT = ROOT / "build" / "fuzz"


def corpus(name: str) -> list[Path]:
    """The committed inputs of a target."""
    return sorted((CORPUS / name).iterdir())


def kept(name: str) -> list[Path]:
    """The committed inputs of a target, and those that past runs kept."""
    return [*corpus(name), *sorted((KEPT / name / "inputs").glob("*"))]


def try_again(name: str, paths: list[Path]) -> None:
    """Check inputs, and say what became of each; the first that breaks the contract ends it."""
    target = targets.load(name)
    variables = getattr(target, "environment", dict)()
    if variables.items() - os.environ.items():  # which a process has from its beginning
        os.execve(sys.executable, [sys.executable, "-m", "fuzz", *sys.argv[1:]], os.environ | variables)
    for path in paths:
        accepted = target.check(path.read_bytes())
        print(f"{path}: {'accepted' if accepted else 'refused'}, as it should be")


def write_seeds(name: str) -> None:
    """Write a target's seeds into its corpus."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    for seed, data in targets.load(name).seeds().items():
        (folder / seed).write_bytes(data)


def coverage_of(name: str) -> dict[str, str]:
    """How much of the modules that a target reads with is reached by the inputs kept so far."""
    if measure := getattr(targets.load(name), "coverage", None):
        return measure(kept(name))
    command = [sys.executable, "-m", "fuzz.replay", name]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        return json.loads(finished.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"lines": "?", "branches": "?"}


def _measure(name: str) -> dict[str, str]:
    import coverage

    measured = coverage.Coverage(branch=True, data_file=None, source_pkgs=["tinyllama"])
    measured.start()
    target = targets.load(name)
    for path in kept(name):
        try:
            target.check(path.read_bytes())
        except Exception as error:
            print(f"{path}: {type(error).__name__}", file=sys.stderr)
    measured.stop()
    lines = all_lines = branches = all_branches = 0
    for module in target.READS:
        numbers = measured._analyze(sys.modules[module].__file__).numbers
        lines, all_lines = lines + numbers.n_executed, all_lines + numbers.n_statements
        branches, all_branches = branches + numbers.n_executed_branches, all_branches + numbers.n_branches
    return {"lines": f"{100 * lines // all_lines}%", "branches": f"{100 * branches // all_branches}%"}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
