"""The command line as a user meets it: arguments, signals, closed pipes, and exit statuses."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import tinyllama
from tinyllama import backends
from tinyllama.commands import cli, main, mixes
from tinyllama.errors import TinyllamaError, check_cancelled
from tinyllama.machine import download, places
from tinyllama.machine.files import reserve
from tinyllama.settings import Settings
from tinyllama.texts import perplexity

COMMAND = [sys.executable, "-m", "tinyllama"]
QUICK = ["-n", "12", "-s", "1", "-t", "1", "--backend", "numpy"]
SETTINGS = {"n_predict": 12, "seed": 1, "threads": 1, "backend": "numpy"}


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit status, stdout, stderr)."""

    def run(*argv: str):
        try:
            status = main(argv)
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


def run_process(*argv: str | bytes, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *argv], timeout=60, **{"capture_output": True} | options)


def run_python(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["generate", "--top-p", "2"]])
def test_help_and_the_refusal_of_an_option_do_not_wait_for_numpy(argv):
    program = (
        f"import sys; from tinyllama.commands import main\ntry: main({argv})\n"
        "except SystemExit: print({'numpy', 'tqdm', 'torch'} & set(sys.modules))"
    )
    assert run_python(program).endswith("set()\n")


#: What takes long to import, and a model that is here runs without.
NEEDLESS = "asyncio concurrent.futures huggingface_hub ipywidgets jinja2 logging matplotlib multiprocessing"
NEEDLESS += " numexpr psutil sentencepiece socket subprocess tokenizers torch tqdm urllib.request zipfile"


def needless(program: str, names: str) -> str:
    """Which of these modules a program has imported."""
    return run_python(f"import sys\n{program}\nprint('needless:', *set({names.split()}) & set(sys.modules))")


def test_a_first_word_does_not_wait_for_what_it_can_do_without(smollm2_file):
    program = "import tinyllama.commands; tinyllama.commands.main('generate -m smollm2 -p Hi -n 1'.split())"
    rooms = "commands.bench commands.compare commands.convert commands.inspect formats.ggml formats.meta"
    rooms += " formats.huggingface lab machine.hub machine.ollama"
    others = " ".join(f"tinyllama.{name}" for name in rooms.split())
    assert needless(program, f"{NEEDLESS} threadpoolctl {others}").endswith("needless:\n")


def test_importing_tinyllama_waits_for_nothing_and_loading_a_model_for_little():
    assert needless("import tinyllama", f"{NEEDLESS} numpy").endswith("needless:\n")
    assert needless("import tinyllama; tinyllama.load", NEEDLESS).endswith("needless:\n")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and out.startswith(f"usage: tinyllama {command}")
    assert command in run("--help")[1]


def test_the_version_is_the_packages(run):
    assert run("--version")[:2] == (0, f"tinyllama {tinyllama.__version__}\n")


def test_without_a_command_the_help_is_shown(run):
    status, out, err = run()
    assert (status, out) == (2, "") and "generate" in err


def test_names_and_numbers_that_numpy_would_be_needed_for_are_those_of_their_tables(run):
    assert set(cli.BACKENDS) == {"auto", *backends.BACKENDS}
    assert tuple(download.MODELS) == cli.NAMED
    assert cli.SHORTEST == perplexity.SHORTEST
    assert cli.ON_HUB in places.STORES
    for command, names in {
        "generate": cli.BACKENDS,
        "quantize": mixes.MIXES,
        "download": [*cli.NAMED, cli.ON_HUB],
    }.items():
        shown = run(command, "--help")[1]
        assert all(name in shown for name in names)


OPTIONS = [
    setting
    for setting in fields(Settings)
    if setting.type is not bool or setting.metadata["flag"] is not None
]


