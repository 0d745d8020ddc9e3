"""What is kept of the values inside a model: of a prompt all, of a text what each token was chosen by."""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from ..config import Config
from ..model import Step, tap_shapes
from ..ops import INNER, Tap
from .edits import is_edited
from .names import matching


def traced(llama, ids: list[int], patterns: Sequence[str], cancel=None) -> dict[str, np.ndarray]:
    """What `Llama.trace` says: name -> array."""
    if patterns and not isinstance(patterns[0], str):  # a list of them, as `taps` takes it
        patterns = patterns[0]
    names, kept, n = matching(llama.config, patterns or "*"), {}, len(ids)
    ours, shapes = {*names.values()}, tap_shapes(llama.config, n)
    n_logits = n if ours & {"norm", "logits"} else 1
    n_bytes = 4 * sum(math.prod(shapes[name]) for name in ours)
    room = {"at_once": n, "n_logits": n_logits, "n_bytes": n_bytes, "tapped": has_inner(ours)}
    cache = llama.new_cache(n, **room)
    taps = {name: lambda array, name=name: kept.update({name: array.copy()}) for name in ours}
    llama.run([Step(ids, cache, n_logits, taps)], cancel=cancel, checked=False)
    return {name: kept[own] for name, own in names.items()}


def has_inner(names: Iterable[str]) -> bool:
    """Whether there are values that only exist inside of attention, and so run in NumPy."""
    return any(name.endswith(INNER) for name in names)


class Watch:
    """The values that patterns mean, of the step that runs.

    Args:
        patterns: as of `names.matching`.
    """

    def __init__(self, config: Config | None = None, patterns: tuple[str, ...] = ()):
        self._names = matching(config, patterns) if patterns else {}  # as they were asked for -> ours
        self._config, self._seen = config, {}

    def __bool__(self) -> bool:
        return bool(self._names)

    def taps(self, n_rows: int) -> dict[str, Tap]:
        """For a Step whose last n_rows choose tokens: of a prompt one, of guesses several."""
        return {name: partial(self._keep, name, n_rows) for name in self._names.values() if n_rows}

    def _keep(self, name: str, n_rows: int, array: np.ndarray) -> None:
        rows = array.swapaxes(0, 1) if name.endswith(INNER) else array
        self._seen[name] = rows[len(rows) - n_rows :].copy()  # not a view: it would keep the whole prompt's

    def row(self, n: int) -> dict[str, np.ndarray]:
        """What the n-th of these rows holds: weights are [n_heads, n_past], a residual is [dim]."""
        found = {}
        for asked, name in self._names.items():
            rows = self._seen[name]
            later = len(rows) - 1 - n  # tokens behind it, to which it can't attend
            found[asked] = (rows[n][:, : rows.shape[2] - later] if name.endswith(INNER) else rows[n]).copy()
        return found

    def n_bytes(self, n_tokens: int, n_ctx: int) -> int:
        """Bytes that n_tokens keep at most, of a text of n_ctx."""
        shapes, a_token = tap_shapes(self._config, 1), 0
        for name in self._names.values():
            a_token += 4 * math.prod(shapes[name]) * (n_ctx if name.endswith(INNER) else 1)
        return a_token * n_tokens


def kept_bytes(text) -> int:
    """Bytes that the tokens of a Generation keep at most."""
    return text.watch.n_bytes(text.most - len(text.prompt_ids), text.most) if text.watch else 0


def require_run(llama, texts: list, n_ctx: int) -> None:
    """Refuse texts, of which the longest has n_ctx, that don't fit into memory with what tokens keep."""
    at_once = max(min(text.settings.batch_size, len(text.prompt_ids)) for text in texts)
    tapped = is_edited(llama) or any(text.watch for text in texts)
    kept = sum(map(kept_bytes, texts))
    llama.backend.require_run(llama.config, n_ctx, at_once=at_once, n_bytes=kept, tapped=tapped)
