"""What both tools have: their frame, and how their controls are made and laid out."""

import threading
from collections.abc import Callable
from html import escape

import ipywidgets as w

from ...backends import available
from .elements import Keys
from .models import choices
from .worker import Worker


class Tool(w.VBox):
    """A tool's frame: controls, keys, a line that says what is going on, an error, one job at a time.

    A subclass makes its widgets and calls `show`. Its `start` does what its first button and Ctrl-Enter (with
    `enter`, in the prompt Enter, too) are for, its `update` gives all widgets the values that they are to
    show.

    Attributes:
        worker: runs what takes long; it can be told to stop.
        inputs, buttons, outputs: the widgets, by their names.
    """

    def __init__(self, name: str, worker: Worker, start: str, does: str, enter: bool = False):
        super().__init__()
        replace_earlier(self)
        self.worker, self.inputs = worker, {}
        self.buttons = {
            start: button(start, f"{does} ({'' if enter else 'Ctrl-'}Enter)", self.start, "primary"),
            "Stop": button("Stop", "Stop (Escape)", worker.stop),
        }
        on = {"generate": self.start_with, "stop": lambda _: worker.stop()}
        self.outputs = {
            "status": w.HTML(),
            "error": w.HTML(),
            "keys": Keys(on, label=f"tinyllama {name}", enter=enter),
        }
        self._lock, self._updating = threading.RLock(), False
        self._awaited: str | None = None  # a prompt
        self.add_class("tinyllama").add_class(f"tinyllama-{name}")

    def show(self, *widgets: w.Widget) -> None:
        """Lay out the widgets, once all are there, each with a class by which it can be found."""
        for kind, named in {"in": self.inputs | self.buttons, "out": self.outputs}.items():
            for name, widget in named.items():
                widget.add_class(f"tinyllama-{kind}-{name.lower()}")
        self.children = widgets
        self.inputs["prompt"].observe(self._on_prompt, "value")
        self.refresh()

    def start_with(self, typed: str | None = None) -> None:
        """Start; if what was typed into the prompt is still on its way here, as soon as it arrives."""
        is_here = typed in (None, self.inputs["prompt"].value)
        self._awaited = None if is_here else typed
        if is_here:
            self.start()

    def _on_prompt(self, change) -> None:
        if change.new == self._awaited:
            self.start_with(change.new)

    def refresh(self) -> None:
        """Show what there is now; called by the kernel's thread and the worker's."""
        with self._lock:
            self._updating = True
            try:
                self.buttons["Stop"].disabled = not self.worker.busy
                self.outputs["keys"].busy = self.worker.busy
                error = escape(self.worker.error)
                box = f'<div role="alert" class="tinyllama-error">{error}</div>'
                self.outputs["error"].value = box if error else ""
                self.update()
            finally:
                self._updating = False

    def on_change(self, control: w.Widget, act: Callable[[object], None]) -> None:
        """Call act(value) and refresh when a person, not `update`, has changed a control."""

        def changed(change) -> None:
            with self._lock:
                if not self._updating:
                    act(change.new)
                    self.refresh()

        control.observe(changed, "value")


def model_choice(model: str) -> w.Dropdown:
    """All models that are here, and this one even if it isn't."""
    return choice("Model", choices(), str(model))


def backend_choice(backend: str = "auto") -> w.Dropdown:
    """All backends that run here, and this one even if it doesn't."""
    names = [name for name, reason in available().items() if reason is None]
    return choice("Backend", [(f"auto ({names[0]})", "auto"), *zip(names, names, strict=True)], backend)


def choice(description: str, options: list[tuple[str, str]], value: str) -> w.Dropdown:
    """(label, value) to choose from, and this value even if it isn't among them."""
    missing = [] if value in dict(options).values() else [(value, value)]
    return w.Dropdown(options=options + missing, value=value, description=description)


def button(label: str, tooltip: str, action: Callable[[], object], style: str = "") -> w.Button:
    """A button that calls action()."""
    made = w.Button(description=label, tooltip=tooltip, button_style=style)
    made.on_click(lambda _: action())
    return made


def visible(widget: w.Widget, shown: bool) -> None:
    """Show a widget, or take it away."""
    widget.layout.display = None if shown else "none"


def row(*widgets: w.Widget) -> w.HBox:
    """Widgets side by side, on several lines where there isn't the room."""
    return w.HBox(widgets).add_class("tinyllama-row")


def columns(*widgets: w.Widget) -> w.GridBox:
    """Widgets in columns of one width, as many as there is room for."""
    return w.GridBox(widgets).add_class("tinyllama-columns")


#: A cell's id -> its last execution, and the tools which that has made.
_shown: dict[str, tuple[str, list]] = {}


def replace_earlier(tool: Tool) -> None:
    """Stop the tools that an earlier run of this cell has shown: nobody sees them any more."""
    try:
        from IPython import get_ipython

        request = get_ipython().get_parent()
        cell, execution = request["metadata"]["cellId"], request["header"]["msg_id"]
    except (ImportError, AttributeError, KeyError):
        return  # no notebook, or one that doesn't say which cell runs
    earlier, tools = _shown.get(cell, ("", []))
    if earlier != execution:
        for old in tools:
            old.worker.stop()
            old.close()
        tools = []
    _shown[cell] = execution, [*tools, tool]
