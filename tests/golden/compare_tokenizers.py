"""Compare the ids of real vocabularies with llama.cpp's and with those of the package tokenizers.

The sources of llama-cpp-python hold the vocabularies of published models, with texts and the ids that
transformers gives them. pip install llama-cpp-python, here or elsewhere, and

    python tests/golden/compare_tokenizers.py llama.cpp/models [python that has llama_cpp]

Each vocabulary is read from its GGUF file, and from a tokenizer.json that is made of it; those of byte-level
BPE are cut by each rule in turn, not only by their own.
"""

import json
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from nasty_texts import TEXTS  # noqa: E402
from vocabularies import PUBLISHED, hugging_faces  # noqa: E402

from tinyllama.formats.pre_tokenizers import RULES, words_of  # noqa: E402
from tinyllama.formats.tokenizer_json import vocabulary_from_json  # noqa: E402
from tinyllama.formats.vocabulary import from_gguf  # noqa: E402
from tinyllama.tokenizer import Vocabulary, make_tokenizer  # noqa: E402

NAMES = ["llama-spm", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "gpt-2", "starcoder", "refact"]
NAMES += ["command-r", "mpt", "baichuan"]
ORACLE = """
import json, sys, llama_cpp
texts, found = json.load(sys.stdin), []
for path in sys.argv[2:]:
    llama = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    found.append([llama.tokenize(text.encode(), add_bos=False) for text in texts])
json.dump(found, open(sys.argv[1], "w"))
"""


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Metadata(dict):
    """A file's key-values as `from_gguf` takes them. (The package gguf takes minutes for these.)"""

    def __init__(self, path: Path):
        super().__init__()
        self.data, self.at, self.types = path.read_bytes(), 16, {}
        (n_keys,) = self.take("Q")
        for _ in range(n_keys):
            key, (kind,) = self.string(), self.take("I")
            kind, count = self.take("IQ") if kind == 9 else (kind, None)
            n = 1 if count is None else count
            values = [self.string() for _ in range(n)] if kind == 8 else [*self.take(f"{n}{NUMBERS[kind]}")]
            self[key], self.types[key] = values if count is not None else values[0], kind

    def take(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, key, kind, default=None):
        return self.get(key, default)


def copy(source: Path, target: Path, pre: str) -> None:
    """A vocabulary's file, which holds nothing but key-values, with another rule."""
    data, key = source.read_bytes(), b"tokenizer.ggml.pre" + struct.pack("<I", 8)
    at = data.index(key) + len(key)
    end = at + 8 + struct.unpack_from("<Q", data, at)[0]
    target.write_bytes(data[:at] + struct.pack("<Q", len(pre)) + pre.encode() + data[end:])


def llama_cpps(python: str, paths: list[Path], scratch: Path) -> list[list[list[int]]]:
    """Each file's ids of each text."""
    command = [python, "-c", ORACLE, scratch / "ids.json", *paths]
    texts = json.dumps(TEXTS)
    subprocess.run(command, input=texts, text=True, check=True, stderr=subprocess.DEVNULL)
    return json.loads((scratch / "ids.json").read_text())


def recorded(path: Path) -> tuple[list[str], list[list[int]]]:
    """The texts and ids beside a vocabulary."""
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    ids = [[*map(int, line.split())] for line in Path(f"{path}.out").read_text().splitlines()]
    return texts, ids[: len(texts)]


def report(what: str, tokenizer, texts: list[str], expected: list[list[int]]) -> None:
    """One line, and of the first texts that differ where they do."""
    found = [tokenizer.encode(text, bos=False) for text in texts]
    odd = [rows for rows in zip(texts, found, expected, strict=True) if rows[1] != rows[2]]
    print(f"{what:44} {len(texts) - len(odd)} of {len(texts)} texts alike", flush=True)
    for text, ours, theirs in odd[:2]:
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
        shown = [[tokenizer.piece(token) for token in ids[max(at - 1, 0) : at + 5]] for ids in (ours, theirs)]
        print(f"    {text[:50]!r}: {shown[0]}, not {shown[1]}")


def main() -> None:
    """Compare each vocabulary, then each rule."""
    folder, python = Path(sys.argv[1]), (sys.argv[2:] or [sys.executable])[0]
    paths = {name: folder / f"ggml-vocab-{name}.gguf" for name in NAMES}
    vocabularies = {name: from_gguf(Metadata(path)) for name, path in paths.items()}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for (name, vocabulary), theirs in zip(
            vocabularies.items(), llama_cpps(python, [*paths.values()], scratch), strict=True
        ):
            tokenizer = make_tokenizer(vocabulary)
            if Path(f"{paths[name]}.inp").exists():
                report(f"{name}, transformers recorded", tokenizer, *recorded(paths[name]))
            report(f"{name}, llama.cpp", tokenizer, TEXTS, theirs)
        by_rule("llama-bpe", vocabularies["llama-bpe"], paths["llama-bpe"], python, scratch)


def by_rule(name: str, vocabulary: Vocabulary, path: Path, python: str, scratch: Path) -> None:
    """A vocabulary cut by each rule: beside llama.cpp, and from a tokenizer.json beside tokenizers."""
    copies = [scratch / f"{number}.gguf" for number in range(len(RULES))]
    for pre, copied in zip(RULES, copies, strict=True):
        copy(path, copied, pre)
    for pre, theirs in zip(RULES, llama_cpps(python, copies, scratch), strict=True):
        cut = replace(vocabulary, **words_of(pre))
        report(f"{name} by {pre}, llama.cpp", make_tokenizer(cut), TEXTS, theirs)
        if pre in PUBLISHED and pre != "default":
            made = hugging_faces(cut)
            made.save(str(scratch / "tokenizer.json"))
            read = vocabulary_from_json(scratch / "tokenizer.json")
            ids = [made.encode(text, add_special_tokens=False).ids for text in TEXTS]
            report(f"{name} by {pre}, tokenizers", make_tokenizer(read), TEXTS, ids)


if __name__ == "__main__":
    main()
