"""The playground's widgets: they show a `Session` and tell it what has been clicked."""

import math
import threading
from html import escape

import ipywidgets as w

from ...backends import default_threads
from ...errors import TinyllamaError
from ...generation import Settings
from . import report
from .controls import (
    COLUMNS,
    WIDE,
    backend_choice,
    button,
    error_box,
    model_choice,
    name_control,
    replace_earlier,
    row,
)
from .elements import Alternatives, Keys, Tokens
from .session import PROMPTS, Run, Session

DEFAULTS = Settings()


class Playground(w.VBox):
    """A prompt, what a model makes of it, and why.

    Attributes:
        session: its state; use it from a cell to do by program what a click does.
        worker: the session's, which can be told to stop.
    """

    def __init__(self, model: str = "small", prompt: str = "", **settings):
        unknown = [name for name in settings if not report.is_setting(name)]
        if unknown:
            raise TinyllamaError(f"the playground has no control for {unknown[0]!r}")
        replace_earlier(self)
        self.session = Session(self._refresh)
        self.worker = self.session.worker
        self._lock = threading.RLock()  # the session calls from its thread, clicks come in the kernel's
        self._filling = False
        self._make_inputs(model, prompt, settings)
        self._make_buttons()
        self._make_outputs()
        super().__init__(self._layout())
        for name in ("tinyllama", "tinyllama-playground"):
            self.add_class(name)
        self._refresh()

    # --- controls ------------------------------------------------------------------------------------

    def _make_inputs(self, model: str, prompt: str, settings: dict) -> None:
        self.model, self.backend = model_choice(model), backend_choice()
        self.prompt = w.Textarea(
            prompt,
            description="Prompt",
            placeholder="What the model is to go on from",
            rows=4,
            layout=WIDE,
        )
        self._inputs = {
            "backend": self.backend,
            "threads": w.BoundedIntText(default_threads(), min=1, max=256, description="Threads"),
            "temp": w.FloatSlider(0, min=0, max=2, step=0.05, description="Temperature"),
            "top_k": w.BoundedIntText(0, min=0, max=10**6, description="Top-k (0: all)"),
            "top_p": w.FloatSlider(1, min=0.01, max=1, step=0.01, description="Top-p"),
            "repeat_penalty": w.FloatSlider(1, min=0.5, max=2, step=0.05, description="Repetition penalty"),
            "n_predict": w.BoundedIntText(0, min=-1, max=10**6, description="Tokens (−1: no limit)"),
            "seed": w.BoundedIntText(0, min=-1, max=2**32 - 1, description="Seed (−1: new)"),
        }
        for name, control in self._inputs.items():
            control.value = settings.get(name, getattr(DEFAULTS, name, control.value))
        for name, control in {"model": self.model, "prompt": self.prompt, **self._inputs}.items():
            name_control(name, control)

    def _make_buttons(self) -> None:
        self._examples = [w.Button(description=text, tooltip=text, layout=WIDE) for text in PROMPTS]
        for example in self._examples:
            example.on_click(lambda example: setattr(self.prompt, "value", example.description))
            example.add_class("tinyllama-example")
        self._generate = button("Generate", "Continue the prompt (Ctrl-Enter)", self._on_generate)
        self._generate.button_style = "primary"
        self._stop = button("Stop", "Stop (Escape)", self.session.stop)
        self._continue = button("Continue", "Go on where the text ends", self._on_continue)
        self._clear = button("Clear", "Take the text away; the history stays", self.session.clear)
        self._tint = w.Checkbox(False, description="Tint tokens by probability", indent=False)
        self._tint.add_class("tinyllama-tint")

    def _make_outputs(self) -> None:
        self._keys = Keys(label="tinyllama playground")
        self._keys.on_action("generate", lambda _: self._on_generate())
        self._keys.on_action("stop", lambda _: self.session.stop())
        self._status, self._error = w.HTML(), w.HTML()
        self._text, self._other_text = Tokens(label="Prompt and completion"), Tokens(label="The other run")
        self._text.on_action("select", self.session.select)
        w.dlink((self._tint, "value"), (self._text, "tint"))
        w.dlink((self._tint, "value"), (self._other_text, "tint"))
        self._alternatives = Alternatives()
        self._alternatives.on_action("pick", self._on_pick)
        self._history = w.Dropdown(options=[("none", 0)], description="Run")
        self._other = w.Dropdown(options=[("none", 0)], description="Beside it")
        self._history.observe(self._on_history, "value")
        self._other.observe(self._on_history, "value")
        self._settings = w.HTML()
        for name, control in {"history": self._history, "other": self._other}.items():
            name_control(name, control)
        named = {"status": self._status, "output": self._text, "settings": self._settings}
        for name, widget in named.items():
            widget.add_class(f"tinyllama-{name}")
            widget.layout.width = "auto"

    def _layout(self) -> list[w.Widget]:
        self._columns = w.GridBox([self._text], layout=w.Layout(grid_gap="4px 12px"))
        return [
            self.prompt,
            row(*self._examples),
            w.GridBox([self.model, *self._inputs.values()], layout=COLUMNS),
            row(self._generate, self._stop, self._continue, self._clear, self._tint),
            self._error,
            self._status,
            self._columns,
            self._keys,
            self._alternatives,
            w.GridBox([self._history, self._other], layout=COLUMNS),
            self._settings,
        ]

    # --- what has been clicked -----------------------------------------------------------------------

    def _chosen(self) -> dict:
        chosen = {name: control.value for name, control in self._inputs.items()}
        # The page computes a slider's value in steps: 0.01 + 89 * 0.01.
        return {name: round(value, 4) if type(value) is float else value for name, value in chosen.items()}

    def _how(self) -> dict:
        """The settings of a text, without those of loading a model."""
        return {name: value for name, value in self._chosen().items() if name not in ("backend", "threads")}

    def _on_generate(self) -> None:
        self.session.generate(self.prompt.value, self.model.value, **self._chosen())

    def _on_continue(self) -> None:
        self.session.resume(**self._how())

    def _on_pick(self, token_id: int) -> None:
        if self.session.selected is not None:
            self.session.resume_with(self.session.selected, token_id, **self._how())

    def _on_history(self, change) -> None:
        if self._filling:  # the list has changed, and nobody has clicked
            return
        if change.owner is self._history:
            self.session.show(change.new)
        self._refresh()

    # --- what is shown -------------------------------------------------------------------------------

    def _refresh(self) -> None:
        with self._lock:
            session, run = self.session, self.session.run
            busy, index = session.worker.busy, session.selected
            self._generate.disabled, self._stop.disabled = busy, not busy
            self._continue.disabled = busy or run is None
            self._error.value = error_box(session.error)
            self._status.value = escape(report.status(session))
            self._text.text = _text(run)
            self._text.selected = -1 if index is None else index
            known = run is not None and index is not None
            self._alternatives.report = report.token_report(run, index, not busy) if known else {}
            if not busy:  # what follows can wait for the end
                self._keys.copies = _copies(run)
                self._refresh_history(run)

    def _refresh_history(self, run: Run | None) -> None:
        runs = [(report.title(run), run.number) for run in reversed(self.session.runs)]
        self._fill(self._history, [("none", 0), *runs], run.number if run else 0)
        self._fill(self._other, [("none", 0), *runs], self._other.value)
        other = self.session.find(self._other.value)
        both = run is not None and other is not None
        self._other_text.text = _text(other)
        self._columns.children = [self._text, self._other_text] if both else [self._text]
        self._columns.layout.grid_template_columns = "1fr 1fr" if both else "1fr"
        self._settings.value = _settings(*filter(None, (run, other))) if run else ""

    def _fill(self, dropdown: w.Dropdown, options: list[tuple[str, int]], value: int) -> None:
        self._filling = True
        if list(dropdown.options) != options:
            dropdown.options = options
        dropdown.value = value if value in dict(options).values() else 0
        self._filling = False


