"""Arrays as pictures: heat-maps, bars, curves, vectors."""

from collections.abc import Sequence

import numpy as np

from .style import AMOUNT, BLUE, COLORS, GREY, MASKED, SIGNED, Picture, chart, labels, tick

WORDS, WORDS_ALONG = 32, 48  # tokens of a lens that has room for words; names of tokens below any other


def _legend(picture: Picture) -> Picture:
    picture.legend(loc="outside right center", fontsize=8)
    return picture


def attention(weights: np.ndarray, pieces: Sequence[str], title: str = "") -> Picture:
    """One head's attention: a row for each token that looks, a column for each that is looked at.

    Args:
        weights: [n_tokens, n_past]; what lies in the future is drawn grey.
        pieces: the tokens' texts, [n_past].
    """
    n_tokens = len(weights)
    names = {"ylabel": "n_tokens: the token that looks", "xlabel": "n_past: the tokens it looks at"}
    picture, axes = chart(min(1.6 + 0.22 * n_tokens, 9), title, **names)
    image = _attention(axes, weights)
    tick(axes.yaxis, pieces[-n_tokens:])
    tick(axes.xaxis, pieces, rotation=90)
    picture.colorbar(image, label="weight", shrink=0.7)
    return picture


def attention_heads(weights: np.ndarray, pieces: Sequence[str], title: str = "", names=()) -> Picture:
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
    for number, (axes, head) in enumerate(zip(grid.flat, weights, strict=False)):
        image = _attention(axes, head)
        axes.set_title(names[number] if len(names) else f"head {number}", fontsize=8)
        tick(axes.yaxis, pieces[-len(head) :], size=6)
        tick(axes.xaxis, pieces, size=6, rotation=90)
    for axes in grid.flat[len(weights) :]:
        axes.set_axis_off()
    picture.suptitle(title, fontsize=10)
    picture.supylabel("n_tokens", fontsize=9)
    picture.supxlabel("n_past", fontsize=9)
    picture.colorbar(image, ax=grid, label="weight", shrink=0.5)
    return picture


def _attention(axes, weights: np.ndarray):
    """Draw [n_tokens, n_past] with the future, which no token sees, in grey."""
    n_tokens, n_past = weights.shape
    future = np.arange(n_past) > np.arange(n_past - n_tokens, n_past)[:, None]
    cells = np.ma.masked_array(weights, future)
    axes.set_facecolor(MASKED)
    return axes.imshow(cells, cmap=AMOUNT, vmin=0, vmax=1, interpolation="nearest", aspect="auto")


