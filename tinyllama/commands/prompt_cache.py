"""--prompt-cache: what has been read of a prompt stays in a file, and the next prompt goes on from there."""

import argparse
import time
from pathlib import Path

from ..errors import Cancelled, TinyllamaError, require
from ..formats.cache_file import opened
from ..generation import Generation
from ..llama import Llama
from ..machine.limits import human
from ..machine.terminal import say


class PromptCache:
    """The file of a run, if it has one: `restore` before the text begins, `keep` after each of its pieces.

    Attributes:
        figures: a line for each thing that it did.
    """

    def __init__(self, args: argparse.Namespace):
        """Raises TinyllamaError where the file is something else, which must not be written over."""
        self.path = args.prompt_cache and Path(args.prompt_cache)
        self.whole, self.read_only, self.figures = args.prompt_cache_all, args.prompt_cache_ro, []
        self._file, self._ids, self._n_many = None, [], 0  # mapped; what it holds
        if self.path:
            folder = self.path.parent
            require(folder.is_dir() or self.read_only, f"{self.path}: there is no folder {folder}")
            if self.path.exists() and (not self.path.is_file() or self.path.stat().st_size):
                self._file = opened(self.path)
            elif self.read_only:
                say(f"warning: {self.path}: isn't there or empty: the prompt is read")

    def restore(self, llama: Llama) -> None:
        """Have the prompts of a model find what is in the file; where it can't be used, warn."""
        if self._file:
            started = time.perf_counter()
            try:
                cache = llama.load_cache(self._file, 1, mapped=True)
            except Cancelled:
                raise
            except TinyllamaError as error:
                return say(f"warning: {error}")
            llama.remembered.keep(cache, whole=len(cache) > cache.n_many)
            self._file, self._ids, self._n_many = None, cache.ids, cache.n_many
            self._note("restore", time.perf_counter() - started, len(cache), f"from {self.path}")

    def keep(self, text: Generation, ended: bool = False) -> None:
        """Write the prompt's tokens once they are read, or all at the end; what the file has already isn't.

        Where that fails the text goes on, after a warning. After Ctrl-C nothing more is written.
        """
        is_time = not text.unread and text.stop_reason != "cancelled" and (ended or not self.whole)
        if not self.path or self.read_only or not is_time:
            return
        cache, started = text.cache, time.perf_counter()
        n_tokens = len(cache) if self.whole else len(text.prompt_ids)
        n_many = min(cache.n_many, n_tokens)
        if self._ids[:n_tokens] != cache.ids[:n_tokens] or self._n_many < n_many:
            self._ids, self._n_many = cache.ids[:n_tokens], n_many  # whatever comes of it: once is enough
            try:
                cache.save(self.path, n_tokens)
            except Cancelled:
                raise
            except TinyllamaError as error:
                return say(f"warning: {error}")
            where = f"in {self.path}, {human(self.path.stat().st_size)}"
            self._note("save", time.perf_counter() - started, n_tokens, where)

    def _note(self, step: str, seconds: float, n_tokens: int, where: str) -> None:
        self.figures.append(f"{step:8} {seconds:6.2f} s {n_tokens:6} tokens {where}")
