"""Record hashes of what ggml makes of nasty_rows(), for tests to compare with.

In each type of superblocks, and with an importance matrix in each type.

pip install llama-cpp-python
PYTHONPATH=tests python tests/golden/record_superblocks.py

ggml_quantize_chunk is what llama-quantize calls. On an x86-64 processor:
tinyllama/superblocks/search.py says why.
"""

import ctypes
import hashlib
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from nasty import GGUF_TYPES, SUPERBLOCKS, nasty_importance, nasty_rows


def library() -> ctypes.CDLL:
    """The part of llama.cpp that quantizes."""
    (path,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return ggml


def quantized(ggml: ctypes.CDLL, x: np.ndarray, type: str, importance: np.ndarray | None = None) -> bytes:
    """x [n_rows, n_cols] as ggml's blocks."""
    id = gguf.GGMLQuantizationType[type.upper()]
    block, size = gguf.GGML_QUANT_SIZES[id]
    blocks = np.zeros(x.size // block * size, np.uint8)
    weights = None if importance is None else importance.ctypes.data
    ggml.ggml_quantize_chunk(id, x.ctypes.data, blocks.ctypes.data, 0, *x.shape, weights)
    return blocks.tobytes()


def digest(data: bytes) -> str:
    """The beginning of its hash."""
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> None:
    """Write the hashes beside this script."""
    ggml, rows, importance = library(), nasty_rows(), nasty_importance()

    def hashes(type: str, *more: np.ndarray) -> dict[str, str]:
        return {name: digest(quantized(ggml, x, type, *more)) for name, x in rows.items()}

    record = {
        "llama_cpp_python": llama_cpp.__version__,
        "weights": {name: digest(x.tobytes()) for name, x in rows.items()},
        "blocks": {type: hashes(type) for type in SUPERBLOCKS},
        "importance": digest(importance.tobytes()),
        "weighed": {type: hashes(type, importance) for type in [*GGUF_TYPES, *SUPERBLOCKS]},
    }
    (Path(__file__).parent / "superblocks.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
