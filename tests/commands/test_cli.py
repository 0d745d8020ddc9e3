"""The command line as a user meets it: what goes to stdout and stderr, and the exit status."""

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tinyllama
from tinyllama.commands import cli, run as commands, streaming
from tinyllama.machine import download
from tinyllama.commands.run import PROMPTS, unescape
from tinyllama.machine.download import small_folder
from tinyllama.errors import TinyllamaError
from tinyllama.formats import meta, open_checkpoint

HELD_OUT = Path(__file__).parents[2] / "data" / "held_out.txt"
COMMAND = [sys.executable, "-m", "tinyllama"]
QUICK = ["-n", "12", "-s", "1", "-t", "1", "--backend", "numpy"]
SETTINGS = {"n_predict": 12, "seed": 1, "threads": 1, "backend": "numpy"}


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit status, stdout, stderr)."""

    def run(*argv: str):
        try:
            status = cli.main(argv)
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


def run_process(*argv: str | bytes, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *argv], capture_output=True, timeout=60, **options)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the small model's folder to write into."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        shutil.copy(small_folder() / name, folder)
    return folder


def options() -> list[tuple[str, argparse.Action]]:
    """(command, option) of all commands."""
    parser = cli.make_parser()
    (commands_action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [(name, action) for name, sub in commands_action.choices.items() for action in sub._actions]


# --- arguments ------------------------------------------------------------------------------------


def test_help_does_not_wait_for_numpy():
    program = (
        "import sys; from tinyllama.commands.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print({'numpy', 'tqdm', 'torch'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert shown.stdout.endswith("set()\n"), shown
    for command in ("convert", "quantize", "generate", "main", "perplexity", "inspect", "download"):
        assert command in shown.stdout


def test_a_first_word_does_not_wait_for_what_other_commands_need(smollm2_file):
    program = (
        "import sys; from tinyllama import cli\n"
        "cli.main(['generate', '-m', 'smollm2', '-p', 'Hi', '-n', '1'])\n"
        "wanted = {'sentencepiece', 'numexpr', *(f'tinyllama.{name}' for name in "
        "'bench compare convert inspect perplexity streaming formats.ggml formats.meta'.split())}\n"
        "print('needless:', sorted(wanted & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert shown.stdout.endswith("needless: []\n"), shown


@pytest.mark.parametrize("command", ["convert", "quantize", "generate", "perplexity", "inspect", "download"])
def test_every_argument_of_a_command_is_explained(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and out.startswith(f"usage: tinyllama {command}")
    assert all(action.help for name, action in options() if name == command)


def test_the_version_is_the_packages(run):
    assert run("--version")[:2] == (0, f"tinyllama {tinyllama.__version__}\n")


def test_without_a_command_the_help_is_shown(run):
    status, out, err = run()
    assert (status, out) == (2, "") and "generate" in err


def test_underscores_and_dashes_are_the_same_in_every_option():
    long = {text for _, action in options() for text in action.option_strings if "_" in text}
    assert long >= {"--n_predict", "--top_k", "--batch_size", "--ctx_size", "--repeat_last_n"}
    for text in long:
        dashes = "--" + text[2:].replace("_", "-")
        assert cli._with_underscores(["generate", dashes, "a-b", f"{dashes}=a-b"]) == [
            "generate",
            text,
            "a-b",
            f"{text}=a-b",
        ]


def test_only_options_are_respelled():
    argv = ["-p", "--a-b c", "-a-b", "a-b", "---", "--", "--a-b"]
    assert cli._with_underscores(argv) == argv


def test_the_defaults_are_those_of_llama_cpp():
    args = vars(cli.make_parser().parse_args(["generate"]))
    wanted = {"model": "small", "n_predict": 128, "seed": -1, "threads": None, "stop": [], "escape": False}
    wanted |= {"top_k": 40, "top_p": 0.9, "temp": 0.8, "repeat_penalty": 1.0, "repeat_last_n": 64}
    wanted |= {"batch_size": 512, "ctx_size": None}
    assert wanted.items() <= args.items()


@pytest.mark.parametrize(
    "argv, wrong",
    [
        (["generate", "--temp", "nan"], "temp"),
        (["generate", "--temp=-1"], "temp"),
        (["generate", "--temp", "warm"], "--temp"),
        (["generate", "--top_p", "2"], "top_p"),
        (["generate", "--top-p", "nan"], "top_p"),
        (["generate", "--top_k", "-1"], "top_k"),
        (["generate", "--repeat_penalty", "0"], "repeat_penalty"),
        (["generate", "-n", "many"], "-n"),
        (["generate", "-n", "-2"], "n_predict"),
        (["generate", "-b", "0"], "batch_size"),
        (["generate", "-c", "0"], "ctx_size"),
        (["generate", "-t", "0"], "threads"),
        (["generate", "--backend", "abacus"], "abacus"),
        (["generate", "--stop", ""], "stop"),
        (["generate", "-p", ""], "prompt"),
        (["generate", "-p", "a", "-f", "b"], "not allowed"),
        (["generate", "--prom", "a"], "--prom"),
        (["convert"], "FOLDER"),
        (["convert", ".", "2"], "2"),
        (["quantize", "a", "b", "q3_0"], "q3_0"),
        (["perplexity"], "--file"),
        (["perplexity", "-f", "-", "-c", "2"], "ctx_size"),
        (["inspect", "-c", "0"], "ctx_size"),
        (["download", "gpt-2"], "gpt-2"),
        (["dance"], "dance"),
    ],
)
def test_bad_arguments_get_one_line_and_status_2(run, argv, wrong):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("tinyllama") and wrong in err and err.count("\n") == 1


# --- generate -------------------------------------------------------------------------------------


def test_stdout_gets_the_prompt_and_the_text_alone(run):
    text = tinyllama.generate("Once upon a time", **SETTINGS)
    status, out, _ = run("generate", "-p", "Once upon a time", *QUICK)
    assert (status, out) == (0, f"Once upon a time{text}\n")


def test_stderr_gets_everything_else(run):
    err = run("generate", "-p", "Once upon a time", *QUICK)[2]
    ids = tinyllama.load("small", "numpy", 1).tokens("Once upon a time")
    assert f"seed 1, {len(ids)} prompt tokens, backend numpy, 1 thread\n" in err
    for step in ("load", "prompt", "sample", "predict", "total"):
        assert re.search(rf"^{step} +\d+\.\d\d s", err, re.MULTILINE), step
    assert "ms/token" in err and "tokens/s" in err and "peak memory" in err
    assert "stopped" not in err, "it simply reached its length"


def test_the_same_text_comes_from_the_mapped_file(run):
    line = ["generate", "-p", "Once", "-n", "5", "--seed", "1", "--temp", "0"]
    _, copied, _ = run(*line)
    status, mapped, err = run(*line, "--mmap")
    assert status == 0 and mapped == copied and "stay in the file" in err


def test_main_is_another_name_of_generate(run):
    argv = ["-p", "Once upon a time", *QUICK]
    assert run("main", *argv)[:2] == run("generate", *argv)[:2]


def test_the_settings_reach_the_model(run):
    settings = {"temp": 2.5, "top_k": 300, "top_p": 0.99, "repeat_penalty": 1.3, "repeat_last_n": 5}
    settings |= {"batch_size": 2, "ctx_size": 40}
    text = tinyllama.generate("Once upon a time", **SETTINGS, **settings)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert run("generate", "-p", "Once upon a time", *QUICK, *argv)[1] == f"Once upon a time{text}\n"
    assert text != tinyllama.generate("Once upon a time", **SETTINGS)


def test_the_prompt_comes_from_a_file_without_its_last_newline(run, tmp_path):
    file = tmp_path / "prompt.txt"
    for end in ("", "\n", "\r\n"):
        file.write_bytes(f"Two lines\nof text{end}".encode())
        assert run("generate", "-f", str(file), *QUICK)[1].startswith("Two lines\nof text")
        out = run("generate", "-f", str(file), *QUICK)[1]
        assert out == run("generate", "-p", "Two lines\nof text", *QUICK)[1]


def test_the_prompt_comes_from_stdin(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon a time\n")))
    assert run("generate", "-f", "-", *QUICK)[1] == run("generate", "-p", "Once upon a time", *QUICK)[1]


def test_without_a_prompt_the_seed_chooses_one(run):
    begun = {run("generate", "-n", "0", "-s", str(seed))[1].removesuffix("\n") for seed in range(30)}
    assert begun == set(PROMPTS)
    assert run("generate", "-n", "0", "-s", "5")[1] == run("generate", "-n", "0", "-s", "5")[1]


def test_escapes_are_replaced_on_request_in_the_prompt_and_in_stop_strings(run):
    assert run("generate", "-p", r"one\ntwo", "-n", "0", "-e")[1] == "one\ntwo\n"
    assert run("generate", "-p", r"one\ntwo", "-n", "0")[1] == "one\\ntwo\n"
    text = tinyllama.generate("Once upon a time", **SETTINGS)
    word = text.split()[-2]
    escaped = "".join(rf"\x{byte:02x}" for byte in word.encode())
    out = run("generate", "-p", "Once upon a time", *QUICK, "-e", "--stop", escaped)[1]
    assert out == f"Once upon a time{text[: text.index(word)]}\n"


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


def test_why_it_stopped_is_said_where_it_is_not_the_length(run):
    text = tinyllama.generate("Once upon a time", **SETTINGS)
    err = run("generate", "-p", "Once upon a time", *QUICK, "--stop", "QQQ", "--stop", text.split()[-2])[2]
    assert "stopped: a stop string was found\n" in err
    n_prompt = len(tinyllama.load("small", "numpy", 1).tokens("Once upon a time"))
    err = run("generate", "-p", "Once upon a time", *QUICK, "-c", str(n_prompt + 2))[2]
    assert "stopped: the context is full\n" in err


def test_a_warning_is_one_line(run):
    err = run("generate", "-p", "Once upon a time ", *QUICK)[2]
    (line,) = (line for line in err.splitlines() if "space" in line)
    assert line.startswith("warning: the prompt ends in a space")


def test_control_c_ends_the_text_and_prints_the_timings(run, monkeypatch):
    forward, n_calls = tinyllama.Llama.forward, 0

    def interrupted(self, *args, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 5:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **options)

    monkeypatch.setattr(tinyllama.Llama, "forward", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    status, out, err = run("generate", "-p", "Once upon a time", *QUICK)
    monkeypatch.undo()
    whole = tinyllama.generate("Once upon a time", **SETTINGS)
    assert status == 130 and n_calls == 5
    text = out.removeprefix("Once upon a time").removesuffix("\n")
    assert text and whole.startswith(text) and text != whole
    assert "predict" in err and err.endswith("stopped: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_control_c_ends_at_once(run, monkeypatch):
    def interrupted(self, *args, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tinyllama.Llama, "forward", interrupted)
    status, out, err = run("generate", "-p", "Once upon a time", *QUICK)
    assert (status, out) == (130, "Once upon a time\n") and "Traceback" not in err


def test_control_c_while_loading_is_quiet(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load", interrupted)
    assert run("generate", "-p", "Once") == (130, "", "")
    assert run("perplexity", "-f", str(HELD_OUT)) == (130, "", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_convert_that_is_told_to_end_leaves_nothing_behind(run, checkpoint, monkeypatch, name):
    number, write_headers, began = signal.Signals[name], streaming._write_headers, []

    def told_to_end(path, output):
        write_headers(path, output)
        began.append(path.exists())
        assert signal.getsignal(number) != signal.SIG_DFL  # which would end the tests too
        signal.raise_signal(number)

    before = {path.name for path in checkpoint.iterdir()}
    handler = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(streaming, "_write_headers", told_to_end)
    assert run("convert", str(checkpoint))[0] == 128 + number
    assert began == [True] and {path.name for path in checkpoint.iterdir()} == before
    assert signal.signal(number, handler) == signal.SIG_DFL


def test_a_reader_that_goes_away_ends_it_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [*COMMAND, "generate", "-n", "5"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert process.returncode == 141
    assert b"Traceback" not in process.stderr and b"Broken" not in process.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_gets_one_line():
    with open("/dev/full", "w") as full:
        process = subprocess.run([*COMMAND, "inspect"], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert process.returncode == 1
    assert process.stderr.decode() == f"tinyllama: {os.strerror(28)}\n"


def test_a_terminal_without_the_characters_gets_question_marks():
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = run_process("generate", "-p", "Königin 🦙", "-n", "0", env=ascii_only)
    assert process.returncode == 0 and process.stdout == b"K?nigin ?\n"


@pytest.mark.skipif(sys.platform == "win32", reason="its arguments are always Unicode")
def test_arguments_that_are_not_utf_8_are_bytes_to_the_model():
    process = run_process("generate", "-p", b"caf\xe9", "-n", "0", env=os.environ | {"PYTHONUTF8": "1"})
    assert process.returncode == 0 and process.stdout.decode() == "caf�\n"
    ids = tinyllama.load("small", "numpy", 1).tokens("caf\udce9")
    assert f" {len(ids)} prompt tokens".encode() in process.stderr


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
        (["generate", "-f", str(empty)], str(empty)),
        (["generate", "-p", "a long prompt", "-c", "2"], "context is full"),
        (["generate", "-p", "Once", "-c", str(10**12)], "GB of memory"),
        (["perplexity", "-f", str(tmp_path / "none.txt")], "none.txt"),
        (["convert", str(tmp_path)], str(tmp_path)),
        (["quantize", str(page), str(tmp_path / "out.bin"), "2"], str(page)),
        (["inspect", str(page)], str(page)),
        (["inspect", "nowhere.gguf"], "nowhere.gguf"),
    ]
    for argv, named in cases:
        run("inspect", "--backends")  # forget what was printed before
        status, out, err = run(*argv)
        lines = [line for line in err.splitlines() if not line.startswith("loading ")]
        assert (status, out) == (1, ""), argv
        assert len(lines) == 1 and lines[0].startswith("tinyllama: ") and named in lines[0], argv
    assert not (tmp_path / "out.bin").exists()


def test_a_lack_of_memory_gets_one_line(run, monkeypatch):
    def starve(*_, **__):
        raise MemoryError("Unable to allocate 9.00 TiB")

    monkeypatch.setattr(commands, "load", starve)
    status, _, err = run("generate", "-p", "Once")
    assert (status, err) == (1, "tinyllama: there is not enough memory: Unable to allocate 9.00 TiB\n")


def test_a_message_of_several_lines_becomes_one(run, monkeypatch):
    def fail(*_, **__):
        raise TinyllamaError("a file\n named so\n")

    monkeypatch.setattr(commands, "load", fail)
    assert run("generate", "-p", "Once")[2] == "tinyllama: a file\\n named so\\n\n"


def test_tinyllama_debug_shows_where_an_error_comes_from(run, monkeypatch):
    monkeypatch.setenv("TINYLLAMA_DEBUG", "1")
    with pytest.raises(TinyllamaError):
        run("inspect", "nowhere.gguf")


def test_the_environment_chooses_the_backend(run, monkeypatch):
    monkeypatch.setenv("TINYLLAMA_BACKEND", "numpy")
    assert "backend numpy" in run("generate", "-p", "Once", "-n", "0")[2]
    monkeypatch.setenv("TINYLLAMA_BACKEND", "numexpr")
    assert "backend numexpr" in run("generate", "-p", "Once", "-n", "0")[2]


# --- from a checkpoint to text --------------------------------------------------------------------


@pytest.mark.parametrize("n_parts", [1, 2])
def test_convert_quantize_inspect_generate(run, checkpoint, n_parts):
    if n_parts > 1:
        meta.split(checkpoint, checkpoint / "parts", n_parts)
        checkpoint = checkpoint / "parts"
    suffixes = ["", ".1"][:n_parts]

    status, out, err = run("convert", str(checkpoint), "1")
    f16 = checkpoint / "ggml-model-f16.bin"
    assert status == 0 and "convert" in err
    assert [line.rpartition("  ")[0] for line in out.splitlines()] == [
        f"{f16}{suffix}" for suffix in suffixes
    ]

    q4_0 = checkpoint / "ggml-model-q4_0.bin"
    status, out, err = run("quantize", str(f16), str(q4_0), "2")
    assert status == 0
    assert [line.rpartition("  ")[0] for line in out.splitlines()] == [
        f"{q4_0}{suffix}" for suffix in suffixes
    ]
    assert all(re.search(r"  [\d.]+ MB$", line) for line in out.splitlines())

    assert "q4_0" in run("inspect", str(q4_0))[1]
    status, out, _ = run("generate", "-m", str(q4_0), "-p", "Once upon a time", *QUICK)
    assert status == 0 and len(out) > len("Once upon a time and")


def test_convert_and_quantize_gguf(run, checkpoint):
    f32, q8_0 = checkpoint / "a.gguf", checkpoint / "b.gguf"
    assert run("convert", str(checkpoint), "0", "--format", "gguf", "--outfile", str(f32))[0] == 0
    assert run("quantize", str(f32), str(q8_0), "Q8_0")[0] == 0
    types = {tensor.type for tensor in open_checkpoint(q8_0).tensors.values()}
    assert types == {"f32", "q8_0"}
    assert {tensor.type for tensor in open_checkpoint(f32).tensors.values()} == {"f32"}


@pytest.mark.parametrize(
    "text, name", [("2", "q4_0"), ("3", "q4_1"), ("q4_0", "q4_0"), ("Q5_1", "q5_1"), ("q8_0", "q8_0")]
)
def test_quantizations_have_numbers_and_names(text, name):
    assert cli.make_parser().parse_args(["quantize", "a", "b", text]).type == name


def test_download_fetches_what_is_asked_for(run, monkeypatch):
    fetched = []
    monkeypatch.setattr(download, "download", fetched.append)
    assert run("download", "smollm2")[0] == 0
    assert fetched == ["smollm2"]


# --- perplexity, inspect --------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(HELD_OUT.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return str(file)


def test_perplexity_prints_its_figures_on_one_line(run, text_file):
    status, out, err = run("perplexity", "-f", text_file, "-c", "64", "-b", "16")
    assert status == 0
    assert re.fullmatch(
        r"perplexity [\d.]+ \+/- [\d.]+, [\d.]+ bits per byte \(\d+ windows of 64 tokens, \d+ scored\)\n", out
    )
    assert "perplexity: 100%" in err


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file that can't be read")
def test_a_text_that_fails_while_it_is_read_is_named(run):
    status, _, error = run("generate", "--file", "/proc/self/mem")
    assert (status, error) == (1, "tinyllama: /proc/self/mem: Input/output error\n")


def test_perplexity_as_json_has_the_same_figures(run, text_file):
    line = run("perplexity", "-f", text_file, "-c", "64")[1]
    figures = json.loads(run("perplexity", "-f", text_file, "-c", "64", "--json")[1])
    assert line.startswith(f"perplexity {figures['perplexity']:.4f} +/- {figures['standard_error']:.4f}, ")
    assert figures["ctx_size"] == 64 and len(figures["running"]) == figures["n_windows"]


def test_perplexity_reads_stdin(run, text_file, monkeypatch):
    wanted = run("perplexity", "-f", text_file, "-c", "64")[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(text_file).read_bytes())))
    assert run("perplexity", "-f", "-", "-c", "64")[1] == wanted


def test_perplexity_of_a_text_that_is_too_short_says_by_how_much(run, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("Once upon a time")
    status, out, err = run("perplexity", "-f", str(file))
    assert (status, out) == (1, "")
    assert re.search(r"the text has \d tokens, and a window takes 512", err)


def test_perplexity_warns_of_windows_that_the_model_was_not_trained_on(run, text_file):
    assert (
        "warning: the model was trained on 2048 tokens" in run("perplexity", "-f", text_file, "-c", "3000")[2]
    )


def test_inspect_shows_the_small_model_if_nobody_says(run):
    assert run("inspect")[1] == run("inspect", "small")[1]
    assert run("inspect")[1].startswith(f"{small_folder()}: meta, ")


def test_inspect_as_json_has_every_tensor(run):
    shown = json.loads(run("inspect", "--json", "-c", "100")[1])
    assert [tensor["name"] for tensor in shown["tensors"]] == list(
        open_checkpoint(small_folder()).config.tensor_shapes()
    )
    assert shown["memory"]["ctx_size"] == 100


def test_inspect_shows_tokens_and_backends(run):
    rows = json.loads(run("inspect", "--tokens", "Once upon", "--json")[1])
    assert [row["id"] for row in rows] == tinyllama.load("small", "numpy", 1).tokens("Once upon")
    assert run("inspect", "--tokens", "Once upon")[1].endswith(f"{len(rows)} tokens\n")
    assert json.loads(run("inspect", "--backends", "--json")[1])["numpy"] is None
