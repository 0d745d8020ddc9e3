"""The models on this computer for `llm`, by Simon Willison: `llm -m tinyllama/smollm2 'Hi'`.

`llm` imports this at each start, so what computes is imported with the first answer.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields

import click
import llm
from pydantic import AliasChoices, Field, create_model

from ..errors import TinyllamaError
from ..machine import places
from ..settings import Settings
from ..texts.keywords import OTHER_NAMES

LISTED = (
    "max_tokens",
    "temperature",
)  # what all plugins of llm call these settings; our names are taken, too
LOADING = {  # arguments of `load`
    "backend": (str | None, 'what computes: "c", "numpy", ...; default: the fastest'),
    "threads": (int | None, "default: one a core"),
    "mmap": (bool | None, "leave the weights in their file: less memory, slower"),
}
LEFT_OUT = ("stages", "taps")  # of the settings: too much for a log
CONTINUED = 128  # tokens, by default, of a text that isn't an answer: it may have no end

log = logging.getLogger("tinyllama")  # which nobody has to set up: warnings go to stderr


@llm.hookimpl
def register_models(register) -> None:
    """Tell llm of all that looks like a model; whether it is one that runs shows when it is asked."""
    names = [places.default_model()]
    try:
        names += [name for name, _ in places.everything()]
    except (TinyllamaError, OSError) as error:
        log.warning("tinyllama: %s", error)
    for name in dict.fromkeys(names):
        register(Model(name), AsyncModel(name))


def _options() -> type[llm.Options]:
    """The settings as options of llm, with their limits; None: what tinyllama takes by default."""
    made = {}
    for setting in [setting for setting in fields(Settings) if setting.name not in LEFT_OUT]:
        about, kind = setting.metadata, str | list[str] if setting.name == "stop" else setting.type
        names = [setting.name, *(theirs for theirs, ours in OTHER_NAMES.items() if ours == setting.name)]
        names.sort(key=lambda name: name not in LISTED)
        limits = {"ge": about["least"]} | ({"le": about["most"]} if about["most"] < math.inf else {})
        field = Field(None, description=about["help"], validation_alias=AliasChoices(*names), **limits)
        made[names[0]] = kind | None, field
    made |= {name: (kind, Field(None, description=text)) for name, (kind, text) in LOADING.items()}
    return create_model("Options", __base__=llm.Options, **made)


class _Named:
    can_stream, Options = True, _options()

    def __init__(self, name: str):
        self.name, self.model_id = name, f"tinyllama/{name}"

    def begin(self, prompt: llm.models.Prompt):
        """The answer to a prompt and to what was said before it, a Generation."""
        from ..llama import load
        from ..texts.chat import Chat
        from ..texts.templates import prompt_of

        wanted = {OTHER_NAMES.get(name, name): value for name, value in prompt.options if value is not None}
        llama = load(self.name, **{name: wanted.pop(name) for name in LOADING if name in wanted})
        messages = [{"role": one.role, "content": _text(one)} for one in prompt.messages]
        answers = wanted.pop("chat", True)
        if not (answers and llama.template(wanted.get("chat_template"))):
            wanted = {"n_predict": CONTINUED} | wanted
        if answers:
            text = Chat(llama, messages=messages, **wanted).stream()
        else:
            text = llama.stream(prompt_of(messages, None), **wanted)
        for warning in text.warnings:
            log.warning("tinyllama: %s", warning)
        return text

    def note(self, text, response: llm.models._BaseResponse) -> None:
        """What llm keeps of an answer in its log."""
        tokens = [{"id": token.id, "piece": token.piece, "prob": token.prob} for token in text.tokens]
        about = {"seed": text.seed, "stop_reason": text.stop_reason, "timings": asdict(text.timings)}
        response.response_json = about | {"warnings": text.warnings, "tokens": tokens}
        n_read = text.timings.n_remembered
        details = {"remembered_tokens": n_read} if n_read else None
        response.set_usage(input=len(text.prompt_ids), output=len(tokens), details=details)


class Model(_Named, llm.Model):
    """A model by a name that `load` takes."""

    def execute(self, prompt, stream, response, conversation) -> Iterator[str]:
        """The pieces of an answer. Ctrl-C raises KeyboardInterrupt before the next layer."""
        with _refusals():
            text = self.begin(prompt)
            try:
                yield from text
            finally:
                self.note(text, response)


class AsyncModel(_Named, llm.AsyncModel):
    """The same for asyncio: it computes in another thread."""

    async def execute(self, prompt, stream, response, conversation) -> AsyncIterator[str]:
        """The pieces of an answer; whoever stops listening ends it."""
        with _refusals():
            text = await asyncio.to_thread(self.begin, prompt)
            try:
                while piece := await asyncio.to_thread(next, text, ""):
                    yield piece
            finally:
                text.cancelled = True
                self.note(text, response)


class Refused(llm.ModelError, click.ClickException):
    """An error that llm shows as one line; click's kind, since `llm chat` catches no other."""


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except TinyllamaError as error:
        raise Refused(str(error)) from None


def _text(message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, llm.parts.TextPart))
