"""A live tool for a notebook: the prompt playground.

    models           the models that can be chosen
    worker           one job at a time, in a thread that can be told to stop
    session          what the playground knows and does: runs, history, alternatives
    report           what it says about a token, a run, or two runs
    elements         the parts that ipywidgets lacks, through anywidget
    playground_view  the widgets on top of a session

State is plain Python that runs and is tested without a browser; `elements` and the views put widgets on top
of it, and only they need the packages of the extra `notebooks`.
"""

from importlib.util import find_spec

from ..errors import TinyllamaError


def playground(model: str = "small", prompt: str = "", **settings):
    """Prompt a model in a notebook: text as it is made, every token to be clicked.

    Args:
        model: the one that is chosen at first, as `load` takes it.
        prompt: what the prompt says at first.
        settings: of `backend`, `threads` and `generation.Settings`, what they are at first.
    Raises:
        TinyllamaError: ipywidgets or anywidget isn't installed.
    """
    _require_widgets()
    from .playground_view import Playground

    return Playground(model, prompt, **settings)


def _require_widgets() -> None:
    missing = [name for name in ("ipywidgets", "anywidget") if find_spec(name) is None]
    if missing:
        raise TinyllamaError(f"{' and '.join(missing)} missing: `pip install tinyllama[notebooks]`")
