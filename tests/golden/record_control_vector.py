"""Record what llama.cpp expects behind a prompt under a control vector, for test_control_vectors.py.

pip install llama-cpp-python
tinyllama convert data/models/SmolLM2-135M-Instruct.Q4_1.gguf f32 --outfile f32.gguf
python tests/golden/record_control_vector.py f32.gguf

With float32 weights llama.cpp doesn't round what they are multiplied with, and its logits are those of NumPy.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

PROMPT, SCALE, SHOWN = "The capital of France is", 8.0, 20
RANGES = {"all": (1, 29), "some": (10, 20), "one": (15, 15)}  # layers, both included


def directions(n_layers: int, dim: int) -> np.ndarray:
    """Those of layers 1, 2, ...: [n_layers - 1, dim]."""
    found = np.random.default_rng(5).standard_normal((n_layers - 1, dim), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def main(model: str) -> None:
    """Write the likeliest tokens and their logits beside this script."""
    llama = llama_cpp.Llama(model, n_ctx=64, logits_all=True, type_k=0, type_v=0, verbose=False)
    ids = llama.tokenize(PROMPT.encode(), add_bos=True)
    n_layers, dim = llama_cpp.llama_model_n_layer(llama.model), llama.n_embd()
    data = (SCALE * directions(n_layers, dim)).ravel()
    pointer, found = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), {}
    for name, (first, last) in RANGES.items():
        context = llama.ctx
        assert llama_cpp.llama_set_adapter_cvec(context, pointer, data.size, dim, first, last) == 0
        llama.reset()
        llama.eval(ids)
        logits = np.array(llama.scores[len(ids) - 1])
        best = np.argsort(-logits)[:SHOWN]
        found[name] = {str(token): round(float(logits[token]), 4) for token in best}
    record = {"llama_cpp_python": llama_cpp.__version__, "ids": ids, **found}
    text = json.dumps(record).replace('}, "', '},\n"')
    (Path(__file__).parent / "control_vector.json").write_text(f"{text}\n")


if __name__ == "__main__":
    main(sys.argv[1])
