"""What `compare_models` found, a `Compared`, as one page of HTML that needs nothing but itself."""

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from string import Template

from ..errors import naming
from ..machine.files import written
from ..machine.limits import human
from . import compare_charts as charts
from .compare_report import CURVES, by_kind, kinds, nats, pair_of, percent_of, predictions, scored, verdict
from .kl_divergence import KLD_QUANTILES, P_QUANTILES
from .tables import split_name

TEMPLATE = Path(__file__).with_name("compare.html")

#: Sections that a comparison with a file has not.
STEPS = Template("""<h2>Where it begins</h2>
<p class="muted">Each model goes on from its own values, so errors add up from layer to layer. The error of a
step is the mean squared difference as a fraction of the mean square of base's values, of $n_tokens tokens;
the first token of the text isn't counted. The stronger the colour the larger the error, on a logarithmic
scale; a frame means that it is above the limit, $limit. Outside of the layers: $whole.</p>
$map
<div class="legend">$legend</div>
$curves
""")
WEIGHTS = Template("""<h2>Which weights make it</h2>
<p class="muted">Part of KLD: the divergence where only these weights are Q's and all others are base's, as a
part of the whole. About that much goes away where they are kept as they are in base, for so many bytes more.
Weights, output: root mean square of the difference, as a fraction, of the weights and of what comes out of
them where both get the values that base computes.</p>
<div class="wide"><table>$rows</table></div>
$by_layer
<h3>Error of what comes out of each tensor</h3>
$tensors
""")


def save(found, path: str | Path) -> None:
    """Write the page: the whole file, or none."""
    with naming(path), written(path) as (unfinished,):
        unfinished.write_text(page(found), encoding="utf-8", errors="replace")  # a path may be no UTF-8


def page(found) -> str:
    """The page."""
    names = [Path(side.name).name for side in (found.b, found.a)]
    parts = {
        "title": escape(f"{names[0]} against {names[1]}"),
        "sides": "".join([_side("base", found.a), _side("Q", found.b)]),
        "verdict": "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(found)),
        "scored": escape(scored(found)),
        "predictions": "".join(map(_row, predictions(found, 4))),
        "trail": charts.trail(found.scores["kld"].ravel()),
        "quantiles": "".join(_quantiles(found)),
        "inside": (_steps(found) if found.steps else "") + (_weights(found) if found.tensors else ""),
        "surprises": "".join(_surprises(found)),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts)


def _row(cells: Iterable[object], tag: str = "td") -> str:
    return f"<tr>{_cells(cells, tag)}</tr>"


def _cells(cells: Iterable[object], tag: str = "td") -> str:
    return "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)


def _side(label: str, side) -> str:
    size = f"{side.type}, {side.bits:.2f} bits a weight, {human(side.n_bytes)}, backend {side.backend}"
    about = size if side.type else "log-probabilities from a file"
    return f"<dt>{label}</dt><dd>{escape(side.name)}<br>{escape(about)}</dd>"


def _quantiles(found) -> Iterator[str]:
    some = found.divergence
    yield _row(("", "KLD", "Δp"), "th")
    yield _row(("Mean", " ".join(pair_of(some.kld, 4)), " ".join(percent_of(some.dp, 2))))
    for name in P_QUANTILES:
        kld = nats(some.kld_quantiles[name]) if name in KLD_QUANTILES else ""
        yield _row((name, kld, f"{some.dp_quantiles[name]:.2%}"))


def _steps(found) -> str:
    groups, limit = by_kind(found), found.limit[1]
    inside = {name: steps for name, steps in groups.items() if steps[0].layer is not None}
    rows = {name: [step.error for step in steps] for name, steps in inside.items()}
    lines = {name: rows[name] for name in CURVES}
    keys = (f'<svg viewBox="0 0 26 8"><path class="c{number}" d="M0 4H26"/></svg>' for number in range(9))
    legend = "".join(f"<span>{key} {name}</span>" for key, name in zip(keys, lines, strict=False))
    return STEPS.substitute(
        n_tokens=found.n_step_tokens,
        limit=f"{limit:g}" + f" ({found.limit[0]})" * bool(found.limit[0]),
        whole=", ".join(
            f"{name} {steps[0].error:.2g}" for name, steps in groups.items() if name not in inside
        ),
        map=charts.heat_map(rows, limit),
        legend=legend,
        curves=charts.curves(lines, limit),
    )


def _weights(found) -> str:
    some = kinds(found)
    if not some:
        return "<h2>Which weights make it</h2><p>All weights are the same in both.</p>"
    names = ("tensor", "type", "part of KLD", "more in base", "weights", "output", "bits", "size")
    rows, most = [_row(names, "th")], max((kind.part or 0 for kind in some), default=0) or 1
    for kind in some:
        bar = f'<span class="part"><i style="width:{max(kind.part or 0, 0) / most:.0%}"></i></span>'
        part = f"<td>{kind.part:.1%}{bar}</td>" if kind.part is not None else "<td></td>"
        output = f"{kind.output_error:.1%}" if kind.output_error is not None else ""
        after = human(max(kind.more, 0)), f"{kind.error:.1%}", output, f"{kind.bits:.2f}", human(kind.n_bytes)
        rows.append(f"<tr>{_cells((kind.name, kind.types))}{part}{_cells(after)}</tr>")
    parts = [share.part for share in found.shares if share.name.startswith("layers.")]
    by_layer = f"<h3>Part of KLD by layer</h3>{charts.bars(parts)}" if parts else ""
    return WEIGHTS.substitute(rows="".join(rows), by_layer=by_layer, tensors=_tensors(found))


def _tensors(found) -> str:
    """A map of all that are in layers, and a list of all that differ."""
    errors: dict[str, dict[int, float]] = {}
    rows, head = [], _row(("tensor", "type", "weights", "output"), "th")
    for tensor in found.tensors:
        layer, role = split_name(tensor.name.removesuffix(".weight"))
        if layer is not None and tensor.output_error is not None:
            errors.setdefault(role, {})[layer] = tensor.output_error
        if tensor.error:
            output = f"{tensor.output_error:.1%}" if tensor.output_error is not None else ""
            name = tensor.name.removesuffix(".weight")
            rows.append(_row((name, tensor.types[1], f"{tensor.error:.1%}", output)))
    shown = {role: [errors[role][layer] for layer in sorted(errors[role])] for role in sorted(errors)}
    table = f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
    listed = f"<details><summary>All {len(rows)} that differ, the worst first</summary>{table}</details>"
    return charts.heat_map(shown, form="{:.1%}", decades=1) + listed


def _surprises(found) -> Iterator[str]:
    head = ("KLD", "token", "text", "came", "base", "Q")
    yield f"<tr>{''.join(f'<th>{name}</th>' for name in head[:2])}"
    yield f"{''.join(f'<th class=left>{name}</th>' for name in head[2:])}</tr>"
    for some in found.surprises:
        both = (f"{piece!r} {p:.0%}" for piece, p in (some.a, some.b))
        cells = "".join(f'<td class="left">{escape(text)}</td>' for text in (repr(some.token), *both))
        before = f'<td class="text">… {escape(some.before)}</td>'
        yield f"<tr><td>{nats(some.kld)}</td><td>{some.position}</td>{before}{cells}</tr>"
