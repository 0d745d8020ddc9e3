"""Record what llama-imatrix collects on the small model, for test_imatrix.py to compare with.

python tests/golden/record_llama_imatrix.py path/to/llama-imatrix
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tinyllama.commands.convert import convert  # noqa: E402
from tinyllama.formats import imatrix  # noqa: E402

TEXT = HERE.parents[1] / "data" / "held_out.txt"
OPTIONS = ["-c", "128", "-b", "128", "--chunks", "6", "-t", "1", "-ngl", "0", "--process-output"]
SHOWN = 4  # means of each matrix


def main(program: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (model,) = convert("small", "f32", f"{folder}/small.gguf", "gguf")
        for kind in ("gguf", "dat"):
            target = ["-o", f"{folder}/imatrix.{kind}", "--output-format", kind]
            subprocess.run([program, "-m", model, "-f", TEXT, *OPTIONS, *target], check=True)
        today, older = (imatrix.read(f"{folder}/imatrix.{kind}") for kind in ("gguf", "dat"))
        found = {"chunks": today.n_chunks, "chunk_size": today.chunk_size, "means": {}}
        for name, means in today.means().items():
            worst = max(abs(means / older.means()[name] - 1))
            assert worst < 1e-6, f"{name}: the two kinds of file differ by {worst}"
            found["means"][name] = [float(f"{value:.6g}") for value in (means.mean(), *means[:SHOWN])]
        text = json.dumps(found).replace('], "', '],\n"').replace('{"blk', '{\n"blk')
        (HERE / "llama_imatrix.json").write_text(f"{text}\n")


if __name__ == "__main__":
    main(sys.argv[1])
