"""safetensors files: the length of the header, its JSON, and the bytes of the tensors."""

import json
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors import safe_open

from tinyllama.config import Config
from tinyllama.formats import safetensors
from tinyllama.formats.parts import Part
from tinyllama.quant import TYPES

from .. import contract
from ..damage import Field, Number, damaged, odd_tensors, pack

READS = ("tinyllama.formats.safetensors", "tinyllama.formats.folders")
WORDS = [
    b'"dtype":',
    b'"shape":',
    b'"data_offsets":',
    b'"__metadata__"',
    b'"BF16"',
    b'"F16"',
    b'"F32"',
    b"[0, 8]",
]

COUNTING = bytes(range(256))  # no two weights are the same, so that their order shows
DTYPES = {type: dtype for dtype, type in safetensors.DTYPES.items()}


def check(data: bytes) -> bool:
    """A tensor that is read lies in the file, and is what the safetensors package reads."""
    with contract.folder({"model.safetensors": data}) as folder:
        path = folder / "model.safetensors"
        part = contract.opened(safetensors.read_tensors, path)
        if part is None:
            return False
        contract.are_inside(part, len(data))
        agrees(path, part)
    return True


def agrees(path: Path, part: Part) -> None:
    """Where the safetensors package reads the file, too, it finds the same bytes in every tensor."""
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:  # it looks at the strings about the file, too
        return
    contract.must(theirs.keys() == part.keys(), "not the tensors that the safetensors package reads")
    for name, piece in part.items():
        same = np.array_equal(piece.blocks().view(np.uint8), theirs[name].view(torch.uint8).numpy())
        contract.must(same, "not what the safetensors package reads", name)


# --- nearly valid files ---------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """Tiny models whose tensors, header or bytes are damaged."""
    config = draw(st.sampled_from([Config(8, 1, 2, 5, 24, 2), Config(4, 2, 1, 3, 12, 1)]))
    type, shapes = draw(st.sampled_from(list(DTYPES))), config.tensor_shapes()
    what = draw(st.sampled_from(["tensors", "entries", "header", "fields", "nothing"]))
    tensors = draw(odd_tensors(shapes)) if what == "tensors" else list(shapes.items())
    header = header_of(tensors, type)
    if what == "entries":
        name = draw(st.sampled_from(list(header)))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        header[name] = draw(st.sampled_from([header[name] | {key: draw(VALUES)}, draw(VALUES)]))
    size = sum(TYPES[type].nbytes(shape) for _, shape in tensors)
    encoded = json.dumps(header).encode()
    cut = [encoded[start : start + 16] for start in range(0, len(encoded), 16)]
    encoded = draw(damaged(cut)) if what == "header" else encoded
    whole = fields(encoded, (COUNTING * (size // 256 + 1))[:size])
    return draw(damaged(whole)) if what == "fields" else pack(whole)


ODD = [
    0,
    -1,
    1,
    8,
    2**31,
    2**63,
    2**64,
    10**400,
    1.0,
    float("nan"),
    None,
    True,
    "F16",
    "I64",
    "F8_E4M3",
    "x" * 3000,
]
VALUES = st.sampled_from(
    [*ODD, [], {}, [0, 8], [8, 0], [-8, 0], [1, 1, 1], [0], [[0, 8]], [2**40, 2**40 + 8]]
)


def header_of(tensors, type: str) -> dict:
    """The header of tensors that lie one behind the other."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        start, end = end, end + TYPES[type].nbytes(shape)
        header[name] = {"dtype": DTYPES[type], "shape": list(shape), "data_offsets": [start, end]}
    return header


def fields(header: bytes, data: bytes) -> list[Field]:
    """A file."""
    return [Number("Q", len(header)), header, data]


def file(tensors, type: str, fill: bytes = COUNTING) -> bytes:
    """A whole file of these names and shapes."""
    size = sum(TYPES[type].nbytes(shape) for _, shape in tensors)
    return pack(fields(json.dumps(header_of(tensors, type)).encode(), (fill * size)[:size]))


def seeds() -> dict[str, bytes]:
    """A layer of f16, and two of bf16 in one head."""
    one, two = Config(8, 1, 2, 5, 24, 2).tensor_shapes(), Config(4, 2, 1, 3, 12, 1).tensor_shapes()
    return {"f16": file(one.items(), "f16"), "bf16": file(two.items(), "bf16")}
