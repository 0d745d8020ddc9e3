"""The pickle in a .pth file: a program that builds a dict of tensors, run on a machine that only takes notes.

Python's pickle machine would call whatever the program names, and even one that calls nothing can be made to
fill the memory (a memo of two billion places, an instruction of five bytes) or to compute for ever (the hash
of a tuple that holds another twice, and so on). This machine knows the instructions that torch.save writes:
it has a stack, marks on it, a memo, and builds numbers, strings, tuples and dicts by strings. For a tensor
the program pushes

    ("storage", torch.HalfStorage, "0", "cpu", number of elements)

turns it into a storage (BINPERSID), and calls torch._utils._rebuild_tensor_v2(storage, offset, shape, stride,
...), counted in elements. Whatever else a program names or wants to do, it is refused.
"""

import pickletools
from typing import NamedTuple

from ..errors import TinyllamaError

MOST_AXES = 8
LARGEST = 1 << 48  # of an offset, a length or a step


class Storage(NamedTuple):
    """Numbers of a type ("HalfStorage"), in the archive's member `data/KEY`."""

    type: str
    key: str
    n_elements: int


class SavedTensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Name(str):
    """What the program looked up by its name."""


def read_tensors(data: bytes) -> dict[str, SavedTensor]:
    """The tensors of a data.pkl by name.

    Raises TinyllamaError, for the caller to put a file's name before, where the program is another.
    """
    machine, position = _Machine([], [], {}), 0
    try:
        for instruction, argument, position in pickletools.genops(data):  # noqa: B007
            machine.step(instruction.name, argument)
        root = machine.stack.pop()
    except TinyllamaError:
        raise
    except Exception:  # whatever a crafted program does to the machine ends here
        raise TinyllamaError(f"is damaged: its data.pkl makes no sense at byte {position}") from None
    if not isinstance(root, dict) or not root or not all(isinstance(t, SavedTensor) for t in root.values()):
        raise TinyllamaError("is a torch file but no checkpoint: it holds no dict of tensors")
    if not all(name.isprintable() for name in root):
        raise TinyllamaError("is damaged: it names a tensor that can't be printed")
    return root


class _Machine(NamedTuple):
    """The stack, where on it the marks are, and the memo."""

    stack: list
    marks: list[int]
    memo: dict[int, object]

    def step(self, name: str, argument: object) -> None:
        """Carry out one instruction."""
        stack = self.stack
        match name:
            case "PROTO" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(None)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, int(name[-1]))))
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(_pop(stack, len(stack) - self.marks.pop())))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_known(argument))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE":
                stack.append(_call(*_pop(stack, 2)))
            case "SETITEM":
                items = _pop(stack, 2)
                _set(stack[-1], items)
            case "SETITEMS":
                items = _pop(stack, len(stack) - self.marks.pop())
                _set(stack[-1], items)
            case "BUILD":  # attributes, such as the _metadata of a module's state_dict
                stack.pop()
            case _:
                raise TinyllamaError(f"is no checkpoint: its data.pkl says {name}")


def _pop(stack: list, count: int) -> list:
    if not 0 <= count <= len(stack):
        raise IndexError
    start = len(stack) - count
    popped = stack[start:]
    del stack[start:]
    return popped


def _set(target: object, items: list) -> None:
    names, values = items[::2], items[1::2]
    if not isinstance(target, dict) or not all(isinstance(name, str) for name in names):
        raise TypeError
    for name, value in zip(names, values, strict=True):
        if name in target:
            raise TinyllamaError(f"is damaged: it holds {name} twice")
        target[name] = value


_CALLABLE = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")


def _known(name: str) -> _Name:
    """`name` is of the form "module name"."""
    module, _, what = name.partition(" ")
    if name in _CALLABLE or (module == "torch" and what.endswith("Storage") and what.isidentifier()):
        return _Name(what)
    wanted = name.replace(" ", ".")[:80]
    raise TinyllamaError(f"wants to run {wanted}: that is no checkpoint, don't open it elsewhere either")


def _storage(kind, type, key, _, n_elements) -> Storage:
    if kind != "storage" or not isinstance(type, _Name) or not isinstance(key, str):
        raise TypeError
    return Storage(str(type), key, _number(n_elements))


def _call(called: object, arguments: tuple) -> object:
    if not isinstance(called, _Name):
        raise TypeError
    if called == "OrderedDict" and arguments == ():
        return {}
    if called == "_rebuild_parameter" and isinstance(arguments[0], SavedTensor):
        return arguments[0]
    storage, start, shape, stride, *_ = arguments
    if called != "_rebuild_tensor_v2" or not isinstance(storage, Storage):
        raise TypeError
    return SavedTensor(storage, _number(start), _numbers(shape), _numbers(stride))


def _numbers(values: tuple) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > MOST_AXES:
        raise TypeError
    return tuple(map(_number, values))


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < LARGEST:
        raise ValueError
    return value