@pytest.mark.parametrize("setting", OPTIONS)
def test_every_setting_is_an_option_with_its_help_default_and_range(run, setting):
    shown = " ".join(run("generate", "--help")[1].split())
    assert f"--{setting.name} " in shown and setting.metadata["help"] in shown.replace("- ", "-")
    value = cli.parse(["generate"]).settings[setting.name]
    assert value == (list(setting.default) if isinstance(setting.default, tuple) else setting.default)
    if (least := setting.metadata["least"]) is not None:
        for option in (f"--{setting.name}", f"--{setting.name.replace('_', '-')}", setting.metadata["flag"]):
            status, _, err = run("generate", f"{option}={least - 1:g}") if option else (2, "", setting.name)
            assert status == 2 and setting.name in err


def test_a_chat_has_the_settings_of_a_text_and_ends_where_the_model_ends():
    wanted = cli.parse(["chat"]).settings
    usual = cli.parse(["generate"]).settings
    assert wanted.pop("n_predict") == -1 and wanted.pop("batch_size") < usual["batch_size"]
    assert "chat" not in wanted and all(usual[name] == value for name, value in wanted.items())


def test_the_page_of_settings_in_docs_is_up_to_date():
    root = Path(__file__).parents[2]
    tool = root / "tools" / "settings_page.py"
    made = run_python(f"import runpy; print(runpy.run_path({str(tool)!r})['page'](), end='')")
    is_same = made == (root / "docs" / "settings.md").read_text(encoding="utf-8")
    assert is_same, "Settings have changed: run `python tools/settings_page.py`"


