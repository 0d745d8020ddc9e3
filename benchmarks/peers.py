"""The same file on the same threads in tinyllama and in llama-cpp-python, one after the other, in turns.

    python benchmarks/peers.py model.gguf [--threads 2] [--rounds 5]

Every round runs each program in a fresh process: it loads the file, reads a short prompt (which gives the
first token), reads prompts of 32, 128 and 512 tokens, and writes tokens one by one. The table gives medians
over the rounds, and how many times better tinyllama is. The first round, which brings the file into the
system's page cache, isn't counted. Memory is the most that the process had, mapped pages included.

llama-cpp-python has to be built for this computer, or it isn't a fair comparison, and by clang: what GCC 12
makes of its AMX kernels crashes (it keeps only the first 8 bytes of the tile configuration). That takes a
quarter of an hour:

    export CC=clang CXX=clang++ CMAKE_ARGS=-DGGML_NATIVE=ON
    pip install --no-binary llama-cpp-python llama-cpp-python
"""

import argparse
import importlib.util
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from tinyllama.machine.limits import default_threads, human, peak_memory

PROMPTS = (32, 128, 512)
FIRST, WRITTEN, N_CTX = 8, 32, 1024


class Tinyllama:
    """tinyllama on its fastest backend."""

    package = "tinyllama"

    def __init__(self, path: Path, threads: int):
        import tinyllama

        self._llama = tinyllama.load(path, threads=threads)
        self._cache = self._llama.new_cache(N_CTX)

    def run(self, tokens: list[int], pos: int) -> None:
        """The logits that follow tokens, the first of which stands at `pos`."""
        self._cache.trim(pos)
        self._llama.forward(tokens, self._cache, last=True)


class LlamaCpp:
    """llama-cpp-python with its own settings, except that nothing goes to a GPU."""

    package = "llama_cpp"

    def __init__(self, path: Path, threads: int):
        import llama_cpp

        self._llama = llama_cpp.Llama(
            str(path), n_ctx=N_CTX, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
        )

    def run(self, tokens: list[int], pos: int) -> None:
        """As Tinyllama.run."""
        self._llama.n_tokens = pos
        self._llama.eval(tokens)


PROGRAMS = {"tinyllama": Tinyllama, "llama-cpp-python": LlamaCpp}


def measure(name: str, path: Path, threads: int) -> dict[str, float]:
    """Run one program in this process: seconds to the first token, tokens a second, bytes of memory."""
    importlib.import_module(PROGRAMS[name].package)
    started = time.perf_counter()
    running = PROGRAMS[name](path, threads)
    running.run(_tokens(FIRST), 0)
    found = {"first token": time.perf_counter() - started}
    for length in PROMPTS:
        found[f"read {length}"] = length / _seconds(running.run, _tokens(length), 0)
    found["write"] = 1 / median(_seconds(running.run, [300], FIRST + i) for i in range(WRITTEN))
    return found | {"memory": peak_memory()}


def _tokens(n: int) -> list[int]:
    return list(range(300, 300 + n))


def _seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def in_turns(path: Path, threads: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each program took in every round but the first."""
    found = {name: [] for name in PROGRAMS}
    for _ in range(rounds + 1):
        for name in PROGRAMS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found[name].append(process.submit(measure, name, path, threads).result())
    return {name: results[1:] for name, results in found.items()}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians, a line a figure, and how many times faster (or smaller) tinyllama is."""
    lines = [f"{'':12} {'tinyllama':>12} {'llama.cpp':>12} {'ratio':>7}"]
    for key in next(iter(found.values()))[0]:
        ours, theirs = (median(result[key] for result in found[name]) for name in PROGRAMS)
        less_is_better = key in ("first token", "memory")
        ratio = theirs / ours if less_is_better else ours / theirs
        lines.append(f"{key:12} {_shown(key, ours):>12} {_shown(key, theirs):>12} {ratio:>7.2f}")
    return "\n".join(lines)


def _shown(key: str, value: float) -> str:
    if key == "memory":
        return human(value)
    return f"{value:.2f} s" if key == "first token" else f"{value:.1f}/s"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if importlib.util.find_spec(LlamaCpp.package) is None:
        sys.exit("peers.py: llama-cpp-python isn't installed; the head of this file says how to build it")
    if not args.file.is_file():
        sys.exit(f"peers.py: {args.file}: there is no such file")
    print(f"{args.file.name}, {args.threads} threads: medians of {args.rounds} rounds")
    print(table(in_turns(args.file, args.threads, args.rounds)))


if __name__ == "__main__":
    main()
