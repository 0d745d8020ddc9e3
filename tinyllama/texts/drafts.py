"""Drafts: the next tokens are guessed, and the model looks at all guesses in one pass.

A pass that reads the weights for one token can compute a few more in hardly more time. So somebody cheap
guesses how the text goes on, and the model computes its logits behind every guess at once. From the first of
them the next token is sampled as always, with the same random numbers. If it is the guess, the logits behind
that guess are those that the model would have computed next, and the token after it is sampled from them, and
so on up to the first guess that is wrong.

So a text is the same with drafts and without, greedy or sampled. That is more than speculative sampling
(arXiv:2211.17192, arXiv:2302.01318) promises, where only the distribution is the same. There a guess x, drawn
from a distribution q, is accepted with probability min(1, p(x) / q(x)), where p is the model's. The guesses
here are certain, q(x) = 1, so x would be accepted with probability p(x). Sampling from p and comparing
accepts it just as often.

Who guesses: `Lookup`, what came next when the last tokens stood in the text before; `DraftModel`, a small
model of the same vocabulary. How many guesses are worth it: `Drafts`, by what was right so far and by the
seconds that passes really took (`Pace`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from ..errors import Cancelled, require
from ..ops import FEW
from ..sampling import sample
from ..settings import Settings
from ..tokenizer import UNUSED
from .choosing import probability

SIZES = (8, 6, 4, 3, 2, 1)  # tokens that Lookup looks for, the longest first
LOST, AHEAD = (
    0.025,
    100,
)  # the share of a text's time that wrong guesses may take; tokens that are paid before
AGING, FORGETTING = 0.98, 0.9  # how much of what was seen still counts after a pass, after another guess
PRIOR = 0.5  # how many guesses that were seen a source's own confidence counts for
UNSURE = 0.05  # how likely a guess is at least that a small model thinks hardly likely
STALE, EXPIRED = 32, 128  # passes after which what one takes without guesses, and with, is measured anew

Guesses = Iterator[tuple[int, float]]  # tokens, and how likely their source thinks that each is right


class Pace:
    """Seconds that a model's passes take, by the number of tokens: the median of the last three of each.

    All texts of a model share one. It says nothing that wasn't measured, but for two bounds: more tokens take
    no less than fewer, and no more than several passes of fewer.
    """

    def __init__(self):
        self._last: list[tuple[float, ...]] = [()] * (FEW + 1)  # by the number of tokens
        self._noted, self._n_passes = [0] * (FEW + 1), 0

    def note(self, n_tokens: int, seconds: float) -> None:
        """A pass has taken so long."""
        self._n_passes += 1
        if n_tokens <= FEW:
            self._last[n_tokens] = (*self._last[n_tokens][-2:], seconds)
            self._noted[n_tokens] = self._n_passes

    def is_known(self, n_tokens: int) -> bool:
        """Whether a pass of so many tokens was measured lately."""
        return bool(self._last[n_tokens]) and self._n_passes - self._noted[n_tokens] <= STALE

    def seconds(self, n_tokens: int) -> tuple[float, float]:
        """What a pass will take: at a guess that a measurement will correct, and at most."""
        newest = self._n_passes - EXPIRED  # a computer that was busy may not be so any more
        known = [n for n, last in enumerate(self._last) if last and (n == 1 or self._noted[n] > newest)]
        if n_tokens in known:
            last = self._last[n_tokens]
            return (sorted(last)[len(last) // 2],) * 2
        below, above = max((n for n in known if n < n_tokens), default=0), [n for n in known if n > n_tokens]
        low = self.seconds(below)[0] if below else 0.0
        most = low * -(-n_tokens // below) if below else np.inf
        if not above:
            return low, most
        high = self.seconds(above[0])[0]
        return low + (high - low) * (n_tokens - below) / (above[0] - below), min(most, high)


class Lookup:
    """Guesses that a text goes on as it did when its last tokens stood in it before, the prompt included.

    The longest match counts, and of equal ones the latest.
    """

    def __init__(self):
        self._n_known, self._last = 0, []  # tokens that are in the index, and the last of them
        self._ends: dict[tuple[int, ...], int] = {}  # some tokens in a row -> the index behind the last such

    def read(self, ids: list[int]) -> None:
        """Bring the index up to a text, which as a rule continues the last one."""
        known, ends = self._n_known, self._ends
        if ids[max(0, known - SIZES[0]) : known] != self._last:  # another text
            known = 0
            ends.clear()
        for end in range(known, len(ids)):
            for size in SIZES:
                if size <= end:
                    ends[tuple(ids[end - size : end])] = end
        self._n_known, self._last = len(ids), ids[-SIZES[0] :]

    def cache_bytes(self, n_ctx: int) -> int:
        """It has no cache."""
        return 0

    def guesses(self, ids: list[int]) -> Guesses:
        """How the text may go on, each with n / (n + 2) of a match of n tokens. There may be none."""
        self.read(ids)
        found = (self._ends.get(tuple(ids[-size:])) for size in SIZES)
        start = next((end for end in found if end is not None), None)
        if start is None:
            return
        n_same, n_ids, made = 1, len(ids), []
        while n_same < min(start, SIZES[0]) and ids[start - n_same - 1] == ids[n_ids - n_same - 1]:
            n_same += 1
        while True:
            at = start + len(made)
            made.append(ids[at] if at < n_ids else made[at - n_ids])  # a text may repeat its last tokens
            yield made[-1], n_same / (n_same + 2)
            n_same = min(n_same + 1, SIZES[0])


class DraftModel:
    """Guesses what a small model would write at temperature 0. Its cache follows the text.

    Args:
        llama: the small model.
        settings, n_ctx: of the text.
        cancel: as of `Llama.run`: guessing ends, and the text's own pass then says so.
    """

    def __init__(self, llama, settings: Settings, n_ctx: int, cancel=None):
        self._llama, self._settings, self._cancel = llama, replace(settings, temp=0.0), cancel
        self.cache = llama.new_cache(n_ctx, at_once=min(settings.batch_size, n_ctx))
        self._known = llama.remembered if settings.remember else None

    def read(self, ids: list[int]) -> bool:
        """Compute a text but for its last token, from where the cache differs from it.

        Returns whether all its tokens are known: a prompt may have ids that are padding in a larger model.
        """
        if max(ids) >= self._llama.config.vocab_size:
            return False
        if self._known and not self.cache:
            self.cache = self._known.recall(ids, self.cache, whole=False)
        kept = self.cache.ids
        if kept != ids[: len(kept)]:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(kept, ids, strict=False))
            self.cache.trim(sum(1 for _ in same))
        self.cache.trim(len(ids) - 1)
        start, stop, size = len(self.cache), len(ids) - 1, self._settings.batch_size
        for at in range(start, stop, size):
            self._forward(ids[at : min(at + size, stop)])
        if self._known and not start:
            self._known.keep(self.cache)
        return True

    def cache_bytes(self, n_ctx: int) -> int:
        """What the cache of a text of so many tokens takes."""
        return self._llama.backend.cache_bytes(self._llama.config, n_ctx)

    def guesses(self, ids: list[int]) -> Guesses:
        """The likeliest next tokens, one after the other, each computed when it is asked for."""
        never, token = self._llama.tokenizer.unused_ids, ids[-1]
        try:
            while self.read(ids) and len(self.cache) < self.cache.n_ctx:
                logits = self._forward([token])
                token = sample(logits, self._settings, ids, None, never=never)
                ids = [*ids, token]
                yield token, max(UNSURE, round(probability(logits, token), 1))
        except Cancelled:
            pass

    def _forward(self, ids: list[int]) -> np.ndarray:
        return self._llama.forward(ids, self.cache, last=True, cancel=self._cancel)[0]


class Drafts:
    """The guesses of one text: so many as are expected to save time.

    What is expected of guesses is learned from those before, by their source and by how sure it was of them;
    what isn't tried for a while is forgotten, and then tried again. What a pass costs is measured. Guesses
    that turn out wrong may cost a text LOST of the time that it has taken so far (AHEAD of its tokens count
    as if they were written already), more is not risked.

    Args:
        sources: who guesses; the first that has a guess worth its time. Without any there are no guesses.
        pace: of the model, shared by its texts.
        n_max: guesses in a pass at most.
    """

    def __init__(self, sources: Sequence = (), pace: Pace | None = None, n_max: int = FEW - 1):
        self._sources, self._pace, self._n_max = sources, pace or Pace(), min(n_max, FEW - 1)
        self._n_passes, self._n_texts, self._has_read = 0, 1, False
        self._bet: list[tuple] = []  # of each guess in the pass, by what its odds are known
        self._asked: tuple | None = None  # likewise, whether asking its source was worth it
        self._odds: dict[
            tuple, tuple[float, float, int]
        ] = {}  # -> how many were right, of how many, and when
        self._takes = dict.fromkeys(range(len(sources)), 0.0)  # seconds that a guess took
        self._seconds = self._lost = 0.0  # of the text, and what guesses have cost beyond what they saved

    def __bool__(self) -> bool:
        return bool(self._sources)

    def guess(self, ids: list[int], most: int, n_texts: int = 1) -> list[int]:
        """The next tokens of a text.

        Args:
            ids: the text so far.
            most: guesses that it has room for.
            n_texts: texts that are written together: a pass has room for FEW tokens of all.
        """
        self._bet, self._asked, self._n_texts = [], None, n_texts
        self._n_passes += 1
        n, guesses = min(most, self._n_max, FEW // n_texts - 1), []
        if n < 1:
            return []
        if not self._has_read:  # what the prompt takes to read isn't lost by any guess
            self._has_read = self._read(ids)
        started = time.perf_counter()
        if self._pace.is_known(n_texts):
            plain = self._pace.seconds(n_texts)[0]
            allowed = LOST * (self._seconds + min(most, AHEAD) * plain / n_texts) - self._lost
            for number, source in enumerate(self._sources if allowed > 0 else ()):
                if guesses := self._guesses(number, source.guesses(ids), n, plain, allowed):
                    break
        self._lost += time.perf_counter() - started
        return guesses

    def learn(self, n_drafted: int, n_accepted: int, seconds: float, n_others: int = 0) -> None:
        """What became of the guesses.

        Args:
            seconds: that the pass took, with n_others tokens of other texts.
        """
        if not self:
            return
        n_tokens = 1 + n_drafted + n_others
        self._pace.note(n_tokens, seconds)
        if self._n_texts > FEW or n_tokens > FEW:
            return
        a_token = self._pace.seconds(self._n_texts)[0] / self._n_texts
        more = self._pace.seconds(n_tokens)[0] - self._pace.seconds(n_tokens - n_drafted)[0]
        self._lost += max(0.0, more) - n_accepted * a_token
        self._seconds += (1 + n_accepted) * a_token
        if self._asked:
            self._note(self._asked, n_accepted > 0)
        for kind in self._bet[:n_accepted]:
            self._note(kind, True)
        for kind in self._bet[n_accepted : n_accepted + 1]:
            self._note(kind, False)

    def cache_bytes(self, n_ctx: int) -> int:
        """What the caches of small models take."""
        return sum(source.cache_bytes(n_ctx) for source in self._sources)

    def _read(self, ids: list[int]) -> bool:
        try:
            for source in self._sources:
                source.read(ids)
        except Cancelled:
            return False
        return True

    def _guesses(self, number: int, made: Guesses, most: int, plain: float, allowed: float) -> list[int]:
        """As many guesses of a source as give the most tokens a second."""
        n, best, n_best, tokens, kinds = self._n_texts, plain / self._n_texts, 0, [], []
        chance, expected, started, spent = 1.0, float(n), time.perf_counter(), 0.0
        loss = self._takes[number] + self._pace.seconds(n + 1)[1] - plain
        if loss > allowed or self._chance(number, None) * best < self._takes[number]:
            return []
        for token, confidence in made:
            tokens.append(token)
            kinds.append((number, confidence))
            spent = time.perf_counter() - started
            chance *= self._chance(number, confidence)
            expected += chance
            seconds, at_most = self._pace.seconds(n + len(tokens))
            if spent + at_most - plain > allowed:
                break
            if (seconds + spent) / expected < best:
                best, n_best = (seconds + spent) / expected, len(tokens)
            if len(tokens) == most or chance * best < spent / len(tokens):
                break
        if tokens:
            self._asked, self._takes[number] = (number, None), spent / len(tokens)
        self._bet = kinds[:n_best]
        return tokens[:n_best]

    def _chance(self, number: int, confidence: float | None) -> float:
        """How likely a guess is right; without a confidence, that asking a source for some is worth it."""
        right, of, when = self._odds.get((number, confidence), (0.0, 0.0, 0))
        kept = AGING ** (self._n_passes - when)
        prior = 0.5 if confidence is None else confidence
        return (right * kept + PRIOR * prior) / (of * kept + PRIOR)

    def _note(self, kind: tuple, is_right: bool) -> None:
        right, of, when = self._odds.get(kind, (0.0, 0.0, self._n_passes))
        kept = FORGETTING * AGING ** (self._n_passes - when)
        self._odds[kind] = right * kept + is_right, of * kept + 1, self._n_passes


def drafts_for(llama, wanted: Settings, n_ctx: int, load: Callable, cancel=None) -> Drafts:
    """What guesses the tokens of a text that a model writes.

    Args:
        load: as `llama.load`, for the small model.
    Raises TinyllamaError where the small model has another vocabulary, or doesn't fit into memory.
    """
    sources: list = [Lookup()] if wanted.draft_lookup else []
    if wanted.spec_draft_model:
        small = load(wanted.spec_draft_model, llama.backend.name, llama.backend.threads)
        names = f"{small.checkpoint.path} can't guess for {llama.checkpoint.path}"
        require(_facts(small) == _facts(llama), f"{names}: their vocabularies differ")
        sources.append(DraftModel(small, wanted, n_ctx, cancel))
    return Drafts(sources, llama.pace, wanted.spec_draft_n_max)


def _facts(llama) -> tuple:
    """What two vocabularies must have in common; padding at their ends may differ."""
    vocabulary = llama.tokenizer.vocabulary
    n = len(vocabulary.pieces)
    while n and vocabulary.types[n - 1] == UNUSED:
        n -= 1
    special = vocabulary.bos_id, vocabulary.eos_id, set(vocabulary.stop_ids)
    return vocabulary.pieces[:n], vocabulary.types[:n], *special
