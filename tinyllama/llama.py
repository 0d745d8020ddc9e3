"""The one place where a file, a tokenizer, a backend and the model meet."""

import glob
import math
import operator
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np

from .machine import limits as resources
from .backends import Backend, get_backend, one_blas_thread, stoppable
from .machine.download import find
from .errors import TinyllamaError
from .formats import Checkpoint, open_checkpoint
from .generation import Completion, Generation, Token, score
from .machine.mapped import mapped_files, unchanged
from .memory import (
    announcement,
    announcement_of_mapping,
    check_load,
    check_run,
    check_trace,
    default_ctx_size,
    memory_needed,
    stays_in_file,
)
from .model import Model, build, forward, tap_shapes, unembed
from .ops import as_numbers
from .tokenizer import Tokenizer, make_tokenizer


class Llama:
    """A loaded model: text or token ids in, logits, intermediate values or text out.

    Made by `load`. Use it in a `with` statement, or `close()` it, to give its memory back.

    Attributes:
        checkpoint, config, tokenizer, backend: what it was made of.
        name: the name or path it was loaded by.
        mapped: its weights stay in their file.
        n_params: how many weights it has; an output matrix that is the embedding's counts once.
        load_seconds: how long loading took.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        name: str,
        mmap: bool = False,
        progress: Callable | None = None,
    ):
        started = time.perf_counter()
        self.name, self.checkpoint, self.config, self.backend = name, checkpoint, checkpoint.config, backend
        self.tokenizer: Tokenizer = make_tokenizer(checkpoint.vocabulary, checkpoint.path)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise TinyllamaError(
                f"{checkpoint.path}: its tokenizer has {self.tokenizer.vocab_size} tokens, "
                f"the model {self.config.vocab_size}"
            )
        self.n_params = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
        self.mapped = stays_in_file(checkpoint, backend.name, mmap)
        suspects: list[str] = []
        prepare = partial(backend.prepare, copy=not self.mapped, suspect=suspects.append)
        files = mapped_files(part for tensor in checkpoint.tensors.values() for part in tensor.parts)
        with unchanged(files):
            self._model = build(self.config, checkpoint.tensors, prepare, progress or _bar)
        self._files = files if self.mapped else []
        if suspects:
            warnings.warn(_of_suspects(checkpoint.path, suspects), stacklevel=3)
        self.load_seconds = time.perf_counter() - started

    def stream(self, prompt: str | list[int], *, cancel=None, **settings) -> Generation:
        """Continue a prompt piece by piece; see `generation.Settings` for the settings.

        Args:
            prompt: text, or token ids.
            cancel: a threading.Event, say: once it is set, the text ends before the next operation.
        Returns:
            An iterator over pieces of text, which afterwards knows its `tokens`, `stop_reason`, `timings`
            and the whole `completion()`.
        """
        return Generation(self, prompt, cancel=cancel, **settings)

    def generate(self, prompt: str | list[int], *, cancel=None, **settings) -> Completion:
        """Continue a prompt and return the new text; as `stream`, in one go."""
        run = self.stream(prompt, cancel=cancel, **settings)
        for _ in run:
            pass
        return run.completion()

    def logits(self, prompt: str | list[int]) -> np.ndarray:
        """What the model expects after each token of a prompt: [n_tokens, vocab_size].

        Raises TinyllamaError where that doesn't fit into memory; so do `score` and `trace`.
        """
        tokens = self.tokens(prompt)
        self.check_memory(len(tokens), len(tokens), len(tokens))
        return self.forward(tokens, 0, self.new_cache(len(tokens)))

    def score(self, prompt: str | list[int], *, batch_size: int = 512, cancel=None) -> list[Token]:
        """How likely each token of a prompt is, given those before it; see `generation.score`."""
        return score(self, prompt, batch_size=batch_size, cancel=cancel)

    def trace(self, prompt: str | list[int], *patterns: str, cancel=None) -> dict[str, np.ndarray]:
        """Run a prompt and keep the intermediate values whose names match one of the patterns.

        Args:
            patterns: of shell style, "layers.*.attention.weights"; none at all keeps everything.
                `model.forward` lists the names.
            cancel: as of `forward`.
        Returns:
            name -> array, in the order in which they were computed.
        Raises:
            TinyllamaError: a pattern matches nothing.
        """
        tokens, kept = self.tokens(prompt), {}
        names = self._named(tap_shapes(self.config, len(tokens)), patterns)
        check_trace(self.config, self.backend.name, len(tokens), names)

        def tap(name, array):
            if name in names:
                kept[name] = array.copy()

        self.forward(tokens, 0, self.new_cache(len(tokens)), tap=tap, cancel=cancel)
        return kept

    @staticmethod
    def _named(names: Iterable[str], patterns: tuple[str, ...]) -> set[str]:
        """Those of the names that match a pattern, all if there is none."""
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise TinyllamaError(
                    f"nothing is named {pattern!r}: there are {', '.join(list(names)[:9])}, ..."
                )
        return {name for name in names if not patterns or any(fnmatchcase(name, p) for p in patterns)}

    def weight(self, name: str) -> np.ndarray:
        """A weight as float32 numbers, by its name in `Config.tensor_shapes` without ".weight".

        "layers.0.attention.wq" -> [n_out, n_in]; "output" is the embedding where the file has only one.

        Raises TinyllamaError if there is none of this name.
        """
        self._open()
        tensors = dict(self.checkpoint.tensors)
        if name == "output" and "output.weight" not in tensors:
            name = "tok_embeddings"
        if f"{name}.weight" not in tensors:
            raise TinyllamaError(
                f"{self.name} has no weight {name!r}: there are {', '.join(tensors)[:150]}, ..."
            )
        tensor = tensors[f"{name}.weight"]
        with unchanged(mapped_files(tensor.parts)):
            return as_numbers(tensor)

    def tokens(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt, with bos if the model wants it; ids are checked and passed on.

        Raises TinyllamaError if it is empty or an id is none of the vocabulary's.
        """
        if isinstance(prompt, str | bytes | list) and not prompt:
            raise TinyllamaError("the prompt is empty")
        tokens = self._encode(prompt)
        if not tokens:
            raise TinyllamaError("the prompt is empty: the vocabulary has no token for anything in it")
        wrong = [token for token in tokens if not 0 <= token < self.config.vocab_size]
        if wrong:
            raise TinyllamaError(f"token id {wrong[0]} is not in 0..{self.config.vocab_size - 1}")
        return tokens

    def _encode(self, prompt) -> list[int]:
        if isinstance(prompt, str | bytes):
            return self.tokenizer.encode(prompt, special=True)
        try:
            return list(map(operator.index, prompt))
        except TypeError:
            raise TinyllamaError(f"a prompt is text or a list of token ids, not {prompt!r:.60}") from None

    def forward(self, tokens: list[int], pos: int, cache, *, cancel=None, **options) -> np.ndarray:
        """`model.forward` with this model's weights and backend: [n_tokens, vocab_size].

        Args:
            cancel: an object with is_set(), looked at before every operation.
        Raises:
            Cancelled: the flag is set; the cache up to `pos` is still good.
            TinyllamaError: the model has been closed, or it is mapped and its file was changed; or the logits
                aren't numbers: with a `tap`, by which one may want to see why, they are returned.
        """
        backend = self.backend if cancel is None else stoppable(self.backend, cancel)
        with one_blas_thread(), unchanged(self._files):
            logits = forward(self._open(), backend, tokens, pos, cache, **options)
        if not options.get("tap"):
            self.check(logits, tokens, pos)
        return logits

    def check(self, logits: np.ndarray, tokens: list[int], pos: int = 0) -> None:
        """Raises TinyllamaError, naming the token, where logits, of tokens from `pos` on, aren't numbers."""
        wrong = np.flatnonzero(~np.isfinite(logits).all(axis=-1))
        if len(wrong):
            index = len(tokens) - len(logits) + int(wrong[0])
            piece = f"token {pos + index + 1} of the text, {self.tokenizer.piece(int(tokens[index]))!r:.40}"
            raise TinyllamaError(
                f"{self.checkpoint.path}: after {piece}, the model computes NaN or infinity: "
                "its file is damaged, or holds weights that are no numbers"
            )

    def unembed(self, residual: np.ndarray) -> np.ndarray:
        """What a residual stream says about the next token: [n_tokens, dim] -> logits [n_tokens, vocab_size].

        Of an earlier layer's residual ("layers.3.residual" of `trace`), what the model would say if it
        stopped there: the logit lens.
        """
        with one_blas_thread(), unchanged(self._files):
            return unembed(self._open(), self.backend, np.ascontiguousarray(residual, np.float32))

    def _open(self) -> Model:
        if self._model is None:
            raise TinyllamaError(f"{self.name} has been closed")
        return self._model

    def check_memory(self, n_ctx: int, at_once: int, n_logits: int = 1, n_scored: int = 0) -> None:
        """Refuse a run that doesn't fit into memory, as `memory.check_run` says."""
        check_run(self.config, self.backend.name, n_ctx, at_once, n_logits, n_scored)

    def new_cache(self, n_ctx: int):
        """An empty KV cache for n_ctx tokens. Raises TinyllamaError where it doesn't fit into memory."""
        self.check_memory(n_ctx, 0)
        return self.backend.new_cache(self.config, n_ctx)

    def default_ctx_size(self) -> int:
        """Tokens that a run of this model has room for if nobody says."""
        return default_ctx_size(self.config)

    def close(self) -> None:
        """Give the weights' memory back. Closing twice is fine; using it afterwards is an error."""
        self._model, self._files = None, []
        self.checkpoint.tensors.clear()
        with _lock:
            for key in [key for key, llama in _loaded.items() if llama is self]:
                del _loaded[key]

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Llama({self.name!r}, {self.n_params:,} weights, backend {self.backend.name!r})"


