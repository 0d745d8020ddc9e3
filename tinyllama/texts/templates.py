"""How a chat becomes the tokens of a prompt: by a template in Jinja, which comes with the model.

A template is a stranger's program. It runs in a sandbox that gives it nothing but the chat, for so many steps
and so much text at most. Its environment is that of transformers, for which templates are written.

What people wrote never becomes a control token. The template sees a private character in its place, and the
text comes in once the control tokens, which are the template's alone, have been found (`Tokenizer.encode`).
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from ..errors import TinyllamaError, check_cancelled, require
from ..tokenizer import CONTROL, Tokenizer
from .named_templates import NAMED

ROLES = ("system", "user", "assistant")
STEPS = 1_000_000  # lines of Python that a template may run, of which a message takes some tens
MOST = 1 << 24  # characters of a prompt
OFTEN = 10_000  # steps between two looks at whether to stop
PRIVATE = range(0x100000, 0x10FFFE)  # characters of which Unicode says nothing
#: Marks that templates look for in what the model wrote earlier, to leave its thoughts out.
MARKS = ("<think>", "</think>")
#: Filters of Jinja that make long texts of short ones, or that no chat needs.
LENGTHENING = ("center", "filesizeformat", "format", "indent", "pprint", "random", "urlize", "wordwrap")
NEEDED = "chats need the package jinja2: pip install 'tinyllama-lab[chat]'"


def available() -> bool:
    """Whether the package that runs templates is installed."""
    return find_spec("jinja2") is not None


def template_source(wanted: str) -> str:
    """A template by its name, or what is one in Jinja. Raises TinyllamaError for a name that there isn't."""
    require(
        "{" in wanted or wanted in NAMED, f"no chat template {wanted!r:.60}: there are {', '.join(NAMED)}"
    )
    return NAMED.get(wanted, wanted)


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
        from jinja2 import TemplateError

        self._tokenizer, pieces = tokenizer, tokenizer.vocabulary.pieces
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._names = {name: "" if token is None else pieces[token] for name, token in names.items()}
        marks = [mark for mark in MARKS if mark not in _controls(tokenizer)]
        self._marks = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        try:
            self._template = _environment().from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise TinyllamaError(f"the model's chat template can't be read: {_cause(error)}") from None

    def encode(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """A chat -> the ids of a prompt, which the model continues as the assistant.

        Args:
            messages: each {"role": one of ROLES, "content": text}.
        Raises:
            TinyllamaError: messages are of another form, or the template refuses them, or it fails.
        """
        filled: dict[int, str] = {}
        shown = [
            {"role": message["role"], "content": self._hidden(message["content"], filled)}
            for message in _checked(messages)
        ]
        text = self._render(messages=shown, add_generation_prompt=add_generation_prompt)
        size = len(text) + sum(len(filled.get(ord(char), "")) for char in text)
        require(size <= MOST, f"the chat has more than {MOST:,} characters")
        ids = self._tokenizer.encode(text, bos=False, special=True, filled=filled)
        bos = self._tokenizer.bos_id
        return ids if bos is None or not self._tokenizer.add_bos or ids[:1] == [bos] else [bos, *ids]

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

    def _render(self, **chat) -> str:
        from jinja2 import TemplateError

        parts, size = [], 0
        try:
            with _bounded():
                for part in self._template.generate(tools=None, documents=None, **self._names, **chat):
                    parts.append(part)
                    size += len(part)
                    require(size <= MOST, f"it writes more than {MOST:,} characters")
        except (TinyllamaError, TemplateError, MemoryError, *_FAILURES) as error:
            check_cancelled()
            raise TinyllamaError(f"the model's chat template refuses this chat: {_cause(error)}") from None
        return "".join(parts)


#: What a program in Jinja can fail with: it is Python with another face.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _cause(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


@contextmanager
def _bounded() -> Iterator[None]:
    """Inside, at most STEPS lines of Python run: the loops of a template are Python's."""
    before, n_steps = sys.gettrace(), 0

    def step(*_):
        nonlocal n_steps
        n_steps += 1
        if n_steps % OFTEN == 0:
            check_cancelled()
        require(n_steps <= STEPS, f"it takes more than {STEPS:,} steps")
        return step

    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)


def _environment():
    """As transformers makes it, but for what only makes texts long: those stay below MOST all the time."""
    from jinja2.compiler import CodeGenerator
    from jinja2.exceptions import SecurityError, TemplateRuntimeError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def bounded(size: int) -> None:
        if size > MOST:
            raise SecurityError(f"it makes more than {MOST:,} characters")

    def joined(parts) -> str:
        texts = [str(part) for part in parts]
        bounded(sum(map(len, texts)))
        return "".join(texts)

    def replace(text, old, new, count=None):
        text, old, new = str(text), str(old), str(new)
        bounded(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def join(values, d="", attribute=None):
        require(attribute is None, "join by an attribute isn't supported here")
        values = [str(value) for value in values]
        bounded(sum(map(len, values)) + len(values) * len(str(d)))
        return str(d).join(values)

    class Generated(CodeGenerator):
        def visit_Concat(self, node, frame):
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Written(Extension):
        """{% generation %}, around what the model writes: it matters in training alone."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class, concat = Generated, staticmethod(joined)
        intercepted_binops = frozenset({"*", "**", "%", "+"})

        def call_binop(self, context, operator, left, right):
            most = 64 if operator == "**" else 1 << 32
            small = all(isinstance(one, int | float) and abs(one) <= most for one in (left, right))
            if operator == "+" and not small:
                bounded(len(left) + len(right))
            elif not small:
                raise SecurityError(f"{operator} is for small numbers alone here")
            return super().call_binop(context, operator, left, right)

        def call(self, context, function, *args, **kwargs):
            large = [one for one in (*args, *kwargs.values()) if isinstance(one, int) and abs(one) > 1 << 16]
            if large:
                raise SecurityError(f"the number {large[0]!s:.20} is too large here")
            owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
            if isinstance(owner, str) and name in ("replace", "join"):
                return replace(owner, *args) if name == "replace" else join(*args, owner)
            return super().call(context, function, *args, **kwargs)

    def raise_exception(message):
        raise TemplateRuntimeError(message)

    def strftime_now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Written, loopcontrols])
    environment.filters |= {"tojson": tojson, "replace": replace, "join": join}
    for name in LENGTHENING:
        del environment.filters[name]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    del environment.globals["lipsum"]
    return environment