def test_a_chat_template_can_be_in_a_file(run, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("Said: {{ messages[0].content }}\n")
    argv = ["generate", "-p", "Hi", "--chat", *QUICK]
    status, text, _ = run(*argv, "--chat-template-file", str(file))
    assert (status, text) == run(*argv, "--chat-template", file.read_text())[:2]
    assert status == 0


@pytest.mark.parametrize(
    "content, wrong",
    [(None, "No such file"), (b"", "no chat template in it"), (b"\xff", "utf-8"), (b"x" * 70_000, "65,536")],
)
def test_a_file_that_holds_no_chat_template_is_refused_in_a_line(run, tmp_path, content, wrong):
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    status, _, told = run("generate", "-p", "Hi", "--chat_template_file", str(file))
    assert status == 2
    assert f"{file}: " in told
    assert wrong in told
    assert told.count("\n") == 1


def test_a_chat_template_is_given_in_one_way(run):
    status, _, told = run("generate", "--chat-template", "chatml", "--chat-template-file", "mine.jinja")
    assert status == 2
    assert "not allowed with argument --chat_template" in told


SCHEDULER = ["--scheduler", "tcp://host:8786"]


@pytest.mark.parametrize(
    "argv, wrong",
    [
        (["generate", "--split", "1,3"], "--split: needs --scheduler"),
        (["chat", "--split", "0"], "--split: needs --scheduler"),
        (["perplexity", "-f", "x", *SCHEDULER, "--split", "1,-3"], "at least 0, not -3"),
        (["perplexity", "-f", "x", *SCHEDULER, "--split", "a"], "at least 0, not a"),
        (["generate", *SCHEDULER, "--prompt-cache", "x"], "--prompt_cache: a cache that lies on several"),
        (["generate", *SCHEDULER, "-ngl", "0"], "--gpu_layers: is for a model on one computer"),
        (["bench", *SCHEDULER, "--shape", "7B"], "--shape: is for a model on one computer"),
        (["bench", *SCHEDULER, "--against", "llama.cpp"], "--against: is for a model on one computer"),
        (["bench", *SCHEDULER, "--level", "ref"], "--level: is for a model on one computer"),
        (["bench", *SCHEDULER, "--plot", "x.png"], "--plot: is for a model on one computer"),
        (["bench", *SCHEDULER, "--threads", "1,2"], "--threads: is one for all workers"),
        (["bench", *SCHEDULER, "--backend", "c,numpy"], "--backend: is one for all workers"),
    ],
)
def test_what_makes_no_sense_on_several_machines_is_refused_at_once(run, argv, wrong):
    status, out, err = run(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and wrong in err


def test_only_options_are_respelled(run):
    for text in ("--a-b c", "a-b"):
        assert cli.parse(["generate", "-p", text, "--n-predict", "3"]).prompt == text
    assert cli.parse(["generate", "--prompt=--a-b"]).prompt == "--a-b"
    assert cli.parse(["generate", "--prompt=-hello"]).prompt == "-hello"


@pytest.mark.parametrize("text", ["-hello", "---", "--", "--n-predict", "--a-b=c-d", "-n", "-p", "-1", "-"])
def test_the_word_behind_an_option_is_its_value_whatever_it_begins_with(text):
    for flag in ("-p", "--prompt"):
        args = cli.parse(["main", "--top-k", "3", flag, text, "--stop", text, "-e", "--stop", "b"])
        assert (args.prompt, args.settings["stop"], args.escape) == (text, [text, "b"], True)
        assert args.settings["top_k"] == 3
    assert cli.parse(["inspect", "--tokens", text, "small"]).tokens == text
    assert cli.parse(["inspect", "--", text]).model == text


@pytest.mark.parametrize(
    "text, name", [("2", "2"), ("7", "7"), ("q4_0", "q4_0"), ("Q5_1", "q5_1"), ("Q4_K", "q4_k")]
)
def test_names_of_types_may_be_in_capitals(text, name):
    assert cli.parse(["quantize", "a", "b", text]).type == name
    assert mixes.find_mix(text) == mixes.find_mix(name)


def test_the_command_takes_the_types_that_python_takes(run):
    for name in [*mixes.MIXES, *mixes.ALIASES]:
        assert mixes.find_mix(cli.parse(["quantize", "a", "b", name.lower()]).type) in mixes.MIXES
    assert (
        cli.parse(["quantize", "a", "b", "q4_0", "--output-tensor-type", "F16"]).output_tensor_type == "f16"
    )
    assert run("quantize", "a", "b", "q4_0", "--token-embedding-type", "q3_0")[0] == 2


@pytest.mark.parametrize(
    "argv, wrong",
    [
        (["generate", "--temp", "nan"], "temp"),
        (["generate", "--temp", "warm"], "--temp"),
        (["generate", "--top_p", "2"], "top_p"),
        (["generate", "-n", "many"], "-n"),
        (["generate", "-t", "0"], "threads"),
        (["generate", "--backend", "abacus"], "abacus"),
        (["generate", "--stop", ""], "stop"),
        (["generate", "-p", ""], "prompt"),
        (["generate", "-p"], "prompt"),
        (["generate", "-n", "-p", "a"], "n_predict"),
        (["generate", "-p", "a", "-f", "b"], "not allowed"),
        (["generate", "--prom", "a"], "--prom"),
        (["generate", "-p", "a", "--each-line"], "--file"),
        (["chat", "Hello"], "-p"),
        (["chat", "-p", "a", "-f", "b"], "not allowed"),
        (["chat", "--temp", "nan"], "temp"),
        (["batch", "in.jsonl"], "--output"),
        (["batch", "-o", "out.jsonl"], "IN.jsonl"),
        (["bench", "--texts", "0"], "texts"),
        (["convert"], "FOLDER"),
        (["convert", ".", "2"], "2"),
        (["quantize", "a", "b", "q3_0"], "q3_0"),
        (["perplexity"], "--file"),
        (["perplexity", "-f", "-", "-c", "2"], "ctx_size"),
        (["perplexity", "-f", "-", "-b", "0"], "batch_size"),
        (["imatrix"], "--file"),
        (["imatrix", "-f", "-", "--chunks", "0"], "chunks"),
        (["cvector", "--positive-file", "a"], "--negative_file"),
        (["cvector", "--positive-file", "a", "--negative-file", "b", "--method", "ica"], "ica"),
        (["inspect", "-c", "0"], "ctx_size"),
        (["download", "gpt-2"], "gpt-2"),
        (["bench", "-n", "0"], "n_predict"),
        (["bench", "-t", "1,no"], "threads"),
        (["compare", "--backends", "numpy"], "backends"),
        (["compare", "-p", ""], "prompt"),
        (["dance"], "dance"),
    ],
)
def test_bad_arguments_get_one_line_and_status_2(run, argv, wrong):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("tinyllama") and wrong in err and err.count("\n") == 1


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_text_and_prints_the_timings(run, monkeypatch, name):
    forward, n_calls, number = tinyllama.Llama.run, 0, signal.Signals[name]

    def interrupted(self, *args, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 5:
            signal.raise_signal(number)
        return forward(self, *args, **options)

    monkeypatch.setattr(tinyllama.Llama, "run", interrupted)
    handler = signal.getsignal(number)
    status, out, err = run("generate", "-p", "Once upon a time", *QUICK)
    monkeypatch.undo()
    whole = tinyllama.generate("Once upon a time", **SETTINGS)
    assert status == 128 + number and n_calls == 5
    text = out.removeprefix("Once upon a time").removesuffix("\n")
    assert text and whole.startswith(text) and text != whole
    assert "predict" in err and err.endswith("stopped: interrupted\n")
    assert signal.getsignal(number) == handler


def test_a_late_second_control_c_ends_at_once(run, monkeypatch):
    def interrupted(self, *args, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("tinyllama.machine.interrupts.PATIENCE", -1)
    monkeypatch.setattr(tinyllama.Llama, "run", interrupted)
    status, out, err = run("generate", "-p", "Once upon a time", *QUICK)
    assert (status, out) == (130, "Once upon a time\n") and "Traceback" not in err


def test_control_c_while_loading_is_quiet(run, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)
        check_cancelled()

    monkeypatch.setattr("tinyllama.llama.build", interrupted)
    assert run("inspect", "--backends")[0] == 0
    status, out, err = run("generate", "-p", "Once", "--backend", "numpy", "-t", "3")
    assert (status, out) == (130, "") and err.startswith("loading ") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_wait_for_a_prompt_that_nobody_types(run, monkeypatch, name):
    def told_to_end(*_):
        signal.raise_signal(signal.Signals[name])
        return [], [], []

    reader, writer = os.pipe()
    with open(reader) as stdin, open(writer, "w"):
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr("tinyllama.commands.inputs.select", told_to_end)
        assert run("generate", "-f", "-") == (128 + signal.Signals[name], "", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_convert_that_is_told_to_end_leaves_nothing_behind(run, tmp_path, monkeypatch, name):
    folder, number, began = tmp_path / "small", signal.Signals[name], []
    shutil.copytree(download.small_folder(), folder)

    def told_to_end(file, size):
        reserve(file, size)
        began.append(Path(file.name).exists())
        signal.raise_signal(number)

    before = {path.name for path in folder.iterdir()}
    monkeypatch.setattr("tinyllama.commands.convert.reserve", told_to_end)
    status, out, err = run("convert", str(folder))
    assert (status, out, began) == (128 + number, "", [True])
    assert err.endswith("tinyllama: interrupted; no file was left half-written\n")
    assert {path.name for path in folder.iterdir()} == before


def test_a_signal_that_nohup_ignores_stays_ignored(run, monkeypatch):
    forward = tinyllama.Llama.run

    def hung_up(self, *args, **options):
        signal.raise_signal(signal.SIGHUP)
        return forward(self, *args, **options)

    monkeypatch.setattr(tinyllama.Llama, "run", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("generate", "-p", "Once", *QUICK)[0] == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- what stdout, stderr and the terminal are -----------------------------------------------------


def test_a_reader_that_goes_away_ends_it_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    process = run_process("generate", "-n", "5", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.returncode == 141
    assert b"Traceback" not in process.stderr and b"Broken" not in process.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_gets_one_line():
    with open("/dev/full", "w") as full:
        process = run_process("inspect", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert process.returncode == 1
    assert process.stderr.decode() == f"tinyllama: {os.strerror(28)}\n"


@pytest.mark.parametrize(
    ("closed", "status", "err"),
    [("<&- -f -", 1, "tinyllama: stdin: there is no text in it\n"), (">&-", 0, None), ("2>&-", 0, "")],
)
def test_what_is_closed_is_done_without(closed, status, err):
    for n_predict in (0, 1):
        line = f"{sys.executable} -m tinyllama generate -s 1 -n {n_predict} {closed}"
        process = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
        assert process.returncode == status and "Traceback" not in process.stderr
        assert err is None or process.stderr == err
        assert process.stdout.startswith("The old king had three daughters, and" if closed == "2>&-" else "")


def test_what_is_closed_is_no_place_for_a_file(tmp_path):
    target = tmp_path / "f16.gguf"
    line = f"{sys.executable} -m tinyllama convert {download.small_folder()} --format gguf --outfile {target}"
    assert subprocess.run(f"{line} <&- >&- 2>&-", shell=True, timeout=60).returncode == 0
    assert run_process("inspect", "--check", str(target)).returncode == 0


def test_a_terminal_without_the_characters_gets_question_marks():
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = run_process("generate", "-p", "Königin 🦙", "-n", "0", env=ascii_only)
    assert process.returncode == 0 and process.stdout == b"K?nigin ?\n"


def test_a_terminal_gets_pictures_of_what_would_steer_it_and_a_pipe_the_text_itself():
    text, ours = "a\x1b[2Jb\tc", run_process("generate", "-p", "a\x1b[2Jb\tc", "-n", "0").stdout
    assert ours.decode() == f"{text}\n"
    leader, follower = os.openpty()
    argv = [*COMMAND, "generate", "-p", text, "-n", "0"]
    with subprocess.Popen(argv, stdout=follower, stderr=subprocess.DEVNULL) as process:
        shown = os.read(leader, 100)
        assert process.wait(60) == 0
    os.close(follower)
    os.close(leader)
    assert shown.decode().startswith("a␛[2Jb")


# --- errors ---------------------------------------------------------------------------------------


def test_a_lack_of_memory_gets_one_line(run, monkeypatch):
    def starve(*_, **__):
        raise MemoryError("Unable to allocate 9.00 TiB")

    monkeypatch.setattr("tinyllama.commands.run.load", starve)
    status, _, err = run("generate", "-p", "Once")
    assert (status, err) == (1, "tinyllama: there is not enough memory: Unable to allocate 9.00 TiB\n")


def test_a_message_of_several_lines_becomes_one(run, monkeypatch):
    def fail(*_, **__):
        raise TinyllamaError("a file\n named so\n")

    monkeypatch.setattr("tinyllama.commands.run.load", fail)
    assert run("generate", "-p", "Once")[2] == "tinyllama: a file\\n named so\\n\n"


def test_tinyllama_debug_shows_where_an_error_comes_from(run, monkeypatch):
    monkeypatch.setenv("TINYLLAMA_DEBUG", "1")
    with pytest.raises(TinyllamaError):
        run("inspect", "nowhere.gguf")


def test_a_warning_is_one_line(run):
    err = run("generate", "-p", "Once upon a time ", *QUICK)[2]
    (line,) = (line for line in err.splitlines() if "space" in line)
    assert line.startswith("warning: the prompt ends in a space")


def test_the_environment_chooses_the_backend(run, monkeypatch):
    for name in ("numpy", "numexpr"):
        monkeypatch.setenv("TINYLLAMA_BACKEND", name)
        assert f"backend {name}" in run("generate", "-p", "Once", "-n", "0")[2]
    monkeypatch.setenv("TINYLLAMA_BACKEND", "abacus")
    assert run("generate", "-p", "Once", "-n", "0")[::2] == (
        1,
        f"tinyllama: no backend 'abacus': there are auto, {', '.join(backends.BACKENDS)}\n",
    )
