"""One .pth file: the zip archive, the pickle in it, and the storages that the tensors lie in."""

import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from tinyllama.config import Config
from tinyllama.formats import pth
from tinyllama.formats.parts import Part
from tinyllama.quant import TYPES

from .. import contract
from ..damage import Field, Number, damaged, odd_tensors, pack

READS = ("tinyllama.formats.pth", "tinyllama.formats.unpickle")
WORDS = [b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"ctorch\nHalfStorage\n", b"cos\nsystem\n", b"data/0"]
WORDS += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"X\x07\x00\x00\x00storage", b"\x80\x02}"]

COUNTING = bytes(range(256))  # no two weights are the same, so that their order shows
STORAGES = {"f16": b"HalfStorage", "bf16": b"BFloat16Storage", "f32": b"FloatStorage"}


def check(data: bytes) -> bool:
    """A tensor that is read lies in the file, and is what torch reads."""
    with contract.folder({"consolidated.00.pth": data}) as folder:
        path = folder / "consolidated.00.pth"
        part = contract.opened(pth.read_part, path)
        if part is None:
            return False
        contract.are_inside(part, len(data))
        agrees(path, part)
    return True


def agrees(path: Path, part: Part) -> None:
    """Where torch reads the file, too, it finds the same bytes in every tensor."""
    with zipfile.ZipFile(path) as archive:
        if any(info.external_attr & 0x10 for info in archive.infolist()):
            return  # torch takes these members for folders, and gives whatever lies in its memory
    try:
        with warnings.catch_warnings(action="ignore"):  # of protocols that torch.save doesn't write by itself
            theirs = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch tests checksums, among other things
        return
    inner = (
        [found for found in theirs.values() if isinstance(found, dict)] if isinstance(theirs, dict) else []
    )
    theirs = next((found for found in [theirs, *inner] if part.keys() <= found.keys()), None)
    for name, piece in part.items() if theirs else ():
        other = theirs[name].detach().contiguous().view(torch.uint8).numpy()
        same = np.array_equal(piece.blocks().view(np.uint8).ravel(), other.ravel())
        contract.must(same, "not what torch reads", name)


# --- nearly valid files ---------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """Tiny checkpoints whose pickle, or whose archive, is damaged."""
    type = draw(st.sampled_from(list(STORAGES)))
    config = draw(st.sampled_from([Config(8, 1, 2, 5, 24, 2), Config(4, 2, 1, 3, 12, 1)]))
    members = checkpoint(config, type, draw(st.sampled_from([COUNTING, b"\0", b"\xff"])))
    what = draw(st.sampled_from(["views", "tensors", "code", "beside", "pickle", "archive"]))
    shapes = config.tensor_shapes()
    tensors = draw(odd_tensors(shapes)) if what == "tensors" else list(shapes.items())
    views = draw(st.dictionaries(st.sampled_from(list(shapes)), VIEWS, max_size=2)) if what == "views" else {}
    steps = program(tensors, type, views)
    if what == "code":
        place = draw(st.integers(0, len(steps)))
        steps[place:place] = [draw(st.sampled_from(HOSTILE))]
    if what == "beside":  # the weights lie in a dict beside other values
        steps = beside(draw(st.lists(st.sampled_from(PLAIN), max_size=4)), steps)
    members["data.pkl"] = draw(damaged(steps)) if what == "pickle" else pack(steps)
    return draw(damaged(archive(members))) if what == "archive" else pack(archive(members))


#: Where a tensor begins in its storage, and its strides.
STRIDES = [(), (1,), (0, 1), (1, 1), (1, 4), (4, 1), (8, 1), (1, 8), (-1, 1), (4, 1, 1), (2**31 - 1, 1)]
VIEWS = st.tuples(st.sampled_from([0, 0, 1, 4, -1, 2**31 - 1]), st.sampled_from(STRIDES))


#: What a pickle can try: to run code, to fill the memory, to compute for ever, to confuse the machine.
HOSTILE = [
    b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R",
    b"cbuiltins\neval\n",
    b"ctorch\nload\n",
    b"Ka" + b"2\x86" * 40,  # a tuple of two of a tuple of two of ...
    b")" + b"\x85" * 5000,
    b"(" * 5000,
    b"r\xff\xff\xff\x7f",  # a memo of two billion places
    b"r\xff\xff\xff\x05",
    b"\x8e" + struct.pack("<Q", 1 << 40),  # bytes that aren't there
    b"\x96" + struct.pack("<Q", 1 << 33),
    b"\x8b" + struct.pack("<i", 0x7FFFFFFF),
    b"\x95" + struct.pack("<Q", 1 << 60),
    b"}q\x00h\x00h\x00h\x00s",  # a dict within itself
    b"]q\x01h\x01a",
    b"I9" + b"9" * 5000 + b"\n",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"Q",
    b"R",
    b"b",
    b"0",
    b".",
]


