"""The stepper's experiments: what is changed, and the answer as it is beside the one with the changes."""

from collections.abc import Callable, Sequence
from html import escape

import ipywidgets as w
import numpy as np

from ...errors import Cancelled, TinyllamaError, require
from ...texts.completion import STOP_REASONS
from .controls import Tool, button, columns, row, visible
from .elements import HeatMap
from .experiment import Change, Here, Outcome, Row, Side, change, differences, likeliest, run
from .models import choices
from .report import percent
from .report import visible as word
from .step_report import ROOT

STATE = ("changes", "second", "beside", "other", "n_predict")  # what `ExperimentPanel.state` may name
#: Controls that stand side by side.
LINES = (
    ("head_off", "attention_off", "feed_forward_off"),
    ("where", "dim", "number", "set", "scale", "mean"),
    ("second", "patch"),
    ("beside", "other", "n_predict"),
)
SAME = ("the same model", "")
OUTPUTS = ("value", "error", "hint", "left", "right", "likeliest", "code")  # HTML
MOST = 10_000  # tokens that an answer may have
SHOWN = 40  # tokens of a prompt before its answer


class ExperimentPanel(w.VBox):
    """What if? Heads, layers and values that are changed, a second prompt, a second model: two answers.

    A tool shows it below what it shows of a model, and calls `update` whenever it shows what there is now.
    What is chosen is run in the tool's thread, as soon as nothing else runs there.

    Attributes:
        changes: what is changed on the right side.
        sides: as it is, and with the changes, the other prompt or model; None: there is nothing to compare.
        outcomes: what came of two sides, the last that were run.
    """

    def __init__(
        self,
        tool: Tool,
        here: Callable[[], Here | None],
        changes: Sequence[dict] = (),
        second: str = "",
        beside: str = "changes",
        other: str = "",
        n_predict: int = 16,
    ):
        """Args:
        tool: whose worker runs it.
        here: where the tool stands in a model now; None before there is one.
        changes, second, beside, other, n_predict: what is chosen at first, as `state` says it.
        """
        super().__init__()
        self.changes = [change(one) for one in changes]
        _require_state(second, beside, other, n_predict)
        self.outcomes: list[Outcome] = []
        self._tool, self._here = tool, here
        self._tried, self._drawn = None, None  # sides that were started; outcomes that are shown
        self._failed = ""  # why the last run has no outcomes
        self._rows: dict[int, w.HBox] = {}  # of changes, by id
        self._make_inputs(second, beside, other, n_predict)
        self._make_buttons()
        self.outputs = {name: w.HTML() for name in OUTPUTS}
        self.outputs |= {"changes": w.VBox(), "differences": HeatMap()}
        self.outputs["hint"].value = f"<p>{HINT}</p>"
        for kind, named in {"in": self.inputs | self.buttons, "out": self.outputs}.items():
            for name, widget in named.items():
                widget.add_class(f"tinyllama-{kind}-{name}")
        answers = columns(self.outputs["left"], self.outputs["right"])
        numbers = w.HBox([self.outputs["likeliest"], self.outputs["differences"]])
        self._results = w.VBox([answers, numbers.add_class("tinyllama-both"), self.outputs["code"]])
        controls = self.buttons | self.inputs
        off, *lines = [row(*(controls[name] for name in line)) for line in LINES]
        hint = row(self.buttons["compare"], self.outputs["hint"])
        below = self.outputs["changes"], self.outputs["error"], hint, self._results
        self.children = [w.HTML("<h3>What if?</h3>"), off, self.outputs["value"], *lines, *below]
        self.add_class("tinyllama-experiment")

    def _make_inputs(self, second: str, beside: str, other: str, n_predict: int) -> None:
        models = [SAME, *choices()]
        models += [] if other in [value for _, value in models] else [(other, other)]
        self.inputs = {
            "second": w.Text(second, description="Second prompt", continuous_update=False),
            "where": w.Dropdown(options=WHERE, description="At"),
            "dim": w.BoundedIntText(-1, min=-1, max=10**7, description="Dim (−1: all)"),
            "number": w.FloatText(0.0, description="Value"),
            "beside": w.Dropdown(options=BESIDE, value=beside, description="On the right"),
            "other": w.Dropdown(options=models, value=other, description="Its model"),
            "n_predict": w.BoundedIntText(n_predict, min=0, max=MOST, description="Tokens"),
        }
        for control in self.inputs.values():
            self._tool.on_change(control, lambda _: None)

    def _make_buttons(self) -> None:
        self.buttons = {
            "head_off": button("", "What it has found is 0", lambda: self._add("head_off")),
            "attention_off": button("", "Attention adds nothing", lambda: self._add("part_off", "attention")),
            "feed_forward_off": button(
                "", "The network adds nothing", lambda: self._add("part_off", "feed_forward")
            ),
            "set": button(
                "", "Put this number in its place", lambda: self._change(self._dim, value=self._number)
            ),
            "scale": button(
                "", "Multiply it by this number", lambda: self._change(self._dim, times=self._number)
            ),
            "mean": button(
                "Set it to its mean", "The mean of all tokens", lambda: self._change(self._dim, value="mean")
            ),
            "patch": button("", "From the token as far from the end of the second prompt", self._patch),
            "compare": button("Compare", "Run both once more", self._again),
        }

    # --- what a click does ------------------------------------------------------------------------

    @property
    def _number(self) -> float:
        return self.inputs["number"].value

    def _add(self, what: str, *arguments) -> None:
        self.changes.append(getattr(self._here(), what)(*arguments))
        self._tool.refresh()

    @property
    def _dim(self) -> int | None:
        return None if self.inputs["dim"].value < 0 else self.inputs["dim"].value

    def _change(self, dim: int | None = None, **how) -> None:
        self.changes.append(self._here().change(self.inputs["where"].value, dim, **how))
        self._tool.refresh()

    def _patch(self) -> None:
        if self.inputs["second"].value:
            self._change(prompt=self.inputs["second"].value)
        else:
            self._failed = "the second prompt is empty: there is nothing to patch from"
            self._tool.refresh()

    def _again(self) -> None:
        self._tried = None
        self._tool.refresh()

    def _remove(self, one: Change) -> None:
        self.changes = [other for other in self.changes if other is not one]
        self._tool.refresh()

    # --- what is run ------------------------------------------------------------------------------

    @property
    def sides(self) -> tuple[Side, Side] | None:
        here, n_predict = self._here(), self.inputs["n_predict"].value
        if here is None:
            return None
        left = Side(here.prompt, here.model, here.backend, n_predict=n_predict)
        second = self.inputs["beside"].value == "second" and self.inputs["second"].value
        model = self.inputs["other"].value or here.model
        right = Side(second or here.prompt, model, here.backend, tuple(self.changes), n_predict)
        return None if left == right else (left, right)

    def _start(self, sides: tuple[Side, Side]) -> None:
        """Run them, unless that was tried already, as soon as nothing else runs."""
        if sides != self._tried and not self._tool.worker.busy:
            self._tried, self._failed = sides, ""
            self._tool.worker.start(lambda: self._run(*sides))

    def _run(self, left: Side, right: Side) -> None:
        outcomes = []
        for side, doing in ((left, "Running the prompt as it is"), (right, "Running what is on the right")):
            self._tool.worker.doing = doing
            known = [one for one in self.outcomes if one.side == side]
            try:
                outcomes += known[:1] or [run(side, self._tool.worker.load)]
            except Cancelled:
                self._failed = "stopped: Compare runs it again"
                raise
            except TinyllamaError as error:
                self._failed = f"{_short(side.model)}: {error}" if left.model != right.model else str(error)
                return
        self.outcomes = outcomes

    @property
    def _is_done(self) -> bool:
        """Whether the outcomes are of what is chosen now."""
        return self.sides is not None and self.sides == tuple(one.side for one in self.outcomes)

    # --- what is shown ----------------------------------------------------------------------------

    def state(self) -> dict:
        """What of `changes`, `second`, ... opens it like this; only what isn't as at first."""
        usual = {"second": "", "beside": "changes", "other": "", "n_predict": 16}
        chosen = {name: self.inputs[name].value for name in usual}
        changes = {"changes": [one.keywords() for one in self.changes]} if self.changes else {}
        return changes | {name: value for name, value in chosen.items() if value != usual[name]}

    @property
    def copies(self) -> dict[str, str]:
        """What can be copied, as `Keys` takes it."""
        return {"Copy the right side as Python": self.outcomes[1].code} if self._is_done else {}

    def update(self) -> None:
        """Show what is changed and what came of it, and run what hasn't been run yet."""
        here, sides = self._here(), self.sides
        self._update_buttons(here)
        self._update_changes()
        if sides:
            self._start(sides)
        elif self._tried:
            self._tried, self._failed = None, ""
        error = f'<div role="alert" class="tinyllama-error">{escape(self._failed)}</div>'
        self.outputs["error"].value = error if self._failed else ""
        busy, is_done = self._tool.worker.busy, self._is_done
        visible(self._results, self.outcomes and sides and (busy or is_done))
        visible(self.outputs["hint"], not sides)
        visible(self.buttons["compare"], sides and not busy and not is_done)
        if is_done and self._drawn is not self.outcomes:
            self._drawn = self.outcomes
            self._update_results(*self.outcomes)

    def _update_buttons(self, here: Here | None) -> None:
        head, layer = (here.head, here.layer) if here else (0, 0)
        patched = f"all of {here.change(self.inputs['where'].value, prompt='').part}" if here else "it"
        labels = {
            "head_off": f"Switch off head {head} of layer {layer}",
            "attention_off": f"Switch off attention of layer {layer}",
            "feed_forward_off": f"Switch off feed-forward of layer {layer}",
            "set": f"Set it to {self._number:g}",
            "scale": f"Multiply it by {self._number:g}",
            "patch": f"Patch {patched} from the second prompt",
        }
        for key, label in labels.items():
            self.buttons[key].description = label
            self.buttons[key].disabled = here is None
        value = here.change(self.inputs["where"].value, self._dim).part if here else ""
        self.outputs["value"].value = f"The value that is looked at: <code>{escape(value)}</code>"

    def _update_changes(self) -> None:
        old, self._rows = (
            self._rows,
            {id(one): self._rows.get(id(one)) or self._row(one) for one in self.changes},
        )
        self.outputs["changes"].children = list(self._rows.values())
        for key in old.keys() - self._rows.keys():
            old[key].close()
        words = self.outcomes[1].changes if self._is_done else map(str, self.changes)
        for one, said in zip(self.changes, words, strict=True):
            self._rows[id(one)].children[1].value = f"<code>{escape(said)}</code>"

    def _row(self, one: Change) -> w.HBox:
        remove = button("Remove", "Leave this as it is", lambda: self._remove(one))
        return row(remove, w.HTML())

    def _update_results(self, left: Outcome, right: Outcome) -> None:
        names = "As it is", name_of(right.side, left.side)
        for key, name, outcome in zip(("left", "right"), names, (left, right), strict=True):
            self.outputs[key].value = answer(name, outcome)
        self.outputs["likeliest"].value = table(names, likeliest(left, right))
        code = f"<pre tabindex='0'>{escape(right.code)}</pre>"
        self.outputs["code"].value = f"<h4>{escape(names[1])}, in Python</h4>{code}"
        apart = differences(left, right)
        visible(self.outputs["differences"], apart is not None)
        if apart is not None:
            self.outputs["differences"].show(apart.T, **_frame(apart, left, right))