def _of_suspects(path: Path, names: list[str]) -> str:
    rest = f", and so do {len(names) - 1} others" if len(names) > 1 else ""
    return f"{path}: {names[0]} holds NaN or infinity{rest}: what is computed from that is no text"


def _bar(names: list[str]) -> Iterator[str]:
    """tqdm's bar, from half a second on: a small model is loaded before tqdm would be imported."""
    started, rest = time.perf_counter(), deque(names)
    while rest and time.perf_counter() < started + 0.5:
        yield rest.popleft()
    if rest:
        from tqdm.auto import tqdm

        n_done = len(names) - len(rest)
        yield from tqdm(rest, "load", len(names), initial=n_done, unit=" tensors", leave=False)


_loaded: dict[tuple, Llama] = {}  # the models loaded last, the newest at the end
_lock = threading.RLock()
KEPT = 2


def _after_fork() -> None:
    """In the child: a thread that it hasn't may have been loading."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load(
    model: str | Path = "small",
    backend: str | None = None,
    threads: int | None = None,
    *,
    mmap: bool = False,
    verbose: bool = False,
    progress: Callable | None = None,
) -> Llama:
    """Load a model, or return it if it is loaded already.

    Args:
        model: a GGUF file, a ggml file (the first part of several), a folder with Meta's checkpoint, or a
            name: "small" (it ships with tinyllama), "smollm2" (`tinyllama download smollm2`).
        backend: "c", "numexpr", "numpy" or "auto"; None asks TINYLLAMA_BACKEND.
        threads: None for one a core; on a Mac, one a fast core.
        mmap: leave the weights in their file, mapped. Loading takes no time, and the weights no memory but
            the page cache, which the system can take back; each token takes longer. The results are the same.
        verbose: say on stderr what it will need before loading.
        progress: wraps the iteration over the tensors as tqdm does, which shows a bar if nobody says.
    Raises:
        TinyllamaError: there is no such file, it is damaged, or there isn't the memory for it.
    """
    path = find(model)
    table = get_backend(backend, threads)
    key = (*_identity(path), table.name, table.threads, mmap)
    with _lock:
        if key in _loaded:
            _loaded[key] = _loaded.pop(key)
            return _loaded[key]
        checkpoint = open_checkpoint(path)
        needed = memory_needed(checkpoint, table.name, default_ctx_size(checkpoint.config), mmap=mmap)
        while _loaded and (len(_loaded) >= KEPT or sum(needed.values()) > resources.available_memory()):
            del _loaded[next(iter(_loaded))]
        check_load(path, needed, stays_in_file(checkpoint, table.name, mmap))
        if verbose:
            say = announcement_of_mapping if mmap else announcement
            print(say(path, needed), file=sys.stderr)
        _loaded[key] = Llama(checkpoint, table, str(model), mmap, progress)
        return _loaded[key]


def stream(
    prompt: str | list[int],
    model: str | Path = "small",
    *,
    backend: str | None = None,
    threads: int | None = None,
    mmap: bool = False,
    cancel=None,
    **settings,
) -> Generation:
    """Continue a prompt piece by piece: `load(...).stream(prompt, ...)`; arguments as of `generate`."""
    return _start(prompt, model, backend, threads, mmap, cancel=cancel, **settings)


def generate(prompt: str | list[int], model: str | Path = "small", **settings) -> Completion:
    """Continue a prompt and return the new text, a str that also knows its tokens, seed and timings.

    Args:
        prompt: text, or token ids.
        model, backend, threads, mmap: as `load` takes them.
        cancel: see `Llama.stream`.
        settings: the fields of `generation.Settings`: n_predict=128, seed=-1, temp=0.8, top_k=40, top_p=0.9,
            repeat_penalty=1.0, repeat_last_n=64, stop=(), batch_size=512, ctx_size=None, stages=False.
    Raises:
        TinyllamaError: no such model, a setting that makes no sense, a prompt that is empty or too long.
    """
    run = _start(prompt, model, **settings)
    for _ in run:
        pass
    return run.completion()


def _start(prompt, model, backend=None, threads=None, mmap=False, **settings) -> Generation:
    run = load(model, backend, threads, mmap=mmap).stream(prompt, **settings)
    for warning in run.warnings:
        warnings.warn(warning, stacklevel=3)  # where `stream` or `generate` was called
    return run


def _identity(path: Path) -> tuple:
    """Changes when a file of a model does, so that a new file under an old name is loaded anew."""
    path = path.resolve()
    folder = path if path.is_dir() else path.parent
    files = [*folder.glob("*" if path.is_dir() else f"{glob.escape(path.name)}*"), folder / "params.json"]
    files += [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    stats = [(str(file), file.stat()) for file in sorted(set(files)) if file.exists()]
    return (str(path), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
