"""The laws of the house: how long it is to read, who imports whom, and that the maps list what there is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinyllama

PACKAGE = Path(tinyllama.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {"superblocks", "formats", "backends", "taps", "texts"}
ROOMS |= {"machine", "cluster", "serve", "commands", "lab", "plugins"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room(module: str) -> str:
    """The folder of a module of the package, "evening" for one that lies in none."""
    first = module.split(".")[0]
    return first if first in ROOMS else "evening"


MODULES = {module_of(path): path for path in FILES}
DOORS = {"", "__main__"}  # the package itself and its command, which lead into every room


def imported(module: str) -> Iterator[str]:
    """The modules of the package that one imports, at its top or in a function."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" and module else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            names = {".".join([*base, alias.name]) for alias in node.names}
            yield from names & MODULES.keys() or {".".join(base)}


def lines(paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_an_evening_is_enough_for_what_a_learner_reads():
    flat = [path for module, path in MODULES.items() if room(module) == "evening" and module != "__main__"]
    formats = [PACKAGE / "formats" / "__init__.py", *(PACKAGE / "formats").glob("*gguf*.py")]
    assert lines([*flat, *formats]) <= 2800


def test_no_module_is_longer_than_400_lines():
    assert {path.name: lines([path]) for path in FILES if lines([path]) > 400} == {}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - DOORS))
def test_imports_go_one_way(module):
    allowed = {
        "evening": {"evening", "superblocks", "formats", "backends", "taps", "texts"},
        "superblocks": {"evening", "superblocks"},
        "formats": {"evening", "formats", "machine"},
        "backends": {"evening", "backends", "machine"},
        "taps": {"evening", "formats", "taps", "texts"},
        "texts": {"evening", "taps", "texts", "machine"},
        "machine": {"machine"},
        "cluster": {"evening", "formats", "backends", "taps", "texts", "machine", "cluster"},
        "serve": {"evening", "formats", "backends", "taps", "texts", "machine", "serve"},
        "commands": ROOMS - {"lab", "plugins"} | {"evening"},
        "lab": ROOMS - {"commands", "serve", "plugins"} | {"evening"},
        "plugins": ROOMS - {"commands", "lab", "serve"} | {"evening"},
    }
    for other in imported(module):
        is_law = room(module) == "machine" and other == "errors"
        assert is_law or room(other) in allowed[room(module)], other


def test_no_two_modules_import_each_other():
    seen, open_ = set(), []

    def visit(module: str) -> None:
        assert module not in open_, " -> ".join([*open_, module])
        if module not in seen:
            open_.append(module)
            for other in imported(module):
                visit(other)
            seen.add(open_.pop())

    for module in sorted(MODULES.keys() - DOORS):
        visit(module)


def test_the_docstring_lists_every_module_of_the_evening_and_every_room():
    flat = {module for module in MODULES if room(module) == "evening"} - DOORS
    assert set(re.findall(r"^    (\w+)  ", tinyllama.__doc__, re.MULTILINE)) == flat | ROOMS


def test_the_readme_lists_the_evening_in_the_docstring_s_order():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)(?:\.py|/|/gguf\.py)\]\(tinyllama/", readme, re.MULTILINE)
    ordered = re.findall(r"^    (\w+)  ", tinyllama.__doc__, re.MULTILINE)
    above = ("machine", "cluster", "serve", "commands", "lab", "plugins")
    assert listed == [name for name in ordered if name not in above]
