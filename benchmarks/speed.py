"""How fast the backends run a model here: tokens a second, one by one and as a prompt.

    python benchmarks/speed.py [-m smollm2] [--backends numpy,numexpr] [--threads 1,2] [--rounds 5]

The backends take turns in every round, so that what else the machine does hits all alike; the table gives
medians, and ratios to the first row.
"""

import argparse
import itertools
import statistics
import time

import tinyllama

PROMPT_TOKENS, NEW_TOKENS = 128, 16


def measure(llama, tokens: list[int]) -> tuple[float, float]:
    """Tokens a second: (of a prompt in one batch, of tokens one at a time behind it)."""
    cache = llama.new_cache(len(tokens))
    started = time.perf_counter()
    llama.forward(tokens[:PROMPT_TOKENS], cache, last=True)
    between = time.perf_counter()
    for token in tokens[PROMPT_TOKENS:]:
        llama.forward([token], cache)
    ended = time.perf_counter()
    return PROMPT_TOKENS / (between - started), NEW_TOKENS / (ended - between)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="smollm2")
    parser.add_argument("--backends", default="numpy,numexpr")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = list(itertools.product(args.backends.split(","), map(int, args.threads.split(","))))
    llamas = [tinyllama.load(args.model, backend, threads) for backend, threads in rows]
    tokens = [token % llamas[0].config.vocab_size for token in range(300, 300 + PROMPT_TOKENS + NEW_TOKENS)]
    rounds = [[measure(llama, tokens) for llama in llamas] for _ in range(args.rounds)]
    print(f"{args.model}: tokens/s, medians of {args.rounds} rounds")
    print(f"{'backend':10} {'threads':>7} {'prompt':>9} {'ratio':>6} {'one by one':>11} {'ratio':>6}")
    medians = [[statistics.median(r[i][j] for r in rounds) for j in (0, 1)] for i in range(len(rows))]
    for (backend, threads), (prompt, single) in zip(rows, medians, strict=True):
        ratios = prompt / medians[0][0], single / medians[0][1]
        print(f"{backend:10} {threads:7} {prompt:9.1f} {ratios[0]:6.2f} {single:11.1f} {ratios[1]:6.2f}")


if __name__ == "__main__":
    main()
