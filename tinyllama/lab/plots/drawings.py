"""Boxes and arrows: a text cut into tokens, the steps of a computation, the whole machine."""

from collections.abc import Sequence

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from ...config import Config
from .style import BLUE, GREEN, GREY, ORANGE, SKY, YELLOW, Picture, chart, labels

#: How the tokens of a text get into its cache: colours, and what a legend says.
PASSED = {"copied": GREEN, "read": ORANGE, "written": SKY}
KINDS = {
    "copied": "so many tokens copied from a text that begins alike",
    "read": "so many tokens of the prompt read",
    "written": "a token written",
}


def tokens(rows: dict[str, Sequence[str]], ids: Sequence[Sequence[int]] = (), title: str = "") -> Picture:
    """Texts cut into tokens: a box each, its text inside, its id below.

    Args:
        rows: what a row shows ("LLaMA") -> its tokens' texts.
        ids: for each row, its tokens' ids.
    """
    picture, axes = chart(0.5 + 0.75 * len(rows), title, width=9)
    reach = 0.0
    for row, (name, pieces) in enumerate(rows.items()):
        left = 0.0
        axes.text(-0.15, -row, name, ha="right", va="center")
        for number, label in enumerate(labels(pieces)):
            width = 0.35 + 0.12 * len(label)
            color = (SKY, YELLOW)[number % 2] + "66"
            box(axes, left + 0.02, -row - 0.2, width - 0.04, 0.4, color)
            axes.text(left + width / 2, -row, label, ha="center", va="center", family="DejaVu Sans Mono")
            if len(ids):
                where = {"ha": "center", "va": "top", "fontsize": 7, "color": GREY}
                axes.text(left + width / 2, -row - 0.25, ids[row][number], **where)
            left += width
        reach = max(reach, left)
    axes.set(xlim=(-0.2, reach), ylim=(0.4 - len(rows), 0.4))
    axes.set_axis_off()
    return picture


def flow(steps: dict[str, str], title: str = "", arrows: Sequence[str] = ()) -> Picture:
    """Boxes in a row with arrows between them.

    Args:
        steps: what it is -> what is said below it, of each box.
        arrows: what is said above each arrow, a shape say: one fewer than boxes.
    """
    picture, axes = chart(1.5, title, width=9, xlim=(-0.05, len(steps) - 0.27), ylim=(-0.1, 1.1))
    for number, (name, note) in enumerate(steps.items()):
        box(axes, number, 0, 0.68, 1, SKY + "55")
        axes.text(number + 0.34, 0.62, name, ha="center", va="center", fontsize=9, weight="bold")
        axes.text(number + 0.34, 0.28, note, ha="center", va="center", fontsize=7)
        if number:
            arrow(axes, (number - 0.31, 0.5), (number - 0.01, 0.5))
        if number and len(arrows):
            axes.text(number - 0.16, 0.62, arrows[number - 1], ha="center", fontsize=6.5, color=GREY)
    axes.set_axis_off()
    return picture


def passes(rows: dict[str, Sequence[Sequence[tuple[str, str]]]], title: str = "") -> Picture:
    """Texts that go through a model together: a row for each text, a column for each pass.

    Args:
        rows: a text's name -> of each pass the boxes of its tokens, one below the other: (kind, label). The
            kinds are copied, read and written.
    """
    n_passes = max(map(len, rows.values()))
    limits = {"xlim": (-0.6, n_passes), "ylim": (0.75 - len(rows), 1.15)}
    picture, axes = chart(1.3 + 0.75 * len(rows), title, width=9, **limits)
    for column in range(n_passes):
        box(axes, column + 0.04, 0.8 - len(rows), 0.92, len(rows) + 0.05, "#F4F4F4", zorder=-2)
        axes.text(column + 0.5, 0.98, column + 1, ha="center", va="center", fontsize=8, color=GREY)
    axes.text(-0.1, 0.98, "pass", ha="right", va="center", fontsize=8, color=GREY)
    for row, (name, cells) in enumerate(rows.items()):
        axes.text(-0.1, 0.36 - row, name, ha="right", va="center", fontsize=9)
        for column, boxes in enumerate(cells):
            height = 0.66 / max(1, len(boxes))
            for number, (kind, label) in enumerate(boxes):
                bottom = 0.7 - row - height * (number + 1)
                box(axes, column + 0.1, bottom, 0.8, height - 0.03, PASSED[kind] + "77")
                (short,), style = labels([label], 8), {"ha": "center", "va": "center", "fontsize": 7}
                axes.text(column + 0.5, bottom + height / 2 - 0.015, short, **style)
    picture.legend(
        handles=[Patch(color=color + "77", label=KINDS[kind]) for kind, color in PASSED.items()],
        loc="outside lower center",
        ncols=len(PASSED),
        fontsize=8,
    )
    axes.set_axis_off()
    return picture


