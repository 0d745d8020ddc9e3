"""Where in `model.py` or `ops.py` a tapped value is computed, read from the source itself.

A tap is shown by a call such as `see("q", q)` or `tapped(taps, "scores", scores)`. The lines that compute it
are those above, in the same function, that assign to its variable; or the one that shows it, where it isn't a
variable but computed there. So no list of lines has to be kept up to date.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain

from ... import model, ops
from ...config import Config
from .kinds import KINDS

AROUND = 4  # lines that are shown before and after


@dataclass(frozen=True)
class Excerpt:
    """Lines of a function."""

    file: str  # "model.py" or "ops.py"
    function: str
    lines: dict[int, str]  # number in the file -> text
    marked: set[int]  # the numbers of those that compute the value


@cache
def excerpts(kind: str, config: Config) -> list[Excerpt]:
    """The lines that compute a tap, in their surroundings, and the function of `ops.py` that they call.

    Args:
        kind: a tap's name without its layer, "attention.q".
        config: the model's; lines of a step that it hasn't aren't marked.
    """
    ((module, function, statements),) = (
        (module, function, statements)
        for module in (model, ops)
        for function in _functions(module)
        for tap, statements in _shown(function, config)
        if tap == kind
    )
    marked = {number for node in statements for number in range(node.lineno, node.end_lineno + 1)}
    found = [_excerpt(module, function, marked, range(min(marked) - AROUND, max(marked) + AROUND + 1))]
    for node in chain(*map(ast.walk, statements)):
        match node:
            case ast.Attribute(ast.Name("ops"), operation):
                for called in (function for function in _functions(ops) if function.name == operation):
                    return [*found, _excerpt(ops, called, set(), range(called.lineno, called.end_lineno + 1))]
    return found


def _functions(module) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.FunctionDef)]


def _shown(function: ast.FunctionDef, config: Config) -> Iterator[tuple[str, list[ast.stmt]]]:
    """Every tap of a function, and the statements that compute it."""
    nodes = list(_executed(function, config))
    statements = [node for node in nodes if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    for statement, node in ((one, node) for one in statements for node in ast.walk(one)):
        match node:
            case ast.Call(ast.Name("see"), [ast.Constant(name), value]):
                pass
            case ast.Call(ast.Name("tapped"), [_, ast.Constant(name), value]):
                pass
            case _:
                continue
        part = f"{function.name.removeprefix('_')}.{name}"  # _attention shows "attention.q"
        is_variable = isinstance(value, ast.Name)
        computed = _assignments(nodes, value.id, node.lineno) if is_variable else [statement]
        yield part if part in KINDS else name, computed


def _executed(node: ast.AST, config: Config) -> Iterator[ast.AST]:
    """All nodes below one, without those below `if config.biases:` where a model has no biases."""
    for child in ast.iter_child_nodes(node):
        test = getattr(child, "test", None)
        if not isinstance(test, ast.Attribute) or getattr(config, test.attr, True):
            yield child
            yield from _executed(child, config)


def _assignments(nodes: list[ast.AST], variable: str, before: int) -> list[ast.stmt]:
    """The statements before a line that assign to a variable."""
    found = []
    for node in nodes:
        match node:
            case ast.Assign([target]) | ast.AugAssign(target) if node.lineno < before:
                names = [name.id for name in ast.walk(target) if isinstance(name, ast.Name)]
                found += [node] if variable in names else []
    return found


def _excerpt(module, function: ast.FunctionDef, marked: set[int], wanted: range) -> Excerpt:
    """Those of the wanted lines that a function has, its docstring left out."""
    text = inspect.getsource(module).splitlines()
    own = set(range(function.lineno, function.end_lineno + 1))
    if ast.get_docstring(function):
        own -= set(range(function.body[0].lineno, function.body[0].end_lineno + 1))
    lines = {number: text[number - 1] for number in wanted if number in own}
    return Excerpt(f"{module.__name__.rpartition('.')[2]}.py", function.name, lines, marked)
