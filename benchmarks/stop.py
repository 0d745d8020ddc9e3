"""How long Stop takes while a prompt is read and while text is written: `python benchmarks/stop.py 7B c`.

A layer of a shape with random weights, over and over, and a flag that is set at random moments as the
playground sets it: the time until `Cancelled` comes. One layer is as good as many, since the flag is looked
at before every operation.
"""

import sys
import threading
import time
from dataclasses import replace

import numpy as np

from tinyllama.backends import get_backend, one_blas_thread, stoppable
from tinyllama.commands.bench import RandomWeights
from tinyllama.config import PRESETS
from tinyllama.errors import Cancelled
from tinyllama.model import build, forward
from tinyllama.lab.widgets.worker import batch_size

CONTEXT, TRIALS = 2048, 25


def delays(model, backend, n_tokens: int) -> list[float]:
    """Seconds from the flag to the end, of TRIALS runs of the last tokens of a long prompt."""
    cache, rng, found = backend.new_cache(model.config, CONTEXT), np.random.default_rng(0), []
    tokens = np.zeros(n_tokens, np.int64)
    started = time.perf_counter()
    forward(model, backend, tokens, CONTEXT - n_tokens, cache, last=True)
    once = time.perf_counter() - started
    for _ in range(TRIALS):
        flag, at = threading.Event(), []
        threading.Timer(rng.uniform(0, once), _stop, (flag, at)).start()
        try:
            while True:
                forward(model, stoppable(backend, flag), tokens, CONTEXT - n_tokens, cache, last=True)
        except Cancelled:
            found.append(time.perf_counter() - at[0])
    return found


def _stop(flag: threading.Event, at: list[float]) -> None:
    at.append(time.perf_counter())
    flag.set()


def main(shape: str, name: str) -> None:
    config = replace(PRESETS[shape], n_layers=1)
    backend = get_backend(name)
    model = build(
        config, RandomWeights(config, "q4_0"), lambda tensor: backend.prepare(tensor, copy=name == "c")
    )
    for n_tokens in (batch_size(config), 1):
        with one_blas_thread():
            found = delays(model, backend, n_tokens)
        times = f"median {1000 * np.median(found):4.0f} ms, longest {1000 * max(found):4.0f} ms"
        print(f"{shape:4} {name:6} {n_tokens:3} tokens at once: {times}", flush=True)


if __name__ == "__main__":
    pairs = sys.argv[1:] or ["7B", "c", "13B", "c", "65B", "c", "7B", "numpy", "65B", "numpy"]
    for shape, name in zip(pairs[::2], pairs[1::2], strict=True):
        main(shape, name)
