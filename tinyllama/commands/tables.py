"""Tensors in tables: many of a model differ in their layer alone, and share a line."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from ..machine.limits import human
from .printing import columns, counted


def split_name(name: str) -> tuple[int | None, str]:
    """Meta's name of a tensor -> its layer, if it is in one, and the rest."""
    layer, role = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)", name).groups()
    return layer and int(layer), role


def by_layer(names: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Meta's names without layer and ending, and the layers of each: "attention.wq", [0, 1, 3]."""
    found: dict[str, list[int]] = {}
    for layer, role in map(split_name, names):
        found.setdefault(role.removesuffix(".weight"), []).extend([] if layer is None else [layer])
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
        size = human(sum(n_bytes for _, n_bytes in found))
        rows.append((type, counted(len(found), "tensor"), size, ", ".join(where)))
    yield from columns(rows, "<>><")
