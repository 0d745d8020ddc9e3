"""Where in `model.py` or `ops.py` a tapped value is computed, read from the source itself.

A tap is shown by a call such as `_show(tap, prefix, q=q, k=k)` or `tap("scores", scores)`. The lines that
compute it are those above, in the same function, that assign to its variable. So whoever moves a line needn't
tell anybody.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain

from ... import model, ops

AROUND = 4  # lines that are shown before and after


@dataclass(frozen=True)
class Excerpt:
    """Lines of a function.

    Attributes:
        file: "model.py" or "ops.py".
        function: its name.
        lines: (number in the file, text).
        marked: the numbers of those that compute the value.
    """

    file: str
    function: str
    lines: tuple[tuple[int, str], ...]
    marked: frozenset[int]


@dataclass(frozen=True)
class _Place:
    module: object
    function: ast.FunctionDef
    statements: list[ast.stmt]


@cache
def excerpt(kind: str) -> Excerpt:
    """The lines that compute a tap, in their surroundings.

    Args:
        kind: a tap's name without its layer, "attention.q".
    """
    place = _places()[kind]
    lines = [range(statement.lineno, statement.end_lineno + 1) for statement in place.statements]
    marked = frozenset(chain(*lines))
    return _excerpt(place.module, place.function, marked, min(marked) - AROUND, max(marked) + AROUND)


@cache
def definition(kind: str) -> Excerpt | None:
    """The function of `ops.py` that the lines of `excerpt` in `model.py` call, None where they call none."""
    nodes = chain(*map(ast.walk, _places()[kind].statements))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute) and _name(node.value) == "ops"]
    if not names:
        return None
    (function,) = [f for f in _functions(ops) if f.name == names[0]]
    return _excerpt(ops, function, frozenset(), function.lineno, function.end_lineno)


def kinds() -> list[str]:
    """Every tap for which there is a line, in no particular order."""
    return list(_places())


@cache
def _places() -> dict[str, _Place]:
    return {
        kind: _Place(module, function, statements)
        for module in (model, ops)
        for function in _functions(module)
        for kind, statements in _shown(module, function)
    }


def _shown(module, function: ast.FunctionDef) -> Iterator[tuple[str, list[ast.stmt]]]:
    """Every tap of a function, and the statements that compute it."""
    since: dict[str, int] = {}  # variable -> the line at which it was shown last
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: node.lineno):
        if _name(call.func) == "_show":
            prefix = _prefix(call.args[1], function)
            values = {f"{prefix}{keyword.arg}": keyword.value for keyword in call.keywords}
        elif _name(call.func) == "tap" and isinstance(call.args[0], ast.Constant):
            values = {f"{function.name}.{call.args[0].value}": call.args[1]}
        else:
            continue
        for kind, value in values.items():
            variable = _root(value)
            yield kind, _assignments(function, variable, since.get(variable, 0), call.lineno)
            since[variable] = call.lineno


def _assignments(function: ast.FunctionDef, variable: str, after: int, before: int) -> list[ast.stmt]:
    """The statements between two lines that give a variable its value, or change it."""
    found = []
    for node in ast.walk(function):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Assign | ast.AugAssign) and after < node.lineno < before:
            names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            found += [node] if variable in names else []
    return found


def _prefix(node: ast.expr, function: ast.FunctionDef) -> str:
    """f"{layer.name}.attention." -> "attention."; a variable stands for what the function assigns to it."""
    if isinstance(node, ast.Name):
        pairs = [pair for statement in ast.walk(function) for pair in _pairs(statement)]
        node = next(value for target, value in pairs if _name(target) == node.id)
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value for part in parts if isinstance(part, ast.Constant)).removeprefix(".")


def _pairs(statement: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, several of `a, b = 1, 2`."""
    if not isinstance(statement, ast.Assign):
        return []
    (target,), value = statement.targets, statement.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def _excerpt(module, function: ast.FunctionDef, marked: frozenset[int], first: int, last: int) -> Excerpt:
    """Lines of a function, its docstring left out."""
    text = inspect.getsource(module).splitlines()
    first, last = max(first, function.lineno), min(last, function.end_lineno)
    doc = function.body[0] if ast.get_docstring(function) else None
    skipped = range(doc.lineno, doc.end_lineno + 1) if doc else range(0)
    lines = [(number, text[number - 1]) for number in range(first, last + 1) if number not in skipped]
    return Excerpt(f"{module.__name__.rpartition('.')[2]}.py", function.name, tuple(lines), marked)


def _functions(module) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.FunctionDef)]


def _root(node: ast.expr) -> str:
    """The variable of `x`, `x.reshape(...)`, `x[...]`."""
    while not isinstance(node, ast.Name):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""
