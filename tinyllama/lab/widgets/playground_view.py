"""The playground's widgets: they show a `Session` and tell it what has been clicked."""

import math
from functools import partial
from html import escape

import ipywidgets as w

from ...errors import require
from ...machine.limits import default_threads
from ...sampling import Settings
from . import report
from .controls import Tool, backend_choice, button, columns, model_choice, row
from .elements import Alternatives, Tokens
from .session import PROMPTS, Run, Session


class Playground(Tool):
    """A prompt, what a model makes of it, and why. Its `session` does by program what a click does."""

    def __init__(self, model: str = "small", prompt: str = "", **settings):
        self.session = Session(self.refresh)
        super().__init__("playground", self.session.worker, "Generate", "Continue the prompt")
        self._make_inputs(model, prompt, settings)
        self._make_buttons()
        self._make_outputs()
        self.show(
            self.inputs["prompt"],
            row(*self._examples),
            columns(self.inputs["model"], *self._settings.values()),
            row(*self.buttons.values(), self.inputs["tint"], self.inputs["tint_drafted"]),
            *(self.outputs[name] for name in ("error", "status", "texts", "keys", "alternatives")),
            columns(self.inputs["history"], self.inputs["other"]),
            self.outputs["settings"],
        )

    def _make_inputs(self, model: str, prompt: str, settings: dict) -> None:
        self._settings = {
            "backend": backend_choice(settings.get("backend", "auto")),
            "threads": w.BoundedIntText(default_threads(), min=1, max=256, description="Threads"),
            "temp": w.FloatSlider(0, min=0, max=2, step=0.05, description="Temperature"),
            "top_k": w.BoundedIntText(0, min=0, max=10**6, description="Top-k (0: all)"),
            "top_p": w.FloatSlider(1, min=0.01, max=1, step=0.01, description="Top-p"),
            "repeat_penalty": w.FloatSlider(1, min=0.5, max=2, step=0.05, description="Repetition penalty"),
            "n_predict": w.BoundedIntText(0, min=-1, max=10**6, description="Tokens (−1: no limit)"),
            "draft_lookup": w.Checkbox(False, description="Guess tokens from the text before", indent=False),
            "seed": w.BoundedIntText(0, min=-1, max=2**32 - 1, description="Seed (−1: new)"),
        }
        for name in settings:
            require(name in self._settings, f"the playground has no control for {name!r}")
        for name, control in self._settings.items():
            control.value = settings.get(name, getattr(Settings(), name, control.value))
        what = "What the model is to go on from"
        self.inputs = {
            "prompt": w.Textarea(prompt, description="Prompt", placeholder=what, rows=4),
            "model": model_choice(model),
            **self._settings,
            "tint": w.Checkbox(False, description="Tint tokens by probability", indent=False),
            "tint_drafted": w.Checkbox(False, description="Tint tokens that were guessed", indent=False),
            "history": w.Dropdown(description="Run"),
            "other": w.Dropdown(description="Beside it"),
        }
        self.on_change(self.inputs["history"], self.session.show)
        self.on_change(self.inputs["other"], lambda _: None)

    def _make_buttons(self) -> None:
        set_prompt = partial(self.inputs["prompt"].set_trait, "value")
        self._examples = [button(text, text, partial(set_prompt, text)) for text in PROMPTS]
        self.buttons |= {
            "Continue": button("Continue", "Go on where the text ends", self._on_continue),
            "Clear": button("Clear", "Take the text away; the history stays", self.session.clear),
        }

    def _make_outputs(self) -> None:
        self.outputs |= {
            "text": Tokens({"select": self.session.select}, label="Prompt and completion"),
            "other": Tokens(label="The other run"),
            "texts": w.GridBox(),
            "alternatives": Alternatives({"pick": self._on_pick}),
            "settings": w.HTML(),
        }
        for name in ("text", "other"):
            for tint in ("tint", "tint_drafted"):
                w.dlink((self.inputs[tint], "value"), (self.outputs[name], tint))

    def start(self) -> None:
        """Continue the prompt with the settings that are shown."""
        what = (self.inputs[name].value for name in ("prompt", "model", "backend", "threads"))
        self.session.generate(*what, **self._sampling())

    def _on_continue(self) -> None:
        self.session.resume(**self._sampling())

    def _on_pick(self, token_id: int) -> None:
        if self.session.selected is not None:
            self.session.resume_with(self.session.selected, token_id, **self._sampling())

    def _sampling(self) -> dict:
        """The settings that are shown; the page computes a slider's value in steps: 0.01 + 89 * 0.01."""
        values = {name: box.value for name, box in self._settings.items() if hasattr(Settings, name)}
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}

    def update(self) -> None:
        """Show the session's run, and what is known about the selected token."""
        run, index, busy = self.session.run, self.session.selected, self.worker.busy
        self.buttons["Generate"].disabled = busy
        self.buttons["Continue"].disabled = busy or run is None
        self.outputs["status"].value = escape(report.status(self.session))
        self.outputs["text"].text = _text(run)
        self.outputs["text"].selected = -1 if index is None else index
        token = {} if index is None else report.token_report(run, index, not busy)
        self.outputs["alternatives"].report = token
        if not busy:  # what follows can wait for the end
            self._update_history(run)

    def _update_history(self, run: Run | None) -> None:
        runs = [(report.title(run), run.number) for run in reversed(self.session.runs)]
        other = self.session.find(self.inputs["other"].value)
        for name, chosen in (("history", run), ("other", other)):
            self.inputs[name].options = [("none", 0), *runs]
            self.inputs[name].value = chosen.number if chosen in self.session.runs else 0
        call = "Copy as tinyllama.generate(…)"
        self.outputs["keys"].copies = {"Copy as text": run.text, call: run.completion.call()} if run else {}
        self.outputs["other"].text = _text(other)
        shown = ("text", "other") if run and other else ("text",)
        self.outputs["texts"].children = [self.outputs[name] for name in shown]
        self.outputs["settings"].value = _settings(*filter(None, (run, other))) if run else ""


def _text(run: Run | None) -> dict:
    """A run as `Tokens` shows it."""
    if run is None:
        return {}
    tokens = run.tokens
    return {
        "run": run.number,
        "texts": run.texts()[: len(tokens)],
        "pieces": [report.visible(token.piece) for token in tokens],
        "probs": [None if math.isnan(token.prob) else round(token.prob, 4) for token in tokens],
        "drafted": [token.drafted for token in tokens],
        "n_prompt": len(run.prompt_tokens),
        "changed": run.changed,
    }


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
