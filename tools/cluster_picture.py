"""Draws docs/cluster_prompts.png and docs/cluster_layers.png anew: the two ways to use several machines."""

from pathlib import Path

from matplotlib.patches import Patch

from tinyllama.lab.plots import GREEN, GREY, ORANGE, SKY, Picture
from tinyllama.lab.plots.drawings import arrow, box
from tinyllama.lab.plots.style import PINK, chart

DOCS = Path(__file__).parents[1] / "docs"
MIDDLE = {"ha": "center", "va": "center"}

#: Of the prompts: a name, and how many lines it answers in a second.
WORKERS = {"Ada's MacBook": 4, "Ben's MacBook": 4, "the old one": 1.5}
N_LINES, PIECE, LAST = 100, 8, 2

#: Of the layers of 65B: a name and what lies there; the second has twice the memory and twice the speed.
STAGES = {
    "MacBook, 16 GB": "embedding, layers 0 – 19",
    "MacBook Pro, 32 GB": "layers 20 – 59",
    "MacBook, 16 GB ": "layers 60 – 79, output, sampling",
}
COLORS = {"prompt": ORANGE, "A": SKY, "B": GREEN, "C": PINK}


def pieces() -> list[list[tuple[float, float, int, int]]]:
    """What each worker answers: from when to when, in seconds, and the first and last line."""
    rows = [[] for _ in WORKERS]
    free, speeds = [0.0] * len(WORKERS), list(WORKERS.values())
    line = 1
    while line <= N_LINES:
        n = min(PIECE, max(LAST, (N_LINES - line + 1) // (2 * len(WORKERS))))  # smaller towards the end
        worker = free.index(min(free))
        end = free[worker] + n / speeds[worker]
        rows[worker].append((free[worker], end, line, min(line + n - 1, N_LINES)))
        free[worker], line = end, line + n
    return rows


def prompts() -> Picture:
    """A file, the command, the workers, and over time which lines each of them answers."""
    title = "Many prompts: each machine has the whole model, and gets more lines when it has answered some"
    picture, axes = chart(3.5, title, width=9, xlim=(0, 15.2), ylim=(-0.5, 3.15))
    _card(axes, 0.05, 1.75, 1.8, 0.8, "requests.jsonl", f"{N_LINES} lines")
    _card(axes, 0.05, 0.45, 1.8, 0.8, "answers.jsonl", "in the same order")
    _card(axes, 2.35, 0.45, 1.9, 2.1, "tinyllama batch", "on any machine")
    arrow(axes, (1.88, 2.15), (2.32, 2.15))
    arrow(axes, (2.32, 0.85), (1.88, 0.85))
    rows = pieces()
    end = max(row[-1][1] for row in rows)
    for number, (name, row) in enumerate(zip(WORKERS, rows, strict=True)):
        bottom = 2.2 - 1.1 * number
        _card(axes, 5.3, bottom, 2.0, 0.8, name, "the whole model")
        arrow(axes, (4.28, 1.85 - 0.5 * number), (5.27, bottom + 0.55))
        arrow(axes, (5.27, bottom + 0.25), (4.28, 1.65 - 0.5 * number), color=GREEN)
        for start, stop, first, last in row:
            left, width = 7.6 + 7.5 * start / end, 7.5 * (stop - start) / end
            box(axes, left + 0.02, bottom + 0.1, width - 0.04, 0.6, SKY + "77")
            text = f"{first} –\n{last}" if width > 0.55 else ""
            axes.text(left + width / 2, bottom + 0.4, text, fontsize=6.5, **MIDDLE)
        n_lines = sum(last - first + 1 for *_, first, last in row)
        axes.text(15.1, bottom + 0.84, f"{n_lines} lines", fontsize=7.5, color=GREY, ha="right", va="center")
    axes.text(4.65, 2.75, "lines", fontsize=7.5, color=GREY, **MIDDLE)
    axes.text(4.75, 0.05, "answers", fontsize=7.5, color=GREEN, **MIDDLE)
    _time(axes, 7.6, 15.1, -0.25)
    axes.set_axis_off()
    return picture


def layers() -> Picture:
    """Machines with a range of layers each, what goes from one to the next; when each computes."""
    title = "One model on three machines: 65B in 4 bits takes 42 GB, and each has some of its layers"
    picture, axes = chart(4.9, title, width=9, xlim=(0, 15.2), ylim=(-0.15, 5.65))
    note = {"fontsize": 7.5, "color": GREY, "ha": "center", "va": "bottom"}
    for number, (name, what) in enumerate(STAGES.items()):
        left = 1.35 + 4.55 * number
        _card(axes, left, 4.3, 3.35, 0.95, f"{number + 1}   {name.strip()}", what)
        arrow(axes, (left + 3.4, 4.8), (left + (4.5 if number < 2 else 3.75), 4.8))
        if number < 2:
            axes.text(left + 3.95, 4.9, "residual\nstream", **note)
    axes.text(0.45, 4.8, "ids of\nthe prompt", fontsize=7.5, **MIDDLE)
    arrow(axes, (0.98, 4.8), (1.3, 4.8))
    axes.text(14.85, 4.8, "text", fontsize=7.5, **MIDDLE)
    axes.plot([12.1, 12.1, 3.0], [4.27, 3.8, 3.8], color=GREY, linewidth=1)
    arrow(axes, (3.0, 3.8), (3.0, 4.27))
    axes.text(7.55, 3.87, "the id of the token that was chosen", **note)
    for number in range(len(STAGES)):
        axes.text(0.4, 2.65 - 0.8 * number, number + 1, **MIDDLE)
    _schedule(axes)
    _time(axes, 0.75, 15.1, 0.3)
    axes.set_axis_off()
    names = {"prompt": "a piece of the prompt", "A": "a token of text A", "B": "of text B", "C": "of text C"}
    handles = [Patch(color=color + "77", label=names[kind]) for kind, color in COLORS.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return picture


def _schedule(axes) -> None:
    """Five pieces of a prompt, three tokens of one text, and four each of three texts."""
    parts = [
        ("a prompt in pieces: soon all work", [("prompt", str(n + 1), n) for n in range(5)], 0.75, 0.62),
        ("one text: a token needs the one before", [("A", str(n + 1), 3 * n) for n in range(3)], 5.75, 0.5),
        ("three texts: all work", [("ABC"[n % 3], str(n // 3 + 1), n) for n in range(9)], 10.7, 0.4),
    ]
    for name, steps, left, width in parts:
        n_columns = steps[-1][2] + len(STAGES)
        axes.text(left, 3.2, name, fontsize=8, va="center")
        box(axes, left - 0.05, 0.6, n_columns * width + 0.1, 2.45, "#F4F4F4", zorder=-2)
        for kind, label, start in steps:
            for number in range(len(STAGES)):
                corner = left + (start + number) * width
                box(axes, corner + 0.02, 2.35 - 0.8 * number, width - 0.04, 0.6, COLORS[kind] + "77")
                axes.text(corner + width / 2, 2.65 - 0.8 * number, label, fontsize=7, **MIDDLE)


def _card(axes, left: float, bottom: float, width: float, height: float, name: str, note: str) -> None:
    """A box with a name, and below it what is said of it."""
    box(axes, left, bottom, width, height, SKY + "33")
    axes.text(left + width / 2, bottom + height / 2 + 0.15, name, fontsize=8, weight="bold", **MIDDLE)
    axes.text(left + width / 2, bottom + height / 2 - 0.17, note, fontsize=7, **MIDDLE)


def _time(axes, left: float, right: float, height: float) -> None:
    """An arrow of time."""
    arrow(axes, (left, height), (right, height))
    axes.text(left, height - 0.2, "time", fontsize=7.5, color=GREY, va="center")


if __name__ == "__main__":
    (DOCS / "cluster_prompts.png").write_bytes(prompts()._repr_png_())
    (DOCS / "cluster_layers.png").write_bytes(layers()._repr_png_())
