"""The stepper's widgets: they show a `Walk`, and move it."""

import threading
from html import escape

import ipywidgets as w
import numpy as np

from ...errors import Cancelled
from ...llama import load
from .controls import (
    COLUMNS,
    backend_choice,
    button,
    error_box,
    model_choice,
    name_control,
    replace_earlier,
    row,
)
from .elements import HeatMap, Keys, Tokens
from .kinds import KINDS
from .report import percent, visible
from .source import Excerpt
from .steps import Map, Walk
from .worker import Worker


class Stepper(w.VBox):
    """A prompt's way through a model, step by step.

    Attributes:
        walk: where one stands, and all values; None before the first prompt has been read.
    """

    def __init__(self, prompt: str, model: str = "small", backend: str = "auto"):
        replace_earlier(self)
        self.walk: Walk | None = None
        self.worker, self._state = Worker(self._refresh), ""
        self._lock, self._filling = threading.RLock(), False
        self._make_inputs(prompt, model, backend)
        self._make_controls()
        self._make_outputs()
        super().__init__(self._layout())
        for name in ("tinyllama", "tinyllama-stepper"):
            self.add_class(name)
        self._refresh()
        self.read()

    def read(self) -> None:
        """Send the prompt through the model, in the background, instead of one that is still on its way."""
        prompt, model, backend = self.prompt.value, self.model.value, self.backend.value
        self.worker.start(lambda: self._read(prompt, model, backend), instead=True)
        self._refresh()

    def _read(self, prompt: str, model: str, backend: str) -> None:
        try:
            self._state = "Loading the model"
            llama = load(model, backend, progress=self._progress)
            self._state = "The prompt is on its way through the model"
            self._walk_on(Walk(llama, prompt, self.worker))
        finally:
            self._state = ""

    def _progress(self, names: list[str]):
        for number, name in enumerate(names):
            if self.worker.is_set():
                raise Cancelled("cancelled")
            self._state = f"Loading the model: {percent(number / len(names))}"
            yield name

    def _walk_on(self, walk: Walk) -> None:
        """Stand in the new walk where one stood in the old."""
        if self.walk is not None:
            walk.at, walk.head = min(self.walk.at, len(walk.names) - 1), self.walk.head % walk.config.n_heads
        self.walk = walk

    # --- controls ------------------------------------------------------------------------------------

    def _make_inputs(self, prompt: str, model: str, backend: str) -> None:
        self.prompt = w.Text(prompt, description="Prompt")
        self.model, self.backend = model_choice(model), backend_choice(backend)
        for name in ("prompt", "model", "backend"):
            name_control(name, getattr(self, name))
        self._run = button("Run", "Send the prompt through the model (Ctrl-Enter)", self.read)
        self._run.button_style = "primary"
        self._stop = button("Stop", "Stop (Escape)", self.worker.stop)

    def _make_controls(self) -> None:
        self._previous = button("Previous", "One step back", lambda: self._move(-1))
        self._next = button("Next", "One step on", lambda: self._move(1))
        self._kind = w.Dropdown(
            options=[(kind.title, name) for name, kind in KINDS.items()], description="Step"
        )
        self._layer = w.IntSlider(0, min=0, max=0, description="Layer")
        self._head = w.IntSlider(0, min=0, max=0, description="Head")
        self._position = w.IntSlider(0, min=0, max=0, description="Position")
        self._sliders = {"layer": self._layer, "head": self._head, "position": self._position}
        for name, control in {"kind": self._kind, **self._sliders}.items():
            name_control(name, control)
            control.observe(self._on_control, "value")

    def _make_outputs(self) -> None:
        self._keys = Keys(label="tinyllama stepper")
        self._keys.on_action("generate", lambda _: self.read())
        self._keys.on_action("stop", lambda _: self.worker.stop())
        self._tokens = Tokens(label="The prompt's tokens")
        self._tokens.on_action("select", self._look_at)
        self._map = HeatMap()
        self._map.on_action("select", self._look_at)
        self._status, self._error = w.HTML(), w.HTML()
        self._what, self._code, self._says = w.HTML(), w.HTML(), w.HTML()
        named = {"status": self._status, "what": self._what, "code": self._code, "says": self._says}
        for name, widget in named.items():
            widget.add_class(f"tinyllama-{name}")
            widget.layout.width = "auto"

    def _layout(self) -> list[w.Widget]:
        return [
            self.prompt,
            w.GridBox([self.model, self.backend], layout=COLUMNS),
            row(self._run, self._stop, self._previous, self._next, self._status),
            self._error,
            self._kind,
            w.GridBox([*self._sliders.values()], layout=COLUMNS),
            self._tokens,
            self._what,
            self._map,
            self._says,
            self._code,
            self._keys,
        ]

    # --- what has been moved -------------------------------------------------------------------------

    def _move(self, steps: int) -> None:
        if self.walk is not None:
            self.walk.move(steps)
            self._refresh()

    def _look_at(self, position: int) -> None:
        if self.walk is not None and 0 <= position < len(self.walk.pieces):
            self.walk.position = position
            self._refresh()

    def _on_control(self, change) -> None:
        if self._filling or self.walk is None:
            return
        if change.owner is self._kind:
            self.walk.go(kind=change.new)
        elif change.owner is self._layer:
            self.walk.go(layer=change.new)
        elif change.owner is self._head:
            self.walk.head = change.new
        else:
            self.walk.position = change.new
        self._refresh()

    # --- what is shown -------------------------------------------------------------------------------

    def _refresh(self) -> None:
        with self._lock:
            busy, walk = self.worker.busy, self.walk
            self._stop.disabled = not busy
            self._previous.disabled = walk is None or walk.at == 0
            self._next.disabled = walk is None or walk.at == len(walk.names) - 1
            self._error.value = error_box(self.worker.error)
            self._status.value = escape(self._status_line())
            if walk is not None:
                self._show(walk)

    def _status_line(self) -> str:
        if self._state or self.walk is None:
            return self._state
        return f"Step {self.walk.at + 1} of {len(self.walk.names)}: {self.walk.name}"

    def _show(self, walk: Walk) -> None:
        self._fill(walk)
        pieces = [visible(piece) for piece in walk.pieces]
        self._tokens.text = {
            "run": id(walk),
            "texts": [f" {piece} " for piece in pieces],
            "pieces": pieces,
            "probs": [None] * len(pieces),
            "n_prompt": 0,
            "changed": None,
        }
        self._tokens.selected = walk.position
        self._what.value = what(walk)
        self._code.value = "".join(map(code, walk.source()))
        self._says.value = says(walk)
        self._draw(walk)

    def _draw(self, walk: Walk) -> None:
        shown = walk.map()
        finite = np.abs(shown.values[np.isfinite(shown.values)])
        limit = 1.0 if shown.is_share else float(np.quantile(finite, 0.995)) or 1.0
        head = f", head {walk.head}" if walk.has_heads() else ""
        columns = shown.columns if isinstance(shown.columns, str) else list(map(visible, shown.columns))
        self._map.show(
            shown.values,
            rows=list(map(visible, shown.rows)),
            columns=columns,
            per_cell=shown.per_cell,
            limit=limit,
            title=f"{walk.name}{head}. {_legend(shown, limit)}",
            row=walk.position,
        )

    def _fill(self, walk: Walk) -> None:
        """Move the controls to where one stands."""
        ends = {"layer": walk.config.n_layers, "head": walk.config.n_heads, "position": len(walk.pieces)}
        values = {"layer": walk.layer, "head": walk.head, "position": walk.position}
        self._filling = True
        for name, slider in self._sliders.items():
            slider.max = ends[name] - 1
            slider.value = slider.value if values[name] is None else values[name]
        self._head.disabled = not walk.has_heads()
        self._kind.value = walk.kind
        self._filling = False


