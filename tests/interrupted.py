"""Ctrl-C at random moments: `python tests/interrupted.py MODEL BACKEND N [--mmap] [--only load,prefill]`.

N times in each step. Prints how long each took to be heard, as JSON; fails where the model doesn't then say
what it said before.
"""

import argparse
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable

import numpy  # noqa: F401, whose BLAS is looked at
from threadpoolctl import threadpool_info

import tinyllama

PROMPT = "Once upon a time there was a little girl who lived near the forest, and "
STEPS = ("load", "tokens", "prefill", "decode", "score", "trace")


class Trial:
    """The steps that are interrupted, and what a model must say afterwards."""

    def __init__(self, model: str, backend: str, mmap: bool, n_prompt: int):
        self.load = lambda: tinyllama.load(model, backend, 2, mmap=mmap)
        self.prompt = (self.load().tokens(PROMPT) * n_prompt)[:n_prompt]
        self.expected = self.answer()

    def answer(self) -> tuple:
        """What the model says, to the bit."""
        llama = self.load()  # which it is already, unless that was interrupted
        text = llama.generate(self.prompt[:9], temp=0.9, seed=4, n_predict=6)
        return str(text), llama.logits(self.prompt[:5]).tobytes()

    def step(self, name: str) -> Callable:
        tokens = self.prompt
        return {
            "load": lambda: (self.load().close(), self.load()),
            "tokens": lambda: self.load().tokens(PROMPT * 2000 + "a" * 100_000),
            "prefill": lambda: self.load().logits(tokens),
            "decode": lambda: self.load().generate(tokens[:4], n_predict=24, temp=0),
            "score": lambda: self.load().score(tokens[:64]),
            "trace": lambda: self.load().trace(tokens[:32], "*.weights"),
        }[name]

    def interrupt(self, name: str, n: int) -> list[float]:
        """Do a step n times, each time interrupted at a random moment; look at the model after each.

        Returns seconds from each signal to the KeyboardInterrupt.
        """
        run, heard = self.step(name), []
        started = time.perf_counter()
        run()
        lasts = time.perf_counter() - started
        for _ in range(n):
            heard.append(interrupted(run, random.uniform(0, lasts)))
            assert self.answer() == self.expected, f"another answer after an interrupt of {name}"
        return heard


def interrupted(run: Callable, delay: float) -> float:
    """Send SIGINT after some seconds, whether or not `run` has ended; how long it took to be heard."""
    sent = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(delay, send)
    try:
        timer.start()
        run()
        for _ in range(600):  # one long sleep would not end for a signal that comes just before it
            time.sleep(0.1)
    except KeyboardInterrupt:
        return time.perf_counter() - sent[0]
    raise AssertionError("no signal came")


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("backend")
    parser.add_argument("n", type=int)
    parser.add_argument("--mmap", action="store_true")
    parser.add_argument("--prompt", type=int, default=96, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(STEPS))
    args = parser.parse_args()
    random.seed(args.seed)
    blas = blas_threads()
    trial = Trial(args.model, args.backend, args.mmap, args.prompt)
    heard = {name: trial.interrupt(name, args.n) for name in args.only.split(",")}
    assert blas_threads() == blas, "BLAS did not get its threads back"
    print(json.dumps({"heard": heard}))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started in the background ignores it
    main()
