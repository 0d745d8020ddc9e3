"""Arrays as pictures: heat-maps, bars, curves, vectors."""

from collections.abc import Sequence

import numpy as np

from .style import AMOUNT, BLUE, COLORS, GREY, MASKED, SIGNED, Picture, labels, name_axis, tick


def attention(weights: np.ndarray, pieces: Sequence[str], title: str = "") -> Picture:
    """One head's attention: a row for each token that looks, a column for each that is looked at.

    Args:
        weights: [n_tokens, n_past]; what lies in the future is drawn grey.
        pieces: the tokens' texts, [n_past].
    """
    n_tokens = len(weights)
    picture = Picture(min(1.6 + 0.22 * n_tokens, 9), title)
    axes = picture.subplots()
    image = _attention(axes, weights, vmax=1)
    tick(axes.yaxis, pieces[-n_tokens:])
    tick(axes.xaxis, pieces, rotation=90)
    axes.set(title=title, ylabel="n_tokens: the token that looks", xlabel="n_past: the tokens it looks at")
    picture.colorbar(image, label="weight", shrink=0.7)
    return picture


def attention_heads(
    weights: np.ndarray, pieces: Sequence[str], title: str = "", names: Sequence[str] = ()
) -> Picture:
    """Several heads side by side, four a row.

    Args:
        weights: [n_heads, n_tokens, n_past]
        pieces: the tokens' texts, [n_past].
        names: of the heads, [n_heads]; else "head 0", "head 1", ...
    """
    n_columns = min(4, len(weights))
    n_rows = -(-len(weights) // n_columns)
    picture = Picture(0.8 + 2.4 * n_rows, title, width=9)
    grid = picture.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    for number, axes in enumerate(grid.flat):
        if number >= len(weights):
            axes.set_axis_off()
            continue
        image = _attention(axes, weights[number], vmax=1)
        axes.set_title(names[number] if len(names) else f"head {number}", fontsize=8)
        tick(axes.yaxis, pieces[-weights.shape[1] :], size=6)
        tick(axes.xaxis, pieces, size=6, rotation=90)
    picture.suptitle(title, fontsize=10)
    picture.supylabel("n_tokens", fontsize=9)
    picture.supxlabel("n_past", fontsize=9)
    picture.colorbar(image, ax=grid, label="weight", shrink=0.5)
    return picture


def _attention(axes, weights: np.ndarray, vmax: float):
    """Draw [n_tokens, n_past] with the future, which no token sees, in grey."""
    n_tokens, n_past = weights.shape
    future = np.arange(n_past) > np.arange(n_past - n_tokens, n_past)[:, None]
    cells = np.ma.masked_array(weights, future)
    axes.set_facecolor(MASKED)
    return axes.imshow(cells, cmap=AMOUNT, vmin=0, vmax=vmax, interpolation="nearest", aspect="auto")


def matrix(
    values: np.ndarray,
    rows: str | Sequence[str],
    columns: str | Sequence[str],
    title: str = "",
    limit: float | None = None,
) -> Picture:
    """Numbers as colours: blue above zero, red below; grey where there is none (NaN or infinite).

    Args:
        values: [n_rows, n_columns]
        rows, columns: an axis' name ("dim"), or its tick labels.
        limit: the number that gets the darkest colour; None: the largest, the 1% most extreme left out.
    """
    n_rows = len(values)
    finite = np.ma.masked_invalid(values)
    limit = limit or float(np.quantile(np.abs(finite.compressed()), 0.99)) or 1.0
    picture = Picture(min(1.5 + 0.22 * n_rows, 5.5), title)
    axes = picture.subplots()
    axes.set_facecolor(MASKED)
    image = axes.imshow(finite, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    name_axis(axes.yaxis, rows)
    name_axis(axes.xaxis, columns, rotation=90)
    axes.set_title(title)
    picture.colorbar(image, shrink=0.8, extend="both" if np.abs(finite).max() > limit else "neither")
    return picture


def bars(
    values: Sequence[float], names: Sequence[str], title: str = "", xlabel: str = "probability"
) -> Picture:
    """A distribution over a few named things, the first on top.

    Args:
        values: [n_bars]
        names: pieces of text, say, [n_bars]
    """
    picture = Picture(0.9 + 0.24 * len(values), title)
    axes = picture.subplots()
    drawn = axes.barh(range(len(values)), values, color=BLUE, height=0.7)
    axes.bar_label(
        drawn,
        [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" for value in values],
        padding=3,
        fontsize=8,
    )
    tick(axes.yaxis, names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel=xlabel)
    return picture


def lines(
    series: dict[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    x: Sequence[float] | None = None,
    xticks: Sequence[str] = (),
    yscale: str = "linear",
) -> Picture:
    """Curves over a common axis.

    Args:
        series: name -> values [n_points]
        x: where the points are, [n_points]; None: 0, 1, 2, ...
        xticks: names of the points, in place of numbers.
        yscale: "linear" or "log".
    """
    picture = Picture(3.4, title)
    axes = picture.subplots()
    dense = max(map(len, series.values())) > 40
    for number, (name, values) in enumerate(series.items()):
        where = np.arange(len(values)) if x is None else x
        axes.plot(where, values, label=name, marker=None if dense else "os^DvP*"[number % 7], markersize=4)
    if len(xticks):
        tick(axes.xaxis, xticks, rotation=90)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        picture.legend(loc="outside right center", fontsize=8)
    return picture


def histogram(series: dict[str, np.ndarray], xlabel: str, title: str = "", n_bins: int = 80) -> Picture:
    """How often each size of number occurs.

    Args:
        series: name -> array of any shape; all are counted in the same bins.
    """
    picture = Picture(3.2, title)
    axes = picture.subplots()
    low = min(float(np.min(array)) for array in series.values())
    high = max(float(np.max(array)) for array in series.values())
    edges = np.linspace(low, high, n_bins + 1)
    for name, array in series.items():
        axes.stairs(np.histogram(array, edges)[0] / np.size(array), edges, label=name, linewidth=1.5)
    axes.set(title=title, xlabel=xlabel, ylabel=f"share, in {n_bins} bins", yscale="log")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        picture.legend(loc="outside right center", fontsize=8)
    return picture


def arrows(points: dict[str, np.ndarray], title: str = "", xlabel: str = "", ylabel: str = "") -> Picture:
    """Vectors in a plane, from the origin, with the circle that each one's tip can turn on.

    Args:
        points: name -> [2]
    """
    picture = Picture(3.9, title, width=5)
    axes = picture.subplots()
    reach = 1.15 * max(float(np.hypot(*point)) for point in points.values())
    for number, (name, (right, up)) in enumerate(points.items()):
        color = COLORS[number % len(COLORS)]
        tip = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (right, up), (0, 0), arrowprops=tip)
        axes.plot([], [], color=color, label=name)
        turn = np.linspace(0, 2 * np.pi, 200)
        radius = np.hypot(right, up)
        axes.plot(radius * np.cos(turn), radius * np.sin(turn), color=GREY, linewidth=0.5, linestyle=":")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-reach, reach), ylim=(-reach, reach))
    axes.set_aspect("equal")
    picture.legend(loc="outside right center", fontsize=8)
    return picture


def logit_lens(
    pieces: Sequence[Sequence[str]], probs: np.ndarray, prompt: Sequence[str], title: str = ""
) -> Picture:
    """What the model would say after each layer: the likeliest token, darker the likelier.

    Args:
        pieces: the likeliest token's text, [n_layers, n_tokens]
        probs: how likely it is, [n_layers, n_tokens]
        prompt: the tokens' texts, [n_tokens]
    """
    n_layers, n_tokens = probs.shape
    picture = Picture(1.7 + 0.32 * n_layers, title, width=9)
    axes = picture.subplots()
    image = axes.imshow(
        probs, cmap=AMOUNT, vmin=0, vmax=1, aspect="auto", interpolation="nearest", origin="lower"
    )
    for layer in range(n_layers):
        for column, label in enumerate(labels(pieces[layer], 9)):
            style = {
                "fontsize": min(8, 95 / n_tokens),
                "color": "white" if probs[layer, column] > 0.45 else "black",
            }
            axes.text(column, layer, label, ha="center", va="center", **style)
    tick(axes.xaxis, prompt, rotation=90)
    axes.set_yticks(range(n_layers), ["embedding", *(f"layer {layer}" for layer in range(n_layers - 1))])
    axes.set(title=title, xlabel="n_tokens: the prompt")
    picture.colorbar(image, label="probability", shrink=0.8)
    return picture
