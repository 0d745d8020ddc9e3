"""Record what llama.cpp's llama-perplexity says of two models, for test_kl_divergence.py to compare with.

Build llama-perplexity of llama.cpp, or of the sources of llama-cpp-python, then
python tests/golden/record_llama_perplexity.py PATH/llama-perplexity
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tinyllama.commands.convert import convert, quantize
from tinyllama.commands.kl_divergence import HEAD

ROOT = Path(__file__).parents[2]
N_CHARACTERS, CTX_SIZE, VOCAB_SIZE = 6000, 128, 1536


def main() -> None:
    """Write the figures, and the beginning of the file of log-probabilities, beside this script."""
    text = (ROOT / "data" / "held_out.txt").read_text(encoding="utf-8")[:N_CHARACTERS]
    with TemporaryDirectory() as folder:
        base, quantized, file, texts = (Path(folder) / name for name in ("f16", "q4", "kld", "txt"))
        convert("small", "f16", base, "gguf")
        quantize(base, quantized, "Q4_0")
        texts.write_text(text, encoding="utf-8")
        sizes = ["-c", str(CTX_SIZE), "-b", str(CTX_SIZE), "--kl-divergence-base", str(file)]
        for rest in (["-m", str(base), "-f", str(texts)], ["-m", str(quantized), "--kl-divergence"]):
            done = subprocess.run([sys.argv[1], *sizes, *rest], capture_output=True, text=True, check=True)
        data = file.read_bytes()
    numbers = {}
    for name, value, error in re.findall(
        r"^(\S.*?)\s*:\s+(-?[\d.]+)%?(?: ± +([\d.]+))?", done.stdout, re.MULTILINE
    ):
        numbers[re.sub(r"\s+", " ", name)] = [float(value), float(error or 0)]
    n_windows = int.from_bytes(data[16:20], "little")
    rows = data[20 + 4 * CTX_SIZE * n_windows :]
    first = np.frombuffer(rows, "<u2", HEAD + VOCAB_SIZE)
    record = {
        "n_characters": N_CHARACTERS,
        "ctx_size": CTX_SIZE,
        "n_bytes": len(data),
        "header": data[:20].hex(),
        "tokens": np.frombuffer(data, "<i4", CTX_SIZE * n_windows, 20).tolist(),
        "scale, least": first[:HEAD].copy().view("<f4").tolist(),
        "steps": first[HEAD:].tolist(),
        "statistics": numbers,
    }
    (Path(__file__).parent / "llama_perplexity.json").write_text(
        json.dumps(record, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    main()
