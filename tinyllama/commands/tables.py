"""Tensors in tables: many of a model differ in their layer alone, and share a line."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from ..machine.limits import human
from .printing import columns


def by_layer(names: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Meta's names without layer and ending, and the layers of each: "attention.wq", [0, 1, 3]."""
    found: dict[str, list[int]] = {}
    for name in names:
        layer, role = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*?)(?:\.weight)?", name).groups()
        found.setdefault(role, []).extend([int(layer)] if layer else [])
    yield from ((role, sorted(layers)) for role, layers in found.items())


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        runs.append(f"{first}-{rest[-1]}" if rest else f"{first}")
    return ",".join(runs)


def type_table(tensors: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    """Lines that say which tensors are of which type, given the name, type and bytes of each."""
    tensors, types = list(tensors), {}
    for name, type, n_bytes in tensors:
        types.setdefault(type, []).append((name, n_bytes))
    everywhere = dict(by_layer(name for name, *_ in tensors))
    rows = []
    for type, found in types.items():
        where = []
        for role, layers in by_layer(name for name, _ in found):
            some = f" (layer{'s' if len(layers) > 1 else ''} {ranges(layers)})"
            where.append(role + ("" if layers == everywhere[role] else some))
        many = f"{len(found)} tensor{'s' if len(found) > 1 else ''}"
        rows.append((type, many, human(sum(n_bytes for _, n_bytes in found)), ", ".join(where)))
    yield from columns(rows, "<>><")
