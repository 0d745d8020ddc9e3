"""The one place where a file, a tokenizer, a backend and the model meet."""

import math
import operator
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np

from .backends import OPTIONS, Backend, Packing, get_backend, over_forks
from .errors import TinyllamaError, require
from .formats import Checkpoint, default_model, open_checkpoint, stamp
from .formats.cache_file import read as read_cache
from .generation import Generation
from .model import Model, Step, build, forward_texts, unembed
from .ops import KVCache
from .settings import Settings, default_ctx_size
from .taps.edits import Editing, edited, is_edited
from .taps.names import matching
from .taps.watch import require_run, traced
from .texts.beginning import beginning
from .texts.completion import Completion, Token
from .texts.doubts import require_finite
from .texts.drafts import Pace
from .texts.keywords import settings_of, with_settings
from .texts.remembered import Remembered
from .texts.schedule import Texts, Together
from .texts.score import score
from .texts.templates import Template, template_source
from .tokenizer import make_tokenizer

KEPT = 2  # models that stay loaded
LOADING = ("backend", "threads", "mmap", *OPTIONS, "each", "cancel")  # what `generate` takes beside settings
SCORED = 3000  # bytes of a Token with its Stage, as `score` makes them


class Llama(AbstractContextManager):
    """A loaded model: text or token ids in, logits, intermediate values or text out.

    Made by `load`. Use it in a `with` statement, or `close()` it, to give its memory back.

    Attributes:
        checkpoint, config, tokenizer, backend: what it was made of.
        name: the name or path it was loaded by.
        mapped: its weights stay in their file.
        remembered, pace: the caches of the last texts; what their passes took: see `texts`.
        packing: of weights that begin there, how many are in memory now; see `backends.packing`.
        n_params: how many weights it has; an output matrix that is the embedding's counts once.
        load_seconds: how long `load` took.
    """

    def __init__(self, checkpoint: Checkpoint, backend: Backend, name: str, mmap=False, progress=iter):
        self.name, self.checkpoint, self.config, self.backend = name, checkpoint, checkpoint.config, backend
        self.tokenizer, self.load_seconds = make_tokenizer(checkpoint.vocabulary, checkpoint.path), 0.0
        self.n_params = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
        self.packing = Packing(backend, checkpoint.tensors, checkpoint.check_unchanged, mmap)
        self.mapped, self.remembered, self.pace = self.packing.mapped, Remembered(), Pace()
        self._templates: dict[str, Template] = {}
        self._model: Model | None = build(self.config, checkpoint.tensors, self.packing.prepare, progress)
        checkpoint.check_unchanged()
        self.packing.start(now=False)

    # --- text -------------------------------------------------------------------------------------

    @with_settings()
    def stream(self, prompt, *, each=None, cancel=None, **settings) -> "Generation | Texts":
        """Continue a prompt piece by piece; `settings.Settings` lists the settings.

        Args:
            prompt: text, or token ids; or a list of such, which are continued together.
            each: of several prompts, a dict for each with settings of its own.
            cancel: a threading.Event, say: when it is set, the text ends before the next layer at the latest.
        Returns:
            An iterator over pieces of text, which afterwards knows its `tokens`, `stop_reason`, `timings`
            and the whole `completion()`. Of several prompts, `texts.Texts`: pairs (index, piece).
        """
        if not (isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str | list | tuple)):
            require(each is None, "each has settings of several prompts, and there is one")
            text = self.begin(prompt, settings_of(**settings), self.remembered.recall, cancel)
            require_run(self, [text], text.cache.n_ctx)
            return text
        each = each or [{}] * len(prompt)
        require(len(each) == len(prompt), f"each names {len(each)} texts, and there are {len(prompt)}")
        wanted = [settings_of(**settings | own) for own in each]
        together = Together(self, max(some.batch_size for some in wanted), cancel)
        texts = [together.begin(one, some) for one, some in zip(prompt, wanted, strict=True)]
        require_run(self, texts, max(text.most for text in texts))
        return Texts(texts, together, partial(self.backend.running, cancel))

    def begin(self, prompt, wanted: Settings, recall: Callable, cancel=None) -> Generation:
        """A text before its first step; `stream` and `texts.Together` say how it runs."""
        return beginning(self, prompt, wanted, recall, load, cancel)

    @with_settings()
    def generate(self, prompt, *, each=None, cancel=None, **settings) -> Completion | list[Completion]:
        """Continue a prompt and return the new text, or of several prompts a list; as `stream`, in one go."""
        return self.stream(prompt, each=each, cancel=cancel, **settings).finish()

    @with_settings()
    def astream(self, prompt, **settings) -> AsyncIterator[str]:
        """As `stream`, in asyncio: `async for piece in llama.astream("Hi")`; cancelling ends the text."""
        from .texts.asynchronous import pieces_of  # here: asyncio takes as long to import as all the rest

        return pieces_of(self, prompt, **settings)

    @with_settings()
    def chat(self, messages: list[dict] | str, **settings) -> Completion:
        """Answer a chat, [{"role": "user", "content": "Hi"}], as its assistant; settings as of `generate`."""
        return self.generate(messages, **settings | {"chat": True})

    def template(self, wanted: str | None = None) -> Template | None:
        """The model's chat template, or one by its name or in Jinja; None where the model has none."""
        source = template_source(wanted) if wanted else self.checkpoint.template
        if source and source not in self._templates:
            self._templates[source] = Template(source, self.tokenizer)
        return self._templates.get(source)

    def tokens(self, prompt: str | list[int], n_ctx: int | None = None) -> list[int]:
        """The ids of a prompt, with bos if the model wants it; ids are checked and passed on.

        Args:
            n_ctx: the most that there may be.
        Raises TinyllamaError if it is empty or too long, or an id is none of the vocabulary's.
        """
        if isinstance(prompt, str | bytes):
            if n_ctx and len(prompt) > n_ctx:  # cutting takes a second a megabyte
                longest = max(map(len, self.tokenizer.vocabulary.pieces))
                size = f"{len(prompt)} characters, ctx_size is {n_ctx} tokens of at most {longest}"
                require(len(prompt) <= n_ctx * longest, f"the context is full: the prompt has {size}")
            with self.backend.running():
                ids = self.tokenizer.encode(prompt, special=True) if prompt else []
        else:
            try:
                ids = list(map(operator.index, prompt))
            except TypeError:
                raise TinyllamaError(f"a prompt is text or a list of token ids, not {prompt!r:.60}") from None
            wrong = [token for token in ids if not 0 <= token < self.config.vocab_size]
            require(not wrong, f"token id {wrong[:1]} is not in 0..{self.config.vocab_size - 1}")
        require(ids, "the prompt is empty, or has nothing in it that the vocabulary knows")
        full = f"the context is full: the prompt has {len(ids)} tokens, ctx_size is {n_ctx}"
        require(n_ctx is None or len(ids) <= n_ctx, full)
        return ids

    # --- numbers ----------------------------------------------------------------------------------

    def logits(self, prompt: str | list[int]) -> np.ndarray:
        """What the model expects after each token of a prompt: [n_tokens, vocab_size].

        Raises TinyllamaError where that doesn't fit into memory; so do `score` and `trace`.
        """
        ids = self.tokens(prompt)
        return self.forward(ids, self.new_cache(len(ids), at_once=len(ids), n_logits=len(ids)))

    def score(self, prompt: str | list[int], *, batch_size: int = 512, cancel=None) -> list[Token]:
        """How likely each token of a prompt is, given those before it; see `texts.score`."""
        ids = self.tokens(prompt)
        n = min(batch_size, len(ids))  # at once; of two batches there are logits
        cache = self.new_cache(len(ids), at_once=n, n_logits=2 * n, n_bytes=SCORED * len(ids))
        return score(partial(self.forward, cancel=cancel), self.tokenizer, cache, ids, batch_size)

    def trace(self, prompt: str | list[int], *patterns: str, cancel=None) -> dict[str, np.ndarray]:
        """Run a prompt and keep the intermediate values, name -> array in the order of computation.

        Args:
            patterns: of names in `model.tap_shapes`, in shell style: "layers.*.attention.weights", or of
                names that others have (`taps.names`); none keeps all. TinyllamaError if one matches nothing.
        """
        return traced(self, self.tokens(prompt), patterns, cancel)

    def edit(self, changes: dict[str, Callable]) -> AbstractContextManager:
        """Replace values while the model runs, inside of `with llama.edit({"norm": f}): ...`

        Args:
            changes: by a name, or a pattern as of `trace`: f(array), which returns another array of the same
                shape, or changes this one and returns None. `taps.edits` says more.
        """
        return Editing(self, changes)

    def forward(self, tokens: list[int], cache: KVCache, *, last=False, taps=None, cancel=None) -> np.ndarray:
        """`run` for one text: [n_tokens, vocab_size], or [1, vocab_size] of the last token."""
        known = {own: taps[name] for name, own in matching(self.config, [*taps]).items()} if taps else {}
        return self.run([Step(tokens, cache, 1 if last else len(tokens), known)], cancel=cancel)[0]

    def run(self, steps: Sequence[Step], *, cancel=None, checked: bool = True) -> list[np.ndarray]:
        """`model.forward_texts` with this model's weights and backend: of each [n_logits, vocab_size].

        Args:
            cancel: an object with is_set(), looked at before every layer.
        Raises:
            Cancelled: the flag is set; the caches hold what they held before.
            KeyboardInterrupt: at the next layer after Ctrl-C; after the last, the caches have these tokens.
            TinyllamaError: the model has been closed, or weights are in its file and that was changed, or
                logits are NaN or infinite (unless `checked` is False: one may look for the cause).
        """
        model = self.model()
        with self.backend.running(cancel):
            steps = [edited(self, step) for step in steps] if is_edited(self) else steps
            found = forward_texts(model, self.backend, steps)
        self.model()
        self.packing.start()
        for step, logits in zip(steps, found, strict=True):
            if checked:
                require_finite(self, logits, step.cache.ids)
        return found

    def unembed(self, residual: np.ndarray) -> np.ndarray:
        """As `model.unembed`, of a residual stream of `trace`: of an earlier layer's it is the logit lens."""
        with self.backend.running():
            return self.backend.to_numpy(unembed(self.model(), self.backend, residual))

    def weight(self, name: str) -> np.ndarray:
        """A weight as float32 numbers, by its name in `Config.tensor_shapes` without ".weight".

        "layers.0.attention.wq" -> [n_out, n_in]; "output" is the embedding where the file has only one.

        Raises TinyllamaError if there is none of this name.
        """
        self.model()
        tensors = {key.removesuffix(".weight"): tensor for key, tensor in self.checkpoint.tensors.items()}
        tensors.setdefault("output", tensors["tok_embeddings"])
        require(name in tensors, f"no weight is named {name!r}: there are {', '.join(tensors)[:150]}, ...")
        numbers = np.array(tensors[name].dequantize())
        self.checkpoint.check_unchanged()
        return numbers

    def new_cache(self, n_ctx: int, **run) -> KVCache:
        """An empty KV cache for n_ctx tokens; `run`, as `Backend.require_run` takes it: what it is for.

        Raises TinyllamaError where cache and computation don't fit into memory.
        """
        run["tapped"] = run.get("tapped") or is_edited(self)
        self.backend.require_run(self.config, n_ctx, **run)
        return self.backend.new_cache(self.config, n_ctx, self.checkpoint)

    def load_cache(self, path: str | Path, n_ctx: int | None = None, mapped: bool = False) -> KVCache:
        """What `KVCache.save` wrote, with room for n_ctx tokens; `formats.cache_file.read` says the rest."""
        empty = self.new_cache(n_ctx or default_ctx_size(self.config))
        return read_cache(path, empty, self.config.vocab_size, mapped)

    def model(self) -> Model:
        require(self._model is not None, f"{self.name} has been closed")
        self.packing.check()
        return self._model

    def close(self) -> None:
        """Give the weights' memory back. Closing twice is fine; using it afterwards is an error."""
        self._model = None
        self.packing.stop()
        self.remembered.clear()
        self.checkpoint.tensors.clear()
        with _lock:
            for key in [key for key, llama in _loaded.items() if llama is self]:
                del _loaded[key]

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Llama({self.name!r}, {self.n_params:,} weights, backend {self.backend.name!r})"


