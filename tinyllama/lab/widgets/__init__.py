"""Two live tools for a notebook: the prompt playground and the stepper.

    models           the models that can be chosen
    worker           one job at a time, in a thread that can be told to stop
    session          what the playground knows and does: runs, history, alternatives
    attention        what the pass that chose a token attended to
    report           what it says about a token, a run, or two runs
    kinds            what each step of the forward pass is called, what happens in it and why
    source           the line of model.py or ops.py that computes it
    heads            the attention of all heads together
    lens             what the model would say after any layer
    steps            what the stepper knows: a prompt's way through a model
    step_report      what it says about that
    experiment       what if? A model with changes inside, another prompt or model, beside the one as it is
    elements         the parts that ipywidgets lacks, through anywidget
    controls         what both tools have: their frame, and controls in one style
    turns_view       a chat as blocks
    playground_view  the widgets on top of a session
    stepper_view     the widgets on top of a walk
    experiment_view  the widgets on top of two sides of an experiment

State is plain Python that runs and is tested without a browser. What comes from `elements` on puts widgets on
top of it, and needs the packages of the extra `notebooks`.
"""

from importlib.util import find_spec

from ...errors import require
from ...machine.places import default_model


def playground(model: str | None = None, prompt: str = "", chat: bool = False, system: str = "", **settings):
    """Prompt a model in a notebook, or chat with it: text as it is made, every token to be clicked.

    Args:
        model: the one that is chosen at first, as `load` takes it; None: TINYLLAMA_MODEL's, else "small".
        prompt: what the prompt, or the first message, says at first.
        chat: begin with a chat; a switch leads from one to the other.
        system: what the model is told before a chat, at first.
        settings: of `backend`, `threads` and `settings.Settings`, what they are at first.
    Raises:
        TinyllamaError: ipywidgets or anywidget isn't installed.
    """
    _require_widgets()
    from .playground_view import Playground

    return Playground(model or default_model(), prompt, chat, system, **settings)


def stepper(
    prompt: str | list[int] = "Once upon a time",
    model: str | None = None,
    backend: str = "auto",
    *,
    view: str = "step",
    **state,
):
    """Follow a token through a model, step by step: the line that is executed, its numbers, its reason.

    Args:
        prompt, model, backend: what is chosen at first. A prompt may be token ids.
        view: "step", "heads" (the attention of all), "lens" (what the model would say after every layer).
        state: where one stands at first: layer=3, kind="attention.weights", head=2, position=5, looks_at=1;
            what is changed: changes=[{"at": "layers.3.attention.heads", "heads": [2]}], second="prompt"; all
            as the stepper's own line of Python has it.
    Raises:
        TinyllamaError: ipywidgets or anywidget isn't installed, or there is no such view or place.
    """
    _require_widgets()
    from .experiment_view import STATE
    from .stepper_view import PLACE, VIEWS, Stepper

    require(view in VIEWS, f"there is no view {view!r}: there are {', '.join(VIEWS)}")
    known = PLACE + STATE
    unknown = ", ".join(sorted(state.keys() - known))
    require(not unknown, f"the stepper has no {unknown}: there are {', '.join(known)}")
    return Stepper(prompt, model or default_model(), backend, view, **state)


def _require_widgets() -> None:
    missing = [name for name in ("ipywidgets", "anywidget") if find_spec(name) is None]
    require(not missing, f"{' and '.join(missing)} missing: `pip install tinyllama-lab[notebooks]`")
