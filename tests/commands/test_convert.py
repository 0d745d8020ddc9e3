import copy
import hashlib
import itertools
import json
import os
import signal
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import families
import gguf as gguf_package
import historical
import mixed
import numpy as np
import pytest
import torch
import vocabularies

import tinyllama
from tinyllama import backends, ops
from tinyllama.commands.convert import convert, quantize
from tinyllama.config import Config, hidden_dim_of
from tinyllama.errors import TinyllamaError
from tinyllama.formats import gguf, meta, open_checkpoint

SMALL = Path(__file__).parents[2] / "data" / "small"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write(tmp_path / "tiny")


@pytest.fixture
def cut_folder(tmp_path):
    return checkpoints.write(tmp_path / "cut", checkpoints.cut(checkpoints.weights(), 2))


@pytest.fixture(params=["numpy", "c"])
def backend(request, monkeypatch):
    """Runs the test in NumPy and in C."""
    if reason := backends.available()[request.param]:
        pytest.skip(reason)
    monkeypatch.setenv("TINYLLAMA_BACKEND", request.param)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("format", "warned"), [("ggml", True), ("gguf", False)])
def test_a_norm_eps_that_the_format_does_not_hold_is_a_warning(folder, format, warned, recwarn):
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5}))
    convert(folder, format=format)
    messages = [str(warning.message) for warning in recwarn]
    assert any("can't hold norm_eps 1e-05, and 1e-06 will be taken" in text for text in messages) == warned


# --- byte for byte --------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("ftype", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_convert_writes_what_llama_cpp_wrote(tmp_path, ftype, dtype):
    folder = checkpoints.write(tmp_path / "tiny", [checkpoints.weights(dtype=dtype)])
    (path,) = convert(folder, ftype)
    assert path == folder / f"ggml-model-{'f16' if ftype else 'f32'}.bin"
    assert [path.read_bytes()] == historical.convert(folder, checkpoints.PARAMS, ftype)


def test_convert_writes_a_file_for_each_part(cut_folder):
    paths = convert(cut_folder)
    assert [path.name for path in paths] == ["ggml-model-f16.bin", "ggml-model-f16.bin.1"]
    assert [path.read_bytes() for path in paths] == historical.convert(cut_folder, checkpoints.PARAMS, 1)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("ftype", "type"), [(2, 2), (2, "q4_0"), (3, "3"), (3, "q4_1")])
@pytest.mark.parametrize("source_ftype", [0, 1])
def test_quantize_writes_what_llama_cpp_wrote(tmp_path, source_ftype, ftype, type):
    state = checkpoints.weights(dtype=torch.float16 if source_ftype else torch.float32)
    (source,) = convert(checkpoints.write(tmp_path / "tiny", [state]), source_ftype)
    (path,) = quantize(source, tmp_path / "quantized.bin", type)
    assert path.read_bytes() == historical.quantize(source.read_bytes(), ftype)


def test_the_first_part_means_all_parts(cut_folder):
    sources = convert(cut_folder)
    paths = quantize(sources[0], cut_folder / "q4_0.bin", "q4_0")
    assert [path.name for path in paths] == ["q4_0.bin", "q4_0.bin.1"]
    for source, path in zip(sources, paths, strict=True):
        assert path.read_bytes() == historical.quantize(source.read_bytes(), 2)


def test_a_later_part_means_that_part_alone(cut_folder):
    sources = convert(cut_folder)
    sources[0].unlink()
    (path,) = quantize(sources[1], cut_folder / "q4_0.bin.1", "q4_0")
    assert path.read_bytes() == historical.quantize(sources[1].read_bytes(), 2)


def test_the_shipped_model_converts_byte_for_byte(tmp_path):
    if not (SMALL / "consolidated.00.pth").exists():
        pytest.skip("data/small isn't there")
    (source,) = convert(SMALL, 1, tmp_path / "f16.bin")
    params = json.loads((SMALL / "params.json").read_text())
    assert source.read_bytes() == historical.convert(SMALL, params, 1)[0]


