"""How fast backend c multiplies by each type of weights here, beside reading them and beside q4_0.

    python benchmarks/block_types.py [--types q4_0,q4_k] [--shape 4096,14336] [--tokens 1,2,4,512]
                                     [--threads 2] [--rounds 9]

One matrix of each type, of random bytes, and all take turns in every round. The columns are bits a weight
takes in memory; of one token, GB/s of weights and their share of the speed at which the same memory was just
read; and for each number of tokens, multiply-adds a second (G) and their ratio to the first type's. Of GB/s,
and of speeds, medians of the rounds; shares and ratios are medians of each round's own. On a busy computer
--best takes the best round of each.
"""

import argparse
import statistics
import time

import numpy as np

from tinyllama import _native
from tinyllama.quant import TYPES
from tinyllama.tensor import Tensor

TYPES_IN_FILES = "q4_0,q4_1,q5_0,q5_1,q8_0,q2_k,q3_k,q4_k,q5_k,q6_k,iq4_nl,iq4_xs"


def random_weight(type: str, n_out: int, n_in: int, threads: int) -> "_native.Weight":
    """A prepared weight whose scales are all alike and whose other bytes are random."""
    kind, shape = TYPES[type], (n_out, n_in)
    data = np.random.default_rng(0).integers(0, 256, kind.nbytes(shape), np.uint8)
    blocks = kind.view(data, shape)
    for name in {"d", "m", "dmin"} & set(blocks.dtype.names):
        blocks[name] = 0.01
    tensor, weight = Tensor.from_blocks("", shape, type, blocks), _native.Weight(kind.prepared, *shape)
    _native.pack(type, tensor.pieces[0].data, *shape, weight, 0, 0, threads)
    return weight


def seconds(function, *arguments) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def measure(weights: list, tokens: list[int], threads: int) -> list[list[float]]:
    """Seconds of each weight: of reading it, then of products with so many tokens.

    What one leaves in the caches the others have pushed out before its next turn.
    """
    rows, n_in = weights[0].shape
    turns = [[seconds(_native.read_all, (weight,), threads) for weight in weights]]
    for n in tokens:
        x = np.random.default_rng(n).standard_normal((n, n_in), np.float32)
        outs = (np.empty((n, rows), np.float32),)
        turns.append([seconds(_native.matmul, x, (weight,), outs, threads) for weight in weights])
    return np.transpose(turns).tolist()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", default=TYPES_IN_FILES)
    parser.add_argument("--shape", default="14336,4096", help="rows, columns")
    parser.add_argument("--tokens", default="1,2,3,4,8,16,128,512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--best", action="store_true")
    args = parser.parse_args()
    types, tokens = args.types.split(","), [int(n) for n in args.tokens.split(",")]
    shape = tuple(int(n) for n in args.shape.split(","))
    weights = [random_weight(type, *shape, args.threads) for type in types]
    rounds = np.array([measure(weights, tokens, args.threads) for _ in range(args.rounds)])
    middle = np.median if not args.best else np.min  # of seconds
    took = middle(rounds, axis=0)  # [n_types, 1 + len(tokens)]
    shares, ratios = rounds[:, :, :1] / rounds, rounds[:, :1] / rounds
    if args.best:
        shares, ratios = took[None, :, :1] / took, took[None, :1] / took
    print(f"level {_native.level()}, {args.threads} threads, {shape[0]} x {shape[1]}, {args.rounds} rounds")
    print("type     bits  GB/s share |" + "".join(f"{n:>7} tokens" for n in tokens))
    for i, (type, weight) in enumerate(zip(types, weights, strict=True)):
        one = tokens.index(1) + 1 if 1 in tokens else 0
        line = f"{type:7} {weight.nbytes * 8 / np.prod(shape):5.2f} {weight.nbytes / took[i, one] / 1e9:5.1f}"
        line += f" {statistics.median(shares[:, i, one]):5.2f} |"
        for j, n in enumerate(tokens, 1):
            speed = n * np.prod(shape) / took[i, j] / 1e9
            line += f" {speed:7.1f} {statistics.median(ratios[:, i, j]):5.2f}"
        print(line)


if __name__ == "__main__":
    main()
