"""lock.py [--upgrade] writes requirements/*.txt: of every package that a goal of the Makefile installs, the
one version and the SHA-256 of its files, for Linux and macOS and every Python that tinyllama is for.

Versions that stand in requirements/ stay while pyproject.toml allows them; --upgrade takes the newest ones.
All goals share one .venv, so their versions come from one resolution, which uv makes. `-r` brings in the file
that another one builds on.

torch has a file of its own. On Linux, PyPI's builds need gigabytes of CUDA libraries that nothing here uses;
PyTorch's own index has the same version for the CPU alone.
"""

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

#: requirements/NAME.txt: the file that it builds on, and what of pyproject.toml it has besides.
GOALS = {
    "demo": (None, "--group=setup --extra=chat --extra=serve"),
    "notebooks": ("demo", "--extra=notebooks"),
    "test": ("notebooks", "--extra=test"),
    "browser": ("test", "--group=browser"),
    "fuzz": ("test", "--group=fuzz"),
    "cross": ("test", "--group=cross"),
    "arm": ("demo", "--group=arm"),
    "wheels": ("demo", "--group=wheels"),
    "lint": ("demo", "--extra=lint"),
    "audit": ("demo", "--group=audit"),
    "lock": ("demo", "--group=lock"),
}
#: torch, what its builds for the CPU do without, and pip, which Python brings.
APART = re.compile(r"torch|triton|nvidia-.*|cuda-.*|pip")
HEADER = "# Made by `make lock`, as CONTRIBUTING.md says."


def resolve(*arguments: str, output: Path) -> dict[str, str]:
    """{name: its lines}, as `uv pip compile` writes them; it prefers the versions that `output` names."""
    options = ["--universal", "--python-version=3.11", "--fork-strategy=fewest", "--generate-hashes"]
    options += ["--no-annotate", "--no-header", "--quiet", f"--output-file={output}"]
    command = [sys.executable, "-m", "uv", "pip", "compile", *options, *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("make lock: uv failed for the reason above; requirements/ stays as it was")
    return {block.split("==")[0]: block for block in blocks(output)}


def blocks(path: Path) -> list[str]:
    """The pinned packages of a file, each with its hashes."""
    return re.findall(r"^[a-z0-9].*(?:\n    .*)*", path.read_text(), flags=re.MULTILINE)


def resolve_all(folder: Path, upgrade: list[str]) -> dict[str, str]:
    """{name: its lines} of every package."""
    standing = folder / "standing.txt"
    standing.write_text("\n".join(chain(*map(blocks, LOCKS.glob("*.txt")))).replace("+cpu", ""))
    return resolve(
        "pyproject.toml", *chain(*(what.split() for _, what in GOALS.values())), *upgrade, output=standing
    )


def lock_goals(folder: Path, pins: Path) -> dict[str, list[str]]:
    """{goal: what requirements/goal.txt lists}."""
    known, lists = {None: set()}, {}
    for goal, (base, what) in GOALS.items():
        found = resolve(
            "pyproject.toml", *what.split(), f"--constraints={pins}", output=folder / f"{goal}.txt"
        )
        known[goal] = known[base] | found.keys()
        own = [found[name] for name in sorted(found.keys() - known[base]) if not APART.fullmatch(name)]
        lists[goal] = [f"-r {base}.txt", *own] if base else own
    return lists


def lock_torch(folder: Path, version: str) -> list[str]:
    """What requirements/torch.txt lists."""
    wanted = folder / "torch.in"
    wanted.write_text(
        f"torch=={version}+cpu ; sys_platform == 'linux'\ntorch=={version} ; sys_platform == 'darwin'\n"
    )
    options = ["--no-deps", "--default-index", TORCH_INDEX]
    found = resolve(str(wanted), *options, output=folder / "torch.txt")
    return [f"--extra-index-url {TORCH_INDEX}", *found.values()]


def main(*upgrade: str) -> None:
    """Writes all files, or none where a version or an index can't be found."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        everything = resolve_all(folder, upgrade)
        pins = folder / "pins.txt"
        pins.write_text("\n".join(block.split("\\\n")[0] for block in everything.values()))
        lists = lock_goals(folder, pins)
        torch = re.match(r"torch==(\S+)", everything["torch"])[1]
        if f"torch=={torch}+cpu " not in (LOCKS / "torch.txt").read_text():
            lists["torch"] = lock_torch(folder, torch)
    for goal, lines in lists.items():
        (LOCKS / f"{goal}.txt").write_text("\n".join([HEADER, *lines, ""]))


if __name__ == "__main__":
    main(*sys.argv[1:])
