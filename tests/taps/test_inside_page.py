"""docs/inside.md lists the names that there are, and its examples run."""

import re
from pathlib import Path

import pytest

import tinyllama
from tinyllama.config import PRESETS
from tinyllama.model import tap_shapes
from tinyllama.taps.names import NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "inside.md").read_text(encoding="utf-8")


def test_the_table_of_names_is_the_code_s():
    rows = re.findall(r"(?m)^\| `(\S+)` \| `\[(.*?)\]` \| (.*?) ?\| (.*?) ?\|$", PAGE)
    listed = [tuple(name.strip("`").replace("N", "{}") for name in (row[0], *row[2:])) for row in rows]
    assert listed == [tuple(name.replace("N", "{}") for name in names) for names in NAMES]
    config = PRESETS["7B"]
    shapes = tap_shapes(config, 3)
    sizes = vars(config) | {"n_tokens": 3, "n_past": 3}
    for name, axes, *_ in rows:
        assert shapes[name.replace("N", "1")] == tuple(eval(axis, {}, sizes) for axis in axes.split(", "))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_its_examples_run(monkeypatch, capsys):
    small = tinyllama.load("small")
    monkeypatch.setattr(tinyllama, "load", lambda name: small)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    for number in (5, 7, 9, 12):  # the small model has four layers
        code = code.replace(f"layers.{number}.", "layers.2.").replace(f"layer={number}", "layer=2")
    code = code.replace("The capital of France is", "Tom was a big").replace(
        "The capital of Japan is", "Lily was a sad"
    )
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) >= 2
