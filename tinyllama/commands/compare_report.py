"""What `compare_models` found, a `Compared`, as text for a terminal and as a picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np

from ..machine.limits import human
from .kl_divergence import KLD_QUANTILES, P_QUANTILES
from .outputs import save_picture
from .printing import columns, counted
from .tables import split_name

WIDTH = 100
SHOWN = 5  # layers beside each other
WORST = 10  # tensors and layers that are listed
CURVES = ("residual", "attention.heads", "attention.output", "feed_forward.hidden", "feed_forward.output")


@dataclass(frozen=True)
class Kind:
    """The tensors of one kind in all layers."""

    name: str  # "attention.wv"
    types: str  # in the second model
    bits: float  # a weight, in the second
    n_bytes: int  # in the second
    more: int  # bytes that the first has more
    error: float  # of the weights: root mean square over the layers
    output_error: float | None  # of what comes out of them
    part: float | None  # of the divergence that they make by themselves


def kinds(found) -> list[Kind]:
    """The kinds of tensors that differ, the one that makes most first."""
    parts, groups = {share.name: share.part for share in found.shares}, {}
    for tensor in found.tensors:
        if tensor.error:
            _, role = split_name(tensor.name.removesuffix(".weight"))
            groups.setdefault(role, []).append(tensor)
    made = []
    for name, tensors in groups.items():
        ours, theirs = (sum(tensor.n_bytes[side] for tensor in tensors) for side in (0, 1))
        bits = 8 * theirs / sum(tensor.n_weights for tensor in tensors)
        types = ", ".join(sorted({tensor.types[1] for tensor in tensors}))
        errors = [[t.error for t in tensors], [t.output_error for t in tensors if t.output_error is not None]]
        error, output = (float(np.mean(np.square(some))) ** 0.5 if some else None for some in errors)
        made.append(Kind(name, types, bits, theirs, ours - theirs, error, output, parts.get(name)))
    return sorted(made, key=lambda kind: (kind.part is None, -(kind.part or 0), -(kind.output_error or 0)))


def verdict(found) -> Iterator[str]:
    """Sentences: what it comes to."""
    some, (ratio, error) = found.divergence, found.divergence.ratio
    figures = f"{some.ppl[0]:.2f}, of base {some.ppl_base[0]:.2f}: {ratio - 1:+.2%} ± {error:.2%}"
    yield f"The perplexity of Q is {figures}."
    same, most = some.same_top[0], some.kld_quantiles["99.0%"]
    yield f"Both think the same token likeliest in {same:.1%} of the places."
    yield f"The KL divergence is {some.kld[0]:.2g} nats on average, and above {most:.2g} in 1% of the places."
    if found.steps:
        name, limit = found.limit
        named = f"{limit:g} ({name})" if name else f"{limit:g}"
        where = f"First step whose error is above {named}: {found.first_over}."
        yield where if found.first_over else f"Every step's error stays below {named}."
    all_kinds = kinds(found)
    first = [kind for kind in all_kinds if kind.more > 0 and (kind.part or 0) >= 0.01]
    if first and some.kld[0] > 0 and all(kind.part is not None for kind in all_kinds):  # none is left to run
        best = max(first, key=lambda kind: kind.part / kind.more)
        alone, more = f"{best.part:.0%} of the divergence by themselves", f"{human(best.more)} more"
        yield f"To keep finer first: {best.name}, whose weights make {alone}, and in base take {more}."
    yield from (f"Note: {note}." for note in found.notes)


def table(found) -> str:
    """All for a terminal."""
    parts = ["\n".join(columns([_side("base", found.a), _side("Q", found.b)], "<<<", indent=""))]
    parts += [fill(" ".join(verdict(found)), WIDTH), "\n".join(_predictions(found))]
    parts += ["\n".join(_steps(found))] if found.steps else []
    parts += ["\n".join(_weights(found))] if found.tensors else []
    return "\n\n".join([*parts, "\n".join(_surprises(found))])


def _side(label: str, side) -> tuple[str, str, str]:
    size = f"{side.type}, {side.bits:.2f} bits a weight, {human(side.n_bytes)}, backend {side.backend}"
    return label, side.name, size if side.type else "log-probabilities from a file"


def scored(found) -> str:
    """How much was scored."""
    n = found.divergence.n_scored
    return f"{counted(found.n_windows, 'window')} of {found.ctx_size} tokens, {n} tokens scored"


def predictions(found, digits: int = 6) -> list[tuple[str, str, str]]:
    """llama-perplexity's names, the values, and their standard errors."""
    some = found.divergence
    return [
        ("Mean PPL(Q)", *pair_of(some.ppl, digits)),
        ("Mean PPL(base)", *pair_of(some.ppl_base, digits)),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", f"{some.correlation:.2%}", ""),
        ("Mean ln(PPL(Q)/PPL(base))", *pair_of(some.ln_ratio, digits)),
        ("Mean PPL(Q)/PPL(base)", *pair_of(some.ratio, digits)),
        ("Mean PPL(Q)-PPL(base)", *pair_of(some.difference, digits)),
        ("Mean KLD", *pair_of(some.kld, digits)),
        ("Mean Δp", *percent_of(some.dp)),
        ("RMS Δp", *percent_of(some.dp_rms)),
        ("Same top p", *percent_of(some.same_top)),
    ]


def pair_of(pair: tuple[float, float], digits: int = 6) -> tuple[str, str]:
    """A value and its standard error."""
    return f"{pair[0]:.{digits}f}", f"± {pair[1]:.{digits}f}"


def nats(kld: float) -> str:
    """A divergence, in few digits."""
    return f"{kld:.3f}" if abs(kld) >= 0.01 else f"{kld:.1e}"


