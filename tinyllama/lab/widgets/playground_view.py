"""The playground's widgets: they show a `Session` and tell it what has been clicked."""

import json
from functools import partial
from html import escape

import ipywidgets as w
import numpy as np

from ...errors import require
from ...machine.limits import default_threads
from ...settings import Settings
from ...texts.named_templates import NAMED
from . import report
from .controls import Tool, backend_choice, button, choice, columns, model_choice, row, visible
from .elements import Alternatives, Tokens
from .session import MESSAGES, PROMPTS, Run, Session
from .turns_view import Turns


class Playground(Tool):
    """A prompt, what a model makes of it, and why. Its `session` does by program what a click does."""

    def __init__(self, model: str = "small", prompt: str = "", chat=False, system: str = "", **settings):
        self.session = Session(self.refresh)
        self.session.chatting = bool(chat)
        self._edited: tuple[Run, bool] | None = None  # the run of which message or answer is edited
        self._sent = ""  # a message that isn't in the chat yet
        super().__init__(
            "playground", self.session.worker, "Generate", "Continue the prompt, or send the message"
        )
        self._make_inputs(model, prompt, system, settings)
        self._make_buttons()
        self._make_outputs()
        self._about = columns(*(self.inputs[name] for name in ("history", "other", "name")))
        self._attention = w.VBox(
            [row(self.inputs["layers"], self.inputs["sinks"]), self.outputs["attention"]]
        )
        self.show(
            row(*(self.inputs[name] for name in ("mode", "model", "system"))),
            self.outputs["turns"],
            self.inputs["prompt"],
            *self.examples,
            row(
                *self.buttons.values(),
                *(self.inputs[name] for name in ("more", "tint", "tint_drafted", "attend", "raw")),
            ),
            self._attention,
            self._more,
            *(self.outputs[name] for name in ("error", "notes")),
            row(self.offer),
            *(self.outputs[name] for name in ("status", "texts", "alternatives")),
            self._about,
            *(self.outputs[name] for name in ("keys", "settings")),
        )

    def _make_inputs(self, model: str, prompt: str, system: str, settings: dict) -> None:
        templates = [("the model's own", ""), *((name, name) for name in NAMED)]
        self._settings = {
            "backend": backend_choice(settings.get("backend", "auto")),
            "threads": w.BoundedIntText(default_threads(), min=1, max=256, description="Threads"),
            "temp": w.FloatSlider(0, min=0, max=2, step=0.05, description="Temperature"),
            "top_k": w.BoundedIntText(0, min=0, max=10**6, description="Top-k (0: all)"),
            "top_p": w.FloatSlider(1, min=0.01, max=1, step=0.01, description="Top-p"),
            "repeat_penalty": w.FloatSlider(1, min=0.5, max=2, step=0.05, description="Repetition penalty"),
            "n_predict": w.BoundedIntText(0, min=-1, max=10**6, description="Tokens (−1: no limit)"),
            "seed": w.BoundedIntText(0, min=-1, max=2**32 - 1, description="Seed (−1: new)"),
            "ctx_size": w.BoundedIntText(0, min=0, max=10**7, description="Context (0: usual)"),
            "stop": w.Textarea(description="Stop strings", placeholder="one a line", rows=1),
            "chat_template": choice("Chat template", templates, settings.get("chat_template") or ""),
            "draft_lookup": w.Checkbox(False, description="Guess tokens from the text before", indent=False),
        }
        for name in settings:
            require(name in self._settings, f"the playground has no control for {name!r}")
        usual = {name: getattr(Settings(), name, box.value) for name, box in self._settings.items()}
        usual |= {"n_predict": -1} if self.session.chatting else {}
        for name, value in (usual | settings).items():
            self._settings[name].value = SHOWN.get(name, lambda value: value)(value)
        modes = [("Continue a text", False), ("Chat", True)]
        self.inputs = {
            "mode": w.RadioButtons(options=modes, value=self.session.chatting, orientation="horizontal"),
            "system": w.Text(
                system, description="System prompt", placeholder="What the model is told before the chat"
            ),
            "prompt": w.Textarea(prompt, rows=2),
            "model": model_choice(model),
            **self._settings,
            "stops": self._settings["stop"],  # "stop" is the button
            "more": w.ToggleButton(
                description="Settings", tooltip="Show or hide temperature, top-k and the others"
            ),
            "tint": w.Checkbox(False, description="Tint tokens by probability", indent=False),
            "tint_drafted": w.Checkbox(False, description="Tint tokens that were guessed", indent=False),
            "attend": w.Checkbox(False, description="Tint what a token attended to", indent=False),
            "layers": w.SelectionSlider(options=[ALL_LAYERS], description="Layers"),
            "sinks": w.Checkbox(False, description="Tint the first token, too", indent=False),
            "raw": w.Checkbox(False, description="Show what the model saw", indent=False),
            "history": w.Dropdown(description="Run"),
            "other": w.Dropdown(description="Beside it"),
            "name": w.Text(description="Name of this run", continuous_update=False),
        }
        del self.inputs["stop"]
        self._more = columns(*self._settings.values())
        self.on_change(self.inputs["mode"], self._on_mode)
        self.on_change(self.inputs["history"], self.session.show)
        self.on_change(self.inputs["name"], lambda name: setattr(self.session.run, "name", name))
        self.on_change(self.inputs["attend"], self.session.attend)
        for name in ("other", "more", "raw", "layers", "sinks"):
            self.on_change(self.inputs[name], lambda _: None)

    def _make_buttons(self) -> None:
        set_prompt = partial(self.inputs["prompt"].set_trait, "value")
        examples = [
            [button(text, text, partial(set_prompt, text)) for text in some] for some in (PROMPTS, MESSAGES)
        ]
        self.examples = [row(*some) for some in examples]
        self.buttons |= {
            "Cancel": button("Leave it as it is", "Edit nothing", self._stop_editing),
            "Continue": button("Continue", "Go on where the text ends", self._on_continue),
            "Clear": button("Clear", "Take the text away; the history stays", self._on_clear),
        }
        self.offer = button("Ask it in a chat", "Have the prompt answered, not continued", self._on_offer)
        self.offer.add_class("tinyllama-in-offer")

    def _make_outputs(self) -> None:
        self.outputs["keys"].on["save"] = self._on_save
        self.outputs |= {
            "notes": w.HTML(),
            "attention": w.HTML(),
            "turns": Turns(self.session, self._tokens, self._on_edit, self._on_again),
            "text": self._tokens(self.session.select, "Prompt and completion"),
            "other": self._tokens(lambda _: None, "The other run"),
            "texts": w.GridBox(),
            "alternatives": Alternatives({"pick": self._on_pick}),
            "settings": w.HTML(),
        }

    def _tokens(self, select, label: str) -> Tokens:
        """A text whose tokens are tinted if that is wanted."""
        made = Tokens({"select": select}, label=label)
        for tint in ("tint", "tint_drafted"):
            w.dlink((self.inputs[tint], "value"), (made, tint))
        return made

    # --- what a click does ------------------------------------------------------------------------

    def start(self) -> None:
        """Continue the prompt, or send the message, with the settings that are shown."""
        prompt, settings = self.inputs["prompt"], self._sampling()
        if not self.session.chatting:
            self.session.generate(prompt.value, *self._origin(), **settings)
        elif not prompt.value.strip():
            self.worker.error = "the message is empty"
            self.refresh()
        elif not self.worker.busy:
            self._sent, prompt.value = prompt.value, ""
            run, is_answer = self._edited or (None, False)
            self._edited = None
            if is_answer:
                self.session.edit(run, self._sent, **settings)
            else:
                self._ask(self._sent, run)

    def _ask(self, message: str, instead: Run | None = None, **settings) -> None:
        settings = self._sampling() | {"system": self.inputs["system"].value} | settings
        self.session.ask(message, *self._origin(), instead=instead, **settings)

    def _on_again(self, run: Run) -> None:
        self._ask(run.prompt, run, seed=-1)  # the same one would give the same answer

    def _on_edit(self, run: Run, is_answer: bool) -> None:
        self._edited = run, is_answer
        self.inputs["prompt"].value = run.answer if is_answer else run.prompt
        self.inputs["prompt"].focus()
        self.refresh()

    def _stop_editing(self) -> None:
        self._edited, self.inputs["prompt"].value = None, ""
        self.refresh()

    def _on_mode(self, chatting: bool) -> None:
        usual = {False: Settings().n_predict, True: -1}  # an answer ends by itself
        if self._settings["n_predict"].value == usual[not chatting]:
            self._settings["n_predict"].value = usual[chatting]
        self._edited = None
        self.session.switch(chatting)

    def _on_offer(self) -> None:
        self.inputs["mode"].value, self.inputs["prompt"].value = True, self.session.run.prompt
        self.start()

    def _on_clear(self) -> None:
        self._edited = None
        self.session.clear()

    def _on_continue(self) -> None:
        self.session.resume(**self._sampling())

    def _on_pick(self, token_id: int) -> None:
        if self.session.selected is not None:
            self.session.resume_with(self.session.selected, token_id, **self._sampling())

    def _on_save(self, _) -> None:
        content = json.dumps(report.export(self.session.runs), ensure_ascii=False, indent=1)
        self.outputs["keys"].send({"name": "tinyllama-runs.json", "content": content})

    def _origin(self) -> list:
        return [self.inputs[name].value for name in ("model", "backend", "threads")]

    def _sampling(self) -> dict:
        """The settings that are shown; the page computes a slider's value in steps: 0.01 + 89 * 0.01."""
        values = {name: box.value for name, box in self._settings.items() if hasattr(Settings, name)}
        stop = [line.replace("\\n", "\n") for line in values["stop"].split("\n") if line]
        values |= {"stop": tuple(stop), "ctx_size": values["ctx_size"] or None}
        values["chat_template"] = values["chat_template"] or None
        if not self.session.chatting:
            del values["chat_template"]
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}

    # --- what is shown ----------------------------------------------------------------------------

    def update(self) -> None:
        """Show the session's run, and what is known about the selected token."""
        run, index, busy = self.session.run, self.session.selected, self.worker.busy
        self.buttons["Generate"].disabled = busy
        self.buttons["Continue"].disabled = busy or run is None
        self.outputs["status"].value = escape(report.status(self.session))
        self._update_mode(self.session.chatting, run)
        self._update_attention(self.session.attention)
        if self.session.chatting:
            self.outputs["turns"].update(self._attention_from)
        if not self.session.chatting or self.inputs["raw"].value:
            self.outputs["text"].text = report.text(run)
            self.outputs["text"].selected = -1 if index is None else index
            self.outputs["text"].attention = self._attention_from(0)
        token = {} if index is None else report.token_report(run, index, not busy)
        self.outputs["alternatives"].report = token
        self.outputs["keys"].says = "The model is writing" if busy else self._heard()
        if not busy:  # what follows can wait for the end
            self._update_history(run)

    def _update_attention(self, found: np.ndarray | None) -> None:
        """Offer the layers, and say what is tinted."""
        layers = self.inputs["layers"]
        visible(self._attention, self.inputs["attend"].value)
        if found is not None and len(layers.options) != len(found) + 1:
            layers.options = [ALL_LAYERS, *((f"layer {n}", n) for n in range(len(found)))]
        is_part = self.session.chatting and not self.inputs["raw"].value
        first = len(self.session.run.prompt_tokens) if is_part and self.session.run else 0
        note = report.attention_note(found, *self._attention_shown(), first)
        self.outputs["attention"].value = escape(note)

    def _attention_shown(self) -> tuple[int | None, bool]:
        """Which layer's attention is tinted, and whether that to the first token is."""
        layer = self.inputs["layers"].value
        return None if layer < 0 else layer, self.inputs["sinks"].value

    def _attention_from(self, first: int) -> dict:
        """What the selected token attended to, as `Tokens` shows it from a token on."""
        return report.attention(self.session.attention, *self._attention_shown(), first)

    def _heard(self) -> str:
        return f"It wrote: {self.session.runs[-1].answer or 'nothing'}" if self.session.runs else ""

    def _update_mode(self, chatting: bool, run: Run | None) -> None:
        """Name things as they are called in a chat or out of it, and show those that are needed there."""
        self.inputs["mode"].value = chatting
        self.inputs["prompt"].description = "Message" if chatting else "Prompt"
        what = "Say something; Ctrl-Enter sends it" if chatting else "What the model is to go on from"
        self.inputs["prompt"].placeholder = what
        send = "Send" if not self._edited else "Put this answer" if self._edited[1] else "Send this instead"
        self.buttons["Generate"].description = send if chatting else "Generate"
        self.buttons["Clear"].description = "New chat" if chatting else "Clear"
        for name in ("system", "chat_template", "raw"):
            visible(self.inputs[name], chatting)
        visible(self.inputs["other"], not chatting)
        visible(self._about, self.session.runs)
        visible(self.outputs["turns"], chatting and self.session.chat)
        visible(self.outputs["texts"], not chatting or (run and self.inputs["raw"].value))
        visible(self._more, self.inputs["more"].value)
        visible(self.inputs["tint_drafted"], self.inputs["draft_lookup"].value)
        visible(self.buttons["Cancel"], self._edited)
        for is_chat, examples in enumerate(self.examples):
            visible(examples, not run and is_chat == chatting)

    def _update_history(self, run: Run | None) -> None:
        runs = [(report.title(run), run.number) for run in reversed(self.session.runs)]
        other = self.session.find(self.inputs["other"].value)
        for name, chosen in (("history", run), ("other", other)):
            self.inputs[name].options = [("none", 0), *runs]
            self.inputs[name].value = chosen.number if chosen in self.session.runs else 0
        self.inputs["name"].value, self.inputs["name"].disabled = run.name if run else "", run is None
        call, keys = "Copy as tinyllama.generate(…)", self.outputs["keys"]
        keys.copies = {"Copy as text": run.text, call: run.completion.call()} if run else {}
        keys.save = "Save all runs as JSON" if runs else ""
        self.outputs["other"].text = report.text(other)
        shown = ("text", "other") if run and other and not self.session.chatting else ("text",)
        self.outputs["texts"].children = [self.outputs[name] for name in shown]
        self.outputs["settings"].value = _settings(*filter(None, (run, other))) if run else ""
        notes = "<br>".join(map(escape, report.notes(run, len(self.session.answers(run))))) if run else ""
        self.outputs["notes"].value = notes
        visible(self.outputs["notes"], notes)
        visible(self.offer, notes and run.can_chat and run.system is None)
        chat = self.session.chat
        if self._sent and (chat is None or chat.prompt != self._sent) and not self.inputs["prompt"].value:
            self.inputs["prompt"].value = self._sent  # it wasn't sent: the model is missing, say
        self._sent = ""


ALL_LAYERS = ("all layers", -1)

#: Settings that controls show in another form.
SHOWN = {
    "stop": lambda stop: "\n".join(text.replace("\n", "\\n") for text in Settings(stop=stop).stop),
    "ctx_size": lambda size: size or 0,
    "chat_template": lambda template: template or "",
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