# --- by name --------------------------------------------------------------------------------------

_loaded: dict[tuple, Llama] = {}  # the models loaded last, the newest at the end
_lock = over_forks(threading.RLock())


def load(
    model: str | Path | None = None,
    backend: str | None = None,
    threads: int | None = None,
    *,
    mmap: bool = False,
    announce: Callable[[Path, dict[str, int], bool], None] | None = None,
    progress: Callable = iter,
    **options,
) -> Llama:
    """Load a model on this computer, or return it if it is loaded already.

    `tinyllama.load` says what the arguments are, and how the way leads to several machines.
    """
    model = default_model() if model is None else model
    require(isinstance(mmap, bool), f"mmap must be True or False, not {mmap!r:.80}")
    table, started = get_backend(backend, threads, **options), time.perf_counter()
    with _lock, table.running():
        key = (stamp(model), table.name, table.threads, mmap, *map(options.get, OPTIONS))
        if key not in _loaded:
            checkpoint = open_checkpoint(model)
            n_ctx = default_ctx_size(checkpoint.config)
            needed = table.memory(checkpoint.config, checkpoint.tensors, n_ctx, mmap=mmap)
            while _loaded and (len(_loaded) >= KEPT or not table.has_memory(needed)):
                del _loaded[next(iter(_loaded))]
            mapped = table.keeps_in_file(checkpoint.tensors, mmap)
            if mmap and not mapped:
                warnings.warn(f"mmap is ignored: backend {table.name} copies all weights", stacklevel=2)
            table.require_load(checkpoint.path, needed, mapped)
            if announce:
                announce(checkpoint.path, needed, mapped)
            name = str(Path(model).absolute() if Path(model).exists() else model)  # right after chdir, too
            _loaded[key] = Llama(checkpoint, table, name, mmap, progress)
            _loaded[key].load_seconds = time.perf_counter() - started
        _loaded[key] = _loaded.pop(key)
        return _loaded[key]