def _legend(shown: Map, limit: float) -> str:
    if shown.is_share:
        return "The strongest blue is 1."
    many = f" A cell shows the number farthest from 0 of {shown.per_cell}." if shown.per_cell > 1 else ""
    return f"Blue is above 0, orange below; the strongest is ±{limit:.3g} and beyond.{many}"


def what(walk: Walk) -> str:
    """The step's title, what happens and why, and its shape, as HTML."""
    kind, layer = KINDS[walk.kind], "" if walk.layer is None else f"Layer {walk.layer}: "
    return (
        f"<h3>{layer}{escape(kind.title)}</h3><p>{escape(kind.sentence)}</p>"
        f"<p><code>{escape(walk.name)}</code>: <code>{escape(walk.shape())}</code></p>"
    )


def code(excerpt: Excerpt) -> str:
    """Lines of source as HTML, the executed ones marked."""
    lines = []
    for number, text in excerpt.lines:
        line = f"<span class='tinyllama-line'>{number:4}</span> {escape(text)}"
        lines.append(f"<mark>{line}</mark>" if number in excerpt.marked else f"<span>{line}</span>")
    head = f"<b>{excerpt.file}</b>, {excerpt.function}()"
    return f"<div>{head}</div><pre tabindex='0'>{''.join(lines)}</pre>"


def says(walk: Walk) -> str:
    """What the model would say after each layer so far, as HTML."""
    upto = walk.config.n_layers if walk.name in ("norm", "logits") else (walk.layer or 0)
    if walk.layer is not None and walk.kind == "residual":
        upto += 1
    token = escape(visible(walk.pieces[walk.position]))
    rows = [_says_row(layer, walk.says()[layer]) for layer in reversed(range(upto))]
    head = f"<div>What the model would say after <code>{token}</code> if it stopped there</div>"
    none = "<p>No layer is complete yet: go on to the end of the first.</p>"
    return head + (f"<table class='tinyllama-lens'>{''.join(rows)}</table>" if rows else none)


def _says_row(layer: int, likeliest: list[tuple[str, float]]) -> str:
    cells = [f"<td><code>{escape(visible(piece))}</code> {percent(prob)}</td>" for piece, prob in likeliest]
    return f"<tr><th scope='row'>layer {layer}</th>{''.join(cells)}</tr>"
