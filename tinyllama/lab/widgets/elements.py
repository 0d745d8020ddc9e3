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
    """What was expected at a token's place, as bars; sends "pick" with a row's id.

    `report` is empty for nothing, or of `report.token_report`. With "words" it may be about other things than
    tokens: {"row", "pick": heads of columns, "button": its label, "does": [before, after] a row's name}.
    """

    _esm = HERE / "alternatives.js"
    report = traitlets.Dict().tag(sync=True)


class Keys(Element):
    """Keyboard, and buttons that copy a text or save a file; says to screen readers what has happened.

    Sends "generate" (Ctrl-Enter; in the prompt Enter, if `enter`), "stop" (Escape, while something runs
    wherever the focus is) and "save".
    """

    _esm = HERE / "keys.js"
    label = traitlets.Unicode().tag(sync=True)  # the tool's name for screen readers
    copies = traitlets.Dict().tag(sync=True)  # {label of a button: the text that it copies}
    save = traitlets.Unicode().tag(sync=True)  # the label of the button that saves; "" for none
    enter = traitlets.Bool(False).tag(sync=True)  # Enter is enough; Shift-Enter is a new line
    busy = traitlets.Bool(False).tag(sync=True)  # something runs that Escape stops
    says = traitlets.Unicode().tag(sync=True)  # what screen readers say when it changes


def on_board(name: str) -> str:
    """The module of a map, behind what all maps share."""
    return "\n".join((HERE / file).read_text(encoding="utf-8") for file in ("board.js", name))


class HeatMap(Element):
    """Numbers as colours; sends "cell" with row and column of a chosen one."""

    _esm = on_board("heatmap.js")
    values = traitlets.Bytes(b"").tag(sync=True)
    frame = traitlets.Dict().tag(sync=True)

    def show(self, values: np.ndarray, **frame) -> None:
        """Draw float32 [n_rows, n_columns], NaN in grey, both traits in one message.

        Args:
            frame: "rows" and "columns", the labels or the name of the axis; "per_cell", how many numbers a
                cell stands for; "limit", the number of the darkest colour; "root", whether colours go by the
                root; "title"; "row" and "column", what is marked, or -1; "between", what a row does to a
                column, in words, if it does anything; "numbered", whether tokens are told with their numbers.
        """
        with self.hold_sync():
            self.values = values.astype("<f4").tobytes()
            self.frame = {"n_rows": values.shape[0], "n_columns": values.shape[1], **frame}


class Sheet(Element):
    """The attention of all layers and heads as small maps; sends "head" with [layer, head] of a click."""

    _esm = on_board("sheet.js")
    values = traitlets.Bytes(b"").tag(sync=True)
    frame = traitlets.Dict().tag(sync=True)

    def show(self, maps: np.ndarray, **frame) -> None:
        """Draw uint8 [n_layers, n_heads, side, side], both traits in one message.

        Args:
            frame: "title"; "at", the (layer, head) one stands at, and "marked", others.
        """
        sizes = dict(zip(("n_layers", "n_heads", "side"), maps.shape[:3], strict=True))
        with self.hold_sync():
            self.values, self.frame = maps.tobytes(), sizes | frame


class LensTable(Element):
    """What the model would say after every layer and token; sends "go" with layer and position.

    `table` is empty for nothing, or {"columns": the tokens, "rows": [{"layer", and for every token "pieces",
    "probs", "settled": whether it is what the last layer says}], "at": (layer, position), the marked one}.
    """

    _esm = HERE / "lens.js"
    table = traitlets.Dict().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)  # stands above it


class FullScreen(Element):
    """A button that gives the tool that it stands in the whole screen."""

    _esm = HERE / "fullscreen.js"