def test_the_real_vocabulary_converts_byte_for_byte(tmp_path, shared_data):
    config = Config(
        64, 1, 4, vocab_size=32000, hidden_dim=hidden_dim_of(64, 32), n_kv_heads=4, multiple_of=32
    )
    params = checkpoints.PARAMS | {"n_layers": 1}
    folder = checkpoints.write(tmp_path / "tiny", [checkpoints.weights(config)], params)
    (folder / "tokenizer.model").write_bytes((shared_data / "llama_tokenizer/tokenizer.model").read_bytes())
    (path,) = convert(folder)
    assert [path.read_bytes()] == historical.convert(folder, params, 1)


@pytest.mark.usefixtures("backend")
def test_portions_of_any_size_give_the_same_bytes(folder, monkeypatch):
    expected = historical.quantize(historical.convert(folder, checkpoints.PARAMS, 1)[0], 2)
    monkeypatch.setattr("tinyllama.commands.convert.PORTION", 5000)
    monkeypatch.setattr("tinyllama.commands.convert.CHUNK", 1000)
    (source,) = convert(folder)
    (path,) = quantize(source, folder / "q4_0.bin", 2)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("type", ["f16", "q4_0", "q4_1"])
def test_one_part_and_two_give_the_same_logits(folder, cut_folder, type):
    logits = []
    for source in (convert(folder)[0], convert(cut_folder)[0]):
        path = source if type == "f16" else quantize(source, source.with_name(f"{type}.bin"), type)[0]
        with tinyllama.load(path, backend="numpy") as llama:
            logits.append(llama.logits("the youngest was so beautiful"))
    assert np.array_equal(*logits)
    assert np.ptp(logits[0]) > 0.1


# --- GGUF -----------------------------------------------------------------------------------------


def gguf_tensors(path):
    return {tensor.name: tensor for tensor in gguf_package.GGUFReader(path).tensors}


GGUF_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
    "layers.1.attention_norm.weight": "blk.1.attn_norm.weight",
    "layers.1.attention.wq.weight": "blk.1.attn_q.weight",
    "layers.1.attention.wk.weight": "blk.1.attn_k.weight",
    "layers.1.attention.wv.weight": "blk.1.attn_v.weight",
    "layers.1.attention.wo.weight": "blk.1.attn_output.weight",
    "layers.1.ffn_norm.weight": "blk.1.ffn_norm.weight",
    "layers.1.feed_forward.w1.weight": "blk.1.ffn_gate.weight",
    "layers.1.feed_forward.w2.weight": "blk.1.ffn_down.weight",
    "layers.1.feed_forward.w3.weight": "blk.1.ffn_up.weight",
}


@pytest.mark.parametrize("n_parts", [1, 2])
def test_a_gguf_holds_every_tensor_whole(tmp_path, n_parts):
    state = checkpoints.weights()
    folder = checkpoints.write(tmp_path / "tiny", checkpoints.cut(state, n_parts))
    (path,) = convert(folder, format="gguf")
    assert path == folder / "ggml-model-f16.gguf"
    tensors = gguf_tensors(path)
    assert len(tensors) == len(checkpoints.CONFIG.tensor_shapes())
    for name, gguf_name in GGUF_NAMES.items():
        expected = state[name].numpy().astype(np.float32 if state[name].ndim == 1 else np.float16)
        assert tensors[gguf_name].data.dtype == expected.dtype
        assert np.array_equal(tensors[gguf_name].data, expected)


