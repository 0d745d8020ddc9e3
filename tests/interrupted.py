"""Interrupts at random moments: `python tests/interrupted.py MODEL BACKEND N [--mmap] [--only load,prefill]`.

MODEL is a file, a name, or a size, "7B": a few layers of random weights, in a temporary file.

A timer's signal raises KeyboardInterrupt as Ctrl-C and a notebook's interrupt do, N times in each step.
Prints how long each took to be heard, as JSON; fails where the model doesn't then say what a fresh one says.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from threadpoolctl import threadpool_info

import tinyllama
from tinyllama import llama as llama_module
from tinyllama.commands.bench import RandomWeights
from tinyllama.config import PRESETS
from tinyllama.machine.download import small_folder
from tinyllama.formats import gguf
from tinyllama.vocabulary import NORMAL, vocabulary_from_model

PROMPT = "Once upon a time there was a little girl who lived near the forest, and "


def write_shape(path: Path, shape: str, n_layers: int) -> None:
    """A GGUF file of q4_0 weights of a size with few layers, which are as good as many."""
    config = replace(PRESETS[shape], n_layers=n_layers, vocab_size=32000)
    words = vocabulary_from_model(small_folder() / "tokenizer.model")
    more = range(config.vocab_size - len(words.pieces))
    words = replace(
        words,
        model=None,
        pieces=words.pieces + tuple(f"unused {number}" for number in more),
        scores=words.scores + (-1e9,) * len(more),
        types=words.types + (NORMAL,) * len(more),
    )
    weights = RandomWeights(config, "q4_0")
    shapes = config.tensor_shapes().items()
    infos = [(name, "f32" if len(shape) == 1 else "q4_0", shape) for name, shape in shapes]
    head, offsets, size = gguf.header(config, words, infos, gguf.FILE_TYPES["q4_0"], shape)
    with path.open("wb") as file:
        file.truncate(size)
        file.write(head)
        for (name, *_), offset in zip(infos, offsets, strict=True):
            file.seek(offset)
            file.write(weights[name].parts[0].tobytes())


class Trial:
    """The steps that are interrupted, and what a model must say afterwards.

    Attributes:
        heard: step -> seconds from each signal to the KeyboardInterrupt.
        missed: step -> how many signals came too late.
    """

    def __init__(self, model: str, backend: str, mmap: bool, n_prompt: int):
        self.load = lambda: tinyllama.load(model, backend, 2, mmap=mmap)
        self.llama = self.load()
        self.prompt = (self.llama.tokens(PROMPT) * n_prompt)[:n_prompt]
        self.expected = self.answer()
        self.heard, self.missed = {}, {}

    def answer(self) -> tuple:
        """What this model says, to the bit."""
        text = self.llama.generate(self.prompt[:9], temp=0.9, seed=4, n_predict=6)
        return str(text), self.llama.logits(self.prompt[:5]).tobytes()

    def steps(self) -> dict[str, Callable]:
        tokens = self.prompt
        return {
            "load": self.load_again,
            "prefill": lambda: self.llama.generate(tokens, n_predict=1),
            "decode": lambda: self.llama.generate(tokens[:4], n_predict=24, temp=0),
            "score": lambda: self.llama.score(tokens[:64]),
            "trace": lambda: self.llama.trace(tokens[:32], "*.weights"),
            "with": self.with_load,
        }

    def load_again(self) -> None:
        llama_module._loaded.clear()
        self.llama = None  # or there would be two of them in memory
        self.llama = self.load()

    def with_load(self) -> None:
        self.load_again()
        with self.llama as llama:
            llama.generate(self.prompt[:4], n_predict=8)

    def interrupt(self, step: str, n: int) -> None:
        """Do a step n times, each time interrupted at a random moment; look at the model after each."""
        run, heard = self.steps()[step], self.heard.setdefault(step, [])
        started = time.perf_counter()
        run()
        lasts = time.perf_counter() - started
        for _ in range(n):
            delay = random.uniform(0.0001, lasts)
            started = time.perf_counter()
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                run()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                heard.append(time.perf_counter() - started - delay)
            else:
                self.missed[step] = self.missed.get(step, 0) + 1
            if self.llama is None or self.llama._model is None:
                self.load_again()
            assert self.answer() == self.expected, f"another answer after an interrupt of {step}"


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def others() -> set[int]:
    """The bare threads that run Python: those of products and of long texts."""
    return sys._current_frames().keys() - {thread.ident for thread in threading.enumerate()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("backend")
    parser.add_argument("n", type=int)
    parser.add_argument("--mmap", action="store_true")
    parser.add_argument("--prompt", type=int, default=96, help="tokens")
    parser.add_argument("--layers", type=int, default=2, help="of a size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="load,prefill,decode,score,trace,with")
    args = parser.parse_args()
    random.seed(args.seed)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    blas = blas_threads()
    folder = tempfile.TemporaryDirectory()
    if args.model in PRESETS:
        path = Path(folder.name) / f"{args.model}.gguf"
        write_shape(path, args.model, args.layers)
        args.model = path
    trial = Trial(args.model, args.backend, args.mmap, args.prompt)
    for step in args.only.split(","):
        trial.interrupt(step, args.n)
    deadline = time.monotonic() + 5
    while others() and time.monotonic() < deadline:  # jobs that were begun
        time.sleep(0.01)
    assert not others(), others()
    assert blas_threads() == blas, "BLAS did not get its threads back"
    print(json.dumps({"heard": trial.heard, "missed": trial.missed}))


if __name__ == "__main__":
    main()
