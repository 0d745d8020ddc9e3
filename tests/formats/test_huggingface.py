"""Folders of Hugging Face: what transformers saves is read as it computes it, or is refused in one line."""

import json
import shutil
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import vocabularies
from checkpoints import refused
from safetensors.torch import load_file, save_file

from tinyllama import load
from tinyllama.backends import available, get_backend
from tinyllama.config import RopeScaling
from tinyllama.formats import huggingface, open_checkpoint, stamp

LOGITS = 1e-3  # largest difference of float32 sums in another order, over 300 tokens
BACKENDS = [name for name, reason in available().items() if not reason]


def save(name: str, folder: Path, **options) -> Path:
    families.made(name).save_pretrained(folder, **options)
    (folder / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model(byte_fallback=False))
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function: the folder of a family, saved once."""
    folders = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp("saved") / name)
        return folders[name]

    return folder_of


@pytest.fixture
def folder(tmp_path, saved):
    """A copy of a small model's folder, to be changed."""
    return Path(shutil.copytree(saved("llama2-grouped"), tmp_path / "model"))


def change(folder: Path, name: str = "config.json", **values) -> Path:
    """Other values in a JSON file; ... takes a key out."""
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (old | values).items() if value is not ...}))
    return folder


def change_weights(folder: Path, edit) -> None:
    """Replace the tensors, {name: tensor}, by what `edit` returns."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in edit(load_file(path)).items()}, path)


def config_of(folder: Path, **values):
    return huggingface.read(change(folder, **values)).config


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.VARIANTS)
def test_every_family_is_read_as_transformers_saves_it(saved, name):
    theirs, checkpoint = families.made(name), huggingface.read(saved(name))
    assert checkpoint.config == families.config_of(theirs)
    expected = families.tensors_of(theirs)
    assert checkpoint.tensors.keys() == expected.keys()
    for key, tensor in checkpoint.tensors.items():
        assert np.array_equal(tensor.dequantize(), expected[key].dequantize()), key
        assert np.array_equal(tensor.dequantize(3, 7), expected[key].dequantize(3, 7)), key


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_transformers(saved, name, backend):
    expected = families.logits_of(name)
    got = load(saved(name), backend=backend).logits(families.text())
    if backend in ("numpy", "numexpr"):
        np.testing.assert_allclose(got, expected, rtol=0, atol=LOGITS)
    else:
        families.assert_close_in_c(got, expected, get_backend(backend, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_the_width_are_read(folder, dtype):
    change_weights(folder, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    state, tensors = load_file(folder / "model.safetensors"), huggingface.read(folder).tensors
    for theirs, ours in {
        "lm_head": "output",
        "model.layers.1.mlp.up_proj": "layers.1.feed_forward.w3",
    }.items():
        expected = state[f"{theirs}.weight"].float().numpy()
        assert np.array_equal(tensors[f"{ours}.weight"].dequantize(), expected)


def test_weights_are_mapped_and_not_copied(saved):
    checkpoint = huggingface.read(saved("qwen2"))
    assert {piece.data for tensor in checkpoint.tensors.values() for piece in tensor.pieces} == {
        *checkpoint.files
    }


def test_weights_in_several_files_are_the_same_model(saved, tmp_path):
    whole = huggingface.read(saved("qwen3"))
    parts = huggingface.read(save("qwen3", tmp_path, max_shard_size="100KB"))
    assert len(parts.files) > 3 and parts.config == whole.config
    for name, tensor in whole.tensors.items():
        assert np.array_equal(parts.tensors[name].dequantize(), tensor.dequantize())


@pytest.mark.parametrize("cut", [False, True])
def test_weights_saved_by_torch_are_the_same_model(folder, cut):
    whole, state = huggingface.read(folder).tensors, load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if cut:
        places = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(state)}
        for file in set(places.values()):
            torch.save({name: state[name].clone() for name in state if places[name] == file}, folder / file)
        change(folder, "pytorch_model.bin.index.json", weight_map=places)
    else:
        torch.save(state, folder / "pytorch_model.bin")
    for name, tensor in huggingface.read(folder).tensors.items():
        assert np.array_equal(tensor.dequantize(), whole[name].dequantize())


def test_a_folder_opens_by_its_path_or_one_of_its_files(folder):
    for path in (folder, folder / "config.json", folder / "model.safetensors"):
        assert open_checkpoint(path).format == "huggingface"


def test_names_may_lack_the_first_word_and_frequencies_are_ignored(folder):
    expected = huggingface.read(folder).tensors
    change_weights(
        folder,
        lambda state: (
            {name.removeprefix("model."): tensor for name, tensor in state.items()}
            | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        ),
    )
    found = huggingface.read(folder).tensors
    assert found.keys() == expected.keys()


def test_the_output_matrix_may_be_the_embedding(folder):
    change_weights(folder, lambda state: {name: state[name] for name in state if name != "lm_head.weight"})
    refused(lambda: huggingface.read(folder), "model.safetensors: 1 tensors are missing, lm_head.weight")
    change(folder, tie_word_embeddings=True)
    assert "output.weight" not in huggingface.read(folder).tensors


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_the_stamp_changes_with_every_file_that_is_read(folder, name):
    before = stamp(folder)
    assert stamp(folder) == before
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert stamp(folder) != before


def test_the_stamp_changes_with_a_template_that_comes(folder):
    before = stamp(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert stamp(folder) != before


# --- config.json ----------------------------------------------------------------------------------


def test_what_isnt_said_is_as_transformers_has_it(folder):
    without = {"head_dim": None, "rope_parameters": ..., "tie_word_embeddings": ..., "rms_norm_eps": ...}
    config = config_of(folder, **without, hidden_act=..., a_key_that_nobody_knows={"a": [1]})
    assert (config.head_dim, config.rope_theta, config.norm_eps) == (16, 10000.0, 1e-6)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("values", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, RopeScaling("linear", 4.0)),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, 1e4, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, RopeScaling("llama3", 8.0, 64)),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, RopeScaling("llama3", 8.0, 64)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
            1e4,
            RopeScaling("yarn", 4.0, 128),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.5, "beta_fast": 16}},
            1e4,
            RopeScaling("yarn", 4.0, 512, beta_fast=16.0, attn_factor=1.5),
        ),
    ],
)
def test_rope_is_read_from_either_version_of_transformers(folder, values, theta, scaling):
    config = config_of(folder, **({"rope_parameters": ...} | values))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_yarn_may_have_two_scales(folder):
    rope = {"type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0}
    found = config_of(folder, rope_parameters=..., rope_scaling=rope).rope_scaling.attn_factor
    assert found == pytest.approx((0.0707 * np.log(40) + 1) / (0.1 * np.log(40) + 1))


WINDOW = {"sliding_window": 64, "use_sliding_window": True}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "mistral", "sliding_window": 512}, 0),  # as long as the context
        ({"model_type": "llama", "sliding_window": 64}, 0),
        ({"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": False}, 0),
        ({"model_type": "qwen3", "max_window_layers": 0} | WINDOW, 64),
        ({"model_type": "qwen3", "max_window_layers": 2} | WINDOW, 0),
        ({"model_type": "qwen3", "layer_types": [FULL] * 2} | WINDOW, 0),
        ({"model_type": "qwen3", "layer_types": [SLIDING] * 2} | WINDOW, 64),
        ({"model_type": "qwen3", "layer_types": 5, "max_window_layers": -1} | WINDOW, 64),
    ],
)
def test_windows_are_read_as_transformers_uses_them(folder, values, window):
    norms = {
        f"model.layers.{i}.self_attn.{name}_norm.weight": torch.ones(16) for i in (0, 1) for name in "qk"
    }
    if values["model_type"] == "qwen3":
        change_weights(folder, lambda state: state | norms)
    assert config_of(folder, **values).sliding_window == window


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": ...}, "None"),
        ({"model_type": ["llama"]}, "llama"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized by fp8"),
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "by bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "its weights are quantized by"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of the kind dynamic isn't supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE of the kind longrope isn't supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "yarn without truncate"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor must be a number, not 'x'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "must be a positive number"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": -1}},
            "must be a positive number",
        ),
        ({"rope_scaling": [1]}, "RoPE's numbers"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "RoPE's numbers differ from layer to layer"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "96"}, "hidden_size must be a whole number, not '96'"),
        ({"num_hidden_layers": 0}, "n_layers must be a positive number"),
        ({"num_hidden_layers": 10**9}, "n_layers is 1000000000"),
        ({"num_attention_heads": 7}, "7 heads can't share 2"),
        ({"rms_norm_eps": 1e400}, "rms_norm_eps must be a number"),
        (
            {"model_type": "mistral", "layer_types": [FULL, SLIDING], "sliding_window": 9},
            "for some layers alone",
        ),
    ],
)
def test_what_isnt_supported_or_true_is_refused_by_its_name(folder, values, words):
    change(folder, **values)
    refused(lambda: huggingface.read(folder), f"{folder / 'config.json'}: ", words)


@pytest.mark.parametrize("text", ["", "[]", "{" * 100_000, "nonsense"])
def test_a_config_that_isnt_json_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refused(lambda: huggingface.read(folder), f"{folder / 'config.json'}: ")


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda state: state | {"score.weight": torch.ones(2, 96)}, "the tensor model.score.weight is none"),
        (
            lambda state: state | {"model.norm.weight": torch.ones(97)},
            "model.norm.weight has the shape [97], not",
        ),
        (
            lambda state: {"lm_head.weight": torch.ones(2, 2)},
            "tensors are missing, model.embed_tokens.weight",
        ),
        (
            lambda state: state | {"model.layers.1.self_attn.q_proj.bias": torch.ones(96)},
            "the tensor model.layers.1.self_attn.q_proj.bias is none",
        ),
        (
            lambda state: state | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)},
            "the tensor model.layers.0.self_attn.q_norm.weight is none",
        ),
        (
            lambda state: state | {"model.layers.0.self_attn.q_proj.weight": torch.ones(95, 96)},
            "q_proj.weight has the shape [95, 96], not [96, 96]",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(folder, edit, words):
    change_weights(folder, edit)
    refused(lambda: huggingface.read(folder), f"{folder / 'model.safetensors'}: ", words)


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: open_checkpoint(folder), f"{folder / 'model.safetensors'}: is missing")


# --- around it ------------------------------------------------------------------------------------


def test_the_template_comes_from_its_file_or_from_the_settings(folder):
    assert huggingface.find_template(folder) == ""
    change(folder, "tokenizer_config.json", chat_template="one")
    assert huggingface.find_template(folder) == "one"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "several"}]
    change(folder, "tokenizer_config.json", chat_template=several)
    assert huggingface.find_template(folder) == "several"
    (folder / "chat_template.jinja").write_text("first: {{ messages }}\n")
    assert huggingface.read(folder).template == "first: {{ messages }}\n"


def test_a_folder_with_both_layouts_is_hugging_faces_if_its_weights_are_there(folder):
    (folder / "params.json").write_text("{}")
    (folder / "consolidated.safetensors").touch()
    assert huggingface.recognizes(folder)
    (folder / "model.safetensors").unlink()
    assert not huggingface.recognizes(folder)


def test_a_link_to_a_folder_and_links_in_one_are_followed(folder, tmp_path):
    """As the cache of huggingface_hub has them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a"
    folder.rename(blobs)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.iterdir())):
        (snapshot / path.name).symlink_to(path.rename(blobs / str(number)))
    for path in (snapshot, snapshot / "config.json"):
        assert open_checkpoint(path).format == "huggingface"
        assert len(stamp(path)) > 3
