"""Every hostile file is refused in one line, with its name, in few steps and little memory."""

import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import checkpoints
import historical
import pytest
import vocabularies
from hostile import CASES, huge, text

from tinyllama.commands import main
from tinyllama.commands.convert import convert
from tinyllama.commands.inspect import inspect, report
from tinyllama.errors import TinyllamaError

ROOT = Path(__file__).parents[1]
STEPS, MEMORY = 20_000_000, 200 << 20  # a vocabulary of a million tokens takes seven million steps

SLOW = {  # a second of steps, or more
    "consolidated.00.pth: 200,000 dicts",
    "consolidated.00.pth: a call 100,000 deep",
    "consolidated.00.pth: tuples 200,000 deep",
    "f16.bin: 20 GB, 2^20 empty tokens",
    "spm.gguf: 20 GB, an array of 2 M strings",
    "spm.gguf: 20 GB, strings as long as can be",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a good model in every format, each of which has been read once."""
    folder = checkpoints.write(tmp_path_factory.mktemp("hostile") / "good")
    convert(folder, 1, folder / "spm.gguf", "gguf")
    (folder / "f16.bin").write_bytes(historical.convert(folder, checkpoints.PARAMS, 1)[0])
    write_bpe(folder)
    for name in ("", "spm.gguf", "bpe.gguf", "f16.bin"):
        report(inspect(folder / name))
    return folder


def write_bpe(folder: Path) -> None:
    from formats.test_gguf import config_for, quantized, write_ours

    vocabulary = vocabularies.bpe()
    config = config_for(vocabulary)
    write_ours(folder / "bpe.gguf", config, vocabulary, quantized(config, "f16"))


def memory() -> int:
    """Bytes this process has had in memory at most since they were last reset, where they can be."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def reset_memory() -> None:
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


@contextmanager
def counted() -> Iterator[count]:
    """Counts calls of functions and returns from them: a clock would also count what runs beside."""
    steps = count()
    sys.setprofile(lambda *_: next(steps))
    try:
        yield steps
    finally:
        sys.setprofile(None)


def linked(good: Path, folder: Path, file: str) -> Path:
    """The folder of good models again: a copy of one file, and links to the others."""
    folder.mkdir()
    for path in good.iterdir():
        if path.name == file:
            shutil.copy(path, folder)
        else:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SLOW else ()) for name in CASES]
)
def test_a_hostile_file_is_refused_in_one_line_few_steps_and_little_memory(good, tmp_path, name):
    file, damage, words = CASES[name]
    folder = linked(good, tmp_path / "model", file)
    instead = damage(folder / file)
    read = folder if file in ("consolidated.00.pth", "params.json", "tokenizer.model") else folder / file
    read = instead if isinstance(instead, Path) else read
    reset_memory()
    before = memory()
    with counted() as steps, pytest.raises(TinyllamaError) as caught:
        inspect(read)
    taken, grown = next(steps), memory() - before
    message = str(caught.value)
    print(f"{taken:9,} steps {grown / 1e6:6.1f} MB  {message.removeprefix(str(tmp_path))}")
    assert message.isprintable() and len(message) <= 1001
    assert message.startswith(f"{folder}/")
    for word in words:
        assert word in message
    assert taken < STEPS and grown < MEMORY
    assert not (folder / "proof").exists() and not Path("proof").exists()


# --- what isn't a model ---------------------------------------------------------------------------


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """A command's exit status, its text, and the last of its lines on stderr."""
    status = main(argv)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, "".join(err.splitlines()[-1:])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "there is no text in it"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "more than 50 MB of text"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: huge(path, b"Once upon a time"), "more than 50 MB of text"),
    ],
    ids=["empty", "a folder", "a device", "a link to itself", "20 GB"],
)
@pytest.mark.parametrize("command", ["perplexity", "generate"])
def test_a_hostile_text_is_refused_in_one_line_and_little_memory(tmp_path, capsys, command, make, words):
    path = tmp_path / "text.txt"
    make(path)
    reset_memory()
    before = memory()
    status, out, line = run(capsys, command, "-f", str(path))
    assert (status, out) == (1, "")
    assert line.startswith(f"tinyllama: {path}: ") and words in line
    assert memory() - before < MEMORY


