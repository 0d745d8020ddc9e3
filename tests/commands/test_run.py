"""What the commands do: from a checkpoint to text, and the figures of a text."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest

import tinyllama
from tinyllama.commands import main
from tinyllama.commands import run as commands
from tinyllama.commands.run import PROMPTS, unescape
from tinyllama.formats import open_checkpoint
from tinyllama.machine import download
from tinyllama.texts.drafts import Pace

HELD_OUT = Path(__file__).parents[2] / "data" / "held_out.txt"
QUICK = ["-n", "12", "-s", "1", "-t", "1", "--backend", "numpy"]
SETTINGS = {"n_predict": 12, "seed": 1, "threads": 1, "backend": "numpy"}
ONCE = "Once upon a time"


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit status, stdout, stderr)."""

    def run(*argv: str):
        return main(argv), *capsys.readouterr()

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the small model's folder to write into."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        shutil.copy(download.small_folder() / name, folder)
    return folder


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "main"])
def test_stdout_gets_the_prompt_and_the_text_alone(run, command):
    text = tinyllama.generate(ONCE, **SETTINGS)
    assert run(command, "-p", ONCE, *QUICK)[:2] == (0, f"{ONCE}{text}\n")


def test_stderr_gets_everything_else(run):
    err = run("generate", "-p", ONCE, *QUICK)[2]
    ids = tinyllama.load("small", "numpy", 1).tokens(ONCE)
    assert f"seed 1, {len(ids)} prompt tokens, backend numpy, 1 thread\n" in err
    for step in ("load", "prompt", "sample", "predict", "total"):
        assert re.search(rf"^{step} +\d+\.\d\d s", err, re.MULTILINE), step
    assert "ms/token" in err and "tokens/s" in err and "peak memory" in err
    assert "stopped" not in err, "it simply reached its length"


def test_guesses_are_counted(run, monkeypatch):
    note = Pace.note  # a pass takes a second, whatever it computes: guesses pay
    monkeypatch.setattr(Pace, "note", lambda self, n_tokens, _: note(self, n_tokens, 1.0))
    line = ["generate", "-p", ONCE, "-n", "80", "--temp", "0", "--repeat-penalty", "0.7", "--draft-lookup"]
    assert re.search(r"^draft +\d+ guessed, [1-9]\d* right$", run(*line)[2], re.MULTILINE)
    _, text, err = run(*line[:-1], "-md", "small", "--spec-draft-n-max", "3")
    assert re.search(r"^draft +(\d+) guessed, \1 right$", err, re.MULTILINE)
    assert run(*line[:-1])[1] == text and "guessed" not in run(*line[:-1])[2]


def test_what_loading_takes_is_said_before(run):
    pattern = r"loading .*small: up to [\d.]+ MB of memory \([\d.]+ MB weights, [\d.]+ MB KV cache\)\n"
    assert re.match(pattern, run("generate", "-p", "Once", "-n", "0", "-t", "5")[2])


def test_the_same_text_comes_from_the_mapped_file(run):
    line = ["generate", "-p", "Once", "-n", "5", "--seed", "1", "--temp", "0"]
    _, copied, _ = run(*line)
    status, mapped, err = run(*line, "--mmap")
    assert status == 0 and mapped == copied and "stay in the file" in err


def test_the_settings_reach_the_model(run):
    settings = {"temp": 2.5, "top_k": 300, "top_p": 0.99, "repeat_penalty": 1.3, "repeat_last_n": 5}
    settings |= {"batch_size": 2, "ctx_size": 40}
    text = tinyllama.generate(ONCE, **SETTINGS, **settings)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert run("generate", "-p", ONCE, *QUICK, *argv)[1] == f"{ONCE}{text}\n"
    assert text != tinyllama.generate(ONCE, **SETTINGS)


def test_the_prompt_comes_from_a_file_without_its_last_newline(run, tmp_path):
    file, wanted = tmp_path / "prompt.txt", run("generate", "-p", "Two lines\nof text", *QUICK)
    for end in ("", "\n", "\r\n"):
        file.write_bytes(f"Two lines\nof text{end}".encode())
        assert run("generate", "-f", str(file), *QUICK)[:2] == wanted[:2]


