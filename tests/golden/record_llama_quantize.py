"""Record which types and bytes llama-quantize writes, for test_mixes.py to compare with.

pip install llama-cpp-python
python tests/golden/record_llama_quantize.py
"""

import ctypes
import hashlib
import json
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import gguf
import llama_cpp

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import mixed  # noqa: E402

from tinyllama.commands.mixes import MIXES  # noqa: E402

SAID: list[str] = []
KEPT: list[ctypes.Array] = []  # that llama.cpp has pointers to
#: What may be asked for besides a mix; types by ggml's numbers.
OPTIONS = {
    "": {},
    "pure": {"pure": True},
    "output f16": {"output_tensor_type": 1},
    "embedding q8_0": {"token_embedding_type": 8},
    "pure, output q4_0, embedding q5_1": {
        "pure": True,
        "output_tensor_type": 2,
        "token_embedding_type": 7,
    },
}


#: Of these cases, which have an eighth of a layer at least, the types with an importance matrix.
WEIGHED = "grouped", "80 layers, grouped", "tied", "qwen2"


@llama_cpp.llama_log_callback
def log(level, text, user_data):
    """Keep what it says."""
    SAID.append(text.decode("utf-8", "replace"))


def quantize(source: Path, target: Path, number: int, **options) -> bool:
    """Whether it did."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, 1
    for name, value in options.items():
        setattr(params, name, value)
    return not llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )


def importance(source: Path) -> ctypes.Array:
    """A model's importance matrix as llama.cpp takes it; its last row ends it."""
    found = mixed.importance(source)
    rows = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(found) + 1))()
    for row, (name, means) in zip(rows, found.items(), strict=False):
        data = (ctypes.c_float * len(means))(*means)
        row.name, row.data, row.size = name.encode(), data, len(means)
        KEPT.append(data)
    return rows


def types_of(source: Path, number: int, **options) -> dict[str, str]:
    """Types -> the kinds of matrices that have them; where they differ by layers, "2 q6_k, 1 q4_k"."""
    SAID.clear()
    assert quantize(source, source, number, dry_run=True, **options)
    found: dict[str, list[str]] = {}
    line = r"\] +(\S+) +- \[.*?type = +(\w+), .*?size =[^(\n]*(?:\((\w+)\))?"
    for name, old, new in re.findall(line, "".join(SAID)):
        if not name.endswith((".bias", "norm.weight")):
            found.setdefault(re.sub(r"blk\.\d+\.|\.weight", "", name), []).append((new or old).lower())
    kinds: dict[str, list[str]] = {}
    for name, types in found.items():
        kinds.setdefault(in_short(types), []).append(name)
    return {types: " ".join(names) for types, names in kinds.items()}


def in_short(types: list[str]) -> str:
    """["q6_k", "q6_k", "q4_k"] -> "2 q6_k, 1 q4_k"; all the same -> "q4_k"."""
    runs = [(type, len(list(run))) for type, run in groupby(types)]
    return runs[0][0] if len(runs) == 1 else ", ".join(f"{n} {type}" for type, n in runs)


def digest(file: Path) -> str:
    """Of the data of a GGUF file."""
    data = file.read_bytes()[gguf.GGUFReader(file).data_offset :]
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Write llama_quantize.json beside this script."""
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    types, sums, weighed = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f16.gguf", Path(folder) / "out.gguf"
        for case, numbers in mixed.CASES.items():
            mixed.write(source, **numbers, empty=True)
            for asked, options in OPTIONS.items():
                fits = numbers.get("dim", 256) % 32 == 0  # it stops where a type asked for doesn't
                if not asked or (fits and numbers.get("n_layers", 4) < 10):
                    of_mix = {mix: types_of(source, row.number, **options) for mix, row in MIXES.items()}
                    types[f"{case}; {asked}".strip("; ")] = of_mix
            if case in WEIGHED:
                matrix = importance(source)
                of_mix = {mix: types_of(source, row.number, imatrix=matrix) for mix, row in MIXES.items()}
                types[f"{case}; importance"] = of_mix
        for case, numbers in mixed.WHOLE.items():
            mixed.write(source, **(mixed.CASES[case] | numbers))
            matrix = importance(source)
            for mix, row in MIXES.items():
                if quantize(source, target, row.number):
                    sums.setdefault(case, {})[mix] = digest(target)
                assert quantize(source, target, row.number, imatrix=matrix)
                weighed.setdefault(case, {})[mix] = digest(target)
    version = llama_cpp.__version__
    record = {"llama_cpp_python": version, "types": types, "sha256": sums, "weighed": weighed}
    (HERE / "llama_quantize.json").write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()