def test_text_that_is_not_utf8_is_read_to_the_byte(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(bytes(range(128, 256)))
    status, out, _ = run(capsys, "perplexity", "-f", str(tmp_path / "text.txt"), "-c", "16")
    assert status == 0 and out.startswith("perplexity ")


@pytest.mark.parametrize(
    "command", ["generate -m", "perplexity -f README.md -m", "inspect", "bench", "compare -m"]
)
def test_every_command_refuses_a_hostile_file_in_one_line(good, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "bad.gguf"
    path.write_bytes((good / "spm.gguf").read_bytes().replace(text("llama"), text("\x1b[2J\n"), 1))
    status, out, line = run(capsys, *command.split(), str(path))
    assert (status, out) == (1, "")
    assert line.startswith(f"tinyllama: {path}: a model of the architecture '\\x1b[2J\\n' isn't supported")


def test_quantize_and_convert_refuse_a_hostile_file_and_write_nothing(good, tmp_path, capsys):
    path = tmp_path / "bad.gguf"
    path.write_bytes((good / "spm.gguf").read_bytes()[:-1000])
    status, _, line = run(capsys, "quantize", str(path), str(tmp_path / "out.gguf"), "q4_0")
    assert status == 1 and line.startswith(f"tinyllama: {path}: truncated or damaged: the tensor ")
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    huge(folder / "checklist.chk", b"")
    status, _, line = run(capsys, "convert", str(folder))
    assert (status, line) == (
        1,
        f"tinyllama: {folder / 'checklist.chk'}: is too large: more than 65,536 bytes",
    )
    assert not (tmp_path / "out.gguf").exists() and not (folder / "ggml-model-f16.bin").exists()


# --- strangers' text on a terminal ----------------------------------------------------------------

STEERING = "\x1b]52;c;bWU=\x07\x9b2J\x7f"


def test_inspect_shows_strangers_text_harmlessly(good, tmp_path, capsys):
    path = tmp_path / "model.gguf"
    data = (good / "spm.gguf").read_bytes()
    path.write_bytes(data.replace(text("good"), text("\x1b[2J"), 1).replace(b"</s>", b"\x1b[m>"))
    status, out, _ = run(capsys, "inspect", str(path))
    assert status == 0 and r"gguf, 327 kB, \x1b[2J" in out and r"2 \x1b[m>" in out
    assert all(char.isprintable() or char == "\n" for char in out)
    _, out, _ = run(capsys, "inspect", str(path), "--tokens", "\x1b[m>")
    assert all(char.isprintable() or char == "\n" for char in out)


def test_a_terminal_gets_pictures_of_what_would_steer_it_and_a_pipe_the_text_itself(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "text.txt").write_text(f"a\tb\n{STEERING}", encoding="utf-8")
    command = ["generate", "-f", str(tmp_path / "text.txt"), "-n", "1", "-c", "64"]
    assert run(capsys, *command)[1].startswith(f"a\tb\n{STEERING}")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(capsys, *command)[1].startswith("a\tb\n␛]52;c;bWU=␇\ufffd2J␡")


def test_errors_and_warnings_quote_strangers_text_in_one_harmless_line_of_bounded_length(capsys):
    error = TinyllamaError(f"model.gguf: {STEERING}\n\u202e\ud800: no")
    assert str(error) == r"model.gguf: \x1b]52;c;bWU=\x07\x9b2J\x7f\n\u202e\ud800: no"
    assert str(TinyllamaError(str(error))) == str(error)
    long = str(TinyllamaError("model.gguf: the piece " + "\x1b" * 5_000_000 + " is there twice"))
    assert long.startswith("model.gguf: the piece ") and long.endswith(" is there twice") and len(long) < 5000