def test_a_text_comes_from_stdin(run, tmp_path, monkeypatch):
    wanted = run("generate", "-p", ONCE, *QUICK)[1]
    piped = subprocess.run(
        [sys.executable, "-m", "tinyllama", "generate", "-f", "-", *QUICK],
        input=f"{ONCE}\n".encode(),
        capture_output=True,
        timeout=60,
    )
    assert piped.stdout.decode() == wanted
    (tmp_path / "prompt").write_text(ONCE)
    with open(tmp_path / "prompt") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert run("generate", "-f", "-", *QUICK)[1] == wanted


def test_without_a_prompt_the_seed_chooses_one(run):
    begun = {run("generate", "-n", "0", "-s", str(seed))[1].removesuffix("\n") for seed in range(30)}
    assert begun == set(PROMPTS)
    assert run("generate", "-n", "0", "-s", "5")[1] == run("generate", "-n", "0", "-s", "5")[1]


def test_escapes_are_replaced_on_request_in_the_prompt_and_in_stop_strings(run):
    assert run("generate", "-p", r"one\ntwo", "-n", "0", "-e")[1] == "one\ntwo\n"
    assert run("generate", "-p", r"one\ntwo", "-n", "0")[1] == "one\\ntwo\n"
    text = tinyllama.generate(ONCE, **SETTINGS)
    word = text.split()[-2]
    escaped = "".join(rf"\x{byte:02x}" for byte in word.encode())
    out = run("generate", "-p", ONCE, *QUICK, "-e", "--stop", escaped)[1]
    assert out == f"{ONCE}{text[: text.index(word)]}\n"


@pytest.mark.parametrize(
    "text, wanted",
    [
        (r"a\nb\tc\rd", "a\nb\tc\rd"),
        (r"\"\'\\n", "\"'\\n"),
        (r"\x41\xc3\xa4", "Aä"),
        (r"\q \x4", r"\q \x4"),
        ("ä\\nö", "ä\nö"),
        (r"\xff", "\udcff"),
    ],
)
def test_unescape(text, wanted):
    assert unescape(text) == wanted


def test_arguments_that_are_not_utf_8_are_bytes_to_the_model(run):
    status, out, err = run("generate", "-p", "caf\udce9", "-n", "0", *QUICK[2:])
    assert (status, out) == (0, "caf�\n")
    ids = tinyllama.load("small", "numpy", 1).tokens("caf\udce9")
    assert f" {len(ids)} prompt tokens" in err


def test_why_it_stopped_is_said_where_it_is_not_the_length(run):
    text = tinyllama.generate(ONCE, **SETTINGS)
    err = run("generate", "-p", ONCE, *QUICK, "--stop", "QQQ", "--stop", text.split()[-2])[2]
    assert "stopped: a stop string was found\n" in err
    n_prompt = len(tinyllama.load("small", "numpy", 1).tokens(ONCE))
    err = run("generate", "-p", ONCE, *QUICK, "-c", str(n_prompt + 2))[2]
    assert "stopped: the context is full\n" in err


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_that_names_it_and_status_1(run, tmp_path):
    empty, page = tmp_path / "empty.txt", tmp_path / "page.bin"
    empty.write_text("\n")
    page.write_text("<!DOCTYPE html><title>Sign in</title>" * 20)
    cases = [
        (["generate", "-m", "nowhere.bin"], "nowhere.bin"),
        (["generate", "-m", str(page)], str(page)),
        (["generate", "-f", str(tmp_path / "none.txt")], "none.txt"),
        (["generate", "-f", str(tmp_path)], str(tmp_path)),
        (["generate", "-f", str(empty)], f"{empty}: there is no text"),
        (["generate", "-p", "a long prompt", "-c", "2"], "context is full"),
        (["generate", "-p", "Once", "-c", str(10**12)], "GB of memory"),
        (["perplexity", "-f", str(tmp_path / "none.txt")], "none.txt"),
        (["convert", str(tmp_path)], str(tmp_path)),
        (["quantize", str(page), str(tmp_path / "out.bin"), "2"], str(page)),
        (["inspect", str(page)], str(page)),
        (["inspect", "nowhere.gguf"], "nowhere.gguf"),
    ]
    for argv, named in cases:
        status, out, err = run(*argv)
        lines = [line for line in err.splitlines() if not line.startswith("loading ")]
        assert (status, out) == (1, ""), argv
        assert len(lines) == 1 and lines[0].startswith("tinyllama: ") and named in lines[0], argv
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads files that only Linux has")
def test_a_text_that_cannot_be_read_or_never_ends_is_named(run):
    status, _, error = run("generate", "--file", "/proc/self/mem")
    assert (status, error) == (1, "tinyllama: /proc/self/mem: Input/output error\n")
    status, _, error = run("generate", "--file", "/dev/zero")
    assert (status, error) == (1, "tinyllama: /dev/zero: more than 50 MB of text\n")


