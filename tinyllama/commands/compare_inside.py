"""What differs inside two models: steps, then tensors, then what each of these does to the predictions."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
from tqdm.auto import tqdm

from ..backends.numpy import one_blas_thread
from ..errors import require
from ..llama import Llama
from .compare_shares import mixtures, share_cache, shares
from .compare_steps import LIMITS, batches, is_comparable, run_steps, step_caches
from .compare_tensors import inputs_of, pairs, tensor_error
from .tables import by_layer

MOST = 1.3  # parts of one whole, together
TOO_MUCH = "the parts add up to {:.0%}: arithmetic in 8 bits rounds otherwise whatever changes (not on numpy)"


class Inside:
    """Two models that are to be compared inside, on some tokens; there is the memory for it, or it raises.

    Args:
        tokens: of one text, [n_tokens]; none: nothing is compared.
        limit: as of `named_limit`.
        progress: show bars.
    """

    def __init__(self, a: Llama, b: Llama, tokens: np.ndarray, limit: str | float | None, progress: bool):
        self._a, self._b, self._tokens, self._limit = a, b, tokens, limit
        self._bar = partial(tqdm, disable=not progress, leave=False)
        self._on_one = (a.backend.name, a.backend.options) == (b.backend.name, b.backend.options)
        self._comparable, self._n_mixtures = is_comparable(a.config, b.config), 0
        if len(tokens) and self._comparable:  # now: not when all windows have been run
            step_caches(a, b, len(tokens))
            share_cache(a, len(tokens))

    def parts(self) -> Iterator[dict]:
        """Fields of `Compared`, as they are found: steps, tensors, shares one by one."""
        a, b, tokens, bar = self._a, self._b, self._tokens, self._bar
        if not self._comparable:
            sizes = [f"{side.config.n_layers} layers of {side.config.dim}" for side in (a, b)]
            yield {
                "notes": [f"steps and tensors can't be compared: one has {sizes[0]}, the other {sizes[1]}"]
            }
            return
        both, tensors = pairs(a.checkpoint, b.checkpoint), []
        bits = min(side.pieces[0].kind.bits_per_weight for pair in both.values() for side in pair)
        limit = named_limit(self._limit, bits)
        steps, inputs = run_steps(a, b, tokens, bar(batches(len(tokens)), "steps", unit=" batches"))
        over = next((step.name for step in steps if step.error > limit[1]), None)
        yield {"n_step_tokens": len(tokens), "steps": steps, "limit": limit, "first_over": over}
        names = inputs_of(both)
        with one_blas_thread():  # products are small, and threads take longer to meet than to multiply
            for name in bar(both, "tensors"):
                tensors.append(tensor_error(name, *both[name], inputs.get(names.get(name))))
        yield {"tensors": sorted(tensors, key=lambda tensor: -tensor.worst)}
        if not self._on_one:
            other = "on two backends no weights are exchanged, which would tell which of them count most"
            yield {"notes": [other]}
            return
        kinds = [kind for kind, _ in by_layer(tensor.name for tensor in tensors if tensor.error)]
        mixed, found = [*mixtures(a.model(), b.model(), kinds)], []
        self._n_mixtures = len(mixed)
        for share in shares(a, b, tokens, bar(mixed, "mixtures")):
            found.append(share)
            whole = sum(share.part for share in found[: len(kinds)])
            yield {"shares": found, "notes": [TOO_MUCH.format(whole)] * (whole > MOST)}

    def stopped(self, found: dict) -> str:
        """Where, of somebody who has this of it."""
        if "steps" not in found:
            return "stopped after all windows, before steps and weights"
        if "tensors" not in found:
            return "stopped after steps, before weights"
        n, n_mixtures = len(found.get("shares", [])), self._n_mixtures
        return f"stopped after {n} of {n_mixtures} kinds of weights and layers whose part was to be measured"


def named_limit(limit: str | float | None, bits: float = 16) -> tuple[str, float]:
    """A limit of `compare_steps.LIMITS`, or a number, with its name; None: that of so many bits a weight."""
    if limit is None:
        limit = "rounding" if bits >= 16 else "8-bit" if bits >= 8 else "4-bit"
    if isinstance(limit, str) and limit in LIMITS:
        return limit, LIMITS[limit][0]
    try:
        number = float(limit)
    except (TypeError, ValueError):
        number = -1.0
    require(
        0 <= number < math.inf, f"limit must be a number or one of {', '.join(LIMITS)}, not {limit!r:.40}"
    )
    return "", number
