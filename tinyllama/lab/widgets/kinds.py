"""What each step of the forward pass is called, its axes, what happens in it and why: kinds.txt as values."""

import re
from dataclasses import dataclass
from pathlib import Path

TEXT = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Kind:
    """A step as every layer does it."""

    title: str
    axes: tuple[str, ...]  # of its value, by the names of config.py
    sentence: str  # what happens and why


#: By the step's name without its layer: "attention.q".
KINDS = {
    name: Kind(title, tuple(axes.split(", ")), " ".join(sentence.split()))
    for name, axes, title, sentence in re.findall(r"(?m)^(\S+) \[(.*)\] (.*)\n((?:    .*\n)+)", TEXT)
}
