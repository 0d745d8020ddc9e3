"""What `inspect` says of a model, against the model's own figures."""

import json
import shutil
from dataclasses import replace

import checkpoints
import numpy as np
import pytest
import torch

import tinyllama
from tinyllama.backends import get_backend
from tinyllama.commands import main
from tinyllama.commands.convert import convert, quantize
from tinyllama.commands.inspect import backend_table, inspect, report, token_table, tokens
from tinyllama.errors import TinyllamaError
from tinyllama.formats import open_checkpoint
from tinyllama.machine.download import small_folder
from tinyllama.tensor import Tensor
from tinyllama.tokenizer import make_tokenizer

NORM, MATRIX = "layers.2.ffn_norm.weight", "layers.1.attention.wq.weight"


@pytest.fixture(scope="module")
def small():
    return inspect("small")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The small model as a ggml file of one part, a GGUF file, and 4-bit files of one and two parts."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        shutil.copy(small_folder() / name, folder)
    checkpoints.split(folder, folder / "parts", 2)
    (ggml,), (gguf,) = convert(folder), convert(folder, format="gguf")
    in_parts = quantize(convert(folder / "parts")[0], folder / "parts" / "q4_0.bin", "q4_0")
    (q4_0,) = quantize(ggml, folder / "q4_0.bin", "q4_0")
    return {"ggml": ggml, "gguf": gguf, "q4_0": q4_0, "parts": in_parts[0]}


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit status, stdout, stderr)."""

    def run(*argv: str):
        return main(["inspect", *argv]), *capsys.readouterr()

    return run


# --- a model --------------------------------------------------------------------------------------


def test_its_figures_are_those_of_the_model(small):
    checkpoint = open_checkpoint(small_folder())
    assert small["config"]["dim"] == checkpoint.config.dim
    assert small["n_params"] == checkpoint.config.n_params()
    shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in small["tensors"]}
    assert shapes == checkpoint.config.tensor_shapes()
    assert list(shapes) == list(checkpoint.config.tensor_shapes()), "in reading order"
    assert small["n_bytes"] == 2 * small["n_params"] and small["bits_per_weight"] == 16
    assert small["files"] == [
        {"path": str(path), "n_bytes": path.stat().st_size} for path in small_folder().glob("*.pth")
    ]


def test_its_tokenizer_is_that_of_the_model(small):
    tokenizer = make_tokenizer(open_checkpoint(small_folder()).vocabulary)
    assert small["tokenizer"]["kind"] == "sentencepiece"
    assert small["tokenizer"]["size"] == tokenizer.vocab_size
    assert small["tokenizer"]["special"]["bos"] == {"id": 1, "piece": "<s>"}
    assert small["tokenizer"]["ends"] == [{"id": 2, "piece": "</s>"}]


def test_the_kv_cache_grows_with_the_context():
    config = open_checkpoint(small_folder()).config
    for ctx_size in (1, 100, 3000):
        memory = inspect("small", ctx_size)["memory"]
        assert memory["ctx_size"] == ctx_size
        assert memory["kv_cache"] == get_backend().cache_bytes(config, ctx_size)
        parts = ("weights", "kv_cache", "activations", "tokenizer")
        assert memory["total"] == sum(memory[part] for part in parts)


def test_every_format_shows_the_same_model(small, files):
    def shapes(model):
        return {tensor["name"]: tensor["shape"] for tensor in model["tensors"]}

    for path in files.values():
        shown = inspect(path)
        assert shown["n_params"] == small["n_params"] and shapes(shown) == shapes(small)
        for name in ("dim", "n_layers", "n_heads"):
            assert shown["config"][name] == small["config"][name]


def test_a_quantized_file_shows_its_types_and_sizes(files):
    shown = {tensor["name"]: tensor for tensor in inspect(files["q4_0"])["tensors"]}
    wq, norm = shown["layers.0.attention.wq.weight"], shown["norm.weight"]
    assert wq["type"] == "q4_0_2023" and wq["n_bytes"] == wq["shape"][0] * wq["shape"][1] * 20 // 32
    assert norm["type"] == "f32" and norm["n_bytes"] == 4 * norm["shape"][0]
    assert 5 < inspect(files["q4_0"])["bits_per_weight"] < 5.1


def test_every_part_of_a_model_in_parts_is_listed(files):
    shown = inspect(files["parts"])
    assert [file["path"] for file in shown["files"]] == [str(files["parts"]), f"{files['parts']}.1"]
    assert {tensor["n_parts"] for tensor in shown["tensors"] if len(tensor["shape"]) == 2} == {2}
    assert "part q4_0.bin.1" in report(shown)


def test_the_report_starts_with_a_summary_and_ends_with_totals(small):
    lines = report(small).splitlines()
    assert lines[0].startswith(f"{small_folder()}: meta, ")
    assert lines[-1].startswith(f"total: {len(small['tensors'])} tensors, {small['n_params']:,} weights")
    assert lines.index("hyper-parameters") < lines.index("tokenizer") < lines.index("tensors")


def test_layers_that_agree_share_a_line_and_others_do_not(small):
    assert "  layers.0-3.attention.wq.weight " in report(small)
    odd = [dict(tensor) for tensor in small["tensors"]]
    next(tensor for tensor in odd if tensor["name"] == MATRIX)["type"] = "q8_0"
    text = report(small | {"tensors": odd})
    assert "  layers.0,2-3.attention.wq.weight " in text and f"  {MATRIX} " in text


def test_a_name_in_a_file_cannot_steer_a_terminal(small):
    text = report(small | {"metadata": {"general.name": "a\x1b[2Jb\nc"}})
    assert text.splitlines()[0].endswith(r", a\x1b[2Jb\nc")


def test_all_of_it_is_json(small, files):
    for shown in (small, inspect(files["gguf"])):
        assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def test_all_of_a_gguf_file_from_elsewhere_is_json_too(smollm2_file):
    shown = inspect(smollm2_file)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown["n_params"] == 134_515_008
    assert shown["tokenizer"]["kind"] == "bpe" and shown["tokenizer"]["pre"] == "smollm"
    assert shown["metadata"]["general.architecture"] == "llama"


def test_a_tensor_that_only_some_models_have_is_shown_last(files, monkeypatch):
    checkpoint = open_checkpoint(files["gguf"])
    factors = Tensor.from_array("rope_freqs.weight", np.ones(16, np.float32))
    tensors = {factors.name: factors} | checkpoint.tensors
    monkeypatch.setattr(
        "tinyllama.commands.inspect.open_checkpoint", lambda _: replace(checkpoint, tensors=tensors)
    )
    assert [tensor["name"] for tensor in inspect("llama-3.1")["tensors"]][-1] == factors.name


def test_a_model_that_is_not_there_is_refused_by_name():
    with pytest.raises(TinyllamaError, match="nowhere"):
        inspect("nowhere")


# --- its weights ----------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """The small model with a NaN in a matrix and an infinity in a norm."""
    folder = shutil.copytree(small_folder(), tmp_path / "model")
    state = torch.load(folder / "consolidated.00.pth")
    state[MATRIX][7, 3], state[NORM][5] = np.nan, -np.inf
    torch.save(state, folder / "consolidated.00.pth")
    return folder


def test_check_names_the_tensors_that_hold_nan_or_infinity(run, damaged):
    status, out, err = run("--check", str(damaged))
    said = f"tinyllama: {damaged}: holds NaN or infinity: it is damaged, fetch it again\n"
    assert (status, err) == (1, said)
    wanted = [f"warning: {name} holds NaN or infinity" for name in (MATRIX, NORM)]
    assert out.splitlines()[-2:] == wanted
    assert inspect(damaged, check=True)["not_finite"] == [MATRIX, NORM]


def test_of_a_good_model_check_says_so(run):
    status, out, err = run("--check")
    assert (status, err) == (0, "") and out.endswith("\ncheck: no weight is NaN or infinite\n")


def test_nothing_is_checked_that_nobody_asks_for(run, damaged):
    assert inspect(damaged)["not_finite"] is None
    status, out, _ = run(str(damaged))
    assert status == 0 and "NaN" not in out


# --- tokens and backends --------------------------------------------------------------------------


def test_the_tokens_of_a_text_are_those_of_a_prompt():
    tokenizer = make_tokenizer(open_checkpoint(small_folder()).vocabulary)
    rows = tokens("small", "Once upon a </s>🦙")
    assert [row["id"] for row in rows] == tokenizer.encode("Once upon a </s>🦙", special=True)
    assert rows[0] == {"id": 1, "piece": "<s>", "text": "<s>"}
    assert {"id": 2, "piece": "</s>", "text": "</s>"} in rows
    assert rows[1]["piece"].startswith("▁") and rows[1]["text"].startswith(" ")


def test_the_token_table_has_a_line_a_token_and_shows_what_cannot_be_seen():
    rows = tokens("small", "a\n🦙")
    table = token_table(rows).splitlines()
    assert table[-1] == f"{len(rows)} tokens" and len(table) == len(rows) + 1
    assert any(r"'\n'" in line for line in table)
    assert any(r"'\xf0'" in line for line in table), "a byte of a character that the vocabulary lacks"


def test_backends_that_cannot_run_say_why():
    lines = backend_table({"c": "no compiler", "numpy": None}).splitlines()
    assert lines[0].split(maxsplit=1) == ["c", "can't run here: no compiler"]
    assert lines[1].split(maxsplit=1) == ["numpy", "can run here"]


def test_the_c_backend_tells_its_levels():
    _native = pytest.importorskip("tinyllama._native", reason="the C backend is not built")
    line = backend_table({"c": None})
    assert "can run here (" in line and ", ".join(_native.levels()) in line


# --- the command ----------------------------------------------------------------------------------


def test_the_small_model_is_shown_if_nobody_says(run):
    assert run() == run("small")
    assert run()[1].startswith(f"{small_folder()}: meta, ")


def test_as_json_there_is_every_tensor(run):
    shown = json.loads(run("--json", "-c", "100")[1])
    names = [tensor["name"] for tensor in shown["tensors"]]
    assert names == list(open_checkpoint(small_folder()).config.tensor_shapes())
    assert shown["memory"]["ctx_size"] == 100


def test_tokens_and_backends_are_shown_instead(run):
    rows = json.loads(run("--tokens", "Once upon", "--json")[1])
    assert [row["id"] for row in rows] == tinyllama.load("small", "numpy", 1).tokens("Once upon")
    assert run("--tokens", "Once upon")[1].endswith(f"{len(rows)} tokens\n")
    assert json.loads(run("--backends", "--json")[1])["numpy"] is None
