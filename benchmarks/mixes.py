"""What every mix of block types costs in perplexity, in tinyllama and in llama.cpp, as a Markdown table.

    pip install llama-cpp-python gguf
    python benchmarks/mixes.py data/models/SmolLM2-135M-Instruct.Q4_1.gguf [--bytes 40000] [Q4_K_M Q6_K ...]

The model becomes f16 first, and then each mix, once by `tinyllama quantize` and once by llama.cpp's own
llama_model_quantize; the table says whether the tensors of the two files hold the same bytes. Both programs
read our file, and the same windows of the same text. They round activations to 8 bits, each in its own way,
so that figures differ a little.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

import tinyllama
from tinyllama.commands.convert import convert, quantize
from tinyllama.commands.mixes import MIXES, find_mix
from tinyllama.machine.limits import default_threads
from tinyllama.texts.perplexity import perplexity
from tinyllama.tokenizer import Tokenizer

CTX_SIZE = 512


class LlamaCpp:
    """As much of a `Llama` as `perplexity` needs, and its own cache, computed by llama.cpp."""

    def __init__(self, path: Path, tokenizer: Tokenizer, threads: int):
        self.tokenizer = tokenizer
        options = {"n_ctx": CTX_SIZE, "n_batch": CTX_SIZE, "logits_all": True, "n_gpu_layers": 0}
        self._llama = llama_cpp.Llama(
            str(path), n_threads=threads, n_threads_batch=threads, verbose=False, **options
        )

    def new_cache(self, *_, **__) -> "LlamaCpp":
        """Itself."""
        return self

    def trim(self, n: int) -> None:
        """Forget all but n tokens."""
        self._llama.n_tokens = n

    def forward(self, tokens: np.ndarray, cache: "LlamaCpp", last: bool = False) -> np.ndarray:
        """The logits behind each token."""
        start = self._llama.n_tokens
        self._llama.eval(tokens.tolist())
        return self._llama.scores[start : self._llama.n_tokens]


def same_tensors(ours: Path, theirs: Path) -> bool:
    """Whether the tensors of two GGUF files have the same types and bytes."""
    tensors = [
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}
        for path in (ours, theirs)
    ]
    return tensors[0] == tensors[1]


def quantized_by_llama_cpp(source: Path, target: Path, mix: str, threads: int) -> None:
    """A file of llama-quantize."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = MIXES[mix].number, threads
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if failed:
        raise RuntimeError(f"llama.cpp could not write {mix}")


def row(source: Path, folder: Path, mix: str, text: str, threads: int) -> str:
    """A line of the table."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    with contextlib.redirect_stdout(io.StringIO()):
        quantize(source, ours, mix)
    quantized_by_llama_cpp(source, theirs, mix, threads)
    same = "same" if same_tensors(ours, theirs) else "**other**"
    llama = tinyllama.load(ours, threads=threads)
    found = perplexity(llama, text, CTX_SIZE, CTX_SIZE, progress=False)
    peer = perplexity(LlamaCpp(ours, llama.tokenizer, threads), text, CTX_SIZE, CTX_SIZE, progress=False)
    figures = f"{found.perplexity:.3f} ± {found.standard_error:.3f} | {peer.perplexity:.3f}"
    return f"| {mix} | {ours.stat().st_size:,} | {figures} | {same} |"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="a model")
    known = [mix for mix in MIXES if mix not in ("F32", "Q2_K_S")]  # the latter needs an importance matrix
    parser.add_argument("mixes", nargs="*", type=find_mix, help="such as Q4_K_M; all by default")
    parser.add_argument("--text", type=Path, default=Path("data/held_out.txt"))
    parser.add_argument("--bytes", type=int, default=40_000, help="of the text (%(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads())
    args = parser.parse_args()
    text = args.text.read_bytes()[: args.bytes].decode(errors="ignore")
    print("| Mix | Bytes | Perplexity | in llama.cpp | Bytes as llama-quantize's |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "f16.gguf"
        with contextlib.redirect_stdout(io.StringIO()):
            convert(args.file, "f16", source, "gguf")
        for mix in args.mixes or known:
            print(row(source, Path(folder), mix, text, args.threads), flush=True)


if __name__ == "__main__":
    sys.exit(main())
