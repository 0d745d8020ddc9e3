"""Draws docs/texts.png anew: four prompts that the small model really continues together, pass by pass."""

from pathlib import Path

import tinyllama
from tinyllama.lab import plots
from tinyllama.llama import Llama

PICTURE = Path(__file__).parents[1] / "docs" / "texts.png"
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog. "
PROMPTS = {
    "A": STORY * 2 + "One day",
    "B": "The old king had three daughters. They lived in a castle by the sea. " * 3 + "One day",
    "C": STORY * 2 + "Her dog saw a bird in a tree. It barked and barked, and the bird flew away. Lily",
    "D": "Tom and his",
}
N_PASSES = 13


def cells(llama: Llama) -> dict[str, list]:
    """Of each text what every pass computes, as `plots.passes` takes it."""
    together = llama.stream(list(PROMPTS.values()), temp=0, batch_size=32, n_predict=N_PASSES)
    texts = dict(zip(PROMPTS, together.generations, strict=True))
    rows: dict[str, list] = {name: [] for name in texts}
    compute = llama.run

    def run(steps, **options):
        for name, text in texts.items():
            step = next((step for step in steps if step.cache is text.cache), None)
            rows[name].append(boxes(text, step) if step else [])
        return compute(steps, **options)

    together._schedule._run = run
    for _ in together:
        if len(rows["A"]) >= N_PASSES:
            break
    return {name: row[:N_PASSES] for name, row in rows.items()}


def boxes(text, step) -> list[tuple[str, str]]:
    """A step of a text: what was copied before it, and what it computes."""
    if not text.unread:
        return [("written", text.tokens[-1].piece)]
    known = text.timings.n_remembered if text.n_read == text.timings.n_remembered else 0
    return [("copied", str(known))] * (known > 0) + [("read", str(len(step.tokens)))]


if __name__ == "__main__":
    with tinyllama.load("small", "c") as llama:
        picture = plots.passes(cells(llama), "Four texts: in each pass all weights are read once")
    PICTURE.write_bytes(picture._repr_png_())
