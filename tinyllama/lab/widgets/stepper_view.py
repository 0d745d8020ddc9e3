"""The stepper's widgets: they show a `Walk`, and move it."""

from html import escape

import ipywidgets as w

from ...errors import require
from . import step_report as report
from .controls import Tool, backend_choice, button, columns, model_choice, row, visible
from .elements import Alternatives, FullScreen, HeatMap, LensTable, Sheet, Tokens
from .experiment import Here
from .experiment_view import STATE, ExperimentPanel
from .kinds import KINDS
from .report import visible as word
from .source import excerpts
from .steps import Walk
from .worker import Worker

SLIDERS = ("layer", "head", "position")
PLACE = ("layer", "kind", "head", "position", "looks_at")
VIEWS = {"step": "This step", "heads": "All heads", "lens": "All layers"}


class Stepper(Tool):
    """A prompt's way through a model, step by step.

    Attributes:
        walk: where one stands, and all values, once the first prompt has been read.
        panel: what if something were changed?
    """

    def __init__(
        self,
        prompt: str | list[int],
        model: str = "small",
        backend: str = "auto",
        view: str = "step",
        **state,
    ):
        self.walk: Walk | None = None
        experiment = {name: state.pop(name) for name in STATE if name in state}
        self._place: dict | None = state  # where the first walk is to be opened, as `Walk.open` takes it
        self._wants_lens = False  # it is to be read as soon as nothing else runs
        self._ran: tuple | None = None  # what the walk is of: prompt, model, backend
        is_text = isinstance(prompt, str)
        fits = is_text or isinstance(prompt, list | tuple)
        require(fits, f"a prompt is text or a list of token ids, not {prompt!r:.60}")
        self._exact = None if is_text else ("", model, list(prompt))  # a text that stands for these ids
        does = "Send the prompt through the model"
        super().__init__("stepper", Worker(self.refresh), "Run", does, enter=True)
        self._make_inputs(prompt if is_text else "", model, backend, view)
        self._make_outputs()
        self.panel = ExperimentPanel(self, self._here, **experiment)
        self.show(
            self.inputs["prompt"],
            columns(self.inputs["model"], self.inputs["backend"]),
            row(*self.buttons.values(), self.outputs["full"], self.outputs["status"]),
            *(self.outputs[name] for name in ("error", "old")),
            self.inputs["view"],
            columns(*(self.inputs[name] for name in ("kind", *SLIDERS))).add_class("tinyllama-where"),
            *(self.outputs[name] for name in ("tokens", "looked", "what")),
            w.HBox([self.outputs[name] for name in STAGE]).add_class("tinyllama-stage"),
            *(self.outputs[name] for name in ("lens", "says", "code")),
            self.panel,
            *(self.outputs[name] for name in ("line", "keys")),
        )
        self.start()

    def _make_inputs(self, prompt: str, model: str, backend: str, view: str) -> None:
        steps = [(kind.title, name) for name, kind in KINDS.items()]
        views = [(title, name) for name, title in VIEWS.items()]
        self.inputs = {
            "prompt": w.Textarea(prompt, description="Prompt", rows=2),
            "model": model_choice(model),
            "backend": backend_choice(backend),
            "view": w.RadioButtons(options=views, value=view, orientation="horizontal"),
            "kind": w.Dropdown(options=steps, description="Step"),
            **{name: w.IntSlider(0, max=0, description=name.title()) for name in SLIDERS},
        }
        for name in ("prompt", "model", "backend"):
            self.inputs[name].observe(lambda _: self._mark_old(), "value")
        for name in ("kind", *SLIDERS):
            self.on_change(self.inputs[name], lambda value, name=name: self._go(**{name: value}))
        self.on_change(self.inputs["view"], lambda _: setattr(self, "_wants_lens", True))
        self.buttons["Previous"] = button("Previous", "One step back", lambda: self._go(steps=-1))
        self.buttons["Next"] = button("Next", "One step on", lambda: self._go(steps=1))

    def _make_outputs(self) -> None:
        self.outputs |= {name: w.HTML() for name in ("old", "what", "code", "says", "line")}
        self.outputs |= {
            "tokens": Tokens({"select": lambda at: self._go(position=at)}, label="The token that looks"),
            "looked": Tokens({"select": self._on_looked}, label="The token that is looked at"),
            "map": HeatMap({"cell": self._on_cell}),
            "next": Alternatives({"pick": self._on_take}),
            "sheet": Sheet({"head": lambda at: self._show_head(*at)}),
            "looks": Alternatives({"pick": self._on_looker}),
            "lens": LensTable({"go": self._on_lens}, label=report.LENS),
            "full": FullScreen(),
        }

    # --- what a click does ------------------------------------------------------------------------

    def start(self) -> None:
        """Send the prompt through the model, in the background, instead of one that is still on its way."""
        asked = self._asked()
        self.worker.start(lambda: self._read(*asked), instead=True)
        self.refresh()

    def _asked(self) -> tuple[str | list[int], str, str]:
        """Prompt, model and backend as they are chosen; ids where the prompt's text may stand for others."""
        prompt, model, backend = (self.inputs[name].value for name in ("prompt", "model", "backend"))
        if self._exact and self._exact[:2] == (prompt, model):
            prompt = self._exact[2]
        return prompt, model, backend

    def _read(self, prompt: str | list[int], model: str, backend: str) -> None:
        place, self._place = self._place, None
        llama = self.worker.load(model, backend)
        self.worker.doing = "The prompt is on its way through the model"
        walk = Walk(llama, prompt)
        if place:
            walk.open(**place)
        if self.walk:
            walk.follow(self.walk)
        is_asked = self._asked() == (prompt, model, backend)
        self.walk, self._ran = walk, (prompt, model, backend)
        if is_asked and prompt == walk.tokens:
            self._write(walk.text, model, prompt)
        if self._needs_lens():
            self._read_lens()

    def _read_lens(self) -> None:
        """For a job: what the model would say after all layers and tokens."""
        for layer in self.walk.lens.read():
            self.worker.doing = f"What the model would say after layer {layer}"
            self.worker.tell()

    def _needs_lens(self) -> bool:
        return self.walk is not None and self.inputs["view"].value == "lens" and not self.walk.lens.is_read()

    def _write(self, text: str, model: str, ids: list[int]) -> None:
        """Show the text of a prompt that is ids."""
        self._exact = text, model, ids
        self.inputs["prompt"].value = text

    def _here(self) -> Here | None:
        """Where one stands, for experiments."""
        if self.walk is None:
            return None
        walk, layer = self.walk, self.inputs["layer"].value if self.walk.layer is None else self.walk.layer
        return Here(*self._ran, walk.config, walk.name, layer, walk.head, walk.position)

    def _go(self, **where: object) -> None:
        if self.walk is not None:
            self.walk.go(**where)
            self.refresh()

    def _on_looked(self, at: int) -> None:
        self.walk.looks_at = None if at == self.walk.looks_at else at
        self.refresh()

    def _on_cell(self, at: list[int]) -> None:
        position, column = at
        if not self.walk.map().axis:  # a token, too
            self.walk.looks_at = min(column, position)
        self._go(position=position)

    def _show_head(self, layer: int, head: int) -> None:
        self.inputs["view"].value = "step"
        self._go(layer=layer, kind="attention.weights", head=head)

    def _on_looker(self, number: int) -> None:
        look = self.walk.looks()[number]
        self._show_head(look.layer, look.head)

    def _on_lens(self, at: list[int]) -> None:
        self.inputs["view"].value = "step"
        self._go(layer=at[0], kind="residual", position=at[1])

    def _on_take(self, token: int) -> None:
        """Go on with a token that could follow, of the model that is shown."""
        _, self.inputs["model"].value, self.inputs["backend"].value = self._ran
        ids = self.walk.followed_by(token)
        self._write(self.walk.text_of(ids), self._ran[1], ids)
        self.start()

    # --- what is shown ----------------------------------------------------------------------------

    def update(self) -> None:
        """Show where one stands."""
        if self._wants_lens and self._needs_lens() and not self.worker.busy:
            self._wants_lens = False
            self.worker.start(self._read_lens)
        walk, status = self.walk, self.worker.doing
        self.buttons["Previous"].disabled = walk is None or walk.at == 0
        self.buttons["Next"].disabled = walk is None or walk.at == len(walk.names) - 1
        shown = shown_of(walk, self.inputs["view"].value)
        for name in DEPENDING:
            visible(self.outputs[name], name in shown)
        if walk is not None:
            status = status or f"Step {walk.at + 1} of {len(walk.names)}: {walk.name}"
            self._update_inputs(walk)
            self._update_tokens(walk)
            for name in DEPENDING & shown:
                getattr(self, f"_update_{name}", lambda walk: None)(walk)
            self._update_line(walk)
        self.outputs["status"].value = escape(status)
        self._mark_old()
        self.panel.update()

    def _mark_old(self) -> None:
        """Say whether what is shown is of another prompt, model or backend than those that are chosen."""
        names = ("prompt", "model", "backend")
        asked = zip(names, self._asked(), self._ran or self._asked(), strict=True)
        changed = [name for name, now, then in asked if now != then]
        said = f"What is shown is of the earlier {' and '.join(changed)}"
        said += ": Run or Enter shows the new one." if self._asked()[0] else "."
        box = f'<div role="status" class="tinyllama-stale">{said}</div>'
        self.outputs["old"].value = box if changed else ""
        visible(self.outputs["old"], changed)
        (self.add_class if changed else self.remove_class)("tinyllama-old")

    def _update_inputs(self, walk: Walk) -> None:
        ends = walk.config.n_layers, walk.config.n_heads, len(walk.pieces)
        for name, end in zip(SLIDERS, ends, strict=True):
            slider, value = self.inputs[name], getattr(walk, name)
            slider.max = end - 1
            slider.value = slider.value if value is None else value
        self.inputs["head"].disabled = not walk.has_heads()
        self.inputs["kind"].value = walk.kind

    def _update_tokens(self, walk: Walk) -> None:
        pieces = list(map(word, walk.pieces))
        for name, seen in {"tokens": pieces, "looked": pieces[: walk.position + 1]}.items():
            texts = [f" {piece} " for piece in seen]
            self.outputs[name].text = {"run": id(walk), "texts": texts, "pieces": seen}
        self.outputs["tokens"].selected = walk.position
        self.outputs["looked"].selected = -1 if walk.looks_at is None else walk.looks_at

    def _update_what(self, walk: Walk) -> None:
        self.outputs["what"].value = report.what(walk)

    def _update_says(self, walk: Walk) -> None:
        self.outputs["says"].value = report.says(walk)

    def _update_code(self, walk: Walk) -> None:
        self.outputs["code"].value = "".join(map(report.code, excerpts(walk.kind, walk.config)))

    def _update_map(self, walk: Walk) -> None:
        shown = walk.map()
        self.outputs["map"].show(shown.values, **report.map_frame(walk, shown))

    def _update_next(self, walk: Walk) -> None:
        self.outputs["next"].report = report.followers(walk, not self.worker.busy)

    def _update_looks(self, walk: Walk) -> None:
        self.outputs["looks"].report = report.lookers(walk)

    def _update_sheet(self, walk: Walk) -> None:
        self.outputs["sheet"].show(walk.sheet, **report.sheet_frame(walk))

    def _update_lens(self, walk: Walk) -> None:
        self.outputs["lens"].table = report.lens_table(walk)

    def _update_line(self, walk: Walk) -> None:
        _, model, backend = self._ran
        view = self.inputs["view"].value
        line = walk.call(model, backend, **({} if view == "step" else {"view": view}), **self.panel.state())
        self.outputs["line"].value = f"<code>{escape(line)}</code>"
        self.outputs["keys"].copies = {"Copy this line of Python": line} | self.panel.copies


#: Outputs that stand side by side where there is room.
STAGE = ("map", "next", "sheet", "looks")
#: Outputs that one sees or not, depending on what is looked at.
DEPENDING = {"looked", "what", "lens", "says", "code", *STAGE}


def shown_of(walk: Walk | None, view: str) -> set[str]:
    """The names of the outputs that a view of a walk needs."""
    if walk is None:
        return set()
    if view != "step":
        return {"heads": {"looked", "sheet", "looks"}, "lens": {"lens"}}[view]
    seen = {"what", "says", "code", "next" if walk.kind == "logits" else "map"}
    is_attention = walk.kind in ("attention.scores", "attention.weights")
    return seen | ({"looked", "looks"} if is_attention else set())
