"""What drafts save, as Markdown tables: the same texts with and without, in turns.

    python benchmarks/drafts.py [MODEL] [--n 96] [--rounds 3] [--temp 0] [-md DRAFT_MODEL]
    python benchmarks/drafts.py --repeating 7B.gguf [--n 48] [--rounds 3]

The first asks an instruct model (SmolLM2 by default) for answers that repeat their prompts, and for some that
don't. The second needs no sense in the weights: of a model with random ones, `repeat_penalty` below 1 makes a
text that repeats itself. A prompt of random tokens, sampled, makes one that doesn't.

The seconds are those of the text behind its first token, with all that guessing takes.
"""

import argparse
import time
from statistics import median

import numpy as np

import tinyllama
from tinyllama.texts.completion import Completion

CODE = """def mean(numbers):
    total = 0
    for number in numbers:
        total += number
    return total / len(numbers)


def variance(numbers):
    middle = mean(numbers)
    total = 0
    for number in numbers:
        total += (number - middle) ** 2
    return total / len(numbers)
"""
PASSAGE = (
    "The lighthouse stood at the end of a long pier. Every evening the keeper climbed its stairs, lit the "
    "lamp and wrote the hour into a large book. In winter the waves reached the lowest windows, and nobody "
    "came to visit him for weeks. He did not mind. He had his books, his radio and a grey cat with one white "
    "ear."
)
LIST = "pears, apples, plums, cherries, apricots, grapes, peaches, lemons, oranges, figs, dates, quinces"

#: Of a question: whether its answer repeats the prompt.
PROMPTS = {
    "rename in code": f"Rename the variable `total` to `sum` in this code. Show all of it.\n\n{CODE}",
    "comment code": f"Add a comment to each function of this code. Show all of it.\n\n{CODE}",
    "repeat code": f"Repeat this code exactly.\n\n{CODE}",
    "quote a passage": f"Repeat this passage word by word.\n\n{PASSAGE}",
    "correct a passage": f"Correct the spelling of this passage, and show all of it.\n\n{PASSAGE}",
    "first sentences": f"Quote the first three sentences of this passage.\n\n{PASSAGE}",
    "summarize": f"Summarize this passage in two sentences.\n\n{PASSAGE}",
    "sort a list": f"Sort this list by the alphabet: {LIST}",
    "number a list": f"Write this list with a number before each: {LIST}",
    "JSON": f'Write this list as JSON like {{"fruits": ["..."]}}: {LIST}',
    "no repetition: story": "Write a story about a robot who learns to paint.",
    "no repetition: facts": "Why is the sky blue?",
}


def in_turns(*runs) -> tuple[list[float], list[Completion]]:
    """Seconds a token that texts took behind their first, and the texts.

    The next piece is always that of the text with the fewest tokens: what slows the computer slows all alike.
    """
    seconds = [0.0] * len(runs)
    for run in runs:
        next(run, "")
    before = [len(run.tokens) for run in runs]
    while going := [number for number, run in enumerate(runs) if run.stop_reason is None]:
        number = min(going, key=lambda number: len(runs[number].tokens))
        started = time.perf_counter()
        next(runs[number], "")
        seconds[number] += time.perf_counter() - started
    counts = [max(1, len(run.tokens) - n) for run, n in zip(runs, before, strict=True)]
    return [s / n for s, n in zip(seconds, counts, strict=True)], [run.completion() for run in runs]


def measured(llama, prompt, settings: dict, drafts: dict, rounds: int) -> str:
    """A row's figures; the texts must be the same."""
    found, timings = [], []
    for _ in range(rounds):
        runs = [llama.stream(prompt, remember=False, **settings, **some) for some in ({}, drafts)]
        seconds, (text, other) = in_turns(*runs)
        found.append(seconds)
        timings.append(other.timings)
        assert other.ids == text.ids and other.probs == text.probs
    without, with_drafts = (1 / median(seconds) for seconds in zip(*found, strict=True))
    right, guessed = sum(took.n_accepted for took in timings), sum(took.n_drafted for took in timings)
    counts = f"{right} of {guessed} ({right / max(1, guessed):.0%})"
    times = median(plain / drafted for plain, drafted in found)
    speeds = f"{without:.1f} | {with_drafts:.1f} | {times:.2f}"
    return f"{len(text.tokens)} | {speeds} | {counts}"


def chat(llama, question: str) -> str:
    """A question as SmolLM2's template writes it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def cases(llama, args) -> dict[str, tuple]:
    """Name -> (prompt, settings)."""
    if not args.repeating:
        usual = {"temp": args.temp, "seed": 1}
        return {name: (chat(llama, question), usual) for name, question in PROMPTS.items()}
    ids = np.random.default_rng(0).integers(300, llama.config.vocab_size, 64).tolist()
    looping = {"temp": 0, "repeat_penalty": 0.05, "repeat_last_n": 64}
    return {
        "repeats its prompt": (ids * 2, looping),
        "does not": (ids, {"temp": 1.0, "top_k": 0, "top_p": 1, "seed": 1}),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--repeating", action="store_true")
    parser.add_argument("--n", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temp", type=float, default=0)
    parser.add_argument("-md", "--spec-draft-model")
    args = parser.parse_args()
    llama = tinyllama.load(args.model)
    model = args.spec_draft_model
    drafts = {"spec_draft_model": model} if model else {"draft_lookup": True}
    llama.generate("Hello", n_predict=8)
    while llama.packing.state[2]:  # weights that are still being packed would be measured, too
        llama.generate("Hello", n_predict=2)
        time.sleep(0.5)
    print("| prompt | tokens | tokens/s without | with drafts | times | right |\n|---|---|---|---|---|---|")
    for name, (prompt, settings) in cases(llama, args).items():
        figures = measured(llama, prompt, settings | {"n_predict": args.n}, drafts, args.rounds)
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
