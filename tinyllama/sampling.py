"""From logits to the next token: the stages of llama.cpp in March 2023, in its order.

    logits -> repetition penalty -> temperature -> top-k -> softmax -> top-p -> draw

Each stage but `draw` is a pure function. `sample` chains them and, on request, says what each kept and
removed.
"""

from dataclasses import dataclass

import numpy as np

from .ops import softmax
from .settings import Settings

GREEDY_BELOW = 1e-6  # a temperature at which only the likeliest token would ever be drawn
LISTED = 50  # candidates that a Stage lists, so that a long run's record stays small


@dataclass(frozen=True)
class Stage:
    """What a stage of sampling made of the distribution."""

    name: str  # "logits", "repeat_penalty", "temp", "top_k" or "top_p"
    n_kept: int  # tokens that are still possible
    n_removed: int  # and those that this stage ruled out
    kept: np.ndarray  # ids of the likeliest that are still possible, [at most LISTED]
    probs: np.ndarray  # their probabilities after this stage, likewise
    removed: np.ndarray  # ids of the likeliest that it ruled out


def repetition_penalty(logits: np.ndarray, recent: list[int], penalty: float) -> np.ndarray:
    """Push recent tokens down: divide positive logits, multiply negative ones (after arXiv:1909.05858)."""
    ids = np.unique(np.asarray(recent, dtype=np.int64))
    logits = logits.copy()
    logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return logits


def temperature(logits: np.ndarray, temp: float) -> np.ndarray:
    """logits / temp."""
    return logits / np.float32(temp)


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest logits, the largest first; of equals the smaller id. 0 gives all."""
    k = min(k or len(logits), len(logits))
    ids = np.nonzero(logits >= _reached_by(logits, k))[0]
    return ids[_falling(logits[ids])][:k]


def _reached_by(logits: np.ndarray, k: int) -> np.float32:
    """A number that at least k of the logits reach, and few others: of 16 k groups the k-th largest maximum.

    Sorting is what is slow on a large vocabulary; this looks once at each logit.
    """
    n_groups = min(16 * k, len(logits))
    grouped = logits[: len(logits) // n_groups * n_groups].reshape(-1, n_groups)
    return np.partition(grouped.max(axis=0), -k)[-k]


def _falling(logits: np.ndarray) -> np.ndarray:
    """The order of falling logits, of equals the first: a stable argsort in a tenth of its time.

    A float's bits, taken as an integer, are in the order of the floats (those of negative ones once all but
    the sign are turned round). Behind them go the indices, so that no two are equal and any sort will do.
    """
    bits = (0 - np.asarray(logits, np.float32)).view(np.int32)  # 0 - x, where -x would make a -0 of 0
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)
    keys = ordered.astype(np.int64) << 32 | np.arange(len(logits))
    keys.sort()
    return keys & 0xFFFFFFFF


def top_p(probs: np.ndarray, p: float) -> int:
    """Of probabilities in falling order, how many make up at least p; one at least."""
    reached = np.searchsorted(np.cumsum(probs, dtype=np.float64), p) + 1 if p < 1 else len(probs)
    return min(int(reached), len(probs))


def draw(probs: np.ndarray, rng: np.random.Generator) -> int:
    """Index of one of the probabilities, drawn by them."""
    reached = np.cumsum(probs, dtype=np.float64)
    return min(int(np.searchsorted(reached, rng.random() * reached[-1], side="right")), len(probs) - 1)


def sample(
    logits: np.ndarray, settings: Settings, recent: list[int], rng: np.random.Generator, stages=None, never=()
) -> int:
    """Choose the next token's id.

    Args:
        logits: [vocab_size]
        recent: ids so far; the last `repeat_last_n` of them are penalized.
        rng: one number is drawn from it, none if greedy (a temp below GREEDY_BELOW).
        stages: a list to which every stage appends what it did.
        never: ids that can't be chosen.
    """
    if len(never):
        logits = logits.copy()
        logits[never] = -np.inf
    _note(stages, "logits", logits)
    if settings.repeat_penalty != 1 and settings.repeat_last_n:
        logits = repetition_penalty(logits, recent[-settings.repeat_last_n :], settings.repeat_penalty)
        _note(stages, "repeat_penalty", logits)
    if settings.temp < GREEDY_BELOW:
        return int(np.argmax(logits))
    logits = temperature(logits, settings.temp)
    _note(stages, "temp", logits)
    ids = top_k(logits, settings.top_k)
    _note(stages, "top_k", logits, len(ids))
    probs = softmax(logits[ids])
    n_kept = top_p(probs, settings.top_p)
    _note(stages, "top_p", logits, n_kept, len(ids))
    return int(ids[draw(probs[:n_kept], rng)])


def _note(stages, *what) -> None:
    if stages is not None:
        stages.append(stage(*what))


def stage(name: str, logits: np.ndarray, n_kept: int | None = None, n_before: int | None = None) -> Stage:
    """The Stage that keeps the first `n_kept` of the likeliest `n_before` tokens (None: all)."""
    n_before = n_before or len(logits)
    n_kept = n_kept or n_before
    all_kept = n_kept == len(logits)
    ranked = top_k(logits, LISTED if all_kept else n_kept + LISTED)  # sorting 49,152 would take 3 ms
    weights = np.exp((logits if all_kept else logits[ranked[:n_kept]]) - logits[ranked[0]])
    kept, removed = ranked[:n_kept][:LISTED], ranked[n_kept:n_before]
    probs = np.exp(logits[kept] - logits[ranked[0]]) / weights.sum()
    return Stage(name, n_kept, n_before - n_kept, kept, probs, removed)
