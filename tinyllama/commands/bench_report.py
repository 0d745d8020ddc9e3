"""What `bench` has measured, as a table of at most 80 columns and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

from ..machine.limits import human
from .bench import Result
from .printing import columns, counted

WIDTH = 80
EXPLAINED = """Tokens a second by how many are computed at once: of 1, a text is written, of more, a prompt is
read. The share is that of what memory or arithmetic allow."""
TEXTS = """ Texts are written together, with all that generate does; the gain is how many times faster
than one."""
RATIO = " The ratio says how many times better tinyllama is."
FEW = 16  # tokens at once: texts, drafts, a short prompt. More are a long prompt.


def table(results: list[Result]) -> str:
    """Results side by side, a row for each number of tokens at once; below, where one gains least."""
    lengths = sorted({length for result in results for length in result.speeds})
    texts = sorted({number for result in results for number in result.texts})
    sides = []  # of a result and of what it is held against, which stay together
    for ours, result in zip([None, *results], results, strict=False):
        sides += [[]] if not result.ratios else []
        sides[-1] += _columns(result, ours, lengths, texts)
    labels = ["", "", "", "load", "first token", "memory"]
    labels += [counted(length, "token") for length in lengths]
    labels += [counted(number, "text") for number in texts]
    labels += ["memory is read at", "and allows", "arithmetic allows"]
    explained = EXPLAINED + TEXTS * bool(texts) + RATIO * any(result.ratios for result in results)
    parts = [fill(text, WIDTH) for text in (f"{results[0].model}, {results[0].type}", explained)]
    while sides:
        n = len(sides)
        while n > 1 and max(map(len, _block(labels, sides[:n]))) > WIDTH:
            n -= 1
        parts.append("\n".join(_block(labels, sides[:n])))
        sides = sides[n:]
    if lowest := [*_lowest(results)]:
        best = f"the lesser of n x 1 token and {counted(lengths[-1], 'token')}"
        parts.append("\n".join([f"Several at once reach at least, of {best}:", *lowest]))
    return "\n\n".join(parts)


def _block(labels: list[str], sides: list[list[list[str]]]) -> list[str]:
    """The lines of some results; without rows in which they have nothing."""
    cells = [column for side in sides for column in side]
    rows = [row for row in zip(labels, *cells, strict=True) if any(row[1:])]
    return [*columns(rows, "<" + ">" * len(cells), indent="")]


def _columns(
    result: Result, ours: Result | None, lengths: list[int], texts: list[int]
) -> Iterator[list[str]]:
    """A result's figures; beside them its shares and gains, or the ratios to the result before it."""
    head = [result.name, counted(result.threads, "thread"), "mapped" * result.mapped]
    took = [f"{result.load:.2f} s", f"{result.first_token:.2f} s", human(result.memory)]
    speeds = [_number(result.speeds.get(length)) for length in lengths]
    speeds += [_number(result.texts.get(number)) for number in texts]
    limits = ["", "", ""]
    if result.read_probe:
        limits = [f"{human(result.read_bandwidth)}/s", f"n x {_number(result.read_probe)}"]
        limits += [_number(result.multiply_probe)]
    yield [*head, *took, *speeds, *limits]
    if result.shares:
        shares = [f"{result.shares[length]:.0%}" if length in result.shares else "" for length in lengths]
        yield ["", "share", "", "", "", "", *shares, *[""] * len(texts), "", "", ""]
    if result.texts:
        gains = [f"{result.gains[number]:.2f}" for number in texts]
        yield ["", "gain", "", "", "", "", *[""] * len(lengths), *gains, "", "", ""]
    if result.ratios:
        pairs = (result.first_token, ours.first_token), (result.memory, ours.memory)
        took = [f"{theirs / own:.2f}" if own else "" for theirs, own in pairs]
        ratios = [f"{result.ratios[length]:.2f}" for length in lengths]
        yield ["", "ratio", "", "", *took, *ratios, *[""] * len(texts), "", "", ""]


def _number(speed: float | None) -> str:
    return "" if not speed else f"{speed:.1f}" if speed < 99.95 else f"{speed:.0f}"


def _lowest(results: list[Result]) -> Iterator[str]:
    """Of each, the number of tokens that gains least by being computed at once."""
    for result in results:
        speeds, most = result.speeds, max(result.speeds)
        best = {n: min(n * speeds[1], speeds[most]) for n in speeds if 1 < n <= FEW and n != most}
        if best:
            n = min(best, key=lambda n: speeds[n] / best[n])
            yield f"  {_who(result)}: {speeds[n] / best[n]:.0%} ({counted(n, 'token')})"


def _who(result: Result) -> str:
    return f"{result.name}, {counted(result.threads, 'thread')}" + ", mapped" * result.mapped


def plot(results: list[Result], path: str | Path) -> None:
    """Save a roofline: speed over the tokens that are computed at once, below its two limits."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = Figure(figsize=(8, 5), dpi=120, layout="constrained").subplots()
    lengths = sorted({length for result in results for length in (*result.speeds, *result.texts)})
    for number, result in enumerate(results):
        color, own = f"C{number}", sorted(result.speeds)
        axes.plot(own, [result.speeds[n] for n in own], marker="o", ms=5, color=color, label=_who(result))
        if several := sorted(result.texts):
            look = {"marker": "s", "ms": 5, "linestyle": ":", "color": color}
            written = [result.texts[n] for n in several]
            axes.plot(several, written, **look, label=f"{_who(result)}, texts together")
        if result.read_probe:
            _draw_limits(axes, result, lengths[-1], color)
    axes.set(xscale="log", yscale="log", xlabel="tokens computed at once", ylabel="tokens a second")
    axes.set_title(f"{results[0].model}, {results[0].type}")
    axes.set_xticks(lengths, lengths)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    axes.figure.savefig(path)


def _draw_limits(axes, result: Result, most: int, color: str) -> None:
    """What memory allows, up to where arithmetic allows less, and what that allows."""
    memory, arithmetic = result.read_probe, result.multiply_probe
    crossing = min(max(arithmetic / memory, 1), most)
    look = {"linestyle": "--", "linewidth": 1.2, "color": color, "alpha": 0.6}
    axes.plot([1, crossing], [memory, crossing * memory], **look)
    axes.plot([crossing if crossing < most else 1, most], [arithmetic, arithmetic], **look)
    middle, text = crossing**0.5, {"color": color, "fontsize": "small", "va": "bottom", "ha": "right"}
    if middle > 2:  # else there is no room left of it
        axes.text(0.93 * middle, middle * memory, f"memory allows {_number(memory)} x n", **text)
    axes.text(most, 1.02 * arithmetic, f"arithmetic allows {_number(arithmetic)}", **text)
