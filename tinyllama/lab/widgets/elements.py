"""The parts that ipywidgets lacks, each a small JavaScript module beside this file.

anywidget sends a module to the page with the widget, so nothing is fetched from elsewhere and nothing is
built. All colours are in style.css, once for light themes and once for dark ones.
"""

from pathlib import Path

import anywidget
import numpy as np
import traitlets

ROOM = Path(__file__).parent


def _read(name: str) -> str:
    return (ROOM / name).read_text(encoding="utf-8")


class Element(anywidget.AnyWidget):
    """A part of a tool; what is done with it arrives at `on_msg`, as `{"action": ..., ...}`."""

    _css = _read("style.css")

    def on_action(self, action: str, handler) -> None:
        """Call handler(value) when the page sends {"action": action, "value": value}."""
        self.on_msg(lambda _, content, __: content.get("action") == action and handler(content.get("value")))


class Tokens(Element):
    """A text whose tokens can be clicked; sends "select" with a token's index.

    Attributes:
        text: {"run", "texts", "pieces", "probs", "n_prompt", "changed"}; `run` tells one text from another.
        selected: the index of the selected token, or -1.
        tint: colour tokens by their probability.
        label: what a screen reader calls it.
    """

    _esm = _read("tokens.js")
    text = traitlets.Dict().tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)
    tint = traitlets.Bool(False).tag(sync=True)
    label = traitlets.Unicode("Text").tag(sync=True)


class Alternatives(Element):
    """What was expected at a token's place, as bars; sends "pick" with a token's id.

    Attributes:
        report: of `report.token_report`; empty for nothing.
    """

    _esm = _read("alternatives.js")
    report = traitlets.Dict().tag(sync=True)


class Keys(Element):
    """Keyboard, labels for screen readers, and buttons that copy a text.

    Sends "generate" (Ctrl-Enter) and "stop" (Escape).

    Attributes:
        label: the tool's name for screen readers.
        copies: {label of a button: the text that it copies}.
    """

    _esm = _read("keys.js")
    label = traitlets.Unicode().tag(sync=True)
    copies = traitlets.Dict().tag(sync=True)


class HeatMap(Element):
    """Numbers as colours; sends "select" with the index of a clicked row.

    Attributes:
        values: float32, row by row; NaN is drawn grey.
        frame: {"n_rows", "n_columns", "rows", "columns", "per_cell", "limit", "title", "row"}: the labels, or
            the name of the axis; how many numbers a cell stands for; the number of the darkest colour; the
            marked row.
    """

    _esm = _read("heatmap.js")
    values = traitlets.Bytes(b"").tag(sync=True)
    frame = traitlets.Dict().tag(sync=True)

    def show(self, values: np.ndarray, **frame) -> None:
        """Draw values, [n_rows, n_columns], both traits in one message."""
        with self.hold_sync():
            self.values = values.astype("<f4").tobytes()
            self.frame = {"n_rows": values.shape[0], "n_columns": values.shape[1], **frame}