def matrix(values: np.ndarray, rows, columns, title: str = "", limit: float | None = None) -> Picture:
    """Numbers as colours: blue above zero, red below; grey where there is none (NaN or infinite).

    Args:
        values: [n_rows, n_columns]
        rows, columns: an axis' name ("dim"), or its tick labels.
        limit: the number that gets the darkest colour; None: the largest, the 1% most extreme left out.
    """
    finite = np.ma.masked_invalid(values)
    limit = limit or float(np.quantile(np.abs(finite.compressed()), 0.99)) or 1.0
    picture, axes = chart(min(1.5 + 0.22 * len(values), 5.5), title)
    axes.set_facecolor(MASKED)
    image = axes.imshow(finite, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    tick(axes.yaxis, rows)
    tick(axes.xaxis, columns, rotation=90)
    picture.colorbar(image, shrink=0.8, extend="both" if np.abs(finite).max() > limit else "neither")
    return picture


def bars(values, names: Sequence[str], title: str = "", xlabel: str = "probability") -> Picture:
    """A distribution over a few named things, the first on top.

    Args:
        values: [n_bars]
        names: pieces of text, say, [n_bars]
    """
    picture, axes = chart(0.9 + 0.24 * len(values), title, xlabel=xlabel)
    drawn = axes.barh(range(len(values)), values, color=BLUE, height=0.7)
    numbers = [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" for value in values]
    axes.bar_label(drawn, numbers, padding=3, fontsize=8)
    tick(axes.yaxis, names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    return picture


def lines(series: dict, xlabel: str, ylabel: str, title="", x=None, xticks=(), yscale="linear") -> Picture:
    """Curves over a common axis.

    Args:
        series: name -> values [n_points]
        x: where the points are, [n_points]; None: 0, 1, 2, ...
        xticks: names of the points, in place of numbers.
        yscale: "linear" or "log".
    """
    picture, axes = chart(3.4, title, xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    dense = max(map(len, series.values())) > 40
    for number, (name, values) in enumerate(series.items()):
        where = np.arange(len(values)) if x is None else x
        axes.plot(where, values, label=name, marker=None if dense else "os^DvP*"[number % 7], markersize=4)
    if len(xticks):
        tick(axes.xaxis, xticks, rotation=90)
    axes.grid(alpha=0.3)
    return _legend(picture) if len(series) > 1 else picture


def histogram(series: dict[str, np.ndarray], xlabel: str, title: str = "", n_bins: int = 80) -> Picture:
    """How often each size of number occurs.

    Args:
        series: name -> array of any shape; all are counted in the same bins.
    """
    share = f"share, in {n_bins} bins"
    picture, axes = chart(3.2, title, xlabel=xlabel, ylabel=share, yscale="log")
    ends = [end for array in series.values() for end in (np.min(array), np.max(array))]
    edges = np.linspace(float(min(ends)), float(max(ends)), n_bins + 1)
    for name, array in series.items():
        axes.stairs(np.histogram(array, edges)[0] / np.size(array), edges, label=name, linewidth=1.5)
    axes.grid(alpha=0.3)
    return _legend(picture) if len(series) > 1 else picture


def arrows(points: dict[str, np.ndarray], title: str = "", xlabel: str = "", ylabel: str = "") -> Picture:
    """Vectors in a plane, from the origin, with the circle that each one's tip can turn on.

    Args:
        points: name -> [2]
    """
    reach = 1.15 * max(float(np.hypot(*point)) for point in points.values())
    ends = {"xlim": (-reach, reach), "ylim": (-reach, reach), "aspect": "equal"}
    picture, axes = chart(3.9, title, width=5, xlabel=xlabel, ylabel=ylabel, **ends)
    for number, (name, (right, up)) in enumerate(points.items()):
        color = COLORS[number % len(COLORS)]
        tip = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (right, up), (0, 0), arrowprops=tip)
        axes.plot([], [], color=color, label=name)
        turn, radius = np.linspace(0, 2 * np.pi, 200), np.hypot(right, up)
        axes.plot(radius * np.cos(turn), radius * np.sin(turn), color=GREY, linewidth=0.5, linestyle=":")
    return _legend(picture)


def logit_lens(pieces, probs: np.ndarray, prompt: Sequence[str], title: str = "") -> Picture:
    """What the model would say after each layer: the likeliest token, darker the likelier.

    Of more than WORDS tokens only the colours are drawn, and the names of every second one, or third, ...

    Args:
        pieces: the likeliest token's text, [n_layers, n_tokens]
        probs: how likely it is, [n_layers, n_tokens]
        prompt: the tokens' texts, [n_tokens]
    """
    n_layers, n_tokens = probs.shape
    width = max(9, 1.1 + (0.6 if n_tokens <= WORDS else 0.07) * n_tokens)
    every = -(-n_tokens // WORDS_ALONG) if n_tokens > WORDS else 1
    picture, axes = chart(1.7 + 0.32 * n_layers, title, min(width, 21), xlabel="n_tokens: the prompt")
    cells = {"aspect": "auto", "interpolation": "nearest", "origin": "lower"}
    image = axes.imshow(probs, cmap=AMOUNT, vmin=0, vmax=1, **cells)
    style = {"ha": "center", "va": "center", "fontsize": max(7, min(8, 95 / n_tokens))}
    for (layer, column), prob in np.ndenumerate(probs) if n_tokens <= WORDS else ():
        (label,), color = labels([pieces[layer][column]], 9), "white" if prob > 0.45 else "black"
        axes.text(column, layer, label, color=color, **style)
    tick(axes.xaxis, prompt, rotation=90, every=every)
    axes.set_yticks(range(n_layers), ["embedding", *(f"layer {layer}" for layer in range(n_layers - 1))])
    picture.colorbar(image, label="probability", shrink=0.8)
    return picture
