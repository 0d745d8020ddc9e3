"""Two models on the same text: how much what they expect differs, where it begins, and which tensors make it.

Most often the second is a quantized form of the first. Four questions, and for each a module:

    kl_divergence     how much do the predictions differ?       all windows of the text
    compare_steps     in which layer does it begin?             tokens of the first window
    compare_tensors   how far are the weights from each other?  all of them
    compare_shares    which of them make the difference?        tokens of the first window

Windows go through both models one after the other, and only sums and a few numbers of each token are kept.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..backends.numpy import one_blas_thread
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
from .compare_shares import Share, mixtures, shares
from .compare_steps import LIMITS, Step, batches, is_comparable, run_steps
from .compare_tensors import TensorError, inputs_of, pairs, tensor_error
from .inspect import type_of
from .kl_divergence import BaseFile, Divergence, score, statistics
from .tables import by_layer

WORST = 10  # tokens that are shown, those with the largest divergence
BEFORE = 12  # tokens that are shown before each
MOST = 1.3  # parts of one whole, together
TOO_MUCH = "the parts add up to {:.0%}: arithmetic in 8 bits rounds otherwise whatever changes (not on numpy)"


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
        """All of it but `scores`, in plain dicts, lists, strings and numbers."""
        found = asdict(replace(self, scores=None))
        del found["scores"]
        return found

    def table(self) -> str:
        """All of it for a terminal."""
        from .compare_report import table

        return table(self)

    __repr__ = table  # what a notebook shows

    def plot(self, path: str | Path) -> None:
        """Save a picture: the error of steps over the layers, and the divergence over the text."""
        from .compare_report import plot

        plot(self, path)

    def html(self, path: str | Path) -> None:
        """Save a page that needs nothing but itself."""
        from .compare_page import save

        save(self, path)


def compare(
    a,
    b,
    text: str | bytes | None = None,
    *,
    ctx_size: int = 512,
    batch_size: int = 512,
    n_steps: int = 512,
    limit: str | float | None = None,
    base: str | Path | None = None,
    progress: bool = True,
    partial: bool = False,
    **loading,
) -> Compared:
    """Compare a model with the one that it should be like.

    Args:
        a: what b is judged by: a `Llama`, what `load` takes, or a `kl_divergence.BaseFile` or its path, which
            has the text in it.
        b: a `Llama`, or what `load` takes.
        text: as of `perplexity`; its special tokens are plain text.
        ctx_size: tokens in a window.
        batch_size: tokens that go through a model at once.
        n_steps: so many tokens of the first window are used to compare the values in the models; 0: compare
            predictions only.
        limit: what the error of a step may be: a number, or a name of `compare_steps.LIMITS`; by default what
            the types of the weights lead to.
        base: a file to write, with what a expects.
        progress: show bars.
        partial: when it is told to stop, return what the windows until then gave, if there are any.
        loading: as of `load`.
    Raises:
        TinyllamaError: the models have different vocabularies, there isn't the memory for both, ...
    """
    check_steps(n_steps, limit)
    how = {"batch_size": batch_size, "progress": progress, "partial": partial and not base}
    if isinstance(a, BaseFile) or _is_base_file(a):
        file = a if isinstance(a, BaseFile) else BaseFile(a)
        return _with_file(file, _opened(b, loading), **how)
    check_sizes(ctx_size, batch_size)
    a, b = _opened(a, loading), _opened(b, loading)
    require(text, "there is no text to compare models on")
    _require_same_vocabulary(a, b)
    plain = plain_windows(a.tokenizer, text, ctx_size)
    windows, at_once = with_bos(plain, a.tokenizer), min(batch_size, ctx_size)
    with kl_divergence.writing(base, plain, a.config.vocab_size) if base else nullcontext() as keep:
        inside = _inside(a, b, windows[0, :n_steps], limit, progress) if n_steps else {}
        cache = a.new_cache(ctx_size, at_once=at_once, n_logits=2 * at_once)

        def expected(_, window: np.ndarray) -> Iterator[np.ndarray]:
            return (logits for logits, _ in predictions(a, window, batch_size, cache))

        scores = _scores(expected, b, windows, keep, **how)
    return _compared(side_of(a), b, windows, scores, **inside)


def save_base(
    llama, text: str | bytes, path: str | Path, ctx_size: int = 512, batch_size: int = 512, progress=True
) -> Perplexity:
    """Write what a model expects on a text to a file, which models can be compared with; score the text, too.

    Arguments as of `perplexity`.
    """
    check_sizes(ctx_size, batch_size)
    windows = plain_windows(llama.tokenizer, text, ctx_size)
    with kl_divergence.writing(path, windows, llama.config.vocab_size) as keep:
        return perplexity(llama, text, ctx_size, batch_size, progress, keep=keep)


def check_steps(n_steps: int, limit: str | float | None) -> None:
    """Raise TinyllamaError where what `compare` is told of steps makes no sense."""
    require(n_steps == 0 or n_steps >= SHORTEST, f"n_steps must be 0 or at least {SHORTEST}, not {n_steps}")
    named_limit(limit)


def _is_base_file(a) -> bool:
    if not isinstance(a, str | Path) or not Path(a).is_file():
        return False
    with naming(a), open(a, "rb") as file:
        return file.read(len(kl_divergence.MAGIC)) == kl_divergence.MAGIC


def named_limit(limit: str | float | None, bits: float = 16) -> tuple[str, float]:
    """A limit of `compare_steps.LIMITS`, or a number, with its name; None: that of so many bits a weight."""
    if limit is None:
        limit = "rounding" if bits >= 16 else "8-bit" if bits >= 8 else "4-bit"
    if limit in LIMITS:
        return limit, LIMITS[limit][0]
    try:
        number = float(limit)
    except ValueError:
        number = -1.0
    require(number >= 0, f"limit must be a number or one of {', '.join(LIMITS)}, not {limit!r:.40}")
    return "", number


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


def _inside(a: Llama, b: Llama, tokens: np.ndarray, limit, progress: bool) -> dict:
    """Compare steps and tensors; what `Compared` says of them."""
    if not is_comparable(a.config, b.config):
        sizes = [f"{side.config.n_layers} layers of {side.config.dim}" for side in (a, b)]
        return {"notes": [f"steps and tensors can't be compared: one has {sizes[0]}, the other {sizes[1]}"]}
    bar = partial(tqdm, disable=not progress, leave=False)
    steps, inputs = run_steps(a, b, tokens, bar(batches(len(tokens)), "steps", unit=" batches"))
    both = pairs(a.checkpoint, b.checkpoint)
    names, tensors = inputs_of(both), []
    with one_blas_thread():  # products are small, and threads take longer to meet than to multiply
        for name in bar(both, "tensors"):
            tensors.append(tensor_error(name, *both[name], inputs.get(names.get(name))))
    bits = min(side.pieces[0].kind.bits_per_weight for pair in both.values() for side in pair)
    limit, found, notes = named_limit(limit, bits), [], []
    if (a.backend.name, a.backend.options) != (b.backend.name, b.backend.options):
        notes = ["on two backends no weights are exchanged, which would tell which of them count most"]
    else:
        kinds = [kind for kind, _ in by_layer(tensor.name for tensor in tensors if tensor.error)]
        mixed = [*mixtures(a.model(), b.model(), kinds)]
        found = shares(a, b, tokens, bar(mixed, "mixtures"))
        whole = sum(share.part for share in found[: len(kinds)])
        notes = [TOO_MUCH.format(whole)] * (whole > MOST)
    return {
        "shares": found,
        "notes": notes,
        "n_step_tokens": len(tokens),
        "steps": steps,
        "limit": limit,
        "first_over": next((step.name for step in steps if step.error > limit[1]), None),
        "tensors": sorted(tensors, key=lambda tensor: -tensor.worst),
    }


def _with_file(file: BaseFile, b: Llama, **how) -> Compared:
    n, m = file.vocab_size, b.config.vocab_size
    different = f"{file.path} and {b.checkpoint.path} have different vocabularies, of {n} and {m} tokens"
    require(n == m, different)
    windows = with_bos(file.windows, b.tokenizer)
    with naming(file.path):
        scores = _scores(lambda i, _: file.predictions(i, how["batch_size"]), b, windows, None, **how)
    return _compared(Side(str(file.path)), b, windows, scores)


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
