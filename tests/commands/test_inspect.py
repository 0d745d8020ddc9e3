"""What `inspect` says of a model, against the model's own figures."""

import json
import re
import shutil
from dataclasses import replace

import checkpoints
import families
import mixed
import numpy as np
import pytest
import torch
import vocabularies

import tinyllama
from tinyllama.backends import get_backend
from tinyllama.commands import main
from tinyllama.commands.convert import convert, quantize
from tinyllama.commands.inspect import (
    backend_table,
    backends,
    in_8_bits,
    inspect,
    report,
    template_name,
    token_table,
    tokens,
)
from tinyllama.errors import TinyllamaError
from tinyllama.formats import open_checkpoint
from tinyllama.machine.download import small_folder
from tinyllama.machine.limits import UNKNOWN
from tinyllama.quant import TYPES
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


def test_types_that_mlx_has_no_exact_form_for_are_shown_with_the_error_of_8_bits(tmp_path, files):
    (path,) = quantize(small_folder(), tmp_path / "mixed.gguf", "Q2_K")
    shown = inspect(path)
    assert shown["mlx"].keys() == shown["types"].keys() & {"q2_k", "q3_k", "q6_k"}
    assert all(how["bits"] == 8 and 0.002 < how["error"] < 0.006 for how in shown["mlx"].values())
    assert f"q6_k (error {shown['mlx']['q6_k']['error']:.2%})" in report(shown)
    exact = inspect(files["q4_0"])
    assert exact["mlx"] == {} and "on MLX" not in report(exact)


def test_weights_without_a_size_have_no_error_in_8_bits(monkeypatch):
    checkpoint = open_checkpoint("small")
    blocks = np.zeros((2, 1), TYPES["q6_k"].dtype)
    tensor = Tensor.from_blocks("layers.0.attention.wq.weight", (2, 256), "q6_k", blocks)
    tensors = checkpoint.tensors | {tensor.name: tensor}
    monkeypatch.setattr(
        "tinyllama.commands.inspect.open_checkpoint", lambda _: replace(checkpoint, tensors=tensors)
    )
    shown = inspect("zeros")
    assert shown["mlx"] == {"q6_k": {"bits": 8, "error": None}}
    assert "as 8 bits: q6_k; others exact" in report(shown)


def test_8_bits_are_mlx_s_to_the_bit():
    mx = pytest.importorskip("mlx.core")
    weights = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)
    weights[:20], weights[20:40] = np.abs(weights[:20]), -np.abs(weights[:20])
    weights[40], weights[41], weights[42, 1:], weights[43] = 0, 3.5, 0, 1e-9
    with mx.stream(mx.cpu):
        theirs = mx.dequantize(*mx.quantize(mx.array(weights), 32, 8), 32, 8)
    assert np.array_equal(in_8_bits(weights), np.array(theirs))


def test_the_types_that_mlx_says_exactly_are_those_with_a_scale_for_32_weights():
    mlx = pytest.importorskip("tinyllama.backends.mlx", exc_type=ImportError)
    assert mlx.BITS.keys() == {name for name, kind in TYPES.items() if kind.block > 1 and kind.part == 32}


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


# --- in words -------------------------------------------------------------------------------------

WORDS = {
    "llama2-grouped": ["LLaMA", "theta 10000", "none: a token attends to all before it"],
    "llama3": ["LLaMA", "theta 500000, scaled as in Llama 3.1 (factor 8, trained on 64 tokens)"],
    "deepseek-coder": ["theta 100000, positions are divided (factor 4)"],
    "llama-yarn": ["theta 10000, scaled by yarn (factor 4, trained on 64 tokens)", "256 tokens"],
    "mistral": ["LLaMA (as the first Mistral 7B)", "a token attends to 37 tokens"],
    "llama-biases": ["LLaMA, biases of q, k and v, and of wo"],
    "qwen2": ["Qwen2, biases of q, k and v"],
    "qwen3": ["Qwen3, norms of q and k"],
}


@pytest.mark.parametrize("name", WORDS)
def test_it_says_in_words_what_kind_of_model_it_is(tmp_path, name):
    families.made(name).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model(byte_fallback=False))
    (path,) = convert(tmp_path, 1)
    for model in (tmp_path, path):
        shown, text = inspect(model), report(inspect(model))
        for words in WORDS[name] if model is tmp_path or name != "llama3" else WORDS[name][:1]:
            assert words in text, (model, words)
        assert json.loads(json.dumps(shown, allow_nan=False)) == shown
        assert shown["family"] == families.made(name).config.model_type.replace("mistral", "llama")
        assert shown["rope"]["theta"] == families.made(name).config.rope_parameters["rope_theta"]
        assert shown["window"] == (37 if name == "mistral" else None)
        assert shown["template"] == {"name": None, "text": None}
    if name == "llama3":
        assert shown["rope"]["largest_divisor"] == 8
        assert "scaled as in Llama 3.1 (by up to 8: rope_freqs.weight)" in text


