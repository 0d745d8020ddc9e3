"""How well a model predicts a text, by llama.cpp's conventions.

The text's tokens (bos first, if the model wants one) are cut into windows of `ctx_size`,
without overlap; what is left over at the end isn't used. In every window bos takes the place of the first
token, the first half is only read, and each token of the second half but the last predicts the one after it:

    nll = -log p(token | the tokens before it in its window)
    perplexity = e^(mean nll)
    bits per byte = sum of nll / ln 2 / bytes that these tokens stand for

Perplexities compare between models that share a vocabulary, bits per byte between any two.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from ..errors import Cancelled, require
from ..ops import KVCache

SHORTEST = 8  # tokens of a window; its second half has to hold a few that can be scored
ROWS = 16  # predictions that are float64 at one time: 6 MB with 49,152 tokens to choose from


@dataclass(frozen=True)
class Perplexity:
    """What scoring a text gave."""

    perplexity: float  # e^nll
    standard_error: float  # of the perplexity, as llama.cpp prints it behind "+/-"
    bits_per_byte: float  # what an arithmetic coder that asks this model would need for a byte of the text
    nll: float  # mean of all tokens that were predicted, in nats
    n_scored: int  # how many they are
    n_bytes: int  # and the bytes they stand for
    n_windows: int
    ctx_size: int  # tokens in each window
    running: tuple[float, ...]  # the perplexity of all windows up to each

    def __str__(self) -> str:
        found = f"perplexity {self.perplexity:.4f} +/- {self.standard_error:.4f}"
        how = f"({self.n_windows} windows of {self.ctx_size} tokens, {self.n_scored} scored)"
        return f"{found}, {self.bits_per_byte:.4f} bits per byte {how}"


def perplexity(
    llama, text: str | bytes, ctx_size=512, batch_size=512, progress=True, partial=False, keep=None
) -> Perplexity:
    """Score a text with a loaded model.

    Args:
        llama: a `Llama`.
        text: its special tokens, if it writes any out, are plain text here.
        ctx_size: tokens in a window. Longer ones give lower perplexities: compare equal ones.
        batch_size: tokens that go through the model at once; more are faster and take more memory.
        progress: show a bar with the running value.
        partial: when it is told to stop, return what the windows until then gave, if there are any.
        keep: is called with all logits that are scored, batch by batch, [n_tokens, vocab_size].
    Raises:
        TinyllamaError: the text doesn't fill a window, or a size makes no sense.
    """
    from tqdm.auto import tqdm  # here, since whoever writes a text needs none

    check_sizes(ctx_size, batch_size)
    at_once = min(batch_size, ctx_size)
    cache = llama.new_cache(ctx_size, at_once=at_once, n_logits=2 * at_once)  # of this batch and the last
    windows, nlls, running = windows_of(llama.tokenizer, text, ctx_size), [], []
    with tqdm(windows, "perplexity", unit=" windows", disable=not progress) as bar:
        for window in bar:
            try:
                nlls.append(np.concatenate([*_nlls(predictions(llama, window, batch_size, cache), keep)]))
            except Cancelled:
                if partial and nlls:
                    break
                raise
            mean = np.mean(nlls)
            running.append(math.exp(mean) if mean < 709 else math.inf)  # as of a model made of noise
            bar.set_postfix_str(f"{running[-1]:.4f}")
    nll, windows = np.concatenate(nlls), windows[: len(nlls)]
    scored = windows[:, -len(nlls[0]) :].ravel().tolist()
    n_bytes = sum(len(llama.tokenizer.token_bytes(token)) for token in scored)
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
    """Raise TinyllamaError where they leave nothing to compute."""
    for name, size, least in (("ctx_size", ctx_size, SHORTEST), ("batch_size", batch_size, 1)):
        is_whole = isinstance(size, Integral) and size >= least
        require(is_whole, f"{name} must be at least {least}, not {size!r:.40}")


def windows_of(tokenizer, text: str | bytes, ctx_size: int, special: bool = False) -> np.ndarray:
    """A text's windows as a model reads them, [n_windows, ctx_size]; special: as of `Tokenizer.encode`."""
    return with_bos(plain_windows(tokenizer, text, ctx_size, special), tokenizer)


def plain_windows(
    tokenizer, text: str | bytes, ctx_size: int, special: bool = False, name: str = "the text"
) -> np.ndarray:
    """A text's tokens, cut into windows: [n_windows, ctx_size]; messages call it by its name."""
    require(isinstance(text, str | bytes), f"{name} must be str or bytes, not {type(text).__name__}")
    tokens = np.asarray(tokenizer.encode(text, special=special))
    n_windows, has = len(tokens) // ctx_size, f"{name} has {len(tokens)} tokens"
    require(len(tokens) >= SHORTEST, f"{has}: too few, a window takes at least {SHORTEST}")
    require(n_windows, f"{has}, and a window takes {ctx_size}: lower ctx_size (-c)")
    return tokens[: n_windows * ctx_size].reshape(n_windows, ctx_size)


def with_bos(windows: np.ndarray, tokenizer) -> np.ndarray:
    """Windows with bos in the place of each one's first token, if the model wants one."""
    windows = windows.copy()
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        windows[:, 0] = tokenizer.bos_id
    return windows


def predictions(
    llama, window: np.ndarray, batch_size: int, cache: KVCache
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run a window; of its second half, batch by batch: logits [n_tokens, vocab_size], the next tokens."""
    cache.trim(0)
    first, last = len(window) // 2, len(window) - 1
    for start in range(0, first, batch_size):
        llama.forward(window[start : min(start + batch_size, first)], cache, last=True)
    for start in range(first, last, batch_size):
        stop = min(start + batch_size, last)
        yield llama.forward(window[start:stop], cache), window[start + 1 : stop + 1]


def _nlls(predictions: Iterator, keep) -> Iterator[np.ndarray]:
    for logits, targets in predictions:
        if keep:
            keep(logits)
        yield nll_of(logits, targets)


def nll_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in float64: [n_tokens, vocab_size], [n_tokens] -> [n_tokens]."""
    nll = np.empty(len(targets))
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        log_probs = log_softmax(logits[rows])
        nll[rows] = -log_probs[np.arange(len(log_probs)), targets[rows]]
    return nll


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities in float64, since they are differences of nearly equal numbers."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