def test_parts_merge_into_the_file_that_the_whole_gives(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = checkpoints.write(tmp_path / "a" / "tiny")
    cut = checkpoints.write(tmp_path / "b" / "tiny", checkpoints.cut(checkpoints.weights(), 4))
    (one,), (other,) = convert(whole, format="gguf"), convert(cut, format="gguf")
    assert one.read_bytes() == other.read_bytes()


def test_a_gguf_carries_the_tokenizer_and_the_type(folder):
    (path,) = convert(folder, 0, format="gguf")
    checkpoint = gguf.read(path)
    assert checkpoint.metadata["general.file_type"] == 0
    assert checkpoint.metadata["general.architecture"] == "llama"
    assert len(checkpoint.vocabulary.pieces) == len(checkpoint.vocabulary.scores) == 400
    assert checkpoint.tensors["output.weight"].type == "f32"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_gguf_blocks_are_those_of_ggml(folder, type):
    (source,) = convert(folder, format="gguf")
    (path,) = quantize(source, folder / f"{type}.gguf", type, pure=True)
    kind = gguf_package.GGMLQuantizationType[type.upper()]
    before, after = gguf_tensors(source), gguf_tensors(path)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        data = before[name].data
        if data.ndim == 2:
            assert tensor.tensor_type == kind
            data = gguf_package.quants.quantize(data.astype(np.float32), kind)
        assert np.array_equal(tensor.data, data)


def test_quantizing_a_gguf_keeps_what_else_it_says(folder):
    (source,) = convert(folder, format="gguf")
    (path,) = quantize(source, folder / "q8_0.gguf", 7)
    before, after = gguf.read(source), gguf.read(path)
    assert after.metadata["general.file_type"] == 7
    assert after.metadata["general.quantization_version"] == 2
    changed = ("general.file_type", "general.quantization_version")
    assert {key: value for key, value in before.metadata.items() if key not in changed} == {
        key: value for key, value in after.metadata.items() if key not in changed
    }
    assert after.vocabulary == before.vocabulary


# --- any model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: a folder of transformers' of a family's model, in a type of torch's."""

    @cache
    def folder_of(name, dtype=torch.float32):
        folder = tmp_path_factory.mktemp("saved") / name
        model = (
            families.made(name) if dtype == torch.float32 else copy.deepcopy(families.made(name)).to(dtype)
        )
        model.save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model(byte_fallback=False))
        (folder / "chat_template.jinja").write_text("{{ messages }}<|im_start|>")
        return folder

    return folder_of


def same_numbers(before, after):
    """Whether two Configs agree, as far as float32 holds their numbers; RoPE is compared by itself."""
    pairs = zip(asdict(before).items(), asdict(after).values(), strict=True)
    skipped = ("rope_scaling", "multiple_of")
    return all(name in skipped or a == b or a == pytest.approx(b, rel=1e-6) for (name, a), b in pairs)


@pytest.mark.parametrize("name", families.VARIANTS)
def test_a_folder_of_hugging_faces_becomes_a_gguf_of_the_same_model(saved, tmp_path, name):
    (path,) = convert(saved(name), 0, tmp_path / "x.gguf")
    before, after = open_checkpoint(saved(name)), open_checkpoint(path)
    assert same_numbers(before.config, after.config)
    factors = after.tensors.pop("rope_freqs.weight", None)
    theirs = factors.dequantize() if factors else ops.rope_factors(after.config)
    rotations = [
        ops.rope_freqs(config, np.arange(5, 65), some)
        for config, some in ((before.config, ops.rope_factors(before.config)), (after.config, theirs))
    ]
    assert np.allclose(*rotations, atol=2e-5)
    assert before.tensors.keys() == after.tensors.keys()
    for tensor in before.tensors.values():
        assert np.array_equal(tensor.dequantize(), after.tensors[tensor.name].dequantize()), tensor.name
    assert after.vocabulary.pieces == before.vocabulary.pieces
    assert after.vocabulary.types == before.vocabulary.types
    assert after.template == before.template == "{{ messages }}<|im_start|>"


