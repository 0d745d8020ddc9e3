"""GGUF files of a model that was split: NAME-00001-of-00003.gguf and so on, each with some of the tensors."""

import re
from collections.abc import Callable
from pathlib import Path

from ..errors import require
from ..machine.files import MappedFile
from .key_values import shown

SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")  # the name of a part


def part_names(path: Path) -> list[Path]:
    """What the parts of a model are called if this is one of them; else the file itself."""
    found = SPLIT.fullmatch(path.name)
    if not found:
        return [path]
    name, n_parts = found.groups()
    return [path.with_name(f"{name}-{number:05}-of-{n_parts}.gguf") for number in range(1, int(n_parts) + 1)]


def all_parts(opened, read_part: Callable) -> list:
    """The parts of a split model in their order, whichever was opened; of another, the one."""
    n_parts = opened.metadata.get("split.count", 1)
    if n_parts in (0, 1):
        return [opened]
    paths, which = part_names(opened.file.path), f"one of {shown(n_parts)} parts of a model"
    named = "the names of all must end in -00001-of-00002.gguf or the like, or they can't be found"
    require(len(paths) == n_parts, f"{which}: {named}")
    missing = [path for path in paths if not path.exists()]
    require(not missing, f"{which}, and {', '.join(map(str, missing[:3]))} is missing")
    parts = [opened if path == opened.file.path else read_part(MappedFile(path)) for path in paths]
    for number, part in enumerate(parts):
        told = [part.metadata.get(key) for key in ("split.no", "split.count")]
        require(told == [number, n_parts], f"{part.file.path.name} says it's another part than its name")
    n_tensors, names = sum(len(part.infos) for part in parts), {name for part in parts for name in part.infos}
    expected = parts[0].metadata.get("split.tensors.count", n_tensors)
    require(n_tensors == len(names) == expected, f"its parts hold {n_tensors} tensors, not {shown(expected)}")
    return parts
