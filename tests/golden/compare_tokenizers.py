"""Compare the ids of real vocabularies with llama.cpp's and with those of the package tokenizers.

The sources of llama-cpp-python hold the vocabularies of published models, with texts and the ids that
transformers gives them. pip install llama-cpp-python, here or elsewhere, and

    python tests/golden/compare_tokenizers.py llama.cpp/models [python that has llama_cpp]

Each vocabulary is read from its GGUF file, and from a tokenizer.json that is made of it; those of byte-level
BPE are cut by each rule in turn, not only by their own.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import gguf

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from nasty_texts import TEXTS  # noqa: E402
from vocabularies import PUBLISHED, hugging_faces  # noqa: E402

from tinyllama.formats.pre_tokenizers import RULES, words_of  # noqa: E402
from tinyllama.formats.tokenizer_json import vocabulary_from_json  # noqa: E402
from tinyllama.formats.vocabulary import from_gguf  # noqa: E402
from tinyllama.tokenizer import make_tokenizer  # noqa: E402

NAMES = ["llama-spm", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "gpt-2", "starcoder", "refact"]
NAMES += ["command-r", "mpt", "baichuan"]
ORACLE = """
import json, sys, llama_cpp
texts, found = json.load(sys.stdin), []
for path in sys.argv[1:]:
    llama = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    found.append([llama.tokenize(text.encode(), add_bos=False) for text in texts])
json.dump(found, open(sys.argv[1] + ".ids", "w"))
"""


class Metadata(dict):
    """A file's key-values as `from_gguf` takes them, read by the package gguf."""

    def __init__(self, path: Path):
        fields = gguf.GGUFReader(path).fields
        super().__init__({key: field.contents() for key, field in fields.items()})
        self.types = {key: int(field.types[-1]) for key, field in fields.items()}

    def value(self, key, kind, default=None):
        return self.get(key, default)


def copy(source: Path, target: Path, pre: str) -> None:
    """A vocabulary's file with another rule."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = pre if key == "tokenizer.ggml.pre" else field.contents()
        kinds = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, value, kinds[0], sub_type=kinds[1])
    if "tokenizer.ggml.pre" not in reader.fields:
        writer.add_string("tokenizer.ggml.pre", pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def llama_cpps(python: str, paths: list[Path], texts: list[str]) -> list[list[list[int]]]:
    subprocess.run([python, "-c", ORACLE, *map(str, paths)], input=json.dumps(texts), text=True, check=True)
    return json.loads(Path(f"{paths[0]}.ids").read_text())


def recorded(path: Path) -> tuple[list[str], list[list[int]]]:
    """The texts and ids beside a vocabulary."""
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    ids = [[*map(int, line.split())] for line in Path(f"{path}.out").read_text().splitlines()]
    return texts, ids


def report(what: str, tokenizer, texts: list[str], expected: list[list[int]]) -> None:
    """One line, and of the first text that differs where it does."""
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
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for vocabulary_name in NAMES:
            path = folder / f"ggml-vocab-{vocabulary_name}.gguf"
            vocabulary = from_gguf(Metadata(path))
            tokenizer = make_tokenizer(vocabulary)
            if Path(f"{path}.inp").exists():
                report(f"{vocabulary_name}, transformers recorded", tokenizer, *recorded(path))
            linked = scratch / path.name
            linked.symlink_to(path)
            report(f"{vocabulary_name}, llama.cpp", tokenizer, TEXTS, llama_cpps(python, [linked], TEXTS)[0])
        for vocabulary_name in ("llama-bpe", "qwen2"):
            path = folder / f"ggml-vocab-{vocabulary_name}.gguf"
            vocabulary = from_gguf(Metadata(path))
            for pre in RULES:
                copied = scratch / f"{vocabulary_name}-{pre}.gguf"
                copy(path, copied, pre)
                tokenizer = make_tokenizer(replace(vocabulary, **words_of(pre)))
                theirs = llama_cpps(python, [copied], TEXTS)[0]
                report(f"{vocabulary_name} by {pre}, llama.cpp", tokenizer, TEXTS, theirs)
                if pre in PUBLISHED:
                    made = hugging_faces(replace(vocabulary, **words_of(pre)))
                    made.save(str(scratch / "tokenizer.json"))
                    read = vocabulary_from_json(scratch / "tokenizer.json")
                    ids = [made.encode(text, add_special_tokens=False).ids for text in TEXTS]
                    report(f"{vocabulary_name} by {pre}, tokenizers", make_tokenizer(read), TEXTS, ids)
                    named = read.pre, read.ignore_merges
                    assert RULES[read.pre].words == RULES[pre].words, named


if __name__ == "__main__":
    main()
