"""What was read once need not be read again: the caches of a model's last texts.

A prompt that begins like one of them goes on from a copy of its cache, and gets the bits that it would have
got by itself. The numbers of a token that was computed among many others differ in their last bits from those
that it gets among a few (`ops.FEW`); so only what was computed among many is taken over, and the rest of the
prompt is computed so, too. There is one exception. A prompt that goes on from a whole text, as the next turn
of a conversation does, also takes over what was written one token at a time.
"""

from itertools import takewhile

from ..machine.limits import available_memory
from ..ops import FEW, KVCache

MOST = 16  # texts that are kept,
LIMIT = 2**31  # bytes that their caches take,
SHARE = 4  # and the part of the free memory, at most
SMALL = 2**24  # bytes for which nobody asks how much is free: that takes as long as writing a token


class Remembered:
    """The caches of the last texts of one model; those that were used least recently go first.

    Threads share it without a lock: what two of them do at the same time may be forgotten.
    """

    def __init__(self):
        self._kept: list[tuple[KVCache, bool]] = []  # and whether it is that of a whole text

    def recall(self, ids: list[int], cache: KVCache, whole: bool = True) -> KVCache:
        """A cache that has as many of a prompt's first tokens as are known, and as much room as another.

        Args:
            cache: the other, which is empty; it is returned if none are known.
            whole: also go on from a text with all that was written.
        """
        kept = self._kept
        known = [_n_usable(past, ids, whole and is_whole) for past, is_whole in kept]
        if not any(known):
            return cache
        best = kept[known.index(max(known))]
        self._kept = [*(one for one in kept if one is not best), best]
        return best[0].fork(max(known), cache.n_ctx)

    def keep(self, cache: KVCache, whole: bool = False) -> None:
        """Remember a text: once its prompt has been read, and again, `whole`, when it has been written."""
        if not len(cache) or cache.edited:
            return
        kept = [one for one in self._kept if one[0].ids != cache.ids[: len(one[0])]]  # it holds those
        kept.append((cache, whole))
        sizes = [past.nbytes * (not past.in_file) for past, _ in kept]
        total, most = sum(sizes), LIMIT
        if total > SMALL:
            most = min(LIMIT, (available_memory() + total) // SHARE)
        while sum(sizes) > most or len(kept) > MOST:
            del sizes[0], kept[0]
        self._kept = kept

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return sum(cache.nbytes * (not cache.in_file) for cache, _ in self._kept)

    def clear(self) -> None:
        """Forget all."""
        self._kept = []


def _n_usable(kept: KVCache, ids: list[int], whole: bool) -> int:
    """How many of a prompt's first tokens may be taken over."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(kept.ids, ids[:-1], strict=False))
    n_same = sum(1 for _ in same)
    if whole and n_same == len(kept):
        return n_same
    n_same = min(n_same, kept.n_many, len(ids) - FEW - 1)
    return n_same if n_same > FEW else 0
