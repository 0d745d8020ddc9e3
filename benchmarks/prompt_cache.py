"""How long a prompt takes that is read, and one that is restored from a file.

    python benchmarks/prompt_cache.py model.gguf [--read 512] [--restore 512,2000] [--threads 2] [--rounds 3]

Reading is `Llama.forward` of so many tokens at once, into a new cache, with all weights packed. Of this cache
files of other lengths are made, its tokens repeated, and restored with `Llama.load_cache`, which checks every
number and copies it: from the page cache, and from the disk, as right after the computer was started (which
needs Linux; the disk of a virtual computer may have a cache that can't be emptied from inside). Reading 2,000
tokens takes longer than their share of 512, since each looks at more tokens: what is said of them is a lower
bound. Medians.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

import tinyllama
from tinyllama.formats.cache_file import identity
from tinyllama.machine.limits import human
from tinyllama.ops import KVCache


def seconds(do) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def tokens(llama: tinyllama.Llama, n_tokens: int) -> list[int]:
    """Any."""
    return np.random.default_rng(0).integers(3, llama.config.vocab_size, n_tokens).tolist()


def read(llama: tinyllama.Llama, n_tokens: int) -> tuple[float, KVCache]:
    """Read so many tokens; the cache that they fill."""
    cache, ids = llama.new_cache(n_tokens + 1), tokens(llama, n_tokens)
    return seconds(lambda: llama.forward(ids, cache, last=True)), cache


def repeated(cache: KVCache, n_tokens: int) -> KVCache:
    """A cache of another length with the numbers of this one, over and over."""
    other, past = cache.fork(), np.arange(n_tokens) % len(cache)
    other.ids, other.n_ctx, other.n_many = [cache.ids[at] for at in past], n_tokens, n_tokens
    for arrays in (other.keys, other.values):
        arrays[:] = [array.take(past, axis=1) for array in arrays]
    return other


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", help="a model, real or of benchmarks/synthetic.py")
    parser.add_argument("--read", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--restore", default="512,2000", help="tokens of each file (%(default)s)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    llama = tinyllama.load(args.file, "c", args.threads)
    llama.forward([1], llama.new_cache(1))
    while llama.packing.state[2]:
        time.sleep(0.1)
    print(f"{llama}, {llama.backend.threads} threads, load {os.getloadavg()[0]:.1f}")
    read(llama, 32)
    took, cache = read(llama, args.read)
    print(f"read     {args.read:5} tokens {took:7.2f} s {args.read / took:8.1f} tokens/s")
    print(f"identity of the model {1000 * seconds(lambda: identity(llama.checkpoint)):.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        for n_tokens in map(int, args.restore.split(",")):
            path, whole = Path(folder) / "prompt.cache", repeated(cache, n_tokens)
            saved = seconds(lambda path=path, whole=whole: whole.save(path))
            print(f"save     {n_tokens:5} tokens {saved:7.2f} s {human(path.stat().st_size):>8}")
            for where in ("page cache", "disk"):
                rounds = []
                for _ in range(args.rounds):
                    forget(path) if where == "disk" else path.read_bytes()
                    rounds.append(seconds(lambda path=path, n=n_tokens: llama.load_cache(path, n + 1)))
                found, share = median(rounds), took * n_tokens / args.read / median(rounds)
                faster = (
                    f"at least {share:.0f} times as fast as reading"
                    if n_tokens > args.read
                    else f"{share:.0f} times"
                )
                print(f"restore  {n_tokens:5} tokens {found:7.2f} s from the {where:10} {faster}")
            assert llama.load_cache(path, n_tokens + 1).ids == whole.ids


if __name__ == "__main__":
    main()
