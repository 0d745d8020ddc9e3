"""How a chat becomes the tokens of a prompt: by a template in Jinja, which comes with the model.

A template is a stranger's program, and runs in a sandbox (sandbox.py).

What people wrote never becomes a control token. The template sees a private character in its place, and the
text comes in once the control tokens, which are the template's alone, have been found (`Tokenizer.encode`).
"""

import re
from importlib.util import find_spec

from ..errors import TinyllamaError, require
from ..tokenizer import CONTROL, Tokenizer
from .keywords import nearest
from .named_templates import ALIASES, NAMED, ROLES
from .sandbox import MOST, compiled, rendered

PRIVATE = range(0x100000, 0x10FFFE)  # characters of which Unicode says nothing
#: What templates look for in messages: thoughts, which they leave out of earlier answers, and switches.
MARKS = "<think> </think> <tool_response> </tool_response> /no_think /think /system_override <<SYS>>"
NEEDED = "chats need the package jinja2: pip install 'tinyllama-lab[chat]'"


def available() -> bool:
    """Whether the package that runs templates is installed."""
    return find_spec("jinja2") is not None


def template_source(wanted: str) -> str:
    """A template by its name, or what is one in Jinja. Raises TinyllamaError for a name that there isn't."""
    name = ALIASES.get(wanted, wanted)
    if "{" not in wanted and name not in NAMED:
        near = nearest(wanted, [*NAMED, *ALIASES])
        meant = f": did you mean {near}?" if near else f": there are {', '.join(NAMED)}"
        raise TinyllamaError(f"no chat template {wanted!r:.60}{meant}")
    return NAMED.get(name, wanted)


def prompt_of(chat: str | list[dict], template: "Template | None") -> str | list[int]:
    """What a model continues to answer a chat, or one message of a user.

    Without a template it is what was said, one message behind the other.
    """
    messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else _checked(chat)
    if template:
        return template.encode(messages)
    return "\n\n".join(message["content"] for message in messages)


class Template:
    """A model's template. Raises TinyllamaError where it is none, or jinja2 isn't installed."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        require(available(), NEEDED)
        self._tokenizer, pieces = tokenizer, tokenizer.vocabulary.pieces
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._names = {name: "" if token is None else pieces[token] for name, token in names.items()}
        marks = [mark for mark in MARKS.split() if mark not in _controls(tokenizer)]
        self._marks = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        self._template = compiled(source)

    def encode(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """A chat -> the ids of a prompt, which the model continues as the assistant.

        Args:
            messages: each {"role": one of ROLES, "content": text}.
        Raises:
            TinyllamaError: messages are of another form, or the template refuses them, or it fails.
        """
        text, filled = self._filled(messages, add_generation_prompt)
        ids = self._tokenizer.encode(text, bos=False, special=True, filled=filled)
        bos = self._tokenizer.bos_id
        return ids if bos is None or not self._tokenizer.add_bos or ids[:1] == [bos] else [bos, *ids]

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As `encode`, as text, which no longer says what is the template's and what somebody wrote."""
        text, filled = self._filled(messages, add_generation_prompt)
        return text.translate(filled)

    def _filled(self, messages, add_generation_prompt: bool) -> tuple[str, dict[int, str]]:
        """What the template writes, and what its private characters stand for."""
        filled: dict[int, str] = {}
        shown = [
            {"role": message["role"], "content": self._hidden(message["content"], filled)}
            for message in _checked(messages)
        ]
        names = self._names | {"messages": shown, "add_generation_prompt": add_generation_prompt}
        text = rendered(self._template, tools=None, documents=None, **names)
        size = len(text) + sum(len(filled.get(ord(char), "")) for char in text)
        require(size <= MOST, f"the chat has more than {MOST:,} characters")
        return text, filled

    def _hidden(self, content: str, filled: dict[int, str]) -> str:
        """A message with private characters for its words; spaces around it stay, since templates trim."""
        at, hidden, core = 0, [], content.strip()
        for mark in [*self._marks.finditer(core), None]:
            part = core[at : mark.start() if mark else None]
            if part.strip():
                require(len(filled) < len(PRIVATE), "the chat has too many messages")
                inner = part.strip()
                before, _, after = part.partition(inner)
                filled[PRIVATE[len(filled)]] = inner
                part = f"{before}{chr(PRIVATE[len(filled) - 1])}{after}"
            hidden += [part, mark[0] if mark else ""]
            at = mark.end() if mark else at
        before, _, after = content.partition(core) if core else (content, "", "")
        return before + "".join(hidden) + after


def _controls(tokenizer: Tokenizer) -> set[str]:
    vocabulary = tokenizer.vocabulary
    return {p for p, kind in zip(vocabulary.pieces, vocabulary.types, strict=True) if kind == CONTROL}


def _checked(messages: object) -> list[dict[str, str]]:
    """Raises TinyllamaError unless it is a chat."""
    require(isinstance(messages, list) and messages, "messages must be a list with at least one message")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        require(isinstance(message, dict), f"{where} must be an object with role and content")
        roles = f"one of {', '.join(ROLES)}, not {message.get('role')!r:.40}"
        require(message.get("role") in ROLES, f"{where}.role must be {roles}")
        content = message.get("content")
        require(isinstance(content, str), f"{where}.content must be a text, not {content!r:.40}")
        try:
            content.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise TinyllamaError(f"{where}.content holds half a character") from None
    return messages
