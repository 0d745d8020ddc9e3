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

from ..errors import TinyllamaError, require

KNOWN = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")


class SavedTensor(NamedTuple):
    """A view of a storage, counted in elements; all that is known of these numbers is that they are ints."""

    type: str  # of the storage, "torch HalfStorage"
    key: str  # its bytes are the archive's member `data/KEY`
    n_elements: int  # of the storage
    start: int = 0  # of the tensor in it; so are the next
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


def read_tensors(data: bytes) -> dict[str, SavedTensor]:
    """The tensors of a data.pkl by name. Raises TinyllamaError where the program does something else."""
    stack, marks, memo, position = [], [], {}, 0
    try:
        for instruction, argument, position in pickletools.genops(data):  # noqa: B007
            _step(instruction.name, argument, stack, marks, memo)
        root = stack.pop()
    except TinyllamaError:
        raise
    except Exception:  # whatever a crafted program does to the machine ends here
        raise TinyllamaError(f"is damaged: its data.pkl makes no sense at byte {position}") from None
    is_dict = isinstance(root, dict) and root and {type(found) for found in root.values()} == {SavedTensor}
    require(is_dict, "no checkpoint: this torch file holds no dict of tensors")
    require(all(name.isprintable() for name in root), "is damaged: it names a tensor that can't be printed")
    return root


def _step(name: str, argument: object, stack: list, marks: list[int], memo: dict[int, object]) -> None:
    """Carry out one instruction. Whatever doesn't fit it raises an exception of some kind."""
    match name:
        case "PROTO" | "STOP":
            pass
        case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "NONE" | "NEWTRUE" | "NEWFALSE":
            stack.append(argument)
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(_pop(stack, int(name[-1])))
        case "MARK":
            marks.append(len(stack))
        case "TUPLE":
            stack.append(_pop(stack, len(stack) - marks.pop()))
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "GLOBAL":
            is_storage = argument.startswith("torch ") and argument.endswith("Storage")
            require(argument in KNOWN or is_storage, f"wants to run {argument[:80]}: don't open it elsewhere")
            stack.append(argument)
        case "BINPERSID":
            stack.append(_call(*stack.pop()))
        case "REDUCE":
            function, arguments = _pop(stack, 2)
            stack.append(_call(function, *arguments))
        case "SETITEM" | "SETITEMS":
            items = _pop(stack, 2 if name == "SETITEM" else len(stack) - marks.pop())
            for key, value in zip(items[::2], items[1::2], strict=True):
                require(type(key) is str, "no checkpoint: it has keys that aren't names")  # or hash for ever
                require(key not in stack[-1], f"is damaged: it holds {key} twice")
                stack[-1][key] = value
        case "BUILD":  # attributes, such as the _metadata of a module's state_dict
            stack.pop()
        case _:
            raise TinyllamaError(f"no checkpoint: its data.pkl says {name}")


def _pop(stack: list, count: int) -> tuple:
    start = len(stack) - count
    if not 0 <= start <= len(stack):
        raise IndexError
    popped = tuple(stack[start:])
    del stack[start:]
    return popped


def _call(function: str, *arguments: object) -> object:
    """What torch would build, as a note."""
    match function, *arguments:
        case ("collections OrderedDict",):
            return {}
        case "torch._utils _rebuild_parameter", SavedTensor() as tensor, *_:
            return tensor
        case "storage", str(type), str(key), _, int(n_elements):
            return SavedTensor(type, key, n_elements)
        case "torch._utils _rebuild_tensor_v2", SavedTensor() as tensor, int(start), tuple(), tuple(), *_:
            shape, stride = arguments[2:4]
            if all(isinstance(number, int) for number in shape + stride):
                return tensor._replace(start=start, shape=shape, stride=stride)
    raise TypeError
