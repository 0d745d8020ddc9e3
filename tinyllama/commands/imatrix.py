"""Importance matrices: how large the inputs of each matrix of a model are on a text, for `quantize`.

It is collected as llama-imatrix does: the text is cut into chunks as for perplexity (texts/perplexity.py),
every token of a chunk counts, and the squares of what each matrix is multiplied with are added up.
"""

import math
import time
import warnings
from contextvars import Context
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np

from ..config import OUTPUT, Config
from ..errors import Cancelled, require
from ..formats.headers import gguf_names
from ..formats.imatrix import ImportanceMatrix
from ..llama import Llama, load
from ..machine.terminal import say
from ..model import Step
from ..taps.names import INPUTS
from ..texts.perplexity import SHORTEST, nll_of, windows_of
from .outputs import require_new

OFTEN = 10.0  # seconds after which what has been collected is written


def imatrix(
    model: Llama | str | Path,
    text: str | bytes,
    ctx_size: int = 512,
    batch_size: int = 512,
    *,
    chunks: int | None = None,
    parse_special: bool = False,
    process_output: bool = False,
    ppl: bool = True,
    path: str | Path | None = None,
    dataset: str = "",
    progress: bool = True,
    **loading,
) -> ImportanceMatrix:
    """Collect how large the inputs of each matrix are on a text.

    Args:
        model: a `Llama`, or what `load` takes.
        ctx_size: tokens in a chunk.
        batch_size: tokens that go through the model at once; more are faster and take more memory.
        chunks: use the first so many; None: all.
        parse_special: special tokens that the text writes out are such; else they are plain text.
        process_output: collect for the output matrix, too.
        ppl: show the perplexity in the bar, which takes the logits of half the tokens.
        path: of a file to write, now and then and at the end; a run that is stopped leaves what it had.
        dataset: what the file says the text came from.
        progress: show a bar.
        loading: as of `load`.
    Raises:
        TinyllamaError: the text doesn't fill a chunk, a size makes no sense, the model computes NaN or
            infinity, or the file can't be written.
    """
    from tqdm.auto import tqdm  # here, since whoever writes a text needs none

    n_chunks = 1 if chunks is None else chunks
    sizes = ("ctx_size", ctx_size, SHORTEST), ("batch_size", batch_size, 1), ("chunks", n_chunks, 1)
    for name, size, least in sizes:
        whole = isinstance(size, Integral) and size >= least
        require(whole, f"{name} must be at least {least}, a whole number, not {size!r:.60}")
    require(isinstance(text, str | bytes) and text, f"there is no text to run, but {text!r:.60}")
    require_new([path], [model.name if isinstance(model, Llama) else model])
    llama = model if isinstance(model, Llama) else load(model, **loading)
    if process_output and OUTPUT not in llama.checkpoint.tensors:
        process_output, why = False, "the output matrix of this model is its embedding"
        warnings.warn(f"process_output is ignored: {why}", stacklevel=2)
    with llama.backend.running():
        windows = windows_of(llama.tokenizer, text, ctx_size, parse_special)[:chunks]
        sums = Sums(llama, ctx_size, batch_size, process_output, ppl)
        saved = time.monotonic()
        try:
            with tqdm(windows, "imatrix", unit=" chunks", disable=not progress) as bar:
                for window in bar:
                    sums.add(window)
                    bar.set_postfix_str(f"perplexity {sums.perplexity:.4f}" if ppl else "")
                    if path and time.monotonic() > saved + OFTEN:
                        sums.result(dataset).write(path)
                        saved = time.monotonic()
        except Cancelled:
            if path and sums.n_chunks:
                Context().run(sums.result(dataset).write, path)  # there nothing says that it is cancelled
                say(f"{path}: has what the first {sums.n_chunks} of {len(windows)} chunks gave")
            raise
        found = sums.result(dataset)
        if path:
            found.write(path)
    return found


class Sums:
    """Sums of the squares of all inputs, to which chunks of a text are added.

    Attributes:
        n_chunks: how many have been added.
    """

    def __init__(self, llama: Llama, ctx_size: int, batch_size: int, process_output: bool, ppl: bool):
        self._llama, self._batch_size, self._all_logits, self._ppl = llama, batch_size, process_output, ppl
        self.n_chunks, self._chunk_size, self._nlls, self._sums, self._chunk = 0, ctx_size, [], {}, {}
        at_once = min(batch_size, ctx_size)
        self._cache = llama.new_cache(ctx_size, at_once=at_once, n_logits=2 * at_once)  # and those before
        self._matrices = _matrices_by_input(llama.config, process_output)
        self._taps = {name: partial(self._see, name) for name in self._matrices}

    def _see(self, name: str, inputs: np.ndarray) -> None:
        squares = np.square(inputs).sum(axis=0, dtype=np.float64)
        require(np.isfinite(squares).all(), f"{self._llama.name}: {name} holds NaN or infinity")
        self._chunk[name] = self._chunk.get(name, 0) + squares

    def add(self, chunk: np.ndarray) -> None:
        """Add a chunk, ids [chunk_size]: all of it, or nothing where it is cancelled."""
        self._cache.trim(0)
        self._chunk, nlls, first = {}, [], len(chunk) // 2
        for start in range(0, len(chunk), self._batch_size):
            ids = chunk[start : start + self._batch_size]
            stop = start + len(ids)
            n_scored = min(len(ids), max(stop - first, 0)) * self._ppl
            n_logits = len(ids) if self._all_logits else n_scored
            (logits,) = self._llama.run([Step(ids, self._cache, n_logits, self._taps)])
            targets = chunk[stop - n_scored + 1 : stop + 1]  # the last one's isn't in the chunk
            nlls.append(nll_of(logits[n_logits - n_scored :][: len(targets)], targets))
        self._sums = {name: self._sums.get(name, 0) + squares for name, squares in self._chunk.items()}
        self._nlls += nlls
        self.n_chunks += 1

    @property
    def perplexity(self) -> float:
        """Of all chunks until now."""
        mean = np.concatenate(self._nlls).mean()
        return math.exp(mean) if mean < 709 else math.inf  # as of a model made of noise

    def result(self, dataset: str) -> ImportanceMatrix:
        """What has been added up."""
        sums = {}
        for name, squares in self._sums.items():
            sums |= dict.fromkeys(self._matrices[name], squares.astype(np.float32))
        counts = dict.fromkeys(sums, self.n_chunks * self._chunk_size)
        return ImportanceMatrix(sums, counts, (dataset,) * bool(dataset), self.n_chunks, self._chunk_size)


def _matrices_by_input(config: Config, process_output: bool) -> dict[str, list[str]]:
    """The matrices, by GGUF's names, that each value is the input of."""
    names, found = gguf_names(config), {}
    for layer in range(config.n_layers):
        for matrix, value in INPUTS.items():
            gguf = names[f"layers.{layer}.{matrix}.weight"]
            found.setdefault(f"layers.{layer}.{value}", []).append(gguf)
    return found | ({"norm": [names[OUTPUT]]} if process_output else {})
