"""How much a model's predictions differ from another one's, as llama.cpp's llama-perplexity measures it.

Both read the same windows of a text (texts/perplexity.py), and of each token that is scored this is kept:

    nll, nll_base   -log of the probability that the model, and the base model, gave the token that came
    kld             Kullback-Leibler divergence: what the base expects is p, what the model expects is q;
                    the sum of p (log p - log q) over the vocabulary, in nats
    top, base_top   the token that each thought likeliest, and with which probability

`--kl-divergence-base` files hold what the base model expects, so that many models can be compared with one
that is run once. Numbers are little-endian:

    "_logits_"  uint32 ctx_size  int32 vocab_size  int32 n_windows
    int32 tokens [n_windows, ctx_size], without bos in the first place
    of each window, of each token scored:
        float32 scale, float32 least, uint16 steps [vocab_size, one more if that is odd]

A token's log-probability is scale * step + least. What is less likely than e^-16 of the likeliest is stored
as that; and of what is less likely than e^-16, reading takes no account.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import naming, require
from ..machine.files import MappedFile, kind_of, reserve, written
from ..machine.limits import require_disk
from ..texts.perplexity import ROWS, SHORTEST, log_softmax

MAGIC = b"_logits_"
HEADER = np.dtype([("magic", "S8"), ("ctx_size", "<u4"), ("vocab_size", "<i4"), ("n_windows", "<i4")])
FLOOR = 16  # nats: what is so much less likely isn't told apart
STEPS = 65535  # the largest step
STEP = FLOOR / STEPS  # nats, the largest
HEAD = 4  # uint16 that scale and least take

#: Of each token scored.
SCORES = np.dtype(
    [
        ("token", "i4"),  # that came
        ("nll", "f8"),
        ("nll_base", "f8"),
        ("kld", "f8"),
        ("top", "i4"),
        ("top_p", "f4"),
        ("base_top", "i4"),
        ("base_top_p", "f4"),
    ]
)
#: The quantiles that llama-perplexity prints, by its names.
KLD_QUANTILES = {"Maximum": 1.0, "99.9%": 0.999, "99.0%": 0.99, "95.0%": 0.95, "90.0%": 0.9, "Median": 0.5}
KLD_QUANTILES |= {"10.0%": 0.1, "5.0%": 0.05, "1.0%": 0.01, "0.1%": 0.001, "Minimum": 0.0}
P_QUANTILES = {"Maximum": 1.0, "99.9%": 0.999, "99.0%": 0.99, "95.0%": 0.95, "90.0%": 0.9, "75.0%": 0.75}
P_QUANTILES |= {"Median": 0.5, "25.0%": 0.25, "10.0%": 0.1, "5.0%": 0.05, "1.0%": 0.01, "0.1%": 0.001}
P_QUANTILES |= {"Minimum": 0.0}


# --- scores ---------------------------------------------------------------------------------------


def score(base, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compare what is expected after each token.

    Args:
        base: logits of the base model, [n_tokens, vocab_size] float32, or rows of a file as uint16.
        logits: of the model, [n_tokens, vocab_size].
        targets: the tokens that came, [n_tokens].
    Returns:
        [n_tokens] of SCORES.
    """
    scores = np.empty(len(targets), SCORES)
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        some, each = scores[rows], np.arange(len(targets[rows]))
        ours = log_softmax(logits[rows])
        if base.dtype == np.uint16:
            theirs = unpacked(base[rows], logits.shape[-1])
            counted = theirs > -FLOOR
        else:
            theirs, counted = log_softmax(base[rows]), True
        some["token"] = targets[rows]
        some["nll"], some["nll_base"] = (-x[each, targets[rows]] for x in (ours, theirs))
        some["kld"] = np.sum(np.exp(theirs) * (theirs - ours), axis=-1, where=counted)
        for x, top in ((ours, "top"), (theirs, "base_top")):
            some[top] = x.argmax(axis=-1)
            some[f"{top}_p"] = np.exp(x[each, some[top]])
    return scores


