"""The maps of the code, in the package's docstring and in README.md, against the modules that there are."""

import re
from pathlib import Path

import tinyllama

ROOM = Path(tinyllama.__file__).parent
MODULES = {path.stem for path in ROOM.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
MODULES -= {"__init__", "__main__"}


def test_the_docstring_lists_every_module():
    assert set(re.findall(r"^    (\w+)  ", tinyllama.__doc__, re.MULTILINE)) == MODULES


def test_the_readme_lists_every_module_in_the_docstring_s_order():
    readme = (ROOM.parent / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)(?:\.py|/)\]\(tinyllama/", readme, re.MULTILINE)
    assert listed == re.findall(r"^    (\w+)  ", tinyllama.__doc__, re.MULTILINE)
