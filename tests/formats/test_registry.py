"""What all formats have in common: the right one is found, and no file is opened twice."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest

from tinyllama.commands.convert import convert, quantize
from tinyllama.formats import open_checkpoint

opened: list[Path] | None = None  # None: nobody counts


def note(event: str, arguments: tuple) -> None:
    if event == "open" and opened is not None and isinstance(arguments[0], str | bytes | Path):
        opened.append(Path(str(arguments[0])))


sys.addaudithook(note)  # for as long as the process lives


def opens(folder: Path, call: Callable) -> Counter:
    """How often a call opens each file that is in the folder before."""
    global opened
    before, opened = set(folder.iterdir()), []
    try:
        call()
        return Counter(path.name for path in opened if path in before)
    finally:
        opened = None


PARTS = ("consolidated.00.pth", "consolidated.01.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of two parts, and what convert makes of it."""
    folder = checkpoints.write(
        tmp_path_factory.mktemp("formats") / "cut", checkpoints.cut(checkpoints.weights(), 2)
    )
    (folder / "checklist.chk").write_text(f"{'0' * 32}  of_another_file\n")
    convert(folder, outfile=folder / "m.bin")
    convert(folder, outfile=folder / "m.gguf", format="gguf")
    return folder


@pytest.mark.parametrize(
    ("model", "files"),
    [
        ("m.gguf", ["m.gguf"]),
        ("m.bin", ["m.bin", "m.bin.1", "params.json", "tokenizer.model"]),
        ("", [*PARTS, "params.json", "tokenizer.model"]),
        ("consolidated.00.pth", [*PARTS, "params.json", "tokenizer.model"]),
        ("params.json", [*PARTS, "params.json", "tokenizer.model"]),
    ],
)
def test_opening_a_model_opens_each_of_its_files_once(folder, model, files):
    assert opens(folder, lambda: open_checkpoint(folder / model)) == Counter(files)


@pytest.mark.parametrize("format", ["ggml", "gguf"])
def test_convert_opens_each_file_once(folder, tmp_path, format):
    found = opens(folder, lambda: convert(folder, outfile=tmp_path / "out", format=format))
    assert found == Counter([*PARTS, "params.json", "tokenizer.model", "checklist.chk"])


@pytest.mark.parametrize(("source", "files"), [("m.gguf", ["m.gguf"]), ("m.bin", ["m.bin", "m.bin.1"])])
def test_quantize_opens_each_file_once(folder, tmp_path, source, files):
    assert opens(folder, lambda: quantize(folder / source, tmp_path / "out", "q4_0")) == Counter(files)
