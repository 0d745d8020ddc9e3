"""Where chat templates run. A template is a stranger's program in Jinja: it gets nothing but the chat.

For whom it was written it runs as in transformers. What bounds it:

- No value that it makes is larger than LARGEST, written out with all that is in it, and all together are no
  larger than MOST. So its memory is bounded, and nothing that it does with a value takes long. Whatever makes
  values passes through `kept`: operators, filters, calls, slices, lists as they are spelled.
- It takes STEPS at most, turns of its loops and values that it makes, and SECONDS. Jinja computes nothing of
  it before that: there it would have no limits.
- Of strings, numbers, lists and dicts it reaches METHODS alone, and of Jinja's filters FILTERS.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import cache, wraps
from time import monotonic
from types import GeneratorType

from ..errors import TinyllamaError, check_cancelled, require

STEPS, SECONDS = 1_000_000, 10
HUGE = 1 << 64  # of numbers
LONGEST = 1 << 16  # characters of a template; those of models have up to 40,000
LARGEST = 1 << 20  # characters of a value
ENTRY = 16  # characters that an entry of a list counts as
MOST = 1 << 24  # of all values together, and characters of a prompt
FILTERS = """
    capitalize count d default dictsort e escape first float indent int items join last length list lower map
    max min reject rejectattr replace reverse safe select selectattr sort string title tojson trim unique
    upper
"""
METHODS = """
    capitalize count endswith find get index isalnum isalpha isdigit isspace items join keys lower lstrip
    partition removeprefix removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith
    strip title upper values
"""
LISTS = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
DATA = (str, bytes, int, float, dict, type, *LISTS)
#: What a program in Jinja can fail with: it is Python with another face.
FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def compiled(source: str):
    """A template that can be rendered. Raises TinyllamaError where it is none."""
    from jinja2 import TemplateError

    try:
        require(source, "it is empty")
        require(len(source) <= LONGEST, f"it has more than {LONGEST:,} characters")
        return _environment().from_string(source)
    except (TinyllamaError, TemplateError, SyntaxError, *FAILURES) as error:
        raise TinyllamaError(f"the model's chat template can't be read: {_cause(error)}") from None


def rendered(template, **names) -> str:
    """What a template writes, given these names. Raises TinyllamaError where it fails or doesn't end soon."""
    from jinja2 import TemplateError

    parts, size = [], 0
    try:
        with _bounded():
            for part in template.generate(**names):
                parts.append(part)
                size += len(part)
                require(size <= MOST, f"it writes more than {MOST:,} characters")
    except (TinyllamaError, TemplateError, *FAILURES) as error:
        check_cancelled()
        raise TinyllamaError(f"the model's chat template refuses this chat: {_cause(error)}") from None
    return "".join(parts)


