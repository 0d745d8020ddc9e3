"""A chat as blocks: who says what, answers to one message side by side, their tokens to be clicked."""

from collections.abc import Callable, Iterator
from functools import partial
from html import escape

import ipywidgets as w

from . import report
from .controls import button, columns, row
from .elements import Tokens
from .session import Run, Session


class Turns(w.VBox):
    """The chat that a session shows."""

    def __init__(self, session: Session, make_tokens: Callable, on_edit: Callable, on_again: Callable):
        """Args:
        make_tokens: called with what a click does and a label; gives a `Tokens`.
        on_edit: called with a run, and whether its answer is to be edited, not the message.
        on_again: called with a run to which another answer is wanted.
        """
        super().__init__()
        self._session, self._make_tokens = session, make_tokens
        self._on_edit, self._on_again = on_edit, on_again
        self._made: dict[
            tuple[Run, ...], w.VBox
        ] = {}  # a turn's taken answer and all its answers -> its block
        self._tokens: dict[Run, Tokens] = {}

    def update(self, attention: Callable[[int], dict]) -> None:
        """Show what has been said so far.

        Args:
            attention: of the selected token, to the tokens from one on.
        """
        chat = self._session.chat
        shape = [
            (run, *turn) for run, turn in zip(chat.path if chat else (), self._session.turns(), strict=True)
        ]
        for gone in [self._made.pop(turn) for turn in list(self._made) if turn not in shape]:
            for widget in (gone, *_inside(gone)):
                widget.close()
        self._made = {turn: self._made.get(turn) or self._turn(*turn) for turn in shape}
        self.children = list(self._made.values())
        for run, tokens in ((run, self._tokens[run]) for _, *turn in shape for run in turn):
            n_prompt, shown = len(run.prompt_tokens), tokens.text.get("texts")
            if shown is None or len(shown) != len(run.tokens) - n_prompt or run is self._session.run:
                tokens.text = report.text(run, first=n_prompt)
            is_looked_at = run is self._session.run
            index = self._session.selected if is_looked_at else None
            tokens.attention = attention(n_prompt) if is_looked_at else {}
            tokens.selected = -1 if index is None else max(-1, index - n_prompt)
        self._tokens = {run: self._tokens[run] for _, *turn in shape for run in turn}
        for widget in _inside(self):
            if isinstance(widget, w.Button):
                widget.disabled = self._session.worker.busy

    def _turn(self, taken: Run, *answers: Run) -> w.VBox:
        said = w.HTML(f"<div class='tinyllama-message'>{escape(taken.prompt)}</div>")
        how = "Say something else instead, and go on from there"
        edit = button("Edit", how, lambda: self._on_edit(taken, False))
        message = w.VBox([row(w.HTML("<h4>You</h4>"), edit), said]).add_class("tinyllama-user")
        blocks = [self._answer(run, n, len(answers), run is taken) for n, run in enumerate(answers, 1)]
        return w.VBox([message, columns(*blocks).add_class("tinyllama-answers")])

    def _answer(self, run: Run, number: int, of: int, is_taken: bool) -> w.VBox:
        model = str(run.origin[0]).rpartition("/")[2]
        which = "" if of == 1 else f"answer {number} of {of}{' ← taken' * is_taken}"
        select = partial(self._select, run)
        tokens = self._tokens[run] = self._make_tokens(select, f"{model} says {which}".rstrip())
        take = button("Take this one", "Let the chat go on from it", lambda: self._session.take(run))
        again = button("Another answer", "Put another answer beside it", lambda: self._on_again(run))
        edit = button("Edit", "Put other words into the model's mouth", lambda: self._on_edit(run, True))
        who = w.HTML(f"<h4>{escape(model)}</h4> {which}")
        kind = "tinyllama-taken" if is_taken else "tinyllama-left"
        return (
            w.VBox([row(who, again if is_taken else take, edit), tokens])
            .add_class("tinyllama-answer")
            .add_class(kind)
        )

    def _select(self, run: Run, index: int) -> None:
        self._session.select(index + len(run.prompt_tokens), run)


def _inside(box: w.Box) -> Iterator[w.Widget]:
    """All widgets in a box, at any depth."""
    for child in box.children:
        yield child
        yield from _inside(child) if isinstance(child, w.Box) else ()
