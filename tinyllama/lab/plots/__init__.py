"""The pictures that the notebooks share, in one style.

Every function takes arrays whose shapes it names, or a model, and returns a `Picture`, which a notebook shows
as a PNG.

    style     size, font, colours, how tokens are spelled
    charts    arrays as heat-maps, bars, curves, vectors
    drawings  boxes and arrows: tokens, steps, the whole machine
    sheets    a model and a prompt: all heads, the logit lens, what edits change, and the numbers behind them
"""

from .charts import arrows, attention, attention_heads, bars, histogram, lines, logit_lens, matrix
from .drawings import flow, machine, passes, tokens
from .sheets import ablation_map, all_heads, lens, patching_map, top_tokens
from .style import AMOUNT, BLUE, COLORS, GREEN, GREY, ORANGE, RED, SIGNED, SKY, Picture, labels

__all__ = [
    "AMOUNT", "BLUE", "COLORS", "GREEN", "GREY", "ORANGE", "RED", "SIGNED", "SKY", "Picture",
    "ablation_map", "all_heads", "arrows", "attention", "attention_heads", "bars", "flow", "histogram",
    "labels", "lens", "lines", "logit_lens", "machine", "matrix", "passes", "patching_map", "tokens",
    "top_tokens",
]  # fmt: skip