@dataclass(frozen=True)
class Divergence:
    """llama-perplexity's statistics; a pair is a value and its standard error, Q the model that is judged."""

    n_scored: int  # tokens
    ppl: tuple[float, float]  # perplexity of Q
    ppl_base: tuple[float, float]
    correlation: float  # of ln(PPL(Q)) and ln(PPL(base))
    ln_ratio: tuple[float, float]  # ln(PPL(Q) / PPL(base))
    ratio: tuple[float, float]  # PPL(Q) / PPL(base)
    difference: tuple[float, float]  # PPL(Q) - PPL(base)
    kld: tuple[float, float]  # mean
    kld_quantiles: dict[str, float]
    dp: tuple[float, float]  # Δp, Q's probability of the token that came less the base's: mean
    dp_quantiles: dict[str, float]
    dp_rms: tuple[float, float]
    same_top: tuple[float, float]  # how often both think the same token likeliest


def statistics(scores: np.ndarray) -> Divergence:
    """Sum up the scores of a text, [n_scored] of SCORES."""
    n, nll, nll_base = len(scores), scores["nll"], scores["nll_base"]
    dp = np.exp(-nll) - np.exp(-nll_base)
    (ln_ppl, ln_error), (ln_base, base_error) = _mean(nll), _mean(nll_base)
    covariance = float(np.mean(nll * nll_base) - ln_ppl * ln_base) / (n - 1) if n >= 10 else 0.0
    ppl, base, ratio = (float(np.exp(x)) for x in (ln_ppl, ln_base, ln_ppl - ln_base))
    ratio_error = _root(ln_error**2 + base_error**2 - 2 * covariance)
    errors = ppl * ln_error, base * base_error
    mean_square, square_error = _mean(dp**2)
    rms = _root(mean_square)
    same = float(np.mean(scores["top"] == scores["base_top"]))
    return Divergence(
        n_scored=n,
        ppl=(ppl, errors[0]),
        ppl_base=(base, errors[1]),
        correlation=covariance / (ln_error * base_error) if ln_error * base_error else 0.0,
        ln_ratio=(ln_ppl - ln_base, ratio_error),
        ratio=(ratio, ratio * ratio_error),
        difference=(ppl - base, _root(errors[0] ** 2 + errors[1] ** 2 - 2 * ppl * base * covariance)),
        kld=_mean(scores["kld"]),
        kld_quantiles={name: float(np.quantile(scores["kld"], q)) for name, q in KLD_QUANTILES.items()},
        dp=_mean(dp),
        dp_quantiles={name: float(np.quantile(dp, q)) for name, q in P_QUANTILES.items()},
        dp_rms=(rms, square_error / (2 * rms) if rms else 0.0),
        same_top=(same, _root(same * (1 - same) / (n - 1)) if n > 1 else 0.0),
    )


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error, which llama-perplexity takes from more than ten values."""
    mean = float(np.mean(values))
    variance = float(np.mean(values**2)) - mean**2
    return mean, _root(variance / (len(values) - 1)) if len(values) > 10 else 0.0


def _root(square: float) -> float:
    """Rounding may make a square that is near zero negative."""
    return max(square, 0.0) ** 0.5


# --- files ----------------------------------------------------------------------------------------


def packed(logits: np.ndarray) -> np.ndarray:
    """Logits [n_tokens, vocab_size] -> rows of a file, [n_tokens, HEAD + vocab_size] uint16 (even)."""
    logits = np.asarray(logits, np.float32)
    n_tokens, vocab_size = logits.shape
    most = logits.max(axis=-1, keepdims=True)
    least = np.maximum(logits.min(axis=-1, keepdims=True), most - np.float32(FLOOR))
    total = np.exp(logits - most).sum(axis=-1, keepdims=True, dtype=np.float64)
    scale = (most - least) / np.float32(STEPS)
    rows = np.zeros((n_tokens, row_size(vocab_size)), "<u2")
    rows[:, :HEAD].view("<f4")[:] = np.hstack([scale, least - most - np.log(total).astype(np.float32)])
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    rows[:, HEAD : HEAD + vocab_size] = np.rint(inverse * np.maximum(logits - least, 0))
    return rows


def unpacked(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Rows of a file -> log-probabilities, [n_tokens, vocab_size] in float64."""
    scale, least = rows[:, :HEAD].copy().view("<f4").astype(np.float64).T[..., None]
    return scale * rows[:, HEAD : HEAD + vocab_size] + least


