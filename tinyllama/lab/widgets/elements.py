"""The parts that ipywidgets lacks, each a small JavaScript module beside this file.

anywidget sends a module to the page with the widget, so nothing is fetched from elsewhere and nothing is
built. All colours are in style.css, once for light themes and once for dark ones.
"""

from collections.abc import Callable
from pathlib import Path

import anywidget
import numpy as np
import traitlets

HERE = Path(__file__).parent


class Element(anywidget.AnyWidget):
    """A part of a tool.

    What a person does with it arrives as {"action": ..., "value": ...}; the action's function in `on`, if it
    has one, is called with the value.
    """

    _css = HERE / "style.css"

    def __init__(self, on: dict[str, Callable[[object], None]] | None = None, **traits):
        super().__init__(**traits)
        self.on = on or {}
        self.on_msg(lambda _, content, __: self.act(**content))

    def act(self, action: str, value: object = None) -> None:
        """Do what happens when the page sends this."""
        if action in self.on:
            self.on[action](value)


class Tokens(Element):
    """A text whose tokens can be clicked; sends "select" with a token's index.

    `text` is empty for nothing, or {"run": what tells one text from another, "texts": what each token adds to
    it, "pieces": what is shown where that is nothing}. It may have "probs", the tokens' probabilities, None
    where one isn't known; "drafted", whether each was guessed; "n_prompt", tokens of the prompt; "changed",
    the index of a token that was picked.
    """

    _esm = HERE / "tokens.js"
    text = traitlets.Dict().tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)  # a token's index, or -1
    tint = traitlets.Bool(False).tag(sync=True)  # colour tokens by their probability
    tint_drafted = traitlets.Bool(False).tag(sync=True)  # colour tokens that were guessed
    attention = traitlets.Dict().tag(sync=True)  # of `report.attention`: colour tokens by it; empty for not
    label = traitlets.Unicode("Text").tag(sync=True)  # for screen readers


class Alternatives(Element):
    """What was expected at a token's place, as bars; sends "pick" with a token's id."""

    _esm = HERE / "alternatives.js"
    report = traitlets.Dict().tag(sync=True)  # of `report.token_report`; empty for nothing


class Keys(Element):
    """Keyboard, and buttons that copy a text or save a file; says to screen readers what has happened.

    Sends "generate" (Ctrl-Enter), "stop" (Escape, while something runs wherever the focus is) and "save".
    """

    _esm = HERE / "keys.js"
    label = traitlets.Unicode().tag(sync=True)  # the tool's name for screen readers
    copies = traitlets.Dict().tag(sync=True)  # {label of a button: the text that it copies}
    save = traitlets.Unicode().tag(sync=True)  # the label of the button that saves; "" for none
    busy = traitlets.Bool(False).tag(sync=True)  # something runs that Escape stops
    says = traitlets.Unicode().tag(sync=True)  # what screen readers say when it changes


class HeatMap(Element):
    """Numbers as colours; sends "select" with the index of a clicked row."""

    _esm = HERE / "heatmap.js"
    values = traitlets.Bytes(b"").tag(sync=True)
    frame = traitlets.Dict().tag(sync=True)

    def show(self, values: np.ndarray, **frame) -> None:
        """Draw float32 [n_rows, n_columns], NaN in grey, both traits in one message.

        Args:
            frame: "rows" and "columns", the labels or the name of the axis; "per_cell", how many numbers a
                cell stands for; "limit", the number of the darkest colour; "title"; "row", the marked one.
        """
        with self.hold_sync():
            self.values = values.astype("<f4").tobytes()
            self.frame = {"n_rows": values.shape[0], "n_columns": values.shape[1], **frame}
