"""What the stepper says about a walk: HTML, and plain values that are ready to be drawn."""

from html import escape

import numpy as np

from .kinds import KINDS
from .report import percent, visible
from .source import Excerpt
from .steps import Map, Walk

#: What a row of `Alternatives` is called where it is about heads.
HEADS = {"row": "head", "pick": "", "button": "go there", "does": ["go to", ""]}
#: And where it is about tokens that could follow.
NEXT = {"pick": "", "button": "take it", "does": ["take", "and go on"]}

#: How maps of what is mostly small are coloured.
ROOT = "colours go by the root, so that small numbers are seen, too"

#: What stands above the table of all layers.
LENS = (
    "What the model would say after each layer and token if it stopped there. The stronger the colour, the "
    "likelier; bold is what the last layer says, too."
)


def what(walk: Walk) -> str:
    """The step's title, what happens and why, and its shape, as HTML."""
    kind, layer = KINDS[walk.kind], "" if walk.layer is None else f"Layer {walk.layer}: "
    return (
        f"<h3>{layer}{escape(kind.title)}</h3><p>{escape(kind.sentence)}</p>"
        f"<p><code>{escape(walk.name)}</code>: <code>{escape(walk.shape())}</code></p>"
    )


def code(excerpt: Excerpt) -> str:
    """Lines of source as HTML, the executed ones marked."""
    lines = []
    for number, text in excerpt.lines.items():
        tag = "mark" if number in excerpt.marked else "span"
        lines.append(f"<{tag}><span class='tinyllama-line'>{number:4}</span> {escape(text)}</{tag}>")
    head = f"<b>{excerpt.file}</b>, {excerpt.function}()"
    return f"<div>{head}</div><pre tabindex='0'>{''.join(lines)}</pre>"


def says(walk: Walk) -> str:
    """What the model would say after each layer so far, as HTML."""
    token = escape(visible(walk.pieces[walk.position]))
    head = f"<div>What the model would say after <code>{token}</code> if it stopped there</div>"
    rows = ""
    for layer, said in enumerate(walk.says()):
        cells = [f"<td><code>{escape(visible(piece))}</code> {percent(prob)}</td>" for piece, prob in said]
        rows = f"<tr><th scope='row'>layer {layer}</th>{''.join(cells)}</tr>{rows}"
    none = "<p>No layer is complete yet: go on to the end of the first.</p>"
    return head + (f"<table class='tinyllama-lens'>{rows}</table>" if rows else none)


def map_frame(walk: Walk, shown: Map) -> dict:
    """What `HeatMap.show` is to write beside the numbers of the step one stands at."""
    finite = np.abs(shown.values[np.isfinite(shown.values)])
    limit = 1.0 if shown.is_share else float(np.quantile(finite, 0.995)) or 1.0
    head = f", head {walk.head}" if walk.has_heads() else ""
    pieces = list(map(visible, walk.pieces))
    return {
        "rows": pieces,
        "columns": shown.axis or pieces,
        "title": f"{walk.name}{head}. {_legend(shown, limit)}",
        "between": " looks at",
        "numbered": True,
        "root": shown.is_share,
        "row": walk.position,
        "column": -1 if shown.axis or walk.looks_at is None else walk.looks_at,
        "per_cell": shown.per_cell,
        "limit": limit,
    }


def _legend(shown: Map, limit: float) -> str:
    if shown.is_share:
        return f"The strongest blue is 1; {ROOT}."
    many = f" A cell shows the number farthest from 0 of {shown.per_cell}." if shown.per_cell > 1 else ""
    return f"Blue is above 0, orange below; the strongest is ±{limit:.3g} and beyond.{many}"


def followers(walk: Walk, can_resume: bool) -> dict:
    """The ten tokens that are likeliest to follow, as `Alternatives` shows them."""
    rows = [
        {
            "id": token.id,
            "piece": visible(token.piece),
            "cells": [{"share": token.prob, "text": percent(token.prob)}, f"{token.logit:.2f}"],
        }
        for token in walk.likeliest()
    ]
    return {
        "piece": visible(walk.pieces[walk.position]),
        "facts": f"is followed by one of {walk.config.vocab_size:,} tokens. These ten are the likeliest: "
        "take one, and the model goes on from there.",
        "columns": [{"name": "probability", "note": ""}, {"name": "logit", "note": ""}],
        "rows": rows,
        "words": NEXT,
        "can_resume": can_resume,
    }


def lookers(walk: Walk) -> dict:
    """The heads that look from here to there most, as `Alternatives` shows them; a row's id is its number."""
    rows = []
    for number, look in enumerate(walk.looks()):
        there = f" → {_token(walk, look.looks_at)}" if walk.looks_at is None else ""
        cell = {"share": look.weight, "text": f"{look.weight:.2f}"}
        name = f"layer {look.layer}, head {look.head}{there}"
        rows.append({"id": number, "piece": name, "cells": [cell]})
    facts = "looks at others most by these heads. Left out are itself and the first token, where heads rest."
    if walk.looks_at is not None:
        facts = f"looks at {_token(walk, walk.looks_at)} most by these heads."
    elif not rows:
        facts = "sees no other token" + (" but the first, where heads rest." if walk.position else ".")
    return {
        "piece": _token(walk, walk.position),
        "facts": facts,
        "columns": [{"name": "weight", "note": ""}],
        "rows": rows,
        "words": HEADS,
        "can_resume": True,
    }


def _token(walk: Walk, position: int) -> str:
    return f"{visible(walk.pieces[position])} ({position})"


def sheet_frame(walk: Walk) -> dict:
    """What `Sheet.show` is to write beside the maps."""
    config = walk.config
    return {
        "title": f"The attention of {config.n_layers} layers × {config.n_heads} heads. In each map a row is "
        "a token that looks, a column one that is looked at. The heads in the list have a frame.",
        "at": [walk.layer or 0, walk.head],
        "marked": [[look.layer, look.head] for look in walk.looks()],
    }


def lens_table(walk: Walk) -> dict:
    """What is known of the lens, as `LensTable` shows it, the last layer on top."""
    lens, rows = walk.lens, []
    for layer in np.flatnonzero((lens.ids >= 0).all(axis=1))[::-1].tolist():
        pieces = list(map(visible, walk.pieces_of(lens.ids[layer])))
        settled = (lens.ids[layer] == lens.ids[-1]).tolist()
        probs = [round(prob, 4) for prob in lens.probs[layer].tolist()]
        rows.append({"layer": layer, "pieces": pieces, "probs": probs, "settled": settled})
    at = [-1 if walk.layer is None else walk.layer, walk.position]
    return {"columns": list(map(visible, walk.pieces)), "rows": rows, "at": at}