def check_rows(rows: np.ndarray, vocab_size: int) -> None:
    """Raise TinyllamaError unless rows of a file are probabilities that add up to 1."""
    rounding = STEP / 2 + vocab_size * math.exp(-FLOOR)  # what is less likely than FLOOR is stored as that
    for start in range(0, len(rows), ROWS):
        with np.errstate(all="ignore"):
            total = np.exp(unpacked(rows[start : start + ROWS], vocab_size)).sum(axis=-1)
        right = np.abs(total - 1) <= rounding + 1e-3
        require(right.all(), "is damaged: it holds probabilities that don't add up to 1; write it again")


def row_size(vocab_size: int) -> int:
    """The uint16 of a row."""
    return HEAD + vocab_size + vocab_size % 2


def n_scored(ctx_size: int) -> int:
    """The tokens of a window that are scored."""
    return ctx_size - 1 - ctx_size // 2


@contextmanager
def writing(path: str | Path, windows: np.ndarray, vocab_size: int) -> Iterator:
    """A file of what a base model expects, which appears when it is whole.

    Yields a function that takes logits [n_tokens, vocab_size], as they come, window after window.

    Args:
        windows: of a text, [n_windows, ctx_size], without bos.
    Raises TinyllamaError where there isn't the room on the disk.
    """
    n_windows, ctx_size = windows.shape
    size = file_size(ctx_size, vocab_size, n_windows)
    require_disk(size, Path(path).resolve().parent, str(path))
    with written(path) as (unfinished,), unfinished.open("r+b") as file:
        reserve(file, size)
        file.write(np.array((MAGIC, ctx_size, vocab_size, n_windows), HEADER).tobytes())
        file.write(windows.astype("<i4").tobytes())

        def add(logits: np.ndarray) -> None:
            for start in range(0, len(logits), ROWS):
                file.write(packed(logits[start : start + ROWS]).data)

        yield add


def file_size(ctx_size: int, vocab_size: int, n_windows: int) -> int:
    """Bytes of such a file."""
    rows = 2 * n_scored(ctx_size) * row_size(vocab_size)
    return HEADER.itemsize + n_windows * (4 * ctx_size + rows)


class BaseFile:
    """What a base model expects, read from a file.

    Attributes:
        path, ctx_size, vocab_size: of it.
        windows: [n_windows, ctx_size], without bos.
    """

    def __init__(self, path: str | Path):
        """Raises TinyllamaError where the file isn't one, or isn't whole."""
        self.path, what = Path(path), "a file of log-probabilities (llama-perplexity --kl-divergence-base)"
        with naming(path):
            self._file = MappedFile(path)
            is_one = self._file[: len(MAGIC)] == MAGIC
            require(is_one, f"no {what.removeprefix('a ')} but {kind_of(self._file)}")
            require(len(self._file) >= HEADER.itemsize, "was cut short")
            _, ctx_size, vocab_size, n_windows = np.frombuffer(self._file, HEADER, 1)[0].tolist()
            self.ctx_size, self.vocab_size = ctx_size, vocab_size
            sizes = f"{n_windows} windows of {ctx_size} tokens, {vocab_size} in the vocabulary"
            require(ctx_size >= SHORTEST and vocab_size > 0 and n_windows > 0, f"is damaged: {sizes}")
            size = file_size(ctx_size, vocab_size, n_windows)
            short = f"has {len(self._file):,} bytes, and {sizes} take {size:,}: it was cut short"
            require(len(self._file) >= size, short)
            more = f"is damaged: {len(self._file) - size:,} bytes follow its last row"
            require(len(self._file) == size, more)
            tokens = np.frombuffer(self._file, "<i4", n_windows * ctx_size, HEADER.itemsize)
            known = tokens.min() >= 0 and tokens.max() < vocab_size
            require(known, "is damaged: it has tokens that aren't in the vocabulary")
        self.windows = tokens.reshape(n_windows, ctx_size)
        shape, begin = (n_windows, n_scored(ctx_size), row_size(vocab_size)), HEADER.itemsize + tokens.nbytes
        self._rows = np.frombuffer(self._file, "<u2", math.prod(shape), begin).reshape(shape)

    def predictions(self, window: int, batch_size: int) -> Iterator[np.ndarray]:
        """The rows of a window, batch by batch, as `texts.perplexity.predictions` gives logits."""
        for start in range(0, n_scored(self.ctx_size), batch_size):
            self._file.check()
            rows = self._rows[window, start : start + batch_size]
            with naming(self.path):
                check_rows(rows, self.vocab_size)
            yield rows