def test_types_are_summed_up_and_a_mix_is_named(tmp_path):
    (path,) = quantize(mixed.write(tmp_path / "f16.gguf"), tmp_path / "q4_k_m.gguf", "Q4_K_M")
    shown, text = inspect(path), report(inspect(path))
    assert shown["mix"] == "Q4_K_M" and inspect(tmp_path / "f16.gguf")["mix"] == "F16"
    assert sum(of["n_tensors"] for of in shown["types"].values()) == len(shown["tensors"])
    assert sum(of["n_bytes"] for of in shown["types"].values()) == shown["n_bytes"]
    assert f"Q4_K_M, {shown['bits_per_weight']:.2f} bits each" in text
    assert re.search(r"q6_k +5 tensors .*attention\.wv \(layers 2-3\).*output", text)


@pytest.mark.parametrize(
    "template, name",
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}", "chatml"),
        ("<|start_header_id|>{{ m.role }}<|end_header_id|>", "llama3"),
        ("[INST] <<SYS>>", "llama2"),
        ("[INST] {{ m.content }} [/INST]", "mistral"),
        ("USER: {{ m.content }} ASSISTANT:", "vicuna"),
        ("<|user|> <|assistant|>", "zephyr"),
        ("Q: {{ m.content }} A:", None),
        ("", None),
    ],
)
def test_templates_are_known_by_what_they_write(template, name):
    assert template_name(template) == name


def test_a_template_is_named_or_one_of_its_own(smollm2_file):
    shown = inspect(smollm2_file)
    assert shown["template"]["name"] == "chatml" and "im_start" in shown["template"]["text"]
    assert "template  chatml" in report(shown) and "LLaMA (as SmolLM)" in report(shown)
    assert "template  one of its own" in report(
        shown | {"template": {"name": None, "text": "{{ messages }}"}}
    )


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
    assert rows[0] == {"id": 1, "piece": "<s>", "text": "<s>", "completes": ""}
    assert {"id": 2, "piece": "</s>", "text": "</s>", "completes": ""} in rows
    assert rows[1]["piece"].startswith("▁") and rows[1]["text"].startswith(" ")


def test_the_token_table_has_a_line_a_token_and_shows_what_cannot_be_seen():
    rows = tokens("small", "a\n🦙")
    table = token_table(rows).splitlines()
    assert table[-1] == f"{len(rows)} tokens" and len(table) == len(rows) + 1
    assert any(r"'\n'" in line for line in table)
    assert any(r"'\xf0'" in line for line in table), "a byte of a character that the vocabulary lacks"


def test_backends_that_cannot_run_say_why():
    able = {"obstacle": None, "title": "backend numpy, 2 threads", "free_memory": 3_000_000_000}
    lines = backend_table({"c": {"obstacle": "no compiler"}, "numpy": able}).splitlines()
    assert lines[0].split(maxsplit=1) == ["c", "can't run here: no compiler"]
    assert lines[1].split(maxsplit=1) == ["numpy", "can run here, 2 threads      3.0 GB free"]


def test_the_c_backend_tells_its_levels():
    _native = pytest.importorskip("tinyllama._native", reason="the C backend is not built")
    line = backend_table({"c": backends()["c"]})
    assert "can run here, " in line and f" ({', '.join(_native.levels())}" in line


def test_mlx_tells_its_device_and_how_much_memory_that_has(monkeypatch):
    mlx = pytest.importorskip("tinyllama.backends.mlx", exc_type=ImportError)
    monkeypatch.setattr(mlx.Mlx, "free_memory", lambda _: 5_000_000_000)
    found = backends()["mlx"]
    assert found == {"obstacle": None, "title": mlx.Mlx(1).title, "free_memory": 5_000_000_000}
    line = backend_table({"mlx": found})
    assert mlx.mx.device_info()["device_name"] in line and line.endswith(" 5.0 GB free")


def test_where_the_system_does_not_say_what_memory_is_free_nothing_is_said(monkeypatch):
    monkeypatch.setattr("tinyllama.backends.numpy.available_memory", lambda: UNKNOWN)
    found = {"numpy": backends()["numpy"]}
    assert found["numpy"]["free_memory"] is None
    assert "free" not in backend_table(found)


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
    assert json.loads(run("--backends", "--json")[1])["numpy"]["obstacle"] is None
