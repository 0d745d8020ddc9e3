"""The models on this computer: which would run, and which fit into its memory. No weight is read.

What is in a file is kept in the user's cache, since a vocabulary takes a third of a second to read: a second
look at a hundred models takes as long as to find them.
"""

import json
import shutil
import sys
import textwrap
import warnings
from contextlib import suppress
from math import prod
from pathlib import Path

from .. import __version__
from ..backends import Backend, get_backend
from ..errors import TinyllamaError, check_cancelled, printable
from ..formats import Checkpoint, open_checkpoint, stamp
from ..machine import places
from ..machine.download import cache_folder
from ..machine.files import read_file, written
from ..machine.limits import UNKNOWN, available_memory, human
from ..settings import default_ctx_size
from .mixes import ALIASES, MIXES, SUBSTITUTES
from .printing import columns

LARGEST_CACHE = 1 << 24  # bytes; a model takes about 300
#: The columns of the table.
HEADER = {"family": "family", "n_params": "", "type": "type", "n_bytes": "size", "memory": "memory"}
HEADER |= {"fits": "fits", "name": "name"}
SHOWN = 20  # models that can't be run; there are folders full of others


def models() -> dict:
    """Describe every model that `places.everything` finds.

    Returns:
        "models": of each that would run {"name", "path", "family", "n_params", "n_bytes" (of its files),
            "type", "memory" and "weights" (bytes that running it takes, and of these the weights), "fits"}:
            "yes", "--mmap" if only without a copy of its weights, or "no".
        "unsupported": of the others {"name", "path", "reason"}.
        "free_memory": bytes.
    """
    from tqdm.auto import tqdm

    backend, free, known, rows = get_backend(), available_memory(), Known(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what readers warn of doesn't matter here
        for name, path in tqdm([*places.everything()], "look", unit=" models", leave=False, delay=0.5):
            check_cancelled()
            rows.append({"name": name, "path": path and str(path)} | known.facts(name, path, backend))
    known.write()
    for row in rows:
        if "memory" in row:
            is_mapped = row["memory"] - row["weights"] <= free
            row["fits"] = "yes" if row["memory"] <= free else "--mmap" if is_mapped else "no"
    fitting = [row for row in rows if "fits" in row]
    others = [row for row in rows if "reason" in row]
    return {"models": fitting, "unsupported": others, "free_memory": free}


class Known:
    """What is known of models that have been looked at, by the state of their files."""

    def __init__(self):
        self._path, self._new = cache_folder() / "list.json", {}
        sources = Path(__file__).parents[1].rglob("*.py")  # another reader may read what this one doesn't
        self._version = f"{__version__} {max((source.stat().st_mtime_ns for source in sources), default=0)}"
        self._old = {}
        with suppress(TinyllamaError, ValueError, TypeError, KeyError, RecursionError):
            self._old = dict(json.loads(read_file(self._path, LARGEST_CACHE))[self._version])

    def facts(self, name: str, path: Path | None, backend: Backend) -> dict:
        """What `describe` says of a model, or {"reason"} why it can't be run, perhaps from the last time."""
        try:
            path = path or places.find(name)
            key = f"{backend.name} {stamp(path)}"
            self._new[key] = self._old.get(key) or self._describe(path, backend)
            return {"path": str(path)} | self._new[key]
        except TinyllamaError as error:
            return {"reason": str(error).removeprefix(f"{path}: ")}

    def _describe(self, path: Path, backend: Backend) -> dict:
        try:
            return describe(open_checkpoint(path), backend)
        except TinyllamaError as error:
            return {"reason": str(error).removeprefix(f"{path}: ")}

    def write(self) -> None:
        """Keep it for the next time, if there is a place."""
        if self._new == self._old:
            return
        with suppress(TinyllamaError, OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with written(self._path) as (path,):
                path.write_text(json.dumps({self._version: self._new}), encoding="utf-8")


def describe(checkpoint: Checkpoint, backend: Backend) -> dict:
    """What a row of the list says of a model; the sizes are in bytes."""
    config, tensors = checkpoint.config, checkpoint.tensors
    memory = backend.memory(config, tensors, default_ctx_size(config))
    return {
        "family": config.family,
        "n_params": sum(prod(tensor.shape) for tensor in tensors.values()),
        "n_bytes": sum(len(file) for file in checkpoint.files),
        "type": type_of(checkpoint),
        "memory": sum(memory.values()),
        "weights": memory["weights"],
    }


def type_of(checkpoint: Checkpoint) -> str:
    """The name of its mix, "Q4_K_M", if a GGUF file says one that fits; else the type of most weights."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.type] = sizes.get(tensor.type, 0) + prod(tensor.shape)
    most, name = max(sizes, key=sizes.get), ALIASES.get(str(checkpoint.metadata.get("general.file_type")))
    base = name and MIXES[name].type
    return name if most in (base, SUBSTITUTES.get(base)) else most.upper()


def table(found: dict) -> str:
    """What `models` returns, for people: a line a model, then those that can't be run, and why."""
    lines = [*columns([HEADER.values(), *map(_row, found["models"])], "<><>><<", indent="")]
    if found["free_memory"] < UNKNOWN:
        free = f"{human(found['free_memory'])} are free now"
        lines += ["", f"memory: to run it with at most 2048 tokens of context; {free}"]
    if any(row["fits"] == "--mmap" for row in found["models"]):
        lines += ["--mmap: fits only if its weights stay in their file, which is slower"]
    others = found["unsupported"]
    lines += ["", f"can't be run ({len(others)}):"] if others else []
    lines += [_wrapped(f"{row['name']}: {row['reason']}") for row in others[:SHOWN]]
    lines += [f"and {len(others) - SHOWN} more, which --json lists"] if len(others) > SHOWN else []
    return "\n".join(lines)


def _row(model: dict) -> list[str]:
    """A line of the table; the name comes last, since it may be long."""
    counts = {"n_params": human_count(model["n_params"])}
    counts |= {size: human(model[size]) for size in ("n_bytes", "memory")}
    return [(model | counts)[name] for name in HEADER]


def _wrapped(line: str) -> str:
    """On a terminal as many lines as it takes, indented; into a file it goes as one."""
    if not sys.stdout or not sys.stdout.isatty():
        return printable(line)
    how = {"subsequent_indent": "    ", "break_on_hyphens": False}
    return textwrap.fill(printable(line), shutil.get_terminal_size().columns, **how)


def human_count(number: int) -> str:
    """8_030_000_000 -> "8.0B", 134_500_000 -> "135M"."""
    for unit, size in {"B": 1e9, "M": 1e6, "k": 1e3}.items():
        if number >= 0.9995 * size:
            return f"{number / size:.{1 if number < 9.95 * size else 0}f}{unit}"
    return str(number)