@with_settings(*LOADING)
def stream(prompt, model: str | Path | None = None, **settings) -> Generation | Texts:
    """Continue a prompt, or several, piece by piece, as `Llama.stream`; arguments as of `generate`."""
    return _start(prompt, model, **settings)


@with_settings(*LOADING)
def generate(prompt, model: str | Path | None = None, **settings) -> Completion | list[Completion]:
    """Continue a prompt and return the new text, a str that also knows its tokens, seed and timings.

    Args:
        prompt: text, or token ids. Of a list of such, all are continued together, and a list comes back.
        model, backend, threads, mmap, dtype, inexact_as, gpu_layers: of `load`; each, cancel: `Llama.stream`.
        settings: the fields of `settings.Settings`: n_predict=128, seed=-1, temp=0.8, top_k=40, ...
    Raises:
        TinyllamaError: no such model, a setting that makes no sense, a prompt that is empty or too long.
    """
    return _start(prompt, model, **settings).finish()


def _start(prompt, model, backend=None, threads=None, mmap=False, **settings) -> Generation | Texts:
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    started = load(model, backend, threads, mmap=mmap, **options).stream(prompt, **settings)
    for text in getattr(started, "generations", [started]):
        for warning in text.warnings:
            warnings.warn(warning, stacklevel=3)  # where `stream` or `generate` was called
    return started