def _cause(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Run:
    """What a template has used."""

    def __init__(self):
        self.n_steps, self.size, self.end = 0, 0, monotonic() + SECONDS

    def look(self) -> bool:
        """Take a step: a turn of a loop, or a value. True, so that a loop's condition can ask, too."""
        self.n_steps += 1
        check_cancelled()
        require(self.n_steps <= STEPS, f"it takes more than {STEPS:,} steps")
        require(monotonic() < self.end, f"it takes more than {SECONDS} seconds")
        return True


_run: ContextVar[_Run | None] = ContextVar("run", default=None)


@contextmanager
def _bounded() -> Iterator[None]:
    token = _run.set(_Run())
    try:
        yield
    finally:
        _run.reset(token)


def kept(value):
    """A value that a template made. Raises TinyllamaError if it is too large, with all that is in it."""
    if isinstance(value, GeneratorType):
        return iter(kept(list(value)))
    size, parts = 0, [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str | bytes):
            size += len(part)
        elif isinstance(part, dict):
            parts += part
            parts += part.values()
        elif isinstance(part, LISTS):
            parts += part
        elif isinstance(part, int) and not -HUGE < part < HUGE:
            raise TinyllamaError("it makes too large a number")
        size += ENTRY
        if size > LARGEST:
            break
    _small(size)
    if run := _run.get():
        run.size += size
        require(run.size <= MOST, f"it makes more than {MOST:,} characters")
        run.look()
    return value


def _small(size: int) -> None:
    require(size <= LARGEST, f"it makes a text of more than {LARGEST:,} characters, or as long a list")


# --- what makes much of little: how much is known before ------------------------------------------


def joined(values: Iterable, separator="") -> str:
    """All values, written one behind the other."""
    texts, size = [], 0
    for value in values:
        texts.append(str(value))
        size += len(texts[-1]) + len(separator)
        _small(size - len(separator))
    return kept(separator.join(texts))


def join(values, d="", attribute=None) -> str:
    """The filter, and the method of strings."""
    require(attribute is None, "join by an attribute isn't supported here")
    return joined(values, str(d))


def replace(text, old, new, count=None) -> str:
    """The filter, and the method of strings."""
    text, old, new = str(text), str(old), str(new)
    _small(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter of transformers."""
    _narrow(indent, *(separators or ()))
    how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def indent(text, width=4, first=False, blank=False) -> str:
    """The filter of Jinja."""
    from jinja2.filters import do_indent

    _narrow(width)
    return do_indent(str(text), width, first, blank)


def _narrow(*gaps: int | str | None) -> None:
    wide = any(gap > 8 if isinstance(gap, int) else len(gap or "") > 8 for gap in gaps)
    require(not wide, "gaps wider than 8 characters aren't supported here")


def strftime_now(form: str) -> str:
    """The function of transformers."""
    require(len(form) <= 100, "a form of dates has at most 100 characters here")
    return datetime.now().strftime(form)


def written(value) -> str:
    """What {{ }} writes."""
    return value if isinstance(value, str) else kept(str(value))


@cache
def _environment():
    """As transformers makes it, within bounds."""
    from jinja2.compiler import CodeGenerator
    from jinja2.exceptions import TemplateRuntimeError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import And, EnvironmentAttribute, ExprStmt, Impossible, Slice, TemplateData
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generated(CodeGenerator):
        """Python of a template, in which `kept` sees what Jinja makes by itself, and `look` every loop."""

        def visit_For(self, node, frame):
            look = EnvironmentAttribute("look()")
            node.body.insert(0, ExprStmt(look))
            node.test = node.test and And(look, node.test)
            super().visit_For(node, frame)

        def _output_child_to_const(self, node, frame, finalize):
            if isinstance(node, TemplateData):
                return super()._output_child_to_const(node, frame, finalize)
            raise Impossible

        def visit_Concat(self, node, frame):
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

        def visit_List(self, node, frame):
            self._kept(super().visit_List, node, frame)

        def visit_Dict(self, node, frame):
            self._kept(super().visit_Dict, node, frame)

        def visit_Tuple(self, node, frame):
            self._kept(super().visit_Tuple, node, frame, node.ctx == "load")

        def visit_Getitem(self, node, frame):
            self._kept(super().visit_Getitem, node, frame, isinstance(node.arg, Slice))

        def _kept(self, visit, node, frame, makes=True):
            self.write("environment.kept(" * makes)
            visit(node, frame)
            self.write(")" * makes)

    class Training(Extension):
        """{% generation %}, around what the model writes: it matters in training alone."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Named(Namespace):
        def __repr__(self):  # without what is in it, which may be a namespace, and so on
            return "namespace"

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class, concat, kept = Generated, staticmethod(joined), staticmethod(kept)
        look = staticmethod(lambda: _run.get().look())
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

        def is_safe_attribute(self, owner, name, value):
            return super().is_safe_attribute(owner, name, value) and (
                name in METHODS.split() or not isinstance(owner, DATA)
            )

        def wrap_str_format(self, value):
            return None  # `format` isn't among METHODS

        def call_binop(self, context, operator, left, right):
            most = 64 if operator == "**" else 1 << 32
            small = all(isinstance(one, int | float) and abs(one) <= most for one in (left, right))
            require(small or operator == "+", f"{operator} is for small numbers alone here")
            return kept(super().call_binop(context, operator, left, right))

        def call(self, context, function, *args, **kwargs):
            kept((args, kwargs))
            owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
            if isinstance(owner, str) and name in ("replace", "join"):
                return replace(owner, *args) if name == "replace" else join(*args, owner)
            return kept(super().call(context, function, *args, **kwargs))

    def raise_exception(message):
        raise TemplateRuntimeError(message)

    def bounded(filter: Callable) -> Callable:
        return wraps(filter)(lambda *args, **kwargs: kept(filter(*args, **kwargs)))

    how = {"trim_blocks": True, "lstrip_blocks": True, "finalize": written, "optimized": False}
    made = Sandbox(extensions=[Training, loopcontrols], **how)
    filters = made.filters | {"indent": indent, "join": join, "replace": replace, "tojson": tojson}
    made.filters = {name: bounded(filters[name]) for name in FILTERS.split()}
    made.globals |= {"namespace": Named, "raise_exception": raise_exception, "strftime_now": strftime_now}
    del made.globals["lipsum"]
    return made
