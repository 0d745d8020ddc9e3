"""Much work in one process, and what it leaves behind: `python tests/soak.py tokens MODEL BACKEND N`.

    tokens MODEL BACKEND N   N tokens in runs of many lengths and contexts
    texts MODEL BACKEND N    N tokens in changing numbers of texts together, some of which are stopped
    loads MODEL BACKEND N    eight models of copies of a folder, loaded, used and unloaded N times

Prints JSON: resident bytes, file descriptors and threads when a tenth was done, and at the end.
"""

import gc
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

import tinyllama
from tinyllama.llama import _loaded
from tinyllama.machine.places import find

N_MODELS = 8


def tokens(model: str, backend: str, n: int) -> Iterator[int]:
    """Yields how many tokens there are so far."""
    llama, done = tinyllama.load(model, backend, 2, progress=iter), 0
    words = llama.tokens("Once upon a time there was a king who had three daughters and a dog. ") * 100
    while done < n:
        n_prompt = random.choice((1, 5, 30, 200))
        prompt = words[: min(n_prompt, llama.config.max_seq_len // 4)]
        ctx_size = random.choice((None, len(prompt) + 100, len(prompt) + 33))
        text = llama.generate(prompt, n_predict=random.randrange(1, 300), ctx_size=ctx_size, temp=1.2)
        done += len(text.tokens) + 1
        yield done


def texts(model: str, backend: str, n: int) -> Iterator[int]:
    """Yields how many tokens there are so far."""
    llama, done = tinyllama.load(model, backend, 2, progress=iter), 0
    words = llama.tokens("Once upon a time there was a king who had three daughters and a dog. ") * 30
    while done < n:
        n_texts = random.choice((1, 3, 8, 40))
        prompts = [[random.randrange(100), *words[: random.choice((1, 5, 30, 200))]] for _ in range(n_texts)]
        each = [{"n_predict": random.randrange(1, 60), "temp": 1.2, "ctx_size": 300} for _ in prompts]
        run = llama.stream(prompts, each=each)
        for index, _ in run:
            if random.random() < 0.01:
                run.stop(index if random.random() < 0.9 else None)
        done += sum(len(text.tokens) + 1 for text in run.generations)
        yield done


def loads(model: str, backend: str, n: int) -> Iterator[int]:
    """Yields how often all models have been loaded and unloaded."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [shutil.copytree(find(model), Path(folder) / str(number)) for number in range(N_MODELS)]
        for done in range(1, n + 1):
            models = [tinyllama.load(path, backend, 2, progress=iter) for path in paths]
            assert len({llama.generate("Once", n_predict=2, temp=0) for llama in models}) == 1
            for llama in models:
                llama.close()
            yield done


def state() -> dict:
    for llama in [*_loaded.values()]:
        llama.remembered.clear()
    gc.collect()
    process = psutil.Process()
    return {"rss": process.memory_info().rss, "fds": process.num_fds(), "threads": process.num_threads()}


def main(task: Callable, model: str, backend: str, n: int) -> None:
    random.seed(0)
    started, states, step = time.monotonic(), [], n / 10
    for done in task(model, backend, n):
        if done >= step * (len(states) + 1):
            states.append(state())
    print(json.dumps({"n": n, "seconds": time.monotonic() - started, "states": states, "pid": os.getpid()}))


if __name__ == "__main__":
    main(
        {"tokens": tokens, "texts": texts, "loads": loads}[sys.argv[1]],
        sys.argv[2],
        sys.argv[3],
        int(sys.argv[4]),
    )
