"""cluster.py [MODEL] [ROUNDS] measures a batch on clusters of one and of two workers with one thread each.

It prints the lines a second of each round, in turns, then the medians and their ratio; and the machine's own
limit: how much longer one text takes while another process computes one on another core.
"""

import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import tinyllama
from tinyllama.cluster.connect import connected
from tinyllama.cluster.spread import Spread
from tinyllama.commands.batch import Batch, Lines

N_LINES, N_TOKENS = 256, 48
PROMPTS = ("Once upon a time", "Tom", "The old king had three daughters, and", "In the forest")


def written(path: Path) -> Path:
    bodies = [{"prompt": PROMPTS[n % 4], "max_tokens": N_TOKENS} for n in range(N_LINES)]
    lines = [{"method": "POST", "url": "/v1/completions", "body": body} for body in bodies]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_a_second(client, model: str, folder: Path) -> float:
    """Of a batch on workers that have loaded the model."""
    source, target = written(folder / "in.jsonl"), folder / "out.jsonl"
    target.unlink(missing_ok=True)
    started = time.perf_counter()
    with Spread(client, model, model, None, 512) as spread, Lines(str(source)) as lines:
        Batch(spread, model, seed=1).run(lines, target, lambda _: None)
    return N_LINES / (time.perf_counter() - started)


def one_text(model: str) -> float:
    """Seconds of a text alone, without loading."""
    llama = tinyllama.load(model, threads=1)
    llama.generate("Once upon a time", n_predict=4, remember=False)
    started = time.perf_counter()
    llama.generate("Once upon a time", n_predict=8 * N_TOKENS, temp=0, remember=False)
    return time.perf_counter() - started


def main(model: str = "small", rounds: int | str = 5) -> None:
    found: dict[int, list[float]] = {1: [], 2: []}
    with (
        TemporaryDirectory() as name,
        connected(processes=1, threads=1) as one,
        connected(processes=2, threads=1) as two,
    ):
        folder = Path(name)
        for client in (one, two):
            lines_a_second(client, model, folder)  # loads the model
        for _ in range(int(rounds)):
            for n_workers, client in ((1, one), (2, two)):
                found[n_workers].append(lines_a_second(client, model, folder))
                print(f"{n_workers} workers: {found[n_workers][-1]:7.2f} lines/s", flush=True)
    medians = {n_workers: statistics.median(speeds) for n_workers, speeds in found.items()}
    print(f"medians: {medians[1]:.2f} and {medians[2]:.2f} lines/s, ratio {medians[2] / medians[1]:.2f}")
    with ProcessPoolExecutor(2) as pool:
        alone = statistics.median(pool.submit(one_text, model).result() for _ in range(3))
        both = statistics.median(max(pool.map(one_text, [model] * 2)) for _ in range(3))
    print(f"the machine: two texts on two cores are {2 * alone / both:.2f} times as fast as one on one")


if __name__ == "__main__":
    main(*sys.argv[1:])