# --- convert, quantize, download ------------------------------------------------------------------


@pytest.mark.parametrize("n_parts", [1, 2])
def test_convert_quantize_inspect_generate(run, checkpoint, n_parts):
    if n_parts > 1:
        checkpoint = checkpoints.split(checkpoint, checkpoint / "parts", n_parts)
    f16, q4_0 = checkpoint / "ggml-model-f16.bin", checkpoint / "ggml-model-q4_0.bin"
    for argv, target in ((["convert", checkpoint, "1"], f16), (["quantize", f16, q4_0, "2"], q4_0)):
        status, out, err = run(*map(str, argv))
        assert status == 0 and argv[0] in err
        written = [f"{target}{suffix}" for suffix in ["", ".1"][:n_parts]]
        assert [line.rpartition("  ")[0] for line in out.splitlines()] == written
        assert all(re.search(r"  [\d.]+ MB$", line) for line in out.splitlines())
    assert "q4_0" in run("inspect", str(q4_0))[1]
    status, out, _ = run("generate", "-m", str(q4_0), "-p", ONCE, *QUICK)
    assert status == 0 and len(out) > len(f"{ONCE} and")


def test_convert_and_quantize_gguf(run, checkpoint):
    f32, q8_0 = checkpoint / "a.gguf", checkpoint / "b.gguf"
    assert run("convert", str(checkpoint), "0", "--format", "gguf", "--outfile", str(f32))[0] == 0
    assert run("quantize", str(f32), str(q8_0), "Q8_0")[0] == 0
    assert {tensor.type for tensor in open_checkpoint(q8_0).tensors.values()} == {"f32", "q8_0"}
    assert {tensor.type for tensor in open_checkpoint(f32).tensors.values()} == {"f32"}


def test_download_fetches_what_is_asked_for(run, monkeypatch):
    fetched = []
    monkeypatch.setattr(download, "download", fetched.append)
    assert run("download", "smollm2")[0] == 0
    assert fetched == ["smollm2"]


# --- perplexity -----------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(HELD_OUT.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return str(file)


def test_perplexity_prints_its_figures_on_one_line_or_as_json(run, text_file):
    status, out, err = run("perplexity", "-f", text_file, "-c", "64", "-b", "16")
    assert status == 0 and "perplexity: 100%" in err
    figures = r"\(\d+ windows of 64 tokens, \d+ scored\)"
    assert re.fullmatch(rf"perplexity [\d.]+ \+/- [\d.]+, [\d.]+ bits per byte {figures}\n", out)
    found = json.loads(run("perplexity", "-f", text_file, "-c", "64", "-b", "16", "--json")[1])
    assert out.startswith(f"perplexity {found['perplexity']:.4f} +/- {found['standard_error']:.4f}, ")
    assert found["ctx_size"] == 64 and len(found["running"]) == found["n_windows"]


def test_perplexity_of_a_text_that_is_too_short_says_by_how_much(run, tmp_path):
    (tmp_path / "short.txt").write_text(ONCE)
    status, out, err = run("perplexity", "-f", str(tmp_path / "short.txt"))
    assert (status, out) == (1, "")
    assert re.search(r"the text has \d tokens: too few, a window takes at least 8", err)


def test_perplexity_warns_of_windows_that_the_model_was_not_trained_on(run, text_file):
    err = run("perplexity", "-f", text_file, "-c", "3000")[2]
    assert "small was trained on 2048 tokens" in err


