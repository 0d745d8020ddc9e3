"""The stepper's widgets: they show a `Walk`, and move it."""

from html import escape

import ipywidgets as w
import numpy as np

from .controls import Tool, backend_choice, button, columns, model_choice, row
from .elements import HeatMap, Tokens
from .kinds import KINDS
from .report import percent, visible
from .source import Excerpt, excerpts
from .steps import Map, Walk
from .worker import Worker

SLIDERS = ("layer", "head", "position")


class Stepper(Tool):
    """A prompt's way through a model, step by step."""

    def __init__(self, prompt: str, model: str = "small", backend: str = "auto"):
        self.walk: Walk | None = None  # where one stands, and all values, once the first prompt has been read
        super().__init__("stepper", Worker(self.refresh), "Run", "Send the prompt through the model")
        self._make_widgets(prompt, model, backend)
        self.show(
            self.inputs["prompt"],
            columns(self.inputs["model"], self.inputs["backend"]),
            row(*self.buttons.values(), self.outputs["status"]),
            self.outputs["error"],
            self.inputs["kind"],
            columns(*(self.inputs[name] for name in SLIDERS)),
            *(self.outputs[name] for name in ("tokens", "what", "map", "says", "code", "keys")),
        )
        self.start()

    def start(self) -> None:
        """Send the prompt through the model, in the background, instead of one that is still on its way."""
        prompt, model, backend = (self.inputs[name].value for name in ("prompt", "model", "backend"))
        self.worker.start(lambda: self._read(prompt, model, backend), instead=True)
        self.refresh()

    def _read(self, prompt: str, model: str, backend: str) -> None:
        llama = self.worker.load(model, backend)
        self.worker.doing = "The prompt is on its way through the model"
        walk = Walk(llama, prompt)
        if old := self.walk:  # stand where one stood
            walk.go(min(old.layer or 0, walk.config.n_layers - 1), old.kind, old.head % walk.config.n_heads)
        self.walk = walk

    def _go(self, **where: object) -> None:
        if self.walk is not None:
            self.walk.go(**where)
            self.refresh()

    def _make_widgets(self, prompt: str, model: str, backend: str) -> None:
        steps = [(kind.title, name) for name, kind in KINDS.items()]
        self.inputs = {
            "prompt": w.Text(prompt, description="Prompt"),
            "model": model_choice(model),
            "backend": backend_choice(backend),
            "kind": w.Dropdown(options=steps, description="Step"),
            **{name: w.IntSlider(0, max=0, description=name.title()) for name in SLIDERS},
        }
        for name in ("kind", *SLIDERS):
            self.on_change(self.inputs[name], lambda value, name=name: self._go(**{name: value}))
        self.buttons["Previous"] = button("Previous", "One step back", lambda: self._go(steps=-1))
        self.buttons["Next"] = button("Next", "One step on", lambda: self._go(steps=1))
        self.outputs |= {name: w.HTML() for name in ("what", "code", "says")}
        on = {"select": lambda position: self._go(position=position)}
        self.outputs |= {"tokens": Tokens(on, label="The prompt's tokens"), "map": HeatMap(on)}

    def update(self) -> None:
        """Show where one stands."""
        walk, status = self.walk, self.worker.doing
        self.buttons["Previous"].disabled = walk is None or walk.at == 0
        self.buttons["Next"].disabled = walk is None or walk.at == len(walk.names) - 1
        if walk is not None:
            status = status or f"Step {walk.at + 1} of {len(walk.names)}: {walk.name}"
            self._update_inputs(walk)
            self._update_outputs(walk)
        self.outputs["status"].value = escape(status)

    def _update_inputs(self, walk: Walk) -> None:
        ends = walk.config.n_layers, walk.config.n_heads, len(walk.pieces)
        for name, end in zip(SLIDERS, ends, strict=True):
            slider, value = self.inputs[name], getattr(walk, name)
            slider.max = end - 1
            slider.value = slider.value if value is None else value
        self.inputs["head"].disabled = not walk.has_heads()
        self.inputs["kind"].value = walk.kind

    def _update_outputs(self, walk: Walk) -> None:
        pieces, shown = list(map(visible, walk.pieces)), walk.map()
        self.outputs["tokens"].text = {"run": id(walk), "texts": [f" {p} " for p in pieces], "pieces": pieces}
        self.outputs["tokens"].selected = walk.position
        self.outputs["what"].value = what(walk)
        self.outputs["code"].value = "".join(map(code, excerpts(walk.kind, walk.config)))
        self.outputs["says"].value = says(walk)
        finite = np.abs(shown.values[np.isfinite(shown.values)])
        limit = 1.0 if shown.is_share else float(np.quantile(finite, 0.995)) or 1.0
        head = f", head {walk.head}" if walk.has_heads() else ""
        title = f"{walk.name}{head}. {_legend(shown, limit)}"
        labels = {"rows": pieces, "columns": shown.axis or pieces, "title": title, "row": walk.position}
        self.outputs["map"].show(shown.values, per_cell=shown.per_cell, limit=limit, **labels)


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
    for number, text in excerpt.lines.items():
        tag = "mark" if number in excerpt.marked else "span"
        lines.append(f"<{tag}><span class='tinyllama-line'>{number:4}</span> {escape(text)}</{tag}>")
    head = f"<b>{excerpt.file}</b>, {excerpt.function}()"
    return f"<div>{head}</div><pre tabindex='0'>{''.join(lines)}</pre>"


def says(walk: Walk) -> str:
    """What the model would say after each layer so far, as HTML."""
    token = escape(visible(walk.pieces[walk.position]))
    head = f"<div>What the model would say after <code>{token}</code> if it stopped there</div>"
    rows = ""
    for layer, said in enumerate(walk.says()):
        cells = [f"<td><code>{escape(visible(piece))}</code> {percent(prob)}</td>" for piece, prob in said]
        rows = f"<tr><th scope='row'>layer {layer}</th>{''.join(cells)}</tr>{rows}"
    none = "<p>No layer is complete yet: go on to the end of the first.</p>"
    return head + (f"<table class='tinyllama-lens'>{rows}</table>" if rows else none)
