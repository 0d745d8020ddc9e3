"""Controls that both tools have, in one style."""

from html import escape

import ipywidgets as w

from ...backends import available
from .models import choices

WIDE = w.Layout(width="auto")
COLUMNS = w.Layout(grid_template_columns="repeat(auto-fit, minmax(300px, 1fr))", grid_gap="4px 20px")


def name_control(name: str, control: w.Widget) -> None:
    """Give a control its style, and a class by which it can be found."""
    control.add_class(f"tinyllama-in-{name}")
    control.style = {"description_width": "135px"}
    control.layout.width = "auto"


def model_choice(model: str) -> w.Dropdown:
    """All models that are here, and this one even if it isn't."""
    found = [(choice.label, choice.model) for choice in choices()]
    if model not in dict(found).values():
        found.append((str(model), str(model)))
    return w.Dropdown(options=found, value=str(model), description="Model")


def backend_choice(backend: str = "auto") -> w.Dropdown:
    """All backends that run here."""
    names = [name for name, reason in available().items() if reason is None]
    options = [(f"auto ({names[0]})", "auto"), *((name, name) for name in names)]
    if backend not in dict(options).values():
        options.append((backend, backend))
    return w.Dropdown(options=options, value=backend, description="Backend")


def button(label: str, tooltip: str, action) -> w.Button:
    """A button that calls action()."""
    made = w.Button(description=label, tooltip=tooltip, layout=WIDE)
    made.on_click(lambda _: action())
    made.add_class(f"tinyllama-{label.lower()}")
    return made


def row(*widgets: w.Widget) -> w.HBox:
    """Widgets side by side, on several lines where there isn't the room."""
    made = w.HBox(widgets, layout=w.Layout(flex_flow="row wrap", align_items="center"))
    made.add_class("tinyllama-row")
    return made


def error_box(error: str) -> str:
    """An error as HTML, nothing if there is none."""
    return f'<div role="alert" class="tinyllama-error">{escape(error)}</div>' if error else ""


#: A cell's id -> its last execution, and the tools which that has made.
_shown: dict[str, tuple[str, list]] = {}


def replace_earlier(tool) -> None:
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
