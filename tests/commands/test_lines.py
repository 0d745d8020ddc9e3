"""`generate --each-line` and `--json`: many prompts, written together, printed in their order."""

import json
import signal

import pytest

import tinyllama
from tinyllama.commands import main
from tinyllama.commands.printing import escape, unescape

QUICK = ["-n", "12", "-s", "1", "-t", "1", "--backend", "numpy"]
SETTINGS = {"n_predict": 12, "seed": 1, "threads": 1, "backend": "numpy"}
PROMPTS = ["Once upon a time", "Tom", "The old king", " a", "Tom"]


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit status, stdout, stderr)."""

    def run(*argv: object):
        return main([*map(str, argv)]), *capsys.readouterr()

    return run


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:3], "  ", *PROMPTS[3:], ""]))
    return path


def test_each_line_is_a_prompt_and_gets_a_line_in_its_order(run, file):
    status, out, err = run("generate", "-f", file, "--each-line", *QUICK)
    assert status == 0
    expected = [escape(prompt + tinyllama.generate(prompt, **SETTINGS)) for prompt in PROMPTS]
    assert out.split("\n") == [*expected, ""]
    assert err.startswith("5 prompts, backend numpy, 1 thread\n") or "\n5 prompts, " in err
    assert "tokens/s of all together" in err and "60 tokens" in err


def test_json_tells_of_each_what_was_asked_and_written(run, file):
    status, out, _ = run("generate", "-f", file, "--each-line", "--json", *QUICK)
    assert status == 0
    for line, prompt in zip(out.splitlines(), PROMPTS, strict=True):
        text = tinyllama.generate(prompt, **SETTINGS)
        about = {"prompt": prompt, "text": text, "ids": text.ids, "stop_reason": "length", "seed": 1}
        assert json.loads(line) == about


def test_json_alone_tells_of_one_prompt(run):
    (line,) = run("generate", "-p", "Tom\nTim", "--json", *QUICK)[1].splitlines()
    assert json.loads(line)["text"] == tinyllama.generate("Tom\nTim", **SETTINGS)


def test_without_a_seed_each_text_gets_its_own(run, file):
    out = run("generate", "-f", file, "--each-line", "--json", "-n", "1")[1]
    assert len({json.loads(line)["seed"] for line in out.splitlines()}) == 5


@pytest.mark.parametrize("text", ["a\nb\r\n", r"a\nb", "\\", "\\\n\\n", "plain \t text"])
def test_what_a_line_escapes_can_be_had_back(text):
    line = escape(text)
    assert "\n" not in line and "\r" not in line and unescape(line) == text


def test_with_e_a_line_may_hold_newlines(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Tom\\nTim\r\nTom")
    out = run("generate", "-f", path, "--each-line", "-e", "--json", *QUICK)[1]
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["Tom\nTim", "Tom"]


def test_a_line_that_is_no_prompt_is_named_before_anything_is_written(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Tom\n\n" + "word " * 3000)
    status, out, err = run("generate", "-f", path, "--each-line", *QUICK)
    assert (status, out) == (1, "") and f"tinyllama: {path}: line 3: the context is full" in err


def test_a_warning_is_said_once(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Tom \nTim \nTom")
    assert run("generate", "-f", path, "--each-line", *QUICK)[2].count("ends in a space") == 1


def test_a_signal_leaves_the_texts_that_are_whole(run, file, monkeypatch):
    forward, n_calls = tinyllama.Llama.run, 0

    def interrupted(self, *args, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 9:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **options)

    file.write_text("Tom\nTim\nThe")
    monkeypatch.setattr(tinyllama.Llama, "run", interrupted)
    status, out, err = run("generate", "-f", file, "--each-line", *QUICK)
    assert (status, out) == (130, "")
    assert "stopped: interrupted after 0 of 3 texts" in err and "tokens/s" in err


def test_a_value_that_is_not_there_is_refused_before_anything_is_said(run):
    status, out, err = run("generate", "-p", "Tom", "--json", "--taps", "nothing", *QUICK)
    assert (status, out) == (1, "") and "nothing in this model is named 'nothing'" in err
    assert "1 prompt" not in err


def test_tapped_values_are_written_token_by_token(monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *what, **how: pieces.append(what))
    argv = ["generate", "-p", "Tom", "--json", "--taps", "layers.*.residual", *QUICK, "--temp", "0"]
    assert main(argv) == 0
    monkeypatch.undo()
    text = "".join("".join(what) for what in pieces)
    assert max(len("".join(what)) for what in pieces) < len(text) / 10
