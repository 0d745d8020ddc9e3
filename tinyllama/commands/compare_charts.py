"""The charts of the page of two models, as SVG: their colours are the page's, light or dark.

Each function returns an <svg> that is as wide as its place; what a mark stands for is its <title>, which
browsers show where the mouse rests.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

WIDTH = 720  # units of all charts; text has 11 of them
LEFT, RIGHT = 64, 12  # of curves and bars
DECADES = 2.5  # of errors, from the palest colour to the strongest


def heat_map(
    rows: dict[str, Sequence[float]], limit=math.inf, form: str = "{:.2g}", decades: float = DECADES
) -> str:
    """Errors as colours on a logarithmic scale: a row a kind of step or tensor, a column a layer."""
    n_layers, left, height = max(map(len, rows.values())), 140, 17
    width, most = (WIDTH - left - RIGHT) / n_layers, max(map(max, rows.values()))
    marks = []
    for number, (name, errors) in enumerate(rows.items()):
        y = number * height
        marks.append(_text(left - 6, y + 13, name, "end"))
        for layer, error in enumerate(errors):
            share = 1 + math.log10(error / most) / decades if error else 0
            place = f'x="{left + layer * width:.1f}" y="{y}" width="{width - 1:.1f}" height="{height - 1}"'
            look = f'fill="var(--heat)" fill-opacity="{max(share, 0.06) ** 1.3:.2f}"'
            title = escape(f"layer {layer}, {name}: {form.format(error)}")
            over = ' class="over"' * (error > limit)
            marks.append(f"<rect {place} {look}{over}><title>{title}</title></rect>")
    bottom = len(rows) * height
    for layer in _spread(n_layers):
        marks.append(_text(left + (layer + 0.5) * width, bottom + 14, str(layer), "middle"))
    marks.append(_text(left - 6, bottom + 14, "layer", "end"))
    return _svg(bottom + 20, marks, "Errors by layer")


def curves(lines: dict[str, Sequence[float]], limit: float) -> str:
    """Errors over the layers, on a logarithmic scale."""
    height, bottom = 240, 24
    logs = {name: np.log10(np.maximum(line, 1e-18)) for name, line in lines.items()}
    low = math.floor(min(line.min() for line in logs.values()))
    high = max(*(line.max() for line in logs.values()), math.log10(max(limit, 1e-18))) + 0.1
    n = max(map(len, lines.values()))

    def place(layer: float, log: float) -> tuple[float, float]:
        x = LEFT + layer / max(n - 1, 1) * (WIDTH - LEFT - RIGHT)
        return x, 6 + (high - log) / (high - low) * (height - bottom - 6)

    marks = [*_grid({f"{10.0**log:g}": place(0, log)[1] for log in range(low, math.floor(high) + 1)})]
    marks += [_text(place(layer, low)[0], height - 6, str(layer), "middle") for layer in _spread(n)]
    if limit:
        y = place(0, math.log10(limit))[1]
        marks.append(f'<path class="limit" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        marks.append(_text(LEFT + 4, y - 4, "limit", "start"))
    for number, (name, line) in enumerate(logs.items()):
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in enumerate(line))
        marks.append(
            f'<polyline class="c{number}" points="{points}"><title>{escape(name)}</title></polyline>'
        )
    return _svg(height, marks, "Errors over the layers")


def bars(values: Sequence[float]) -> str:
    """Parts of a whole, one a layer."""
    height, bottom = 170, 24
    high, width = max(*values, 1e-9), (WIDTH - LEFT - RIGHT) / len(values)
    scale = (height - bottom - 10) / high
    steps = {f"{value:.2%}" if high < 0.01 else f"{value:.0%}": value for value in (0, high / 2, high)}
    marks = [*_grid({name: height - bottom - value * scale for name, value in steps.items()})]
    for layer, value in enumerate(values):
        x, tall = LEFT + layer * width, max(value, 0) * scale
        size = f'width="{max(width - 2, 1):.1f}" height="{tall:.1f}"'
        place = f'x="{x + 1:.1f}" y="{height - bottom - tall:.1f}" {size}'
        marks.append(f'<rect class="bar" {place}><title>layer {layer}: {value:.1%}</title></rect>')
    for layer in _spread(len(values)):
        marks.append(_text(LEFT + (layer + 0.5) * width, height - 6, str(layer), "middle"))
    return _svg(height, marks, "Part of the divergence that each layer makes")


def trail(values: np.ndarray) -> str:
    """A figure over a text, on a scale of square roots: largest and mean of the tokens of each column."""
    height, bottom, n_columns = 200, 24, min(len(values), 320)
    edges = np.linspace(0, len(values), n_columns + 1).astype(int)[:-1]
    largest = np.maximum.reduceat(values, edges)
    means = np.add.reduceat(values, edges) / np.diff([*edges, len(values)])
    high, width = max(float(values.max()), 1e-9), (WIDTH - LEFT - RIGHT) / n_columns

    def level(value: float) -> float:
        return height - bottom - (max(value, 0) / high) ** 0.5 * (height - bottom - 10)

    marks = [*_grid({f"{high * share:.2g}": level(high * share) for share in (0, 0.05, 0.25, 1)})]
    for number, value in enumerate(largest):
        x = LEFT + (number + 0.5) * width
        marks.append(f'<path class="spike" d="M{x:.1f} {height - bottom}V{level(value):.1f}"/>')
    points = " ".join(f"{LEFT + (i + 0.5) * width:.1f},{level(mean):.1f}" for i, mean in enumerate(means))
    marks.append(f'<polyline class="c1" points="{points}"/>')
    marks += [
        _text(LEFT, height - 6, "first token scored", "start"),
        _text(WIDTH - RIGHT, height - 6, "last", "end"),
    ]
    return _svg(height, marks, "KL divergence over the text")


def _svg(height: float, marks: list[str], label: str) -> str:
    about = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}"'
    return f'<div class="wide"><svg {about}>{"".join(marks)}</svg></div>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _grid(levels: dict[str, float]) -> Iterator[str]:
    """Horizontal lines, by what stands left of them."""
    for name, y in levels.items():
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield _text(LEFT - 6, y + 4, name, "end")


def _spread(n: int) -> range:
    """About ten of n numbers, at equal distances."""
    return range(0, n, max(1, -(-n // 16)))
