"""Record hashes of what ggml makes of nasty_rows() in each type of superblocks, for tests to compare with.

pip install llama-cpp-python
PYTHONPATH=tests python tests/golden/record_superblocks.py

ggml_quantize_chunk without an importance matrix is what llama-quantize calls. On an x86-64 processor:
tinyllama/superblocks/search.py says why.
"""

import ctypes
import hashlib
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from nasty import SUPERBLOCKS, nasty_rows


def library() -> ctypes.CDLL:
    """The part of llama.cpp that quantizes."""
    (path,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return ggml


def quantized(ggml: ctypes.CDLL, x: np.ndarray, type: str) -> bytes:
    """x [n_rows, n_cols] as ggml's blocks."""
    id = gguf.GGMLQuantizationType[type.upper()]
    block, size = gguf.GGML_QUANT_SIZES[id]
    blocks = np.zeros(x.size // block * size, np.uint8)
    ggml.ggml_quantize_chunk(id, x.ctypes.data, blocks.ctypes.data, 0, *x.shape, None)
    return blocks.tobytes()


def main() -> None:
    """Write the hashes beside this script."""
    ggml, rows = library(), nasty_rows()
    hashes = {
        type: {name: hashlib.sha256(quantized(ggml, x, type)).hexdigest()[:16] for name, x in rows.items()}
        for type in SUPERBLOCKS
    }
    weights = {name: hashlib.sha256(x.tobytes()).hexdigest()[:16] for name, x in rows.items()}
    record = {"llama_cpp_python": llama_cpp.__version__, "weights": weights, "blocks": hashes}
    (Path(__file__).parent / "superblocks.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