HINT = "Switch something off, set a value, or put a second prompt or model on the right."
WHERE = [("every token", True), ("the token that is looked at", False)]
BESIDE = [("the same prompt", "changes"), ("the second prompt", "second")]


def name_of(right: Side, left: Side) -> str:
    """In what one side is not as the other."""
    n = len(right.changes)
    found = {
        "the second prompt": right.prompt != left.prompt,
        _short(right.model): right.model != left.model,
        f"{n} change{'s' * (n > 1)}": n,
    }
    return f"With {' and '.join(what for what, differs in found.items() if differs)}"


def _short(model: str) -> str:
    return model.rpartition("/")[2]


def _require_state(second: str, beside: str, other: str, n_predict: int) -> None:
    known = [value for _, value in BESIDE]
    require(beside in known, f"beside is {beside!r}, but must be one of {', '.join(known)}")
    for name, text in {"second": second, "other": other}.items():
        require(isinstance(text, str), f"{name} is {text!r:.60}, but must be text")
    is_number = isinstance(n_predict, int) and 0 <= n_predict <= MOST
    require(is_number, f"n_predict is {n_predict!r:.60}, but must be in 0..{MOST}")


def answer(name: str, outcome: Outcome) -> str:
    """A prompt and what the model goes on with, as HTML."""
    prompt = escape("".join(outcome.pieces[-SHOWN:]))
    more = "… " * (len(outcome.pieces) > SHOWN)
    text = escape(outcome.text)
    if outcome.text.stop_reason == "eos":
        text += f"<i class='tinyllama-unlisted'> ■ {STOP_REASONS['eos']}</i>"
    return (
        f"<h4>{escape(name)}</h4><div class='tinyllama-message'>"
        f"<span class='tinyllama-prompt'>{more}{prompt}</span>{text}</div>"
    )


