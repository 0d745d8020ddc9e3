"""How well a model predicts a text, by llama.cpp's conventions, so that figures compare.

The text's tokens (bos first, if the model wants one) are cut into windows of `ctx_size`, without overlap;
what is left over at the end isn't used. In every window bos takes the place of the first token, the first
half is only read, and each token of the second half but the last predicts the one after it:

    nll = -log p(token | the tokens before it in its window)
    perplexity = e^(mean nll)
    bits per byte = sum of nll / ln 2 / bytes that these tokens stand for

Perplexities compare between models that share a vocabulary, bits per byte between any two.
"""

import math
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from .errors import TinyllamaError

SHORTEST = 8  # tokens of a window; its second half has to hold a few that can be scored
ROWS = 16  # predictions that are float64 at one time: 6 MB with 49,152 tokens to choose from


@dataclass(frozen=True)
class Perplexity:
    """What scoring a text gave.

    Attributes:
        perplexity: e^(mean nll).
        standard_error: of the perplexity, as llama.cpp prints it behind "+/-".
        bits_per_byte: what an arithmetic coder that asks this model would need for a byte of the text.
        nll: mean negative log-likelihood of a token, in nats.
        n_scored, n_bytes: tokens that were predicted, and the bytes they stand for.
        n_windows, ctx_size: windows, and the tokens in each.
        running: the perplexity of all windows up to each.
    """

    perplexity: float
    standard_error: float
    bits_per_byte: float
    nll: float
    n_scored: int
    n_bytes: int
    n_windows: int
    ctx_size: int
    running: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} +/- {self.standard_error:.4f}, "
            f"{self.bits_per_byte:.4f} bits per byte "
            f"({self.n_windows} windows of {self.ctx_size} tokens, {self.n_scored} scored)"
        )


def perplexity(
    llama, text: str | bytes, ctx_size: int = 512, batch_size: int = 512, progress: bool = True
) -> Perplexity:
    """Score a text with a loaded model.

    Args:
        llama: a `Llama`.
        text: its special tokens, if it writes any out, are plain text here.
        ctx_size: tokens in a window. Longer ones give lower perplexities: compare equal ones.
        batch_size: tokens that go through the model at once; more are faster and take more memory.
        progress: show a bar with the running value.
    Raises:
        TinyllamaError: the text doesn't fill a window, or a size makes no sense.
    """
    check_sizes(ctx_size, batch_size)
    windows = _windows(llama.tokenizer, text, ctx_size)
    at_once = min(batch_size, ctx_size)
    llama.check_memory(ctx_size, at_once, n_logits=2 * at_once)  # the next batch begins beside the last
    cache, first = llama.new_cache(ctx_size), ctx_size // 2
    nll, running = np.empty((len(windows), ctx_size - first - 1)), []
    with tqdm(windows, "perplexity", unit=" windows", disable=not progress) as bar:
        for i, window in enumerate(bar):
            nll[i] = _window_nll(llama, window, first, batch_size, cache)
            running.append(_exp(nll[: i + 1].mean()))
            bar.set_postfix_str(f"{running[-1]:.4f}")
    scored = windows[:, first + 1 :].ravel()
    n_bytes = sum(len(llama.tokenizer.token_bytes(token)) for token in scored.tolist())
    return Perplexity(
        perplexity=running[-1],
        standard_error=running[-1] * nll.std(ddof=1).item() / math.sqrt(nll.size),
        bits_per_byte=nll.sum().item() / math.log(2) / n_bytes,
        nll=nll.mean().item(),
        n_scored=nll.size,
        n_bytes=n_bytes,
        n_windows=len(windows),
        ctx_size=ctx_size,
        running=tuple(running),
    )


def check_sizes(ctx_size: int, batch_size: int) -> None:
    """Raises TinyllamaError where a size makes no sense."""
    for name, size, least in (("ctx_size", ctx_size, SHORTEST), ("batch_size", batch_size, 1)):
        if size < least:
            raise TinyllamaError(f"{name} must be at least {least}, not {size}")


def _windows(tokenizer, text: str | bytes, ctx_size: int) -> np.ndarray:
    """Cut a text's tokens into windows, [n_windows, ctx_size]."""
    tokens = np.asarray(tokenizer.encode(text))
    n_windows = len(tokens) // ctx_size
    if not n_windows:
        raise TinyllamaError(
            f"the text has {len(tokens)} tokens, and a window takes {ctx_size}: lower ctx_size"
        )
    windows = tokens[: n_windows * ctx_size].reshape(n_windows, ctx_size)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        windows[:, 0] = tokenizer.bos_id
    return windows


def _window_nll(llama, window: np.ndarray, first: int, batch_size: int, cache) -> np.ndarray:
    """The nll of each token behind position `first`, float64 [ctx_size - first - 1]."""
    for start in range(0, first, batch_size):
        llama.forward(window[start : min(start + batch_size, first)], start, cache, last=True)
    scores, last = [], len(window) - 1
    for start in range(first, last, batch_size):
        stop = min(start + batch_size, last)
        logits = llama.forward(window[start:stop], start, cache)
        scores.append(nll_of(logits, window[start + 1 : stop + 1]))
    return np.concatenate(scores)


def nll_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in float64: [n_tokens, vocab_size], [n_tokens] -> [n_tokens].

    Raises TinyllamaError where the logits are not numbers.
    """
    nll = np.empty(len(targets))
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        x = logits[rows].astype(np.float64)
        with np.errstate(invalid="ignore"):  # inf - inf, which is refused below
            x -= x.max(axis=-1, keepdims=True)
        nll[rows] = np.log(np.exp(x).sum(axis=-1)) - x[np.arange(len(x)), targets[rows]]
    if not np.isfinite(nll).all():
        raise TinyllamaError("the model computed logits that are not numbers: is its file damaged?")
    return nll


def _exp(nll: float) -> float:
    """e^nll, infinite where a float can't hold it, as of a model made of noise."""
    return math.exp(nll) if nll < 709 else math.inf
