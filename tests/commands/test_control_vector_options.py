"""Control vectors from the command line: options of generate and chat, and the command that makes them."""

import gc
import io
import shutil
import weakref
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import tinyllama
from tinyllama import ControlVector
from tinyllama.commands import main
from tinyllama.commands import run as commands
from tinyllama.commands.convert import convert
from tinyllama.machine.download import small_folder

QUICK = ["-n", "12", "--temp", "0", "-t", "1", "--backend", "numpy"]
ONCE = "Once upon a time"


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


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", "numpy", 1)


@pytest.fixture
def files(llama, tmp_path) -> list[Path]:
    """Two control vectors with directions of layers 1 to 3, large enough to change a text."""
    rng, paths = np.random.default_rng(0), [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in paths:
        rows = 4 * rng.standard_normal((3, llama.config.dim), dtype=np.float32)
        ControlVector(dict(enumerate(rows, 1)), "llama").write(path)
    return paths


def expected(llama, *edits: dict) -> str:
    """The text under some edits, in Python."""
    with ExitStack() as within:
        for edit in edits:
            within.enter_context(llama.edit(edit))
        return f"{ONCE}{llama.generate(ONCE, n_predict=12, temp=0)}\n"


def test_generate_adds_the_directions_of_its_files(run, llama, files):
    one, two = map(ControlVector.read, files)
    a, b = map(str, files)
    for options, edits in (
        (["--control-vector", a], [one.edit()]),
        (["--control_vector", a, "--control-vector", b], [one.edit(), two.edit()]),
        (["--control-vector", f"{a},{b}"], [one.edit(), two.edit()]),
        (["--control-vector-scaled", f"{a}:-0.5"], [one.edit(-0.5)]),
        (["--control-vector-scaled", f"{a}:2", "--control-vector-layer-range", "2", "2"], [one.edit(2, [2])]),
        (["--control-vector", a, "--control-vector-layer-range", "0", "-1"], [one.edit()]),  # as llama.cpp
        (["--control-vector-scaled", f"{a}:0"], []),
        ([], []),
    ):
        assert run("generate", "-p", ONCE, *QUICK, *options)[:2] == (0, expected(llama, *edits)), options
    assert expected(llama, one.edit()) != expected(llama)


def test_lines_of_a_file_and_json_do_too(run, llama, files, tmp_path):
    (tmp_path / "prompts").write_text(f"{ONCE}\n{ONCE}\n")
    vector = ControlVector.read(files[0])
    options = ["-f", str(tmp_path / "prompts"), "--each-line", "--control-vector", str(files[0])]
    out = run("generate", *options, *QUICK)[1]
    assert out.splitlines() == [expected(llama, vector.edit())[:-1].replace("\n", r"\n")] * 2


def test_a_chat_is_steered_too(run, llama, files, monkeypatch):
    vector = ControlVector.read(files[0])
    with llama.edit(vector.edit()):
        wanted = llama.generate(ONCE, n_predict=12, temp=0, chat=True, chat_template="chatml")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    options = ["-m", "small", "-p", ONCE, "-st", "--chat-template", "chatml"]
    out = run("chat", *options, *QUICK, "--control-vector", str(files[0]))[1]
    assert str(wanted).strip() in out


@pytest.mark.parametrize(
    "options, status, words",
    [
        (["--control-vector", "none.gguf"], 1, "none.gguf"),
        (["--control-vector", "README.md"], 1, "README.md: is not a control vector"),
        (["--control-vector-scaled", "a.gguf"], 2, "FILE:SCALE"),
        (["--control-vector-scaled", ":2"], 2, "FILE:SCALE"),
        (["--control-vector-layer-range", "1"], 2, "expected 2 arguments"),
        (["--control-vector-layer-range", "1", "2"], 2, "needs --control_vector"),
        (["--control-vector", "a", "--prompt-cache", "b"], 2, "--prompt_cache"),
    ],
)
def test_what_can_not_be_applied_is_refused_in_one_line(run, options, status, words):
    found, out, err = run("generate", "-p", ONCE, *QUICK, *options)
    assert (found, out) == (status, "") and words in err.splitlines()[-1]


def test_a_range_of_layers_without_directions_is_refused(run, files):
    options = ["--control-vector", str(files[0]), "--control-vector-layer-range", "0", "0"]
    status, out, err = run("generate", "-p", ONCE, *QUICK, *options)
    assert (status, out) == (1, "")
    assert "has directions of layers 1 to 3, and none of 0 to 0" in err.splitlines()[-1]


@pytest.mark.parametrize("layers", [("2", "9"), ("3", "2"), ("-2", "1"), ("1", "-2")])
def test_a_range_that_the_model_does_not_have_is_refused(run, files, layers):
    options = ["--control-vector", str(files[0]), "--control-vector-layer-range", *layers]
    status, out, err = run("generate", "-p", ONCE, *QUICK, *options)
    wrong = f"--control-vector-layer-range {' '.join(layers)}: this model's layers are 0 to 3"
    assert (status, out) == (1, "") and wrong in err.splitlines()[-1]


@pytest.mark.parametrize("scale", ["1e39", "nan", "1e38", "-inf"])
def test_a_scale_that_overflows_is_refused_before_the_model_is_loaded(run, files, scale):
    status, out, err = run("generate", "-p", ONCE, *QUICK, "--control-vector-scaled", f"{files[0]}:{scale}")
    (line,) = err.splitlines()
    assert (status, out) == (1, "")
    assert line.startswith(f"tinyllama: --control-vector-scaled: {files[0]}: ") and "overflows" in line


def test_a_model_that_a_chat_goes_on_with_is_steered_too(run, llama, files, tmp_path, monkeypatch):
    vector = ControlVector.read(files[0])
    with llama.edit(vector.edit()):
        wanted = llama.generate(ONCE, n_predict=12, temp=0, chat=True, chat_template="chatml")
    (tmp_path / "said").write_text(f"/model {small_folder()}\n{ONCE}\n")
    with (tmp_path / "said").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        options = ["-m", "small", "--chat-template", "chatml", "--control-vector", str(files[0])]
        status, out, err = run("chat", *options, *QUICK)
    assert status == 0 and out.strip() == str(wanted).strip(), err


@pytest.mark.parametrize("is_steered", [False, True])
def test_a_model_that_a_chat_has_left_is_forgotten(run, files, tmp_path, monkeypatch, is_steered):
    models, loaded, alive = [str(tmp_path / f"{number}.gguf") for number in range(4)], [], []
    convert("small", "f16", models[0], "gguf")
    for path in models[1:]:
        shutil.copy(models[0], path)
    load = commands._load

    def counting(args, tell):
        gc.collect()
        alive.append(sum(model() is not None for model in loaded))
        llama = load(args, tell)
        loaded.append(weakref.ref(llama))
        return llama

    monkeypatch.setattr(commands, "_load", counting)
    said = [ONCE, *(line for path in models[1:] for line in (f"/model {path}", ONCE))]
    (tmp_path / "said").write_text("\n".join([*said, ""]))
    steering = ["--control-vector", str(files[0])] if is_steered else []
    with (tmp_path / "said").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        status, _, err = run("chat", "-m", models[0], "--chat-template", "chatml", *QUICK, *steering)
    assert status == 0 and alive == [0, 1, 2, 2], err  # as many as `load` keeps


def test_one_of_another_model_is_refused_before_anything_is_written(run, tmp_path):
    ControlVector({1: np.ones(7, np.float32)}).write(tmp_path / "x")
    status, out, err = run("generate", "-p", ONCE, *QUICK, "--control-vector", str(tmp_path / "x"))
    assert (status, out) == (1, "") and "is of another model" in err.splitlines()[-1]


# --- cvector --------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path) -> list[str]:
    positive, negative = tmp_path / "positive.txt", tmp_path / "negative.txt"
    positive.write_text("Lily was happy.\\nShe laughed.\n\nIt was a lovely day\n")
    negative.write_text("Lily was sad.\\nShe cried.\r\nIt was a horrible day\r\n", newline="")
    return ["--positive-file", str(positive), "--negative-file", str(negative)]


@pytest.mark.parametrize("method", ["pca", "mean"])
def test_cvector_writes_what_python_makes_of_the_same_pairs(run, llama, prompts, tmp_path, method):
    target = tmp_path / "cv.gguf"
    options = [*prompts, "-o", str(target), "--method", method, "-t", "1", "--backend", "numpy"]
    status, out, err = run("cvector", *options)
    assert status == 0 and out.startswith(f"{target}  ") and f"{target}:SCALE" in err.splitlines()[-1]
    pairs = [("Lily was happy.\nShe laughed.", "Lily was sad.\nShe cried.")]
    pairs += [("It was a lovely day", "It was a horrible day")]
    wanted = ControlVector.of(llama, pairs, method)
    found = ControlVector.read(target)
    assert found.directions.keys() == wanted.directions.keys()
    for layer, direction in found.directions.items():
        assert np.array_equal(direction, wanted.directions[layer])


def test_cvector_replaces_nothing_it_is_made_from_and_looks_for_the_folder_first(run, prompts, tmp_path):
    before = Path(prompts[1]).read_bytes()
    for target, words in (
        (prompts[1], "would replace what it is made from"),
        (prompts[3], "would replace what it is made from"),
        (str(tmp_path / "none" / "x.gguf"), "there is no folder"),
    ):
        status, out, err = run("cvector", *prompts, "-o", target)
        (line,) = err.splitlines()  # nothing was loaded
        assert (status, out) == (1, "") and line.startswith(f"tinyllama: {target}: {words}")
    assert Path(prompts[1]).read_bytes() == before


def test_prompts_without_a_counterpart_are_refused(run, prompts, tmp_path):
    (tmp_path / "negative.txt").write_text("one\n")
    status, out, err = run("cvector", *prompts, "-o", str(tmp_path / "x"))
    assert (status, out) == (1, "")
    assert "positive.txt has 2 prompts, and" in err and not (tmp_path / "x").exists()
    (tmp_path / "negative.txt").write_text("\n\n")
    assert "negative.txt: there is no prompt in it" in run("cvector", *prompts, "-o", str(tmp_path / "x"))[2]