def table(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The likeliest next tokens of both sides with bars, and what became of their logits, as HTML."""
    has_changes = any(one.change is not None for one in rows)  # not where vocabularies differ
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in ("next token", *names))
    head += "<th scope='col'>change of its logit<small>from left to right</small></th>" * has_changes
    lines = [f"<tr>{head}</tr>"]
    for one in rows:
        cells = "".join(f"<td>{_bar(prob)}</td>" for prob in one.probs)
        cells += f"<td>{'–' if one.change is None else f'{one.change:+.2f}'}</td>" * has_changes
        piece = f"<code class='tinyllama-piece'>{escape(word(one.piece))}</code>"
        lines.append(f"<tr><th scope='row'>{piece}</th>{cells}</tr>")
    return f"<table class='tinyllama-bars'>{''.join(lines)}</table>"


def _bar(prob: float | None) -> str:
    if prob is None:
        return "<span class='tinyllama-unlisted'>not in its vocabulary</span>"
    bar = f"<span class='tinyllama-bar' style='width: {100 * prob:.3g}%'></span>"
    share = f"<span class='tinyllama-share'>{percent(prob)}</span>"
    return f"<span class='tinyllama-track'>{bar}</span>{share}"


def _frame(apart: np.ndarray, left: Outcome, right: Outcome) -> dict:
    """What `HeatMap` is told beside the differences [n_layers, n_aligned]: a row for each token."""
    n = apart.shape[1]
    pairs = zip(map(word, left.pieces[-n:]), map(word, right.pieces[-n:]), strict=True)
    layer, token = np.unravel_index(apart.argmax(), apart.shape)
    at = f"{word(left.pieces[token - n])} ({len(left.pieces) - n + token})"
    note = ROOT.capitalize()
    most = f"most in layer {layer} at {at}: {apart.max():.3g}"
    return {
        "rows": [one if one == other else f"{one} / {other}" for one, other in pairs],
        "columns": [f"layer {layer}" for layer in range(len(apart))],
        "title": f"How far apart the residual streams are, |right − left| / |left|; {most}. {note}.",
        "root": True,
        "per_cell": 1,
        "limit": float(apart.max()) or 1.0,
        "row": -1,
        "column": -1,
    }