@pytest.mark.parametrize("name", sorted(families.VARIANTS.keys() - {"mistral", "llama-yarn-own-numbers"}))
def test_llama_cpp_computes_the_same_of_it(saved, tmp_path, name):
    """It knows no window of LLaMA's family, and no other numbers of yarn."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    (path,) = convert(saved(name), 0, tmp_path / "x.gguf")
    llama = llama_cpp.Llama(str(path), n_ctx=320, n_batch=320, logits_all=True, verbose=False)
    llama.eval(families.text())
    expected, found = families.logits_of(name), llama.scores[: families.N_PAST]
    assert np.abs(found - expected).max() < 0.1, "its keys and values are halves"
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.97


def test_keys_are_those_that_other_programs_look_for(saved, tmp_path):
    (path,) = convert(saved("llama3"), 1, tmp_path / "x.gguf")
    reader = gguf_package.GGUFReader(path)
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.architecture"] == "llama" and found["general.type"] == "model"
    assert found["general.name"] == "llama3" and found["general.file_type"] == 1
    assert found["llama.context_length"] == 512 and found["llama.rope.freq_base"] == 5e5
    assert found["llama.attention.head_count"] == 6 and found["llama.attention.head_count_kv"] == 2
    assert found["llama.rope.dimension_count"] == 16 and found["llama.vocab_size"] == families.VOCAB_SIZE
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.pre"] == "default"
    assert found["tokenizer.ggml.bos_token_id"] == 1 and found["tokenizer.ggml.eos_token_id"] == 2
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.scores"]) == families.VOCAB_SIZE
    assert found["tokenizer.chat_template"] == "{{ messages }}<|im_start|>"
    assert not any("rope.scaling" in name for name in found)
    assert "rope_freqs.weight" in gguf_tensors(path)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["llama2-grouped", "qwen2"])
def test_rows_in_another_order_are_cast_like_all_others(saved, tmp_path, name, monkeypatch):
    monkeypatch.setattr("tinyllama.commands.convert.CHUNK", 1000)  # a few rows: heads are cut through
    folder = saved(name, torch.bfloat16)
    (kept,), (halves,) = convert(folder, "bf16", tmp_path / "bf16"), convert(folder, outfile=tmp_path / "f16")
    before = open_checkpoint(folder).tensors
    assert (
        open_checkpoint(halves)
        .tensors["output.weight" if name == "llama2-grouped" else "tok_embeddings.weight"]
        .type
        == "f16"
    )
    for tensor in open_checkpoint(kept).tensors.values():
        assert tensor.type == ("bf16" if len(tensor.shape) == 2 else "f32")
        assert np.array_equal(tensor.dequantize(), before[tensor.name].dequantize())


def test_a_folder_is_quantized_in_one_step(saved, tmp_path):
    (whole,) = convert(saved("qwen3-tied"), 0, tmp_path / "f32.gguf")
    (one,), (two,) = (
        quantize(source, tmp_path / f"{number}.gguf", "Q5_0")
        for number, source in enumerate((saved("qwen3-tied"), whole))
    )
    assert [*gguf_tensors(one)] == [*gguf_tensors(two)]
    for name, tensor in gguf_tensors(one).items():
        assert np.array_equal(tensor.data, gguf_tensors(two)[name].data)


def test_a_split_gguf_becomes_one_file(tmp_path):
    whole = mixed.write(tmp_path / "whole.gguf", n_layers=2)
    mixed.write(tmp_path / "part.gguf", n_layers=2, split=9)
    first, *others = sorted(tmp_path.glob("part-*.gguf"))
    assert others
    (path,) = convert(first)
    assert path == tmp_path / "part-f16.gguf"
    assert not any(key.startswith("split.") for key in gguf.read(path).metadata)
    for name, tensor in gguf_tensors(whole).items():
        assert np.array_equal(tensor.data, gguf_tensors(path)[name].data)
    (once,), (again,) = (quantize(source, tmp_path / f"{source.stem}.q", "q4_0") for source in (whole, first))
    assert once.read_bytes() == again.read_bytes()


def test_blocks_of_a_gguf_stay_as_they_are_unless_a_type_is_named(folder, recwarn):
    (f16,) = convert(folder, format="gguf")
    (source,) = quantize(f16, folder / "q8_0.gguf", "q8_0")
    assert not recwarn
    (kept,), (plain,) = convert(source, None, folder / "kept"), convert(source, 1, folder / "plain")
    assert "quantized weights become f16" in str(recwarn.pop().message)
    assert gguf.read(kept).metadata["general.file_type"] == 7
    assert gguf.read(plain).metadata["general.file_type"] == 1
    before, theirs = gguf.read(source).tensors, gguf.read(plain).tensors
    for name, tensor in gguf_tensors(source).items():
        assert np.array_equal(tensor.data, gguf_tensors(kept)[name].data)
    for name, tensor in before.items():
        expected = tensor.dequantize().astype(np.float16 if len(tensor.shape) == 2 else np.float32)
        assert np.array_equal(theirs[name].dequantize(), expected)


def test_what_else_is_in_a_quantized_file_stays_too(tmp_path):
    source = mixed.write(tmp_path / "f16.gguf", n_layers=1)
    (path,) = quantize(source, tmp_path / "q4_0.gguf", "Q4_0", output_tensor_type="bf16")
    (kept,) = convert(path, outfile=tmp_path / "kept.gguf")
    assert open_checkpoint(kept).tensors["output.weight"].type == "bf16"
    for name, tensor in gguf_tensors(path).items():
        assert np.array_equal(tensor.data, gguf_tensors(kept)[name].data)


def test_what_the_format_of_2023_can_hold_gets_there_from_any_other(folder, recwarn):
    (ggml,), (path,) = convert(folder), convert(folder, format="gguf")
    (back,) = convert(path, 1, folder / "back.bin", format="ggml")
    assert not recwarn
    multiple_of = slice(12, 16)  # any that gives hidden_dim
    assert back.read_bytes()[16:] == ggml.read_bytes()[16:] and back.read_bytes()[multiple_of] == b"@\0\0\0"
    (today,) = convert(ggml)
    assert today == folder / "ggml-model-f16-f16.gguf"
    for name, tensor in gguf_tensors(path).items():
        assert np.array_equal(tensor.data, gguf_tensors(today)[name].data)


@pytest.mark.parametrize("name", ["qwen2", "llama3", "falcon3", "mistral", "llama-biases", "deepseek-coder"])
def test_what_the_format_of_2023_cannot_hold_is_refused(saved, tmp_path, name):
    refusal = checkpoints.refused(
        lambda: convert(saved(name), 1, tmp_path / "x", format="ggml"), "--format gguf"
    )
    assert str(saved(name)) in refusal
    assert not (tmp_path / "x").exists()


def test_of_a_name_it_must_be_said_where_to_write():
    checkpoints.refused(lambda: convert("small", format="gguf"), "small", "outfile")


# --- what they refuse -----------------------------------------------------------------------------


def test_a_part_that_the_checklist_calls_damaged_is_refused(cut_folder):
    sums = [hashlib.md5(meta_file.read_bytes()).hexdigest() for meta_file in meta.part_paths(cut_folder)]
    checklist = cut_folder / "checklist.chk"
    checklist.write_text(f"{sums[0]}  consolidated.00.pth\n{sums[1]}  consolidated.01.pth\n")
    assert len(convert(cut_folder)) == 2
    for path in cut_folder.glob("ggml*"):
        path.unlink()
    checklist.write_text(f"{sums[0]}  consolidated.00.pth\n{sums[0]}  consolidated.01.pth\n")
    before = names(cut_folder)
    checkpoints.refused(lambda: convert(cut_folder), str(cut_folder / "consolidated.01.pth"), "checklist.chk")
    assert names(cut_folder) == before


def test_a_full_disk_is_refused_with_the_figures(folder, monkeypatch):
    monkeypatch.setattr(
        "tinyllama.machine.limits.shutil.disk_usage", lambda path: SimpleNamespace(free=100_000)
    )
    checkpoints.refused(lambda: convert(folder), "ggml-model-f16.bin", "320 kB", "100 kB")
    assert not list(folder.glob("ggml*"))


def test_nothing_replaces_what_it_is_made_from(cut_folder):
    for name in ("consolidated.01.pth", "params.json", "tokenizer.model"):
        checkpoints.refused(lambda name=name: convert(cut_folder, 1, cut_folder / name), name)
    (first, second) = convert(cut_folder)
    before = first.read_bytes(), second.read_bytes()
    checkpoints.refused(lambda: quantize(first, first, 2), str(first))
    link = cut_folder / "link.bin"
    link.symlink_to(first)
    checkpoints.refused(lambda: quantize(first, link, 2), str(link))
    assert (first.read_bytes(), second.read_bytes()) == before


def test_a_target_that_is_no_file_is_refused(folder, tmp_path):
    checkpoints.refused(lambda: convert(folder, outfile=tmp_path), str(tmp_path))
    checkpoints.refused(lambda: convert(folder, outfile=tmp_path / "no" / "x.bin"), str(tmp_path / "no"))


@pytest.mark.parametrize("arguments", [{"ftype": 2}, {"ftype": "q4_0"}, {"format": "onnx"}])
def test_convert_names_the_types_it_knows(folder, arguments):
    checkpoints.refused(lambda: convert(folder, **arguments), "0 (f32) or 1 (f16)")


@pytest.mark.parametrize("type", ["q3_0", 99, "", "q4_0_2023"])
def test_quantize_names_the_types_it_knows(folder, type):
    (source,) = convert(folder)
    checkpoints.refused(lambda: quantize(source, folder / "x.bin", type), "Q4_0", "Q4_K_M")


def test_a_ggml_file_has_two_quantized_types_only(folder):
    (source,) = convert(folder)
    for type in ("q8_0", "Q4_K_M", "f16"):
        checkpoints.refused(
            lambda type=type: quantize(source, folder / "x.bin", type), str(source), "Q4_0 or Q4_1"
        )


@pytest.mark.parametrize("format", ["ggml", "gguf"])
def test_what_is_quantized_already_is_refused(folder, format):
    (source,) = convert(folder, format=format)
    (path,) = quantize(source, folder / "q4_0", "q4_0")
    checkpoints.refused(lambda: quantize(path, folder / "again", "q4_1"), str(path), "quantized already")


def test_rows_that_dont_divide_into_blocks_have_no_place_in_a_ggml_file(tmp_path):
    config = Config(48, 1, 4, vocab_size=400, hidden_dim=hidden_dim_of(48, 32), n_kv_heads=4, multiple_of=32)
    params = checkpoints.PARAMS | {"dim": 48, "n_layers": 1}
    folder = checkpoints.write(tmp_path / "odd", [checkpoints.weights(config)], params)
    (source,) = convert(folder)
    checkpoints.refused(lambda: quantize(source, folder / "q4_0", 2), str(source), "48 weights", "GGUF")


def test_a_gqa_checkpoint_becomes_a_gguf_only(tmp_path):
    config = Config(64, 1, 4, vocab_size=400, hidden_dim=192, n_kv_heads=2, multiple_of=32)
    params = checkpoints.PARAMS | {"n_kv_heads": 2, "n_layers": 1}
    folder = checkpoints.write(tmp_path / "gqa", [checkpoints.weights(config)], params)
    checkpoints.refused(lambda: convert(folder), str(folder), "--format gguf")
    (path,) = convert(folder, format="gguf")
    assert gguf.read(path).config.n_kv_heads == 2


@pytest.mark.parametrize("extra", [{"rope_theta": 500000.0}, {"ffn_dim_multiplier": 1.3}])
def test_what_ggml_has_no_field_for_is_refused(tmp_path, extra):
    params = checkpoints.PARAMS | extra
    config = meta.config_of(params, 400)
    folder = checkpoints.write(tmp_path / "llama2", [checkpoints.weights(config)], params)
    checkpoints.refused(lambda: convert(folder), str(folder), "--format gguf")


def test_a_tokenizer_of_another_model_is_refused(folder, shared_data):
    (folder / "tokenizer.model").write_bytes((shared_data / "llama_tokenizer/tokenizer.model").read_bytes())
    for format in ("ggml", "gguf"):
        checkpoints.refused(
            lambda format=format: convert(folder, format=format), "tokenizer.model", "32000", "400"
        )


@pytest.mark.parametrize("format", ["ggml", "gguf"])
def test_a_tokenizer_that_is_none_is_refused(folder, format):
    (folder / "tokenizer.model").write_text("<html>not found</html>")
    checkpoints.refused(lambda: convert(folder, format=format), str(folder / "tokenizer.model"))


@pytest.mark.usefixtures("backend")
def test_weights_too_large_for_f16_are_refused_by_name(tmp_path):
    state = checkpoints.weights(dtype=torch.float32)
    state["output.weight"][7, 7] = 1e6
    folder = checkpoints.write(tmp_path / "large", [state])
    checkpoints.refused(lambda: convert(folder), "consolidated.00.pth", "output.weight")
    assert len(convert(folder, 0)) == 1


def test_a_source_of_no_known_format_is_refused(tmp_path):
    for content in (b"", b"<html></html>", b"GGUF", b"lmgg", bytes(100)):
        path = tmp_path / "model.bin"
        path.write_bytes(content)
        checkpoints.refused(lambda path=path: quantize(path, tmp_path / "x.bin", 2), str(path))
    checkpoints.refused(lambda: quantize(tmp_path / "none.bin", tmp_path / "x.bin", 2), "none.bin")


# --- what is left behind --------------------------------------------------------------------------


class Fault:
    """os.pwrite, but it fails in the middle of the work."""

    def __init__(self, fail):
        self.calls, self.fail, self.pwrite = itertools.count(1), fail, os.pwrite

    def __call__(self, *arguments):
        if next(self.calls) == 40:  # one step, so that two threads never count the same call
            self.fail()
        return self.pwrite(*arguments)


def raise_(error):
    raise error


FAULTS = {
    "disk full": (lambda: raise_(OSError(28, "No space left on device")), TinyllamaError),
    "a bug": (lambda: raise_(RuntimeError("bug")), RuntimeError),
    "Ctrl-C": (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
}


@pytest.mark.parametrize(("fail", "error"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_a_failure_leaves_good_files_alone_and_nothing_else_behind(
    cut_folder, monkeypatch, verb, fail, error
):
    sources = convert(cut_folder)
    run = {
        "convert": lambda: convert(cut_folder, 1),
        "quantize": lambda: quantize(sources[0], cut_folder / "q4_0.bin", 2),
    }[verb]
    good = {path: path.read_bytes() for path in run()}
    before = names(cut_folder)
    monkeypatch.setattr(os, "pwrite", Fault(fail))
    with pytest.raises(error) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert names(cut_folder) == before
    assert {path: path.read_bytes() for path in good} == good


def test_at_an_interrupt_portions_that_were_begun_end_with_the_chunk(folder, monkeypatch):
    writes, pwrite = itertools.count(1), os.pwrite

    def interrupted(*arguments):
        if (
            next(writes) == 50
        ):  # of the weights; as Ctrl-C, to the process: raise_signal would tell this thread alone
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # as long as a busy disk lets one wait, at least
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", interrupted)
    monkeypatch.setattr("tinyllama.commands.convert.CHUNK", 1)  # a row
    with pytest.raises(KeyboardInterrupt):
        convert(folder)
    assert next(writes) < 100  # of 3,000 rows


def test_a_source_that_shrinks_meanwhile_is_refused(folder, monkeypatch):
    def shrink():
        os.truncate(folder / "consolidated.00.pth", 1000)

    monkeypatch.setattr(os, "pwrite", Fault(shrink))
    checkpoints.refused(lambda: convert(folder), str(folder / "consolidated.00.pth"))
    assert not list(folder.glob("*.tmp"))


def test_files_appear_together_when_all_are_whole(cut_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "pwrite", Fault(lambda: seen.append(names(cut_folder))))
    convert(cut_folder)
    assert len([name for name in seen[0] if name.endswith(".tmp")]) == 2
    assert not seen[0] & {"ggml-model-f16.bin", "ggml-model-f16.bin.1"}
    assert not list(cut_folder.glob("*.tmp"))


def test_it_says_beforehand_what_it_needs(folder, capsys):
    (source,) = convert(folder)
    quantize(source, folder / "q4_0.bin", 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "writes" in line]
    assert ["ggml-model-f16.bin" in lines[0], "q4_0.bin" in lines[1]] == [True, True]
    assert all("memory" in line and " s " in line for line in lines)


def test_a_new_file_has_the_usual_permissions(folder):
    (path,) = convert(folder)
    (folder / "usual").touch()
    assert path.stat().st_mode == (folder / "usual").stat().st_mode


def test_a_device_is_not_replaced_by_a_file(folder):
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    checkpoints.refused(lambda: convert(folder, outfile=pipe), str(pipe), "a pipe or a device")
    assert pipe.is_fifo()


def test_a_symbolic_link_stays_one_and_its_file_is_written(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    link = folder / "ggml-model-f16.bin"
    link.symlink_to(disk / "f16.bin")
    convert(folder)
    assert link.is_symlink() and names(disk) == {"f16.bin"}
    whole = convert(folder, outfile=folder / "whole.bin")[0]
    assert link.read_bytes() == whole.read_bytes()