# --- on several machines --------------------------------------------------------------------------

NEAR = ["-t", "1", "--backend", "c"]  # as each worker has it


@pytest.fixture
def far(client):
    """The options for two workers."""
    pytest.importorskip("tinyllama._native")
    return ["--backend", "c", "--scheduler", client.scheduler.address]


def test_the_same_text_comes_from_several_machines(run, far):
    line = ["generate", "-m", "small", "-p", ONCE, "-n", "12", "-s", "1"]
    status, text, err = run(*line, *far, "--split", "1,3")
    assert (status, text) == run(*line, *NEAR)[:2]
    measured, first, second, title, *_ = err.splitlines()
    assert measured == f"measuring small on the workers of {far[-1]}"
    for said, layers in ((first, "0 to 0"), (second, "1 to 3")):
        memory = r"up to [\d.]+ MB of memory \([\d.]+ MB weights, [\d.]+ [kM]B KV cache\)"
        assert re.fullmatch(rf"loading layers {layers} on worker tcp://\S+ \(\d, host \S+\): {memory}", said)
    assert re.search(r"layers: 1 on \S+, 3 on \S+$", title)


@pytest.mark.parametrize(
    "more", [["--json"], ["--json", "--taps", "norm"], ["--draft-lookup"], ["--spec-draft-model", "small"]]
)
def test_with_all_options_too(run, far, more):
    line = ["generate", "-m", "small", "-p", ONCE, "-n", "12", "-s", "1", *more]
    assert run(*line, *far)[:2] == run(*line, *NEAR)[:2]


def test_each_line_and_perplexity_too(run, far, tmp_path):
    (tmp_path / "lines").write_text(f"{ONCE}\nThe king\nA dog\n" * 3)
    for line in (["generate", "--each-line", "-n", "9", "-s", "1"], ["perplexity", "-c", "16", "--json"]):
        line = [*line, "-m", "small", "-f", str(tmp_path / "lines")]
        assert run(*line, *far)[:2] == run(*line, *NEAR)[:2]


@pytest.mark.parametrize(
    "more, wrong",
    [
        (["--split", "1,2"], r"split 1,2 makes 3 layers, and the model has 4: \d,\d would be right"),
        (["--split", "1,2,1"], "split 1,2,1 is for 3 workers, and there are 2"),
        (["-m", "none.gguf"], r"worker tcp://\S+ \(\d, host \S+\): none.gguf: there is no such file.*"),
        (["--backend", "numexpr", "--dtype", "float16"], ".*dtype.*"),
    ],
)
def test_what_workers_cant_do_is_told_in_a_line(run, far, more, wrong):
    status, out, err = run("generate", "-m", "small", "-p", ONCE, *far, *more)
    assert (status, out) == (1, "")
    assert re.fullmatch(f"tinyllama: {wrong}", err.splitlines()[-1]), err
    assert "Traceback" not in err


def test_without_a_scheduler_a_line_says_so(run, far, monkeypatch):
    monkeypatch.setattr("tinyllama.cluster.connect.PATIENCE", 0.2)
    status, _, err = run("generate", "-p", ONCE, "--scheduler", "tcp://127.0.0.1:1")
    assert status == 1 and len(err.splitlines()) == 2
    assert err.splitlines()[-1].startswith("tinyllama: tcp://127.0.0.1:1: ")


def test_a_model_that_a_chat_has_left_is_on_no_worker(run, far, client, tmp_path, monkeypatch):
    counts, load = [], commands._load

    def counting(args, tell):
        found = load(args, tell)
        counts.append(count())
        return found

    def count() -> int:
        return sum(client.run(lambda dask_worker: len(dask_worker.state.actors)).values())

    monkeypatch.setattr(commands, "_load", counting)
    (tmp_path / "said").write_text(f"{ONCE}\n/model small\n{ONCE}\n/model small\n{ONCE}\n")
    with (tmp_path / "said").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        line = ["-m", "small", "--chat-template", "chatml", "-n", "3", "-s", "1", "--split", "2,2"]
        status, _, err = run("chat", *line, *far)
    assert (status, counts) == (0, [2, 4, 4]), err  # the old one goes when the new one is there
    assert count() == 0
