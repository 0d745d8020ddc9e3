"""The playground's widgets: they show a `Session` and tell it what has been clicked."""

import math
import threading
from html import escape

import ipywidgets as w

from ..backends import available, default_threads
from ..errors import TinyllamaError
from ..generation import Settings
from . import report
from .elements import Alternatives, Keys, Tokens
from .models import choices
from .session import PROMPTS, Run, Session

LABEL = {"description_width": "135px"}
WIDE = w.Layout(width="auto")
DEFAULTS = Settings()


class Playground(w.VBox):
    """A prompt, what a model makes of it, and why.

    Attributes:
        session: its state; use it from a cell to do by program what a click does.
    """

    def __init__(self, model: str = "small", prompt: str = "", **settings):
        unknown = [name for name in settings if not report.is_setting(name)]
        if unknown:
            raise TinyllamaError(f"the playground has no control for {unknown[0]!r}")
        replace_earlier(self)
        self.session = Session(self._refresh)
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
        found = [(choice.label, choice.model) for choice in choices()]
        if model not in dict(map(reversed, found)):
            found.append((str(model), str(model)))
        backends = [name for name, reason in available().items() if reason is None]
        self.model = w.Dropdown(options=found, value=str(model), description="Model")
        self.backend = w.Dropdown(
            options=[(f"auto ({backends[0]})", "auto"), *((name, name) for name in backends)],
            description="Backend",
        )
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
            control.add_class(f"tinyllama-in-{name}")
            control.style = LABEL
            control.layout.width = "auto"

    def _make_buttons(self) -> None:
        self._examples = [w.Button(description=text, tooltip=text, layout=WIDE) for text in PROMPTS]
        for button in self._examples:
            button.on_click(lambda button: setattr(self.prompt, "value", button.description))
            button.add_class("tinyllama-example")
        self._generate = self._button("Generate", "Continue the prompt (Ctrl-Enter)", self._on_generate)
        self._generate.button_style = "primary"
        self._stop = self._button("Stop", "Stop (Escape)", self.session.stop)
        self._continue = self._button("Continue", "Go on where the text ends", self._on_continue)
        self._clear = self._button("Clear", "Take the text away; the history stays", self.session.clear)
        self._tint = w.Checkbox(False, description="Tint tokens by probability", indent=False)
        self._tint.add_class("tinyllama-tint")

    def _button(self, label: str, tooltip: str, action) -> w.Button:
        button = w.Button(description=label, tooltip=tooltip, layout=WIDE)
        button.on_click(lambda _: action())
        button.add_class(f"tinyllama-{label.lower()}")
        return button

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
        self._history = w.Dropdown(options=[("none", 0)], description="Run", style=LABEL)
        self._other = w.Dropdown(options=[("none", 0)], description="Beside it", style=LABEL)
        self._history.observe(self._on_history, "value")
        self._other.observe(self._on_history, "value")
        self._settings = w.HTML()
        named = {"history": self._history, "other": self._other, "settings": self._settings}
        for name, widget in {"status": self._status, "output": self._text, **named}.items():
            widget.add_class(f"tinyllama-{name}")
            widget.layout.width = "auto"

    def _layout(self) -> list[w.Widget]:
        columns = w.Layout(grid_template_columns="repeat(auto-fit, minmax(300px, 1fr))", grid_gap="4px 20px")
        self._columns = w.GridBox([self._text], layout=w.Layout(grid_gap="4px 12px"))
        return [
            self.prompt,
            self._row(*self._examples),
            w.GridBox([self.model, *self._inputs.values()], layout=columns),
            self._row(self._generate, self._stop, self._continue, self._clear, self._tint),
            self._error,
            self._status,
            self._columns,
            self._keys,
            self._alternatives,
            w.GridBox([self._history, self._other], layout=columns),
            self._settings,
        ]

    def _row(self, *widgets: w.Widget) -> w.HBox:
        row = w.HBox(widgets, layout=w.Layout(flex_flow="row wrap", align_items="center"))
        row.add_class("tinyllama-row")
        return row

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
            self._error.value = _error(session.error)
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
        self._settings.value = _table(*filter(None, (run, other))) if run else ""

    def _fill(self, dropdown: w.Dropdown, options: list[tuple[str, int]], value: int) -> None:
        self._filling = True
        if list(dropdown.options) != options:
            dropdown.options = options
        dropdown.value = value if value in dict(options).values() else 0
        self._filling = False


#: A cell's id -> its last execution, and the tools which that has made.
_shown: dict[str, tuple[str, list]] = {}


def replace_earlier(tool) -> None:
    """Stop the tool that an earlier run of this cell has shown: nobody sees it any more."""
    try:
        from IPython import get_ipython

        request = get_ipython().get_parent()
        cell, execution = request["metadata"]["cellId"], request["header"]["msg_id"]
    except (ImportError, AttributeError, KeyError):
        return  # no notebook, or one that doesn't say which cell runs
    earlier, tools = _shown.get(cell, ("", []))
    if earlier != execution:
        for old in tools:
            old.session.stop()
            old.close()
        tools = []
    _shown[cell] = execution, [*tools, tool]


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


def _error(error: str) -> str:
    return f'<div role="alert" class="tinyllama-error">{escape(error)}</div>' if error else ""


def _table(*runs: Run) -> str:
    head = "".join(f"<th scope='col'><b>Run {run.number}</b></th>" for run in runs)
    rows = [f"<tr><th></th>{head}</tr>"]
    for name, values, differs in report.comparison(*runs):
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        cells += "<td>differs</td>" if differs else ""
        kind = " class='tinyllama-differs'" if differs else ""
        rows.append(f"<tr{kind}><th scope='row'>{escape(name)}</th>{cells}</tr>")
    return f"<table class='tinyllama-settings'>{''.join(rows)}</table>"
