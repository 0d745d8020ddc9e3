"""Writes docs/settings.md anew, from the fields of tinyllama.settings.Settings."""

import math
from dataclasses import fields
from pathlib import Path

from tinyllama.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Settings of a run

<!-- made by tools/settings_page.py from tinyllama/settings.py -->

What `tinyllama.generate`, `tinyllama.stream`, `Llama.generate` and `Llama.stream` take as keywords, and
`tinyllama generate` as options (dashes or underscores: `--top-k` is `--top_k`). A value of another kind or
out of its range is refused.

| Python | Command line | Values | Default | Meaning |
|---|---|---|---|---|
"""


def values(setting) -> str:
    """What a setting may be."""
    if setting.type is bool:
        return "`True`, `False`"
    least, most = setting.metadata["least"], setting.metadata["most"]
    if setting.type == str | None:
        is_model = setting.name.endswith("model")
        return "a model, by name or path" if is_model else "a name of docs/templates.md, or Jinja"
    if least is None:
        return "a text, or in Python a list of them"
    kind = "number" if setting.type is float else "whole number"
    return f"{kind}, {f'{least:g} to {most:g}' if most < math.inf else f'at least {least:g}'}"


def row(setting) -> str:
    """A line of the table."""
    flag = setting.metadata["flag"]
    flags = [flag, f"--{setting.name}"] if setting.type is not bool or flag is not None else []
    flags = ", ".join(f"`{flag}`" for flag in flags if flag)
    default = "" if setting.default in (None, ()) else f"`{setting.default}`"
    cells = [f"`{setting.name}`", flags, values(setting), default, setting.metadata["help"]]
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """The whole file."""
    return HEAD + "".join(map(row, fields(Settings)))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
