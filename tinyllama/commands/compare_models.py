"""Two models on the same text: how much what they expect differs, where it begins, and which tensors make it.

Most often the second is a quantized form of the first. Four questions, and for each a module:

    kl_divergence     how much do the predictions differ?       all windows of the text
    compare_steps     in which layer does it begin?             tokens of the first window
    compare_tensors   how far are the weights from each other?  all of them
    compare_shares    which of them make the difference?        tokens of the first window

Windows go through both models one after the other, and only sums and a few numbers of each token are kept.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..errors import Cancelled, naming, require
from ..llama import Llama, load
from ..texts.perplexity import (
    SHORTEST,
    Perplexity,
    check_sizes,
    perplexity,
    plain_windows,
    predictions,
    with_bos,
)
from . import kl_divergence
from .compare_inside import Inside, named_limit
from .compare_shares import Share
from .compare_steps import Step
from .compare_tensors import TensorError
from .inspect import type_of
from .kl_divergence import BaseFile, Divergence, score, statistics
from .outputs import require_new, require_picture

WORST = 10  # tokens that are shown, those with the largest divergence
BEFORE = 12  # tokens that are shown before each


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    name: str  # of the model or file
    type: str = ""  # of most of its weights, or the mix: "Q4_K_M"
    bits: float = 0.0  # a weight
    n_bytes: int = 0  # all weights
    backend: str = ""


@dataclass(frozen=True)
class Surprise:
    """A token before which two models expect different things."""

    before: str  # the text that leads to it
    token: str  # what comes
    kld: float
    position: int  # among the tokens of the text
    a: tuple[str, float]  # what the first model thinks likeliest, and how likely
    b: tuple[str, float]


@dataclass(frozen=True, repr=False)
class Compared:
    """What `compare` found; `a` is the model that `b` is judged by. Methods: table, plot, html."""

    a: Side
    b: Side
    ctx_size: int  # tokens in a window
    n_windows: int
    divergence: Divergence
    windows: list[float]  # the mean divergence of each, in nats
    surprises: list[Surprise]  # the largest first
    n_step_tokens: int = 0  # of which steps were compared
    steps: list[Step] = field(default_factory=list)  # in the order of the forward pass
    limit: tuple[str, float] = ("", 0.0)  # what the error of a step may be: its name, and the error
    first_over: str | None = None  # the first step that leaves it
    tensors: list[TensorError] = field(default_factory=list)  # the worst first
    shares: list[Share] = field(default_factory=list)  # of kinds of tensors, then of layers
    notes: list[str] = field(default_factory=list)  # what couldn't be compared, and why
    scores: np.ndarray = None  # of each token scored, kl_divergence.SCORES

    def as_dict(self) -> dict:
        """All of it but `scores`, in plain dicts, lists, strings and numbers; None for infinity."""
        found = asdict(replace(self, scores=None))
        del found["scores"]
        return finite(found)

    def table(self) -> str:
        """All of it for a terminal."""
        from .compare_report import table

        return table(self)

    __repr__ = table  # what a notebook shows

    def plot(self, path: str | Path) -> None:
        """Save a picture: the error of steps over the layers, and the divergence over the text."""
        require_new([path], [self.a.name, self.b.name])
        require_picture(path)
        from .compare_report import plot

        plot(self, path)

    def html(self, path: str | Path) -> None:
        """Save a page that needs nothing but itself."""
        require_new([path], [self.a.name, self.b.name])
        from .compare_page import save

        save(self, path)


def compare(
    a,
    b,
    text: str | bytes | None = None,
    *,
    ctx_size: int | None = None,
    batch_size: int = 512,
    n_steps: int | None = None,
    limit: str | float | None = None,
    base: str | Path | None = None,
    progress: bool = True,
    partial: bool = False,
    text_name: str = "the text",
    **loading,
) -> Compared:
    """Compare a model with the one that it should be like.

    Args:
        a: what b is judged by: a `Llama`, what `load` takes, or a `kl_divergence.BaseFile` or its path, which
            has the text in it.
        b: a `Llama`, or what `load` takes.
        text: as of `perplexity`; its special tokens are plain text.
        ctx_size: tokens in a window; by default 512.
        batch_size: tokens that go through a model at once.
        n_steps: so many tokens of the first window are used to compare the values in the models; by default
            512; 0: compare predictions only.
        limit: what the error of a step may be: a number, or a name of `compare_steps.LIMITS`; by default what
            the types of the weights lead to.
        base: a file to write, with what a expects.
        progress: show bars.
        partial: when it is told to stop, return what was found until then, if there is a window.
        text_name: what messages call the text.
        loading: as of `load`.
    Raises:
        TinyllamaError: the models have different vocabularies, there isn't the memory for both, ...
    """
    how = {"batch_size": batch_size, "progress": progress, "partial": partial and not base}
    if isinstance(a, BaseFile) or _is_base_file(a):
        file = a if isinstance(a, BaseFile) else BaseFile(a)
        check_sizes(file.ctx_size, batch_size)
        asked = {"text": text, "ctx_size": ctx_size, "n_steps": n_steps, "limit": limit, "base": base}
        if ignored := ", ".join(name for name, value in asked.items() if value is not None):
            has = f"{file.path} has the windows of its text, and no steps"
            warnings.warn(f"{ignored}: ignored, since {has}", stacklevel=2)
        return _with_file(file, _opened(b, loading), **how)
    ctx_size, n_steps = 512 if ctx_size is None else ctx_size, 512 if n_steps is None else n_steps
    check_sizes(ctx_size, batch_size)
    is_whole = isinstance(n_steps, Integral) and (n_steps == 0 or n_steps >= SHORTEST)
    require(is_whole, f"n_steps must be 0 or at least {SHORTEST}, not {n_steps!r:.40}")
    named_limit(limit)
    require(text, "there is no text to compare models on")
    a, b = _opened(a, loading), _opened(b, loading)
    require_new([base], [a.checkpoint.path, b.checkpoint.path])
    _require_same_vocabulary(a, b)
    plain = plain_windows(a.tokenizer, text, ctx_size, name=text_name)
    windows = with_bos(plain, a.tokenizer)
    inside = Inside(a, b, windows[0, :n_steps], limit, progress)
    with kl_divergence.writing(base, plain, a.config.vocab_size) if base else nullcontext() as keep:
        scores = _scores(_expected(a, ctx_size, batch_size), b, windows, keep, **how)
    found, notes = {}, []
    if len(scores) < len(windows):
        notes = [f"stopped after {len(scores)} of {len(windows)} windows, before steps and weights"]
    elif n_steps:
        try:
            for more in inside.parts():
                found |= more
        except Cancelled:
            if not partial:
                raise
            notes = [inside.stopped(found)]
    found["notes"] = found.get("notes", []) + notes
    return _compared(side_of(a), b, windows, scores, **found)


def save_base(
    llama,
    text: str | bytes,
    path: str | Path,
    ctx_size: int = 512,
    batch_size: int = 512,
    progress=True,
    text_name: str = "the text",
) -> Perplexity:
    """Write what a model expects on a text to a file, which models can be compared with; score the text, too.

    Arguments as of `perplexity`; text_name: what messages call the text.
    """
    check_sizes(ctx_size, batch_size)
    require_new([path], [llama.checkpoint.path])
    windows = plain_windows(llama.tokenizer, text, ctx_size, name=text_name)
    with kl_divergence.writing(path, windows, llama.config.vocab_size) as keep:
        return perplexity(llama, text, ctx_size, batch_size, progress, keep=keep)


def finite(found):
    """Dicts and lists with None in the place of NaN and infinity, which JSON has no words for."""
    if isinstance(found, dict):
        return {name: finite(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _expected(a: Llama, ctx_size: int, batch_size: int) -> Callable:
    """What `_scores` takes of a base model that runs."""
    at_once = min(batch_size, ctx_size)
    cache = a.new_cache(ctx_size, at_once=at_once, n_logits=2 * at_once)
    return lambda _, window: (logits for logits, _ in predictions(a, window, batch_size, cache))


def _is_base_file(a) -> bool:
    if not isinstance(a, str | Path) or not Path(a).is_file():
        return False
    with naming(a), open(a, "rb") as file:
        return file.read(len(kl_divergence.MAGIC)) == kl_divergence.MAGIC


def side_of(llama: Llama) -> Side:
    """What a model is called, and how large it is."""
    tensors = llama.checkpoint.tensors.values()
    n_bytes, n_weights = (sum(map(of, tensors)) for of in (lambda t: t.nbytes, lambda t: math.prod(t.shape)))
    path = str(llama.checkpoint.path)
    return Side(path, type_of(llama.checkpoint), 8 * n_bytes / n_weights, n_bytes, llama.backend.name)


def _opened(model, loading: dict) -> Llama:
    return model if isinstance(model, Llama) else load(model, **loading)


def _require_same_vocabulary(a: Llama, b: Llama) -> None:
    both = f"{a.checkpoint.path} and {b.checkpoint.path} have different vocabularies"
    n, m = a.config.vocab_size, b.config.vocab_size
    require(n == m, f"{both}, of {n} and {m} tokens: what they expect can't be compared")
    pieces = zip(a.tokenizer.vocabulary.pieces, b.tokenizer.vocabulary.pieces, strict=True)
    token, ours, theirs = next(((i, x, y) for i, (x, y) in enumerate(pieces) if x != y), (-1, "", ""))
    require(token < 0, f"{both}: token {token} is {ours!r:.40} and {theirs!r:.40}")


def _with_file(file: BaseFile, b: Llama, **how) -> Compared:
    n, m = file.vocab_size, b.config.vocab_size
    different = f"{file.path} and {b.checkpoint.path} have different vocabularies, of {n} and {m} tokens"
    require(n == m, different)
    windows = with_bos(file.windows, b.tokenizer)
    scores = _scores(lambda i, _: file.predictions(i, how["batch_size"]), b, windows, None, **how)
    stopped = f"stopped after {len(scores)} of {len(windows)} windows"
    notes = [stopped] * (len(scores) < len(windows))
    return _compared(Side(str(file.path)), b, windows, scores, notes=notes)


def _scores(
    expected: Callable, b: Llama, windows: np.ndarray, keep: Callable | None, batch_size, progress, partial
) -> np.ndarray:
    """Score all windows, or until told to stop those that are done: [n_windows, n_scored] of SCORES.

    Args:
        expected: takes a window's number and its tokens; yields what the base expects, batch by batch.
        keep: is called with each such batch.
    """
    ctx_size, found = windows.shape[1], []
    at_once = min(batch_size, ctx_size)
    cache = b.new_cache(ctx_size, at_once=at_once, n_logits=4 * at_once)  # the other model has logits, too
    with tqdm(windows, "compare", unit=" windows", disable=not progress) as bar:
        for number, window in enumerate(bar):
            pieces, ours = [], predictions(b, window, batch_size, cache)
            try:
                for base, (logits, targets) in zip(expected(number, window), ours, strict=True):
                    pieces.append(score(base, logits, targets))
                    if keep:
                        keep(base)
            except Cancelled:
                if partial and found:
                    break
                raise
            found.append(np.concatenate(pieces))
            bar.set_postfix_str(f"KLD {np.mean([some['kld'] for some in found]):.4f}")
    return np.stack(found)


def _compared(a: Side, b: Llama, windows: np.ndarray, scores: np.ndarray, **inside) -> Compared:
    flat = scores.ravel()
    worst = np.argsort(-flat["kld"])[:WORST].tolist()
    return Compared(
        a=a,
        b=side_of(b),
        ctx_size=windows.shape[1],
        n_windows=len(scores),
        divergence=statistics(flat),
        windows=scores["kld"].mean(axis=1).tolist(),
        surprises=[_surprise(b.tokenizer, windows, scores, i) for i in worst],
        scores=scores,
        **inside,
    )


def _surprise(tokenizer, windows: np.ndarray, scores: np.ndarray, number: int) -> Surprise:
    """The token that was scored as number so many."""
    window, at = divmod(number, scores.shape[1])
    ctx_size, found = windows.shape[1], scores[window, at]
    at += ctx_size // 2 + 1
    before = tokenizer.decode(windows[window, max(0, at - BEFORE) : at].tolist(), strip_prefix=False)
    return Surprise(
        before,
        tokenizer.piece(int(found["token"])),
        float(found["kld"]),
        window * ctx_size + at,
        (tokenizer.piece(int(found["base_top"])), float(found["base_top_p"])),
        (tokenizer.piece(int(found["top"])), float(found["top_p"])),
    )