def percent_of(pair: tuple[float, float], digits: int = 3) -> tuple[str, str]:
    """A share and its standard error."""
    return f"{pair[0]:.{digits}%}", f"± {pair[1]:.{digits}%}"


def _predictions(found) -> Iterator[str]:
    some, names = found.divergence, [*P_QUANTILES]
    yield f"Predictions, by llama-perplexity's names ({scored(found)})"
    yield from columns(predictions(found), "<>>")
    yield ""
    klds = (nats(some.kld_quantiles[name]) if name in KLD_QUANTILES else "" for name in names)
    percents = (f"{100 * some.dp_quantiles[name]:.2f}" for name in names)
    yield from columns([("", *names), ("KLD", *klds), ("Δp %", *percents)], "<" + ">" * len(names))


def by_kind(found) -> dict[str, list]:
    """The steps of all layers by their names in each, "attention.q"."""
    groups: dict[str, list] = {}
    for step in found.steps:
        groups.setdefault(step.kind if step.layer is not None else step.name, []).append(step)
    return groups


def _steps(found) -> Iterator[str]:
    yield f"Steps: mean squared difference / mean square, {found.n_step_tokens} tokens; ! is above the limit"
    groups = by_kind(found)
    n_layers = max(map(len, groups.values()))
    shown = sorted({round(i * (n_layers - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    rows = [("step", *(f"layer {layer}" for layer in shown), "worst", "in layer")]
    for kind, steps in groups.items():
        worst = max(steps, key=lambda step: step.error)
        inside = worst.layer is not None
        some = [_error(steps[layer].error, found) if inside else "" for layer in shown]
        rows.append((kind, *some, _error(worst.error, found), worst.layer if inside else ""))
    yield from columns(rows, "<" + ">" * (len(shown) + 2))


def _error(error: float, found) -> str:
    return f"{error:.2g}" + (" !" if error > found.limit[1] else "  ")


def _weights(found) -> Iterator[str]:
    some = kinds(found)
    if not some:
        yield "Weights: the same in both"
        return
    yield "Weights: root mean square of the difference, of the weights and of what comes out of them; and the"
    yield "part of the divergence that they make where all other weights are those of base"
    rows = [("tensor", "type", "bits", "size", "weights", "output", "part")]
    for kind in some:
        output, part = (f"{x:.1%}" if x is not None else "" for x in (kind.output_error, kind.part))
        size = f"{kind.bits:.2f}", human(kind.n_bytes)
        rows.append((kind.name, kind.types, *size, f"{kind.error:.1%}", output, part))
    yield from columns(rows, "<<>>>>>")
    layers = sorted((s for s in found.shares if s.name.startswith("layers.")), key=lambda share: -share.part)
    if layers:
        worst = ", ".join(f"{share.name.split('.')[1]} ({share.part:.1%})" for share in layers[:WORST])
        yield f"  part of the divergence by layer: {worst}"
    yield ""
    yield "Tensors whose output is furthest off"
    rows = [("tensor", "type", "weights", "output")]
    for tensor in [tensor for tensor in found.tensors if tensor.error][:WORST]:
        output = f"{tensor.output_error:.1%}" if tensor.output_error is not None else ""
        rows.append((tensor.name.removesuffix(".weight"), tensor.types[1], f"{tensor.error:.1%}", output))
    yield from columns(rows, "<<>>")


def _surprises(found) -> Iterator[str]:
    yield "Where they differ most: the text, and what came; what each thought likeliest"
    rows = [("KLD", "token", "text", "came", "base", "", "Q", "")]
    for some in found.surprises:
        both = (x for piece, p in (some.a, some.b) for x in (repr(piece), f"{p:.0%}"))
        rows.append((nats(some.kld), some.position, repr(some.before[-30:]), repr(some.token), *both))
    yield from columns(rows, ">><<<><>")


def plot(found, path: str | Path) -> None:
    """Save a picture: errors over the layers, what each layer makes, and the divergence over the text."""
    from matplotlib.figure import Figure

    layers = [share for share in found.shares if share.name.startswith("layers.")]
    n_rows = bool(found.steps) + bool(layers) + 1
    figure = Figure(figsize=(9, 3.3 * n_rows), dpi=120, layout="constrained")
    rows = iter(figure.subplots(n_rows, squeeze=False).flat)
    figure.suptitle(f"{Path(found.b.name).name} (Q) against {Path(found.a.name).name} (base)")
    if found.steps:
        axes, groups = next(rows), by_kind(found)
        for number, name in enumerate(CURVES):
            errors = [max(step.error, 1e-18) for step in groups[name]]
            axes.plot(errors, marker="os^vD"[number], ms=4, label=name)
        axes.axhline(found.limit[1], color="grey", linestyle="--", linewidth=1, label="limit")
        axes.set(xlabel="layer", ylabel="mean squared difference\n/ mean square", title="Error of steps")
        axes.set_yscale("log")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if layers:
        axes = next(rows)
        axes.bar(range(len(layers)), [100 * share.part for share in layers])
        title = "Part of the divergence that a layer's weights make by themselves"
        axes.set(xlabel="layer", ylabel="%", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes, kld = next(rows), found.scores["kld"].ravel()
    axes.plot(kld, linewidth=0.4, color="C0", alpha=0.5)
    n = max(1, len(kld) // 100)
    means = np.add.reduceat(kld, np.arange(0, len(kld), n)) / np.diff([*range(0, len(kld), n), len(kld)])
    axes.plot(np.arange(0, len(kld), n), means, color="C1", label=f"mean of {counted(n, 'token')}")
    axes.set(xlabel="token scored", ylabel="nats", title="KL divergence over the text")
    axes.legend(fontsize="small", loc="upper right", frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)