def machine(config: Config, title: str = "") -> Picture:
    """The whole model: the residual stream as a line, to which attention and feed-forward networks add.

    Grey numbers are the notebooks that take a part apart.
    """
    picture, axes = chart(3.3, title, width=9, xlim=(-0.4, 10.55), ylim=(-0.3, 2.1))
    axes.plot([1.1, 8.05], [0.25, 0.25], color=BLUE, linewidth=4, solid_capstyle="butt", zorder=0)
    stream = f"the residual stream: [n_tokens, dim = {config.dim}]"
    axes.text(4.7, 0.0, stream, ha="center", color=BLUE, fontsize=8)
    box(axes, 2.2, -0.2, 5.1, 2.2, "#F4F4F4", zorder=-2)
    axes.text(2.3, 1.85, f"a layer, {config.n_layers} times", va="center", fontsize=9, weight="bold")
    heads = f"{config.n_heads} heads of {config.head_dim}"
    _branch(axes, 2.4, [("RMSNorm", "03", GREEN), ("attention", "04 05 06", ORANGE)], heads)
    _branch(axes, 4.9, [("RMSNorm", "03", GREEN), ("SwiGLU", "07", ORANGE)], f"{config.hidden_dim} neurons")
    _part(axes, -0.35, -0.1, "tokens", "01", YELLOW, "[n_tokens]")
    _part(axes, 0.7, -0.1, "embedding", "03", SKY, f"{config.vocab_size} rows")
    _part(axes, 7.5, -0.1, "RMSNorm", "03", GREEN, "")
    _part(axes, 8.55, -0.1, "output", "08", SKY, f"{config.vocab_size} logits")
    _part(axes, 9.6, -0.1, "sampling", "09", YELLOW, "the next token")
    for start in (0.55, 8.4, 9.45):
        arrow(axes, (start, 0.25), (start + 0.15, 0.25))
    axes.set_axis_off()
    return picture


def _branch(axes, left: float, parts: Sequence[tuple[str, str, str]], note: str) -> None:
    """Two parts beside the stream: they read from it, and what they compute is added to it."""
    arrow(axes, (left, 0.27), (left + 0.15, 1.2), connectionstyle="angle,angleA=90,angleB=0,rad=6")
    for number, (name, notebook, color) in enumerate(parts):
        _part(axes, left + 0.15 + 1.05 * number, 0.85, name, notebook, color, note if number else "")
    arrow(axes, (left + 1.05, 1.2), (left + 1.2, 1.2))
    end = left + 2.28
    arrow(axes, (left + 2.1, 1.2), (end, 0.36), connectionstyle="angle,angleA=0,angleB=90,rad=6")
    axes.plot([end], [0.25], "o", markersize=13, color="white", markeredgecolor=BLUE, markeredgewidth=1.5)
    axes.text(end, 0.245, "+", ha="center", va="center", fontsize=12, color=BLUE)


def _part(axes, left: float, bottom: float, name: str, notebook: str, color: str, note: str) -> None:
    box(axes, left, bottom, 0.9, 0.7, "white")
    box(axes, left, bottom, 0.9, 0.7, color + "55")
    axes.text(left + 0.45, bottom + 0.48, name, ha="center", va="center", fontsize=7.5, weight="bold")
    axes.text(left + 0.45, bottom + 0.26, note, ha="center", va="center", fontsize=6)
    axes.text(left + 0.45, bottom + 0.09, notebook, ha="center", va="center", fontsize=6.5, color=GREY)


def box(axes, left: float, bottom: float, width: float, height: float, color: str, zorder: int = 1) -> None:
    """A rectangle with round corners, in the units of the axes."""
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": color, "edgecolor": GREY}
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, linewidth=0.8, zorder=zorder, **style))


def arrow(axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    """From here to there; the style is FancyArrowPatch's."""
    look = {"arrowstyle": "-|>", "mutation_scale": 9, "color": GREY, "shrinkA": 0, "shrinkB": 0} | style
    axes.add_patch(FancyArrowPatch(start, end, **look))