def _text(run: Run | None) -> dict:
    if run is None:
        return {}
    tokens = run.tokens
    return {
        "run": run.number,
        "texts": run.texts()[: len(tokens)],
        "pieces": [report.visible(token.piece) for token in tokens],
        "probs": [None if math.isnan(token.prob) else round(token.prob, 4) for token in tokens],
        "n_prompt": len(run.prompt_tokens),
        "changed": run.changed,
    }


def _copies(run: Run | None) -> dict[str, str]:
    return {"Copy as text": run.text, "Copy as tinyllama.generate(…)": run.completion.call()} if run else {}


def _settings(*runs: Run) -> str:
    """A run's settings on a line, or those of two in a table."""
    if len(runs) == 1:
        pairs = (f"{escape(name)} {escape(value)}" for name, (value,), _ in report.comparison(*runs))
        return f"Settings of run {runs[0].number}: {' · '.join(pairs)}"
    head = "".join(f"<th scope='col'><b>Run {run.number}</b></th>" for run in runs)
    rows = [f"<tr><th></th>{head}</tr>"]
    for name, values, differs in report.comparison(*runs):
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        cells += "<td>differs</td>" if differs else ""
        kind = " class='tinyllama-differs'" if differs else ""
        rows.append(f"<tr{kind}><th scope='row'>{escape(name)}</th>{cells}</tr>")
    return f"<table class='tinyllama-settings'>{''.join(rows)}</table>"
