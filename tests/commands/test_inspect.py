"""What `inspect` says of a model, against the model's own figures."""

import json
import shutil

import pytest

from tinyllama.backends import available
from tinyllama.commands.convert import convert, quantize
from tinyllama.machine.download import small_folder
from tinyllama.errors import TinyllamaError
from tinyllama.formats import meta, open_checkpoint
from tinyllama.commands.inspect import _ranges, backend_table, inspect, report, token_table, tokens
from tinyllama.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def small():
    return inspect("small")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The small model as a ggml file of one part, a GGUF file, and 4-bit files of one and two parts."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        shutil.copy(small_folder() / name, folder)
    meta.split(folder, folder / "parts", 2)
    (ggml,), (gguf,) = convert(folder), convert(folder, format="gguf")
    in_parts = quantize(convert(folder / "parts")[0], folder / "parts" / "q4_0.bin", "q4_0")
    (q4_0,) = quantize(ggml, folder / "q4_0.bin", "q4_0")
    return {"ggml": ggml, "gguf": gguf, "q4_0": q4_0, "parts": in_parts[0]}


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
        width = 2 if available()["c"] is None else 4  # the C backend keeps it in half precision
        assert memory["kv_cache"] == width * 2 * config.n_layers * config.kv_dim * ctx_size
        parts = ("weights", "kv_cache", "activations", "tokenizer")
        assert memory["total"] == sum(memory[part] for part in parts)


def test_every_format_shows_the_same_model(small, files):
    for path in files.values():
        shown = inspect(path)
        assert shown["n_params"] == small["n_params"]
        assert {t["name"]: t["shape"] for t in shown["tensors"]} == {
            t["name"]: t["shape"] for t in small["tensors"]
        }
        assert {key: shown["config"][key] for key in ("dim", "n_layers", "n_heads")} == {
            key: small["config"][key] for key in ("dim", "n_layers", "n_heads")
        }


def test_a_quantized_file_shows_its_types_and_sizes(files):
    shown = {tensor["name"]: tensor for tensor in inspect(files["q4_0"])["tensors"]}
    wq, norm = shown["layers.0.attention.wq.weight"], shown["norm.weight"]
    assert wq["type"] == "q4_0_2023" and wq["n_bytes"] == wq["shape"][0] * wq["shape"][1] * 20 // 32
    assert norm["type"] == "f32" and norm["n_bytes"] == 4 * norm["shape"][0]
    assert 5 < inspect(files["q4_0"])["bits_per_weight"] < 5.1


def test_every_part_of_a_model_in_parts_is_listed(files, small):
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
    n_layers = small["config"]["n_layers"]
    assert f"  layers.0-{n_layers - 1}.attention.wq.weight " in report(small)
    odd = [dict(tensor) for tensor in small["tensors"]]
    next(t for t in odd if t["name"] == "layers.1.attention.wq.weight")["type"] = "q8_0"
    text = report(small | {"tensors": odd})
    assert f"  layers.0,2-{n_layers - 1}.attention.wq.weight " in text or n_layers == 3
    assert "  layers.1.attention.wq.weight " in text


def test_runs_of_numbers_are_written_as_ranges():
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert _ranges([4]) == "4"


def test_all_of_it_is_json(small, files):
    for shown in (small, inspect(files["gguf"])):
        assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def test_all_of_a_gguf_file_from_elsewhere_is_json_too(smollm2_file):
    shown = inspect(smollm2_file)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown["n_params"] == 134_515_008
    assert shown["tokenizer"]["kind"] == "bpe" and shown["tokenizer"]["pre"] == "smollm"
    assert shown["metadata"]["general.architecture"] == "llama"


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


def test_a_model_that_is_not_there_is_refused_by_name():
    with pytest.raises(TinyllamaError, match="nowhere"):
        inspect("nowhere")
