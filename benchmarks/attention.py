"""How fast backend c attends here: to a prompt, in multiply-adds, and to a cache of many tokens, in bytes.

    python benchmarks/attention.py [--shape 32,32,128] [--threads 2] [--rounds 5]

A prompt comes in pieces of 512 tokens: a piece at position 3,584 attends to 4,096. Products behind the
diagonal, which nobody needs, don't count. The speed is held against that of NumPy's product of square
matrices, which a BLAS computes in float32. One token, or a few at once, read the cache: its bytes a second
are held against the speed at which the same memory was just read. Of all, the best round.
"""

import argparse
import time

import numpy as np

from tinyllama import _native

POSITIONS = (0, 512, 1536, 3584)
CONTEXTS = (256, 1024, 4096, 16384)
PIECE = 512


def seconds(function, *arguments) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


class Layer:
    """Random heads and a cache of n_ctx positions, so many times over that no cache of the CPU holds it."""

    def __init__(self, shape: tuple[int, int, int], n_tokens: int, n_ctx: int, copies: int = 1):
        n_heads, n_kv_heads, head_dim = shape
        rng = np.random.default_rng(0)
        self.q = rng.standard_normal((n_tokens, n_heads, head_dim), np.float32)
        self.k, self.v = rng.standard_normal((2, n_tokens, n_kv_heads, head_dim), np.float32)
        one = rng.standard_normal((2, n_kv_heads, n_ctx, head_dim), np.float32).astype(np.float16)
        self.caches = [one.copy() for _ in range(copies)]
        self.out = np.empty((n_tokens, n_heads * head_dim), np.float32)

    def attend(self, pos: int, threads: int) -> None:
        """One call for each copy of the cache."""
        for keys, values in self.caches:
            _native.attention(self.q, self.k, self.v, keys, values, pos, self.out, threads)

    def read(self, threads: int) -> None:
        """Read all copies of the cache."""
        for cache in self.caches:
            _native.read_all(cache.reshape(-1).view(np.uint8), threads)


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="32,32,128", help="n_heads, n_kv_heads, head_dim")
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    n_heads, n_kv_heads, head_dim = shape = tuple(int(n) for n in args.shape.split(","))
    print(
        f"level {_native.level()}, {args.threads} threads, {n_heads} heads of {head_dim}, {n_kv_heads} shared"
    )

    square, prompt = np.ones((2048, 2048), np.float32), Layer(shape, PIECE, max(POSITIONS) + PIECE)
    calls = [(np.matmul, square, square), *((prompt.attend, pos, args.threads) for pos in POSITIONS)]
    rounds = [[seconds(*call) for call in calls] for _ in range(args.rounds)]
    blas, *took = np.min(rounds, axis=0)
    blas = 2048**3 / blas / 1e9
    print(f"\nNumPy's product: {blas:.1f} G multiply-adds/s\n{PIECE} tokens at       ms  G/s  share")
    for pos, t in zip(POSITIONS, took, strict=True):
        speed = 2 * n_heads * head_dim * PIECE * (pos + PIECE / 2) / t / 1e9
        print(f"{pos:13} {t * 1e3:9.1f} {speed:5.1f} {speed / blas:5.2f}")

    tokens = [int(n) for n in args.tokens.split(",")]
    print("\ncontext   GB/s read |" + "".join(f"{n:>7} tokens" for n in tokens))
    for n_ctx in CONTEXTS:
        size = 4 * n_kv_heads * head_dim * n_ctx
        layers = [Layer(shape, n, n_ctx, max(1, 2**27 // size)) for n in tokens]
        calls = [
            call
            for layer in layers
            for call in ((layer.read, args.threads), (layer.attend, n_ctx - len(layer.q), args.threads))
        ]
        rounds = [[seconds(*call) for call in calls] for _ in range(args.rounds)]
        speeds = size * len(layers[0].caches) / np.min(rounds, axis=0) / 1e9
        line = f"{n_ctx:7} {max(speeds[::2]):11.1f} |"
        print(line + "".join(f"{s:8.1f} {s / max(speeds[::2]):5.2f}" for s in speeds[1::2]))


if __name__ == "__main__":
    main()
