"""What a loaded model does with a prompt, as one picture: all heads, the logit lens, what edits change.

Every function returns a `Picture` whose `numbers` are the arrays behind it, by name.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import numpy as np

from ...errors import require
from ...llama import Llama
from ...model import Step
from ...ops import softmax
from ...taps.edits import Place
from ...taps.interventions import ablate, patch
from ..widgets.lens import Lens
from .charts import logit_lens
from .style import AMOUNT, BLUE, MASKED, ORANGE, SIGNED, WIDTH, Picture, chart, labels, tick

AT_ONCE = 512  # tokens that are computed together
MAP_NOTE = "in each map: a row for each token that looks, a column for each it looks at"


def all_heads(llama: Llama, prompt: str | list[int], title: str = "") -> Picture:
    """Attention of every head of every layer: a small map each, with a row for each token that looks.

    The layers are rows, from the bottom up; or columns, where there are more of them than heads.

    Numbers: "weights", [n_layers, n_heads, n_tokens, n_past].
    """
    weights = np.stack([*llama.trace(prompt, "layers.*.attention.weights").values()])
    n_layers, n_heads, n_tokens, _ = weights.shape
    is_wide = n_layers > n_heads
    maps = weights.swapaxes(0, 1) if is_wide else weights[::-1]  # as they lie: rows, columns
    n_rows, n_columns = maps.shape[:2]
    gap = max(1, n_tokens // 8)
    seen = np.where(np.tri(n_tokens) > 0, maps, np.nan)
    framed = np.pad(seen, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=-1)
    step = n_tokens + gap  # from one map to the next
    tiles = framed.transpose(0, 2, 1, 3).reshape(n_rows * step, n_columns * step)[:-gap, :-gap]
    size = min(1, 15 / n_columns, 15 / n_rows)  # of a map, in inches
    names = ["head", "layer"] if is_wide else ["layer", "head"]
    notes = {"ylabel": names[0], "xlabel": f"{names[1]}\n{MAP_NOTE}"}
    title = title or _heading("The attention of all heads to", llama, prompt)
    picture, axes = chart(1.1 + size * n_rows, title, 1.6 + max(6, size * n_columns), **notes)
    colors = AMOUNT.with_extremes(bad=MASKED, under="white")
    image = axes.imshow(tiles, cmap=colors, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    rows = range(n_rows) if is_wide else range(n_rows)[::-1]
    for axis, numbers in ((axes.xaxis, range(n_columns)), (axes.yaxis, rows)):
        axis.set_ticks(np.arange(len(numbers)) * step + (n_tokens - 1) / 2, numbers, fontsize=8)
        axis.set_tick_params(length=0)
    axes.spines[:].set_visible(False)
    picture.colorbar(image, label="weight", fraction=0.04, pad=0.01, shrink=min(1, 4 / (size * n_rows)))
    picture.numbers = {"weights": weights}
    return picture


def lens(llama: Llama, prompt: str | list[int], title: str = "") -> Picture:
    """What the model would say after each layer, of every token: the logit lens of a whole prompt.

    Numbers: "ids" of the likeliest tokens and their "probs", [n_layers + 1, n_tokens], the embedding's first.
    """
    ids = llama.tokens(prompt)
    streams = llama.trace(ids, "embedding", "layers.*.residual").values()
    found = Lens(llama, [*streams])
    for _layer in found.read():
        pass
    piece = llama.tokenizer.piece
    title = title or _heading("What the model would say after each layer, of", llama, prompt)
    picture = logit_lens(
        [[*map(piece, row)] for row in found.ids.tolist()], found.probs, [*map(piece, ids)], title
    )
    picture.numbers = {"ids": found.ids, "probs": found.probs}
    return picture


def top_tokens(
    llama: Llama, prompt: str | list[int], edit: Mapping[str, Callable], n: int = 10, title: str = ""
) -> Picture:
    """What is likeliest to follow a prompt, without an edit and with it: the n likeliest of both.

    Args:
        edit: as `Llama.edit` takes it.

    Numbers: "ids", [n]; their probabilities "before" and "after"; "change", that of their logits.
    """
    ids = llama.tokens(prompt)
    before, after = (_edited(llama, ids, some) for some in (dict.fromkeys(edit, _as_it_is), edit))
    probs = softmax(before), softmax(after)
    best = np.argsort(-np.maximum(*probs), kind="stable")[:n]
    best = best[np.argsort(-probs[0][best], kind="stable")]
    title = title or _heading("What comes next, after", llama, prompt)
    picture, axes = chart(1.1 + 0.36 * n, title, xlabel="probability")
    for number, (name, color) in enumerate({"as it is": BLUE, "edited": ORANGE}.items()):
        where = np.arange(len(best)) + 0.38 * number - 0.19
        drawn = axes.barh(where, probs[number][best], color=color, height=0.36, label=name)
        axes.bar_label(drawn, [f"{prob:.3g}" for prob in probs[number][best]], padding=3, fontsize=7)
    tick(axes.yaxis, [*map(llama.tokenizer.piece, best.tolist())])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(loc="lower right")
    change = (after - before)[best]
    picture.numbers = {"ids": best, "before": probs[0][best], "after": probs[1][best], "change": change}
    return picture


def patching_map(
    llama: Llama, prompt, other, answer: str | int | None = None, other_answer=None, title: str = ""
) -> Picture:
    """Where a model keeps what it needs to answer one prompt and not another: activation patching.

    The other prompt is run with one token's residual stream after one layer taken from the first. How much of
    the first one's difference of logits, that of the answer less that of the other answer, comes back (1: all
    of it, 0: none)? (arXiv:2202.05262)

    Args:
        prompt, other: of as many tokens.
        answer, other_answer: the text or the id of a token; None: the likeliest one to follow.

    Numbers: "restored", [n_layers, n_tokens]; "ids" of both answers.
    """
    ids, others = llama.tokens(prompt), llama.tokens(other)
    lengths = f"the prompts must have as many tokens, and they have {len(ids)} and {len(others)}"
    require(len(ids) == len(others), lengths)
    streams, names = {}, [f"layers.{layer}.residual" for layer in range(llama.config.n_layers)]
    keep = {name: partial(_keep, streams, name) for name in names}
    n_edits = len(names) * len(ids)
    runs = _logits(llama, [(ids, keep), (others, {})], n_edits)
    right, wrong = (_token(llama, *one) for one in zip((answer, other_answer), runs, strict=True))
    require(right != wrong, f"after both comes {llama.tokenizer.piece(right)!r}: name two answers")
    best, worst = (run[right] - run[wrong] for run in runs)
    require(abs(best - worst) > 1e-6, "both prompts have the same difference of logits: nothing to restore")
    edits = [patch(streams, name, [n]) for name in names for n in range(len(ids))]
    found = _logits(llama, [(others, _taps(llama, edit, len(ids))) for edit in edits], n_edits)
    restored = ((found[:, right] - found[:, wrong] - worst) / (best - worst)).reshape(-1, len(ids))
    pieces = [[*map(llama.tokenizer.piece, some)] for some in (others, ids)]
    put = [a if a == b else f"{a} ← {labels([b])[0]}" for a, b in zip(*pieces, strict=True)]
    label = f"how much of {_piece(llama, right)} over {_piece(llama, wrong)} comes back\n"
    label += "white: nothing, dark blue: all of it, orange: it gets less"
    what = f"The residual stream of one token of {_quoted(llama, prompt)}\nis put into"
    picture, axes = _map(restored, label, title or _heading(what, llama, other), limit=1.0)
    tick(axes.xaxis, put, rotation=90)
    picture.numbers = {"restored": restored, "ids": np.array([right, wrong])}
    return picture


def ablation_map(
    llama: Llama, prompt: str | list[int], token: str | int | None = None, title: str = ""
) -> Picture:
    """What every head does for the next token: the change of its logit when the head finds nothing (zeros).

    Args:
        token: its text or id; None: the likeliest one to follow.

    Numbers: "change", [n_layers, n_heads]; the token's "id".
    """
    ids, config = llama.tokens(prompt), llama.config
    edits = [
        ablate(f"layers.{layer}.attention.heads", head)
        for layer in range(config.n_layers)
        for head in range(config.n_heads)
    ]
    taps = [{}, *(_taps(llama, edit, len(ids)) for edit in edits)]
    before, *after = _logits(llama, [(ids, own) for own in taps], len(taps))
    wanted = _token(llama, token, before)
    change = np.array([logits[wanted] - before[wanted] for logits in after]).reshape(config.n_layers, -1)
    label = f"change of the logit of {_piece(llama, wanted)} without the head\n"
    label += "orange: the head helped, blue: it was in the way"
    title = title or _heading(f"What each head does for {_piece(llama, wanted)} after", llama, prompt)
    picture, axes = _map(change, label, title)
    axes.set_xlabel("head")
    axes.set_xticks(range(config.n_heads), range(config.n_heads), fontsize=8)
    picture.numbers = {"change": change, "id": np.array(wanted)}
    return picture


def _map(values: np.ndarray, label: str, title: str, limit: float | None = None) -> tuple:
    """A picture of [n_layers, n_columns], the last layer on top, and its axes."""
    n_layers, n_columns = values.shape
    limit = limit or float(np.abs(values).max()) or 1.0
    width = max(WIDTH, 2 + 0.2 * n_columns)
    picture, axes = chart(min(2 + 0.22 * n_layers, 12), title, width, ylabel="layer")
    cells = {"aspect": "auto", "interpolation": "nearest", "origin": "lower"}
    image = axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, **cells)
    axes.set_yticks(range(n_layers), range(n_layers), fontsize=8)
    picture.colorbar(image, label=label, shrink=0.9)
    return picture, axes


def _logits(llama: Llama, runs: Sequence[tuple[list[int], dict[str, Callable]]], n_runs: int) -> np.ndarray:
    """What follows each of some prompts of one length, which have taps of their own: [n, vocab_size].

    How many tokens are computed together decides the last bits of numbers, and more where a backend has
    another kernel for many. So as many are for all that is compared, n_runs in all: some twice, if need be.
    """
    length, found = len(runs[0][0]), []
    n_calls = -(-n_runs // max(1, AT_ONCE // length))
    n = -(-n_runs // n_calls)  # runs at once
    for start in range(0, len(runs), n):
        some = [*runs[start : start + n]]
        filled = some + [(runs[0][0], {})] * (n - len(some))
        caches = [llama.new_cache(length, at_once=n * length) for _ in filled]
        steps = [Step(ids, cache, 1, taps) for (ids, taps), cache in zip(filled, caches, strict=True)]
        found += llama.run(steps)[: len(some)]
    return np.concatenate(found)


def _edited(llama: Llama, ids: list[int], edit: Mapping[str, Callable]) -> np.ndarray:
    """What follows a prompt with an edit: [vocab_size]."""
    with llama.edit(edit):
        return _logits(llama, [(ids, {})], 1)[0]


def _as_it_is(array: np.ndarray) -> None:
    """An edit that changes nothing: the value is computed as for any other edit, by the same kernel."""


def _taps(llama: Llama, edit: Mapping[str, list[Callable]], n_tokens: int) -> dict[str, Callable]:
    """A ready-made edit of one text among others that are computed with it, as a Step takes it."""
    places = {name: Place(name, np.arange(n_tokens), llama.config) for name in edit}
    return {name: partial(_changed, edit[name], place) for name, place in places.items()}


def _changed(functions: Sequence[Callable], place: Place, array: np.ndarray) -> np.ndarray:
    return reduce(lambda old, function: function(old, place), functions, array.copy())


def _keep(kept: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
    kept[name] = array.copy()


def _quoted(llama: Llama, prompt: str | list[int]) -> str:
    """A prompt, or its beginning, on one line."""
    text = prompt if isinstance(prompt, str) else llama.tokenizer.decode(llama.tokens(prompt))
    return f"“{labels([text], 70)[0].replace('▁', ' ')}”"


def _heading(what: str, llama: Llama, prompt: str | list[int]) -> str:
    return f"{what}\n{_quoted(llama, prompt)}"


def _token(llama: Llama, wanted: str | int | None, logits: np.ndarray) -> int:
    """A token's id: as it is named, or the likeliest one."""
    if wanted is None:
        return int(logits.argmax())
    if not isinstance(wanted, str):
        return llama.tokens([wanted])[0]
    ids = [token for token in range(len(logits)) if llama.tokenizer.piece(token) == wanted]
    require(ids, f"no token is {wanted!r}; most words begin with a space")
    return ids[0]


def _piece(llama: Llama, token: int) -> str:
    """A token as a title names it."""
    return f"“{labels([llama.tokenizer.piece(token)])[0]}”"
