"""What a loaded model does with a prompt, as one picture: all heads, the logit lens, what edits change.

Every function returns a `Picture` whose `numbers` are the arrays behind it, by name.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.ticker import MaxNLocator

from ...errors import require
from ...llama import Llama
from ...model import Step
from ...ops import softmax
from .charts import logit_lens
from .style import AMOUNT, BLUE, MASKED, ORANGE, SIGNED, Picture, chart, labels, tick

AT_ONCE = 512  # tokens that are computed together


def all_heads(llama: Llama, prompt: str | list[int], title: str = "") -> Picture:
    """Attention of every head of every layer: a small map each, with a row for each token that looks.

    Numbers: "weights", [n_layers, n_heads, n_tokens, n_past].
    """
    weights = np.stack([*llama.trace(prompt, "layers.*.attention.weights").values()])
    n_layers, n_heads, n_tokens, _ = weights.shape
    gap = max(1, n_tokens // 8)
    seen = np.where(np.tri(n_tokens) > 0, weights, np.nan)
    framed = np.pad(seen, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=-1)
    step = n_tokens + gap  # from one map to the next
    tiles = framed.transpose(0, 2, 1, 3).reshape(n_layers * step, n_heads * step)[:-gap, :-gap]
    size = min(8 / n_heads, 15 / n_layers)  # of a map, in inches
    picture, axes = chart(1 + size * n_layers, title, 1.2 + size * n_heads, xlabel="head", ylabel="layer")
    colors = AMOUNT.with_extremes(bad=MASKED, under="white")
    image = axes.imshow(tiles, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    for axis, n in ((axes.xaxis, n_heads), (axes.yaxis, n_layers)):
        axis.set_ticks(np.arange(n) * step + (n_tokens - 1) / 2, range(n), fontsize=7)
        axis.set_tick_params(length=0)
    axes.spines[:].set_visible(False)
    picture.colorbar(image, label="weight", shrink=min(0.7, 4 / (size * n_layers)))
    picture.numbers = {"weights": weights}
    return picture


def lens(llama: Llama, prompt: str | list[int], title: str = "") -> Picture:
    """What the model would say after each layer, of every token: the logit lens of a whole prompt.

    Numbers: "ids" of the likeliest tokens and their "probs", [n_layers + 1, n_tokens], the embedding's first.
    """
    ids = llama.tokens(prompt)
    streams = llama.trace(ids, "embedding", "layers.*.residual").values()
    found = [softmax(llama.unembed(stream)) for stream in streams]
    best = np.stack([probs.argmax(axis=-1) for probs in found])
    probs = np.stack([probs.max(axis=-1) for probs in found])
    piece = llama.tokenizer.piece
    picture = logit_lens([[*map(piece, row)] for row in best.tolist()], probs, [*map(piece, ids)], title)
    picture.numbers = {"ids": best, "probs": probs}
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
    before = _logits(llama, ids, [{}])[0]
    with llama.edit(edit):
        after = _logits(llama, ids, [{}])[0]
    probs = softmax(before), softmax(after)
    best = np.argsort(-np.maximum(*probs), kind="stable")[:n]
    best = best[np.argsort(-probs[0][best], kind="stable")]
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
    runs = [_logits(llama, some, [{}])[0] for some in (ids, others)]
    right, wrong = (_token(llama, *one) for one in zip((answer, other_answer), runs, strict=True))
    require(right != wrong, f"after both comes {llama.tokenizer.piece(right)!r}: name two answers")
    best, worst = (run[right] - run[wrong] for run in runs)
    require(abs(best - worst) > 1e-6, "both prompts have the same difference of logits: nothing to restore")
    streams = llama.trace(ids, "layers.*.residual")
    edits = [{name: partial(_with_row, n, x[n])} for name, x in streams.items() for n in range(len(ids))]
    found = _logits(llama, others, edits)
    restored = ((found[:, right] - found[:, wrong] - worst) / (best - worst)).reshape(-1, len(ids))
    pieces = [[*map(llama.tokenizer.piece, some)] for some in (others, ids)]
    names = [a if a == b else f"{a} ← {labels([b])[0]}" for a, b in zip(*pieces, strict=True)]
    label = f"restored: {_piece(llama, right)} over {_piece(llama, wrong)}"
    picture, axes = _map(restored, label, title, limit=1.0)
    tick(axes.xaxis, names, rotation=90)
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
    before = _logits(llama, ids, [{}])[0]
    wanted = _token(llama, token, before)
    edits = [
        {f"layers.{layer}.attention.heads": partial(_without, head, config.head_dim)}
        for layer in range(config.n_layers)
        for head in range(config.n_heads)
    ]
    change = (_logits(llama, ids, edits)[:, wanted] - before[wanted]).reshape(config.n_layers, -1)
    picture, axes = _map(change, f"change of the logit of {_piece(llama, wanted)}", title)
    axes.set_xlabel("head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    picture.numbers = {"change": change, "id": np.array(wanted)}
    return picture


def _map(values: np.ndarray, label: str, title: str, limit: float | None = None) -> tuple:
    """A picture of [n_layers, n_columns], the last layer on top, and its axes."""
    limit = limit or float(np.abs(values).max()) or 1.0
    picture, axes = chart(min(2 + 0.22 * len(values), 12), title, ylabel="layer")
    cells = {"aspect": "auto", "interpolation": "nearest", "origin": "lower"}
    image = axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, **cells)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    picture.colorbar(image, label=label, shrink=0.8)
    return picture, axes


def _logits(llama: Llama, ids: list[int], taps: Sequence[dict[str, Callable]]) -> np.ndarray:
    """What follows a prompt in one run for each dict of taps: [n_runs, vocab_size]."""
    n, found = max(1, AT_ONCE // len(ids)), []
    for start in range(0, len(taps), n):
        some = taps[start : start + n]
        at_once = len(ids) * len(some)
        found += llama.run([Step(ids, llama.new_cache(len(ids), at_once=at_once), 1, own) for own in some])
    return np.concatenate(found)


def _with_row(number: int, values: np.ndarray, array: np.ndarray) -> np.ndarray:
    """[n_tokens, dim] with other values of one token."""
    return np.where(np.arange(len(array))[:, None] == number, values, array)


def _without(head: int, head_dim: int, array: np.ndarray) -> np.ndarray:
    """[n_tokens, q_dim] with zeros for what one head has found."""
    return np.where(np.arange(array.shape[1]) // head_dim == head, np.float32(0), array)


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
    return labels([llama.tokenizer.piece(token)])[0]
