"""Files of float32 arrays: importance matrices, those of before GGUF too, and control vectors."""

import numpy as np
from hypothesis import strategies as st

from tinyllama.formats import imatrix
from tinyllama.taps.control_vectors import ControlVector

from .. import contract
from ..damage import Field, Number, damaged, odd_tensors, pack
from .gguf import STRING, U32, fields, string, strings, values

READS = ("tinyllama.formats.arrays", "tinyllama.formats.imatrix", "tinyllama.taps.control_vectors")
WORDS = [b"GGUF", b"general.type", b"imatrix", b".in_sum2", b".counts", b"imatrix.chunk_count"]
WORDS += [b"general.architecture", b"controlvector", b"direction.1"]
Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"


def check(data: bytes) -> bool:
    """What is read is finite, no larger than its file, and the same when it has been written again."""
    return sum(_check(data, read) for read in (imatrix.read, ControlVector.read)) > 0  # not any: both


def _check(data: bytes, read) -> bool:
    with contract.folder({"file": data}) as folder:
        found = contract.opened(read, folder / "file")
        if found is None:
            return False
        with contract.limits():
            arrays = _arrays(found)
            found.write(folder / "again")
            again = _arrays(read(folder / "again"))
    contract.must(arrays.keys() == again.keys() and len(arrays), "other arrays when written again")
    for name, array in arrays.items():
        contract.must(array.ndim == 1 and 0 < array.nbytes <= len(data), "an array that its file can't hold")
        contract.must(np.isfinite(array).all(), "NaN or infinity")
        contract.must(np.array_equal(array, again[name]), "another array when written again", name)
    return True


def _arrays(found: imatrix.ImportanceMatrix | ControlVector) -> dict:
    return found.directions if isinstance(found, ControlVector) else found.means()


# --- nearly valid files ---------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """Small files with odd keys, tensors, numbers, or damage anywhere."""
    kind = draw(st.sampled_from(["imatrix", "older", "controlvector"]))
    if kind == "older":
        return draw(damaged(older(draw(st.integers(1, 3)), draw(st.integers(0, 2)))))
    keys, tensors = KINDS[kind]
    what = draw(st.sampled_from(["keys", "tensors", "fields", "nothing"]))
    if what == "keys":
        keys = keys | {draw(st.sampled_from([*keys, "general.alignment"])): draw(values())}
    tensors = draw(odd_tensors(tensors)) if what == "tensors" else [*tensors.items()]
    fill = draw(
        st.sampled_from([ONE, ONE, b"\0", b"\xff", b"\0\0\x80\xbf", b"\xff\xff\x7f\x7f", b"\1\0\0\0"])
    )
    whole = fields(keys, tensors, fill=fill)
    return draw(damaged(whole)) if what == "fields" else pack(whole)


ONE = np.float32(1).tobytes()
FILLS = [ONE, ONE, *(np.float32(value).tobytes() for value in (0, -1, 1e-45, 3e38, np.inf, np.nan))]
KINDS: dict[str, tuple[dict[str, list[Field]], dict[str, tuple[int, ...]]]] = {
    "imatrix": (
        {
            "general.type": [Number("I", STRING), *string(b"imatrix")],
            "imatrix.datasets": strings([b"a.txt"]),
            "imatrix.chunk_count": [Number("I", U32), Number("I", 2)],
            "imatrix.chunk_size": [Number("I", U32), Number("I", 512)],
        },
        {
            f"{name}.{what}": shape
            for name in (Q, DOWN)
            for what, shape in (("in_sum2", (8,)), ("counts", (1,)))
        },
    ),
    "controlvector": (
        {
            "general.architecture": [Number("I", STRING), *string(b"controlvector")],
            "controlvector.model_hint": [Number("I", STRING), *string(b"llama")],
        },
        {f"direction.{layer}": (8,) for layer in (1, 2, 3)},
    ),
}


def older(n_matrices: int, n_ends: int) -> list[Field]:
    """A file of before GGUF, with none, one or both of what may stand at its end."""
    whole: list[Field] = [Number("i", n_matrices)]
    for index in range(n_matrices):
        name = f"blk.{index}.attn_q.weight".encode()
        whole += [Number("i", len(name)), name, Number("i", 2), Number("i", 3)]
        whole += [Number("f", value) for value in (1.5, 0.0, 2.0)]
    return whole + [[], [Number("i", 2)], [Number("i", 2), Number("i", 5), b"a.txt"]][n_ends]


def seeds() -> dict[str, bytes]:
    """One of each kind."""
    made = {kind: pack(fields(keys, [*tensors.items()], fill=ONE)) for kind, (keys, tensors) in KINDS.items()}
    return made | {"older": pack(older(2, 2))}
