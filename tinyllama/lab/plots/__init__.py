"""The pictures that the notebooks share, in one style.

Every function takes arrays whose shapes it names and returns a `Picture`, which a notebook shows as a PNG.

    style     size, font, colours, how tokens are spelled
    charts    arrays as heat-maps, bars, curves, vectors
    drawings  boxes and arrows: tokens, steps, the whole machine
"""

from .charts import arrows, attention, attention_heads, bars, histogram, lines, logit_lens, matrix
from .drawings import flow, machine, passes, tokens
from .style import AMOUNT, BLUE, COLORS, GREEN, GREY, ORANGE, RED, SIGNED, SKY, Picture, labels

__all__ = [
    "AMOUNT", "BLUE", "COLORS", "GREEN", "GREY", "ORANGE", "RED", "SIGNED", "SKY", "Picture", "arrows",
    "attention", "attention_heads", "bars", "flow", "histogram", "labels", "lines", "logit_lens", "machine",
    "matrix", "passes", "tokens",
]  # fmt: skip
