"""The loop: read the prompt, then choose a token, run it through the model, choose the next, ...

(The module isn't called generate: that is the function `tinyllama.generate`.)
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace

import numpy as np

from .errors import Cancelled
from .model import Step
from .ops import FEW, KVCache
from .settings import Settings
from .taps.watch import Watch
from .texts.choosing import Choice, Chosen, Picked
from .texts.completion import Completion, Timings, Token
from .texts.drafts import Drafts
from .tokenizer import TextStream, Tokenizer


class Generation:
    """One text: an iterator over its pieces, which never split a character.

    Who iterates runs it alone. Who runs several together takes a `step` of each, computes them in one pass,
    and gives each its logits with `feed`.

    Attributes:
        prompt_ids: the prompt's tokens.
        n_read: how many of them are in the cache.
        tokens: a Token for each token so far.
        seed: the seed that is really used.
        stop_reason: why it ended, None before that; see Completion.
        timings: a Timings, up to date after every piece.
        origin: what `Completion.settings` says beside the settings: prompt, model, backend, threads.
        warnings: what about prompt or ctx_size will worsen the text.
        cache: the keys and values of the tokens so far.
        cancelled: whether it ends before its next step; any thread may set this.
        bias: what is added to the logits of tokens, by their ids.
    """

    def __init__(
        self,
        run: Callable,
        tokenizer: Tokenizer,
        cache: KVCache,
        prompt_ids: list[int],
        settings: Settings,
        *,
        origin: dict | None = None,
        doubts: Iterable[str] = (),
        door: Callable = nullcontext,
        recall: Callable | None = None,
        keep: Callable | None = None,
        drafts: Drafts | None = None,
        timings: Timings | None = None,
        watch: Watch | None = None,
    ):
        """Args:
        run: sends a Step through a model: logits [n_logits, vocab_size], or what its `choose` made of them.
        cache: empty, with room for the prompt at least.
        door: a context in which `finish` runs, so that a token needn't open it for itself.
        recall, keep: how caches of other texts are found, and this one's is kept: of `texts.Remembered`.
        drafts: what guesses the next tokens.
        watch: what tokens keep of the values inside the model.
        """
        self.tokenizer, self.prompt_ids, self.n_read = tokenizer, prompt_ids, 0
        self.settings, self.origin, self.warnings = settings, origin or {}, list(doubts)
        self.seed = settings.seed if settings.seed >= 0 else secrets.randbits(32)
        self.tokens: list[Token] = []
        self.cancelled, self.stop_reason = False, None if settings.n_predict else "length"
        self.timings, self.cache = timings or Timings(n_prompt=len(prompt_ids)), cache
        self._rng, self._stream = np.random.default_rng(self.seed), TextStream(tokenizer)
        self._text, self.bias = [], {}
        self._held, self._drafted, self.drafts, self.watch = "", [], drafts or Drafts(), watch or Watch()
        self._door, self._run, self._recall, self._keep = door, run, recall, keep

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = ""
        with self.timings.adding_to("total"):
            while self.stop_reason is None and not piece:
                if self.cancelled:
                    piece = self.end("cancelled")
                    break
                step, started = self.step(), time.perf_counter()
                try:
                    found = self._run(step)
                except Cancelled:
                    piece = self.end("cancelled")
                else:
                    piece = self.feed(found, time.perf_counter() - started)
        if not piece:
            raise StopIteration
        return piece

    def finish(self) -> Completion:
        """Run to the end and return the whole text."""
        with self._door():
            for _ in self:
                pass
        return self.completion()

    def completion(self) -> Completion:
        """The text so far, with all that is known about it."""
        text = Completion("".join(self._text))
        text.tokens, text.timings = list(self.tokens), replace(self.timings)
        text.stop_reason = self.stop_reason
        used = asdict(self.settings) | {"seed": self.seed, "ctx_size": self.cache.n_ctx}
        text.settings = self.origin | used
        return text

    @property
    def unread(self) -> list[int]:
        """What of the prompt is not in the cache."""
        return self.prompt_ids[self.n_read :]

    @property
    def most(self) -> int:
        """Tokens that prompt and text have at most."""
        n_predict, n_ctx = self.settings.n_predict, self.cache.n_ctx
        return n_ctx if n_predict < 0 else min(n_ctx, len(self.prompt_ids) + n_predict)

    @property
    def reads_many(self) -> bool:
        """The next step computes more than `ops.FEW` tokens."""
        return min(len(self.prompt_ids) - self.n_read, self.settings.batch_size) > FEW

    def step(self, n_texts: int = 1) -> Step:
        """What is computed next, with n_texts together: a piece of the prompt, or a token and guesses."""
        if self._recall and not self.n_read:
            self.cache = self._recall(self.prompt_ids, self.cache)
            self.n_read = self.timings.n_remembered = len(self.cache)
        self._forget_guesses()
        if unread := self.unread:
            size = self.settings.batch_size
            n = size if len(unread) > size + FEW * (size > FEW) else len(unread)  # no piece of a few is left
            return self._step(unread[:n], int(n == len(unread)))
        last, most = self.tokens[-1].id, self.cache.n_ctx - len(self.cache) - 1
        if self.settings.n_predict > 0:
            most = min(most, self.settings.n_predict - len(self.tokens) - 1)
        if self.drafts:
            with self.timings.adding_to("predict"):
                self._drafted = self.drafts.guess([*self.cache.ids, last], most, n_texts)
        return self._step([last, *self._drafted], 1 + len(self._drafted))

    def _step(self, tokens: list[int], n_logits: int) -> Step:
        never, ends, n = (
            self.tokenizer.unused_ids,
            self.tokenizer.stop_ids,
            max(1, self.settings.repeat_last_n),
        )
        ids = self.cache.ids[-n:] + tokens[: len(tokens) - len(self._drafted)]
        how = ids[-n:], self._drafted, self._rng, never, ends, self.bias
        self._choice = Choice(self.settings, *how)
        choose = self._choice if n_logits else None
        return Step(tokens, self.cache, n_logits, self.watch.taps(n_logits), choose)

    def feed(self, found: "np.ndarray | Chosen", seconds: float = 0.0, n_others: int = 0) -> str:
        """Take the next token, or as many as were guessed right and the one behind them.

        Args:
            found: logits of the Step, [n_logits, vocab_size], or what was chosen by them.
            seconds: what they took, with n_others tokens of other texts.
        Returns:
            The text that they add. It may be empty, as long as a character or a stop string isn't whole.
        """
        is_read, drafted, self._drafted = not self.unread, self._drafted, []
        n_past, pieces, took = len(self.cache) - len(drafted), [], self.timings
        took.predict, took.prompt = took.predict + seconds * is_read, took.prompt + seconds * (not is_read)
        self.n_read = min(len(self.cache), len(self.prompt_ids))
        chosen = found if isinstance(found, Chosen) else self._choice(found)
        self._rng, took.sample = chosen.rng, took.sample + chosen.seconds
        with took.adding_to("sample"):
            for n, (picked, guess) in enumerate(zip(chosen.tokens, [*drafted, None], strict=False)):
                is_guess, is_full = picked.id == guess, n_past + n == self.cache.n_ctx
                pieces.append(self._add(picked, is_guess, self.watch.row(n), is_full))
                if self.stop_reason is not None:
                    break
        if is_read:
            took.n_predict += len(pieces)
            n_accepted = len(pieces) - (not is_guess)  # the last one may be a guess that ends the text
            took.n_drafted, took.n_accepted = took.n_drafted + len(drafted), took.n_accepted + n_accepted
            self.drafts.learn(len(drafted), n_accepted, seconds, n_others)
        self._forget_guesses()
        if self._keep and (self.stop_reason is not None or not (is_read or self.unread)):
            self._keep(self.cache, whole=self.stop_reason is not None and len(self.tokens) > 1)
        self._text += pieces
        return "".join(pieces)

    def end(self, reason: str) -> str:
        """End the text for one of STOP_REASONS; returns what was held back of it."""
        self._forget_guesses()
        self._text.append(self._close(reason))
        if self._keep:
            self._keep(self.cache, whole=len(self.tokens) > 1)
        return self._text[-1]

    def _forget_guesses(self) -> None:
        """Leave in the cache what is known to be the text: all but its last token."""
        self.cache.trim(self.n_read + max(0, len(self.tokens) - 1))

    def _add(self, picked: Picked, is_guess: bool, taps: dict, is_full: bool) -> str:
        """Note a token in `tokens`; the text that it adds, and the end of it where that is reached."""
        token = picked.id
        if token in self.tokenizer.stop_ids:
            return self._close("eos")
        self.tokens.append(Token(token, self.tokenizer.piece(token), *picked[1:], is_guess, taps))
        piece, is_last = self._shown(self._stream.feed(token)), len(self.tokens) == self.settings.n_predict
        if self.stop_reason is None and (is_last or is_full):
            piece += self._close("length" if is_last else "context")
        return piece

    def _close(self, reason: str) -> str:
        self.stop_reason = reason
        return self._shown(self._stream.flush())

    def _shown(self, piece: str) -> str:
        """The text up to a stop string; what may turn out to begin one is held back until the text ends."""
        stop, text = self.settings.stop, self._held + piece
        found = [at for at in map(text.find, stop) if at >= 0]
        if found:
            self.stop_reason, self._held = "stop", ""
            return text[: min(found)]
        begun = [n for some in stop for n in range(len(some)) if text.endswith(some[:n])]
        end = len(text) - (max(begun, default=0) if self.stop_reason is None else 0)
        self._held = text[end:]
        return text[:end]
