"""How long Stop takes while a prompt is read and while text is written: `python benchmarks/stop.py 7B c`.

A layer of a shape with random weights, over and over, and a flag that is set at random moments as the
playground sets it: the time until `Cancelled` comes. One layer is as good as many, since the flag is looked
at before every layer.
"""

import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np

from tinyllama.backends import get_backend
from tinyllama.commands.bench import RandomWeights
from tinyllama.config import PRESETS
from tinyllama.errors import Cancelled, cancellable
from tinyllama.lab.widgets.session import batch_size
from tinyllama.model import Step, build, run_layers

CONTEXT, TRIALS = 2048, 25


def delays(model, backend, n_tokens: int) -> list[float]:
    """Seconds from the flag to the end, of TRIALS runs of the last tokens of a long prompt."""
    cache, rng, found = backend.new_cache(model.config, CONTEXT), np.random.default_rng(0), []
    for array in cache.room(0, CONTEXT - n_tokens):
        array[:] = 0  # the tokens before, which nobody has computed: room is memory as it was found
    cache.ids += [0] * (CONTEXT - n_tokens)
    step = Step([0] * n_tokens, cache)
    run = partial(run_layers, model, backend, np.ones((n_tokens, model.config.dim), np.float32), [step])
    run()
    started = time.perf_counter()
    run()
    once = time.perf_counter() - started
    for _ in range(TRIALS):
        flag, at = threading.Event(), []
        threading.Timer(rng.uniform(0, once), _stop, (flag, at)).start()
        try:
            with cancellable(flag):
                while True:
                    run()
        except Cancelled:
            found.append(time.perf_counter() - at[0])
    return found


def _stop(flag: threading.Event, at: list[float]) -> None:
    at.append(time.perf_counter())
    flag.set()


def main(shape: str, name: str) -> None:
    config, backend = replace(PRESETS[shape], n_layers=1, vocab_size=32), get_backend(name)
    model = build(config, RandomWeights(config, "q4_0"), partial(backend.prepare, copy=name == "c"))
    for n_tokens in (batch_size(config), 1):
        with backend.running():
            found = delays(model, backend, n_tokens)
        times = f"median {1000 * np.median(found):4.0f} ms, longest {1000 * max(found):4.0f} ms"
        print(f"{shape:4} {name:6} {n_tokens:3} tokens at once: {times}", flush=True)


if __name__ == "__main__":
    pairs = sys.argv[1:] or ["7B", "c", "13B", "c", "65B", "c", "7B", "numpy", "65B", "numpy"]
    for shape, name in zip(pairs[::2], pairs[1::2], strict=True):
        main(shape, name)
