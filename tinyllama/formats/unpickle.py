"""The pickle in a .pth file: a program that builds a dict of tensors, run on a machine that only takes notes.

Python's pickle machine would call whatever the program names, and even one that calls nothing can be made to
fill the memory (a memo of two billion places, an instruction of five bytes) or to compute for ever (the hash
of a tuple that holds another twice, and so on). This machine knows the instructions that torch.save writes in
protocols 2 to 5: it has a stack, marks on it, a memo, and builds numbers, strings, tuples, lists and dicts.
For a tensor the program pushes

    ("storage", torch.HalfStorage, "0", "cpu", number of elements)

turns it into a storage (BINPERSID), and calls torch._utils._rebuild_tensor_v2(storage, offset, shape, stride,
...), counted in elements. Some other names stand for plain values, which a training saves beside the weights:
they become None. Whatever else a program names or wants to do, it is refused.

The weights are the root dict, or one in it: {"model": weights, "optimizer": ..., "iter_num": 1}.
"""

import pickletools
import re
from collections import deque
from typing import NamedTuple

from ..errors import TinyllamaError, require

PLAIN = re.compile(
    r"torch[\w.]* \w*Storage|torch (device|Size|b?float\d*\w*|u?int\d+|long|half|double|bool|complex\d+)"
    r"|torch\._utils _rebuild_(tensor_v[23]|parameter(_with_state)?)|collections (OrderedDict|defaultdict)"
    r"|(builtins|__builtin__) (dict|list|(frozen)?set|int|float|bool)|argparse Namespace|pathlib \w*Path"
    r"|_codecs encode|numpy(\._?core\.(multiarray|numeric))? (dtype|scalar|ndarray|_reconstruct|_frombuffer)"
)
PREFIX = re.compile(r"(_orig_mod\.|module\.)+")  # of names, by torch.compile and DistributedDataParallel

PUSHED = "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT NONE NEWTRUE NEWFALSE BINUNICODE SHORT_BINUNICODE "
PUSHED = frozenset((PUSHED + "BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8").split())


class SavedTensor(NamedTuple):
    """A view of a storage, counted in elements; all that is known of these numbers is that they are ints."""

    type: str  # of the storage, "torch HalfStorage"
    key: str  # its bytes are the archive's member `data/KEY`
    n_elements: int  # of the storage
    start: int = 0  # of the tensor in it; so are the next
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


def read_tensors(data: bytes) -> dict[str, SavedTensor]:
    """The weights of a data.pkl by name. Raises TinyllamaError where the program does something else."""
    stack, marks, memo, position = [], [], {}, 0
    try:
        for instruction, argument, position in pickletools.genops(data):  # noqa: B007
            _step(instruction.name, argument, stack, marks, memo)
        root = stack.pop()
    except TinyllamaError:
        raise
    except Exception:  # whatever a crafted program does to the machine ends here
        raise TinyllamaError(f"is damaged: its data.pkl makes no sense at byte {position}") from None
    weights = _weights(root)
    require(weights, "no checkpoint: this torch file holds no dict of tensors")
    printable = all(map(str.isprintable, weights))
    require(printable, "is damaged: it names a tensor that can't be printed")
    named = {PREFIX.sub("", name): tensor for name, tensor in weights.items()}
    require(len(named) == len(weights), "is damaged: two of its tensors differ in a prefix alone")
    return named


def _weights(root: object) -> dict[str, SavedTensor]:
    """The tensors of the outermost dict that holds some by name; that of an optimizer has numbers."""
    waiting, seen = deque([root]), set()
    while waiting:
        found = waiting.popleft()
        if isinstance(found, dict) and id(found) not in seen:
            seen.add(id(found))
            tensors = {name: value for name, value in found.items() if type(value) is SavedTensor}
            if any(type(name) is str and name.endswith("weight") for name in tensors):
                return {str(name): tensor for name, tensor in tensors.items()}
            waiting.extend(found.values())
    return {}


def _step(name: str, argument: object, stack: list, marks: list[int], memo: dict[int, object]) -> None:
    """Carry out one instruction. Whatever doesn't fit it raises an exception of some kind."""
    match name:
        case "PROTO" | "FRAME" | "STOP":
            pass
        case _ if name in PUSHED:
            stack.append(argument)
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_LIST" | "EMPTY_SET":
            stack.append([])
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
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "GLOBAL":
            stack.append(_named(argument))
        case "STACK_GLOBAL":
            module, function = _pop(stack, 2)
            require(type(module) is type(function) is str, "is damaged: it names a function by no string")
            stack.append(_named(f"{module} {function}"))
        case "BINPERSID":
            stack.append(_call(*stack.pop()))
        case "REDUCE" | "NEWOBJ":
            function, arguments = _pop(stack, 2)
            stack.append(_call(function, *arguments))
        case "APPEND" | "APPENDS" | "ADDITEMS":
            values = _pop(stack, 1 if name == "APPEND" else len(stack) - marks.pop())
            list.extend(stack[-1], values)
        case "SETITEM" | "SETITEMS":
            items = _pop(stack, 2 if name == "SETITEM" else len(stack) - marks.pop())
            for key, value in zip(items[::2], items[1::2], strict=True):
                _set(stack[-1], key, value)
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


def _set(target: dict | None, key: object, value: object) -> None:
    """An item of a dict, or of a plain value that isn't kept."""
    simple = type(key) is str or (type(key) is int and abs(key) < 1 << 31)  # others might hash for ever
    require(simple, "no checkpoint: it has keys that aren't names")
    if target is not None:
        require(key not in dict.keys(target), f"is damaged: it holds {key} twice")
        target[key] = value


def _named(name: str) -> str:
    """A name that stands for something plain; torch's functions among them are known to `_call`."""
    has_data = not name.endswith(" _rebuild_meta_tensor_no_storage")
    empty = "holds no data: its tensors have shapes alone (device 'meta'); save it with its weights"
    require(has_data, empty)
    why = "don't open it elsewhere; if it is yours, save the model's state_dict() alone"
    require(PLAIN.fullmatch(name), f"wants to run {name[:80]}: {why}")
    return name


def _call(function: str, *arguments: object) -> object:
    """What torch would build, as a note."""
    match function, *arguments:
        case ("collections OrderedDict" | "collections defaultdict" | "builtins dict", *_):
            return {}
        case "torch._utils _rebuild_parameter" | "torch._utils _rebuild_parameter_with_state", tensor, *_:
            return tensor
        case "storage", str(type), str(key), _, int(n_elements), *_:
            return SavedTensor(type, key, n_elements)
        case (
            "torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor_v3",
            SavedTensor() as tensor,
            int(start),
            tuple(shape),
            tuple(stride),
            *rest,
        ):
            type = rest[2] if function.endswith("v3") else tensor.type  # v3: of types without a storage
            if isinstance(type, str) and all(isinstance(number, int) for number in shape + stride):
                return tensor._replace(type=type, start=start, shape=shape, stride=stride)
        case str(), *_ if PLAIN.fullmatch(function) and "_rebuild_" not in function:
            return None
    raise TypeError