#: Values that a training saves beside the weights, in instructions of protocols 4 and 5.
PLAIN = [
    b"G\x3f\xf8\x00\x00\x00\x00\x00\x00",
    b"]K\x01a",
    b"\x95\x09\x00\x00\x00\x00\x00\x00\x00N",
    b"\x8c\x05hello\x94",
    b"]\x94(K\x01K\x02e",
    b"\x8f\x94(K\x01K\x02\x90",
    b"}\x94(K\x00}X\x07\x00\x00\x00exp_avgNsu",
    b"\x8c\x05torch\x8c\x07float16\x93",
    b"\x8c\x08argparse\x8c\x09Namespace\x93)\x81}X\x01\x00\x00\x00aNsb",
    b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R",
    b"cnumpy._core.multiarray\nscalar\nN\x85R",
    b"\x96\x02\x00\x00\x00\x00\x00\x00\x00ab",
    b"\x8b\x04\x00\x00\x00\xff\xff\xff\x7f",
    b"\x8c\x02os\x8c\x06system\x93",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
]


def checkpoint(config: Config, type: str, fill: bytes = b"\0") -> dict[str, bytes]:
    """The members of an archive, but for data.pkl."""
    sizes = [TYPES[type].nbytes(shape) for shape in config.tensor_shapes().values()]
    weights = {f"data/{number}": (fill * size)[:size] for number, size in enumerate(sizes)}
    return {"version": b"3\n", "byteorder": b"little", **weights}


def program(tensors, type: str, views: dict | None = None) -> list[Field]:
    """A pickle, instruction by instruction, as torch.save writes it for these names and shapes."""
    steps = [b"\x80\x02", b"}", b"q", Number("B", 0), b"("]
    for key, (name, shape) in enumerate(tensors):
        n_elements = int(np.prod(shape))
        start, strides = (views or {}).get(name, (0, (*shape[1:], 1)))
        steps += [*text(name.encode()), b"ctorch._utils\n_rebuild_tensor_v2\n", b"(", b"(", *text(b"storage")]
        steps += [b"ctorch\n%s\n" % STORAGES[type], *text(str(key).encode()), *text(b"cpu")]
        steps += [*integer(n_elements), b"t", b"Q", *integer(start), *numbers(shape), *numbers(strides)]
        steps += [b"\x89", b"ccollections\nOrderedDict\n", b")", b"R", b"t", b"R"]
    return [*steps, b"u", b"."]


def beside(values: list[bytes], steps: list[Field]) -> list[Field]:
    """The program of a dict in which {"model": ...} lies beside values."""
    items = [part for place, value in enumerate(values) for part in (*integer(place), value)]
    return [b"\x80\x02", b"}", b"(", *items, *text(b"model"), *steps[1:-1], b"u."]


def text(data: bytes) -> list[Field]:
    """Push a string."""
    return [b"X", Number("I", len(data)), data]


def integer(value: int) -> list[Field]:
    """Push a whole number."""
    return [b"J", Number("i", value)]


def numbers(values: tuple[int, ...]) -> list[Field]:
    """Push a tuple of at most three whole numbers."""
    return [step for value in values for step in integer(value)] + [b")\x85\x86\x87"[len(values) :][:1]]


def archive(members: dict[str, bytes], folder: str = "consolidated") -> list[Field]:
    """A zip archive of stored members."""
    fields, directory, offset = [], [], 0
    for name, data in members.items():
        path = f"{folder}/{name}".encode()
        sizes = [Number("I", zlib.crc32(data)), Number("I", len(data)), Number("I", len(data))]
        about = [Number("H", 0)] * 5 + sizes
        lengths = [Number("H", len(path)), Number("H", 4)]
        local = [b"PK\x03\x04", *about, *lengths, path, b"FB\0\0", data]
        directory += [b"PK\x01\x02", Number("H", 0), *about, Number("H", len(path)), *[Number("H", 0)] * 4]
        directory += [Number("I", 0), Number("I", offset), path]
        fields, offset = fields + local, offset + len(pack(local))
    size, count = len(pack(directory)), Number("H", len(members))
    end = [
        b"PK\x05\x06",
        Number("H", 0),
        Number("H", 0),
        count,
        count,
        Number("I", size),
        Number("I", offset),
    ]
    return [*fields, *directory, *end, Number("H", 0)]


def file(config: Config, type: str, fill: bytes = b"\0") -> bytes:
    """A whole file with every tensor of a model."""
    steps = program(config.tensor_shapes().items(), type)
    return pack(archive({"data.pkl": pack(steps), **checkpoint(config, type, fill)}))


def seeds() -> dict[str, bytes]:
    """A layer of f16, two of f32 in one head, and weights beside what a training saves."""
    small = Config(4, 2, 1, 3, 12, 1)
    steps = beside(PLAIN[:2], program(small.tensor_shapes().items(), "bf16"))
    return {
        "f16": file(Config(8, 1, 2, 5, 24, 2), "f16", b"\x00\x3c"),
        "f32": file(small, "f32", b"\x00\x00\x80\x3f"),
        "training": pack(archive({"data.pkl": pack(steps), **checkpoint(small, "bf16", b"\x80\x3f")})),
    }
