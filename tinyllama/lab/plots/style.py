"""The one style of all pictures: size, font, colours, how tokens are spelled.

Importing it sets matplotlib's style, so that a picture of your own looks like the others. Colours are Okabe
and Ito's, which people who see red and green alike can tell apart.
"""

import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ...errors import printable

BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW = COLORS = (
    ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"]
)  # fmt: skip
GREY = "#8A8A8A"
WIDTH, DPI = 7.5, 120  # inches, pixels an inch
LONGEST, TALLEST = 48, 22  # characters of a label, of one that stands upright; a piece may have hundreds

#: From nothing to much (white, then ever more blue), and from below zero to above it.
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#FFFFFF", SKY, BLUE, "#002B4A"])
SIGNED = LinearSegmentedColormap.from_list("signed", ["#7A3300", RED, "#FFFFFF", BLUE, "#002B4A"])
MASKED = "#DDDDDD"

matplotlib.rc("font", family="DejaVu Sans", size=9)
matplotlib.rc("axes", titlesize=10, titlelocation="left", axisbelow=True)
matplotlib.rc("axes", prop_cycle=matplotlib.cycler(color=COLORS))
matplotlib.rc("axes.spines", top=False, right=False)
matplotlib.rc("legend", frameon=False)
matplotlib.rc("lines", linewidth=1.8)
matplotlib.rc(("figure", "savefig"), dpi=DPI)


class Picture(Figure):
    """A figure that shows itself in a notebook, with the same bytes every time.

    Attributes:
        numbers: what is drawn, name -> array, where a function of `sheets` computed it.
    """

    def __init__(self, height: float, title: str = "", width: float = WIDTH):
        super().__init__(figsize=(width, height), layout="constrained")
        self.title, self.numbers = title, {}

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()

    def __repr__(self) -> str:
        return f"<Picture: {self.title}>"


def chart(height: float, title: str, width: float = WIDTH, **options) -> tuple:
    """A picture and its one pair of axes; the options are those of `Axes.set`."""
    picture = Picture(height, title, width)
    axes = picture.subplots()
    axes.set(title=title, **options)
    return picture, axes


def labels(pieces: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Tokens as tick labels: a space in front is "▁", as LLaMA's vocabulary spells it; a newline is "\\n"."""
    spelled = [printable(re.sub("^ +", lambda found: "▁" * len(found[0]), piece)) for piece in pieces]
    short = [text if len(text) <= longest else text[: longest - 1] + "…" for text in spelled]
    return [text.replace("$", r"\$") for text in short]  # a dollar begins a formula


def tick(axis, pieces: str | Sequence[str], size: float = 8, rotation: float = 0, every: int = 1) -> None:
    """Tokens, or other names, as the tick labels of an axis, or every n-th; a str is the axis' own name."""
    if isinstance(pieces, str):
        axis.set_label_text(pieces)
        return
    names = labels(pieces[::every], TALLEST if rotation else LONGEST)
    axis.set_ticks(range(0, len(pieces), every), names, fontsize=size, rotation=rotation)
    axis.set_tick_params(length=2)
