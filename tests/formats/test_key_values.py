"""What GGUF's key-values mean: the model that was written is the model that is read."""

import math
import warnings

import families
import gguf as oracle
import numpy as np
import pytest

from tinyllama.config import Config
from tinyllama.errors import TinyllamaError
from tinyllama.formats import gguf

KINDS = oracle.GGUFValueType
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "context_length": 256}


def read_quietly(path):
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gguf.read(path)


def config_with(tmp_path, keys, name="llama2-grouped") -> Config:
    families.write_gguf(name, tmp_path / "model.gguf", keys)
    return read_quietly(tmp_path / "model.gguf").config


@pytest.mark.parametrize("name", families.VARIANTS)
def test_every_family_reads_as_it_was_written(tmp_path, name):
    own = {}
    if name == "llama-yarn-own-numbers":
        own = {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "attn_factor": 1.25 / (0.1 * math.log(4) + 1)}
    keys = {f"rope.scaling.{key}": value for key, value in own.items()}
    families.write_gguf(name, tmp_path / "model.gguf", keys)
    checkpoint, theirs = read_quietly(tmp_path / "model.gguf"), families.made(name)
    expected, config = vars(families.config_of(theirs)), vars(checkpoint.config)
    scaling, read = expected.pop("rope_scaling"), config["rope_scaling"]
    if scaling and scaling.kind != "llama3":
        assert vars(read) == pytest.approx(vars(scaling))
    for key, value in expected.items():
        assert config[key] == (pytest.approx(value) if isinstance(value, float) else value)
    tensors = families.tensors_of(theirs)
    assert checkpoint.tensors.keys() - {"rope_freqs.weight"} == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[key].dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    "keys",
    [
        {
            "attention.head_count": [6, 6],
            "attention.head_count_kv": [2, 2],
            "feed_forward_length": [172, 172],
        },
        {"block_count": (2, KINDS.UINT64), "embedding_length": (96, KINDS.INT32)},
        {"context_length": (512, KINDS.UINT16), "attention.head_count": (6, KINDS.INT8)},
        {"rope.freq_base": (10000.0, KINDS.FLOAT64)},
        {"rope.freq_base": (10000, KINDS.UINT32)},
        {"rope.freq_base": None, "rope.dimension_count": None},
        {"attention.key_length": None, "attention.value_length": None},
        {"rope.scaling.type": "none", "rope.scaling.factor": 8.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0},
        {"rope.scale_linear": 1.0},
        {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 64},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0, "rope.scaling.finetuned": True},
        {"expert_count": 0, "expert_used_count": 0, "expert_feed_forward_length": 12},
        {
            "attention.causal": True,
            "use_parallel_residual": False,
            "tensor_data_layout": "Meta AI original pth",
        },
        {"attention.scale": 0.25, "logit_scale": 1.0, "final_logit_softcapping": 0.0},
        {"attention.sliding_window": 0, "vocab_size": families.VOCAB_SIZE},
    ],
    ids=str,
)
def test_values_that_change_nothing_are_accepted(tmp_path, keys):
    assert config_with(tmp_path, keys) == config_with(tmp_path, {})


@pytest.mark.parametrize(
    ("keys", "kind", "factor", "magnitude"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "linear", 4, 1),
        ({"rope.scaling.factor": 4.0}, "linear", 4, 1),
        ({"rope.scale_linear": 2.0}, "linear", 2, 1),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": (4, KINDS.UINT32)}, "linear", 4, 1),
        ({"rope.scaling.attn_factor": 2.0}, "linear", 1, 2),
        (YARN, "yarn", 4, 0.1 * math.log(4) + 1),
        (YARN | {"rope.scaling.attn_factor": 0.5}, "yarn", 4, 0.5 * (0.1 * math.log(4) + 1)),
        (YARN | {"rope.scaling.yarn_log_multiplier": 1.0}, "yarn", 4, 1),
        (YARN | {"rope.scaling.yarn_attn_factor": 1.5}, "yarn", 4, 1.5),
    ],
    ids=str,
)
def test_scalings_of_rope_are_what_llama_cpp_makes_of_them(tmp_path, keys, kind, factor, magnitude):
    scaling = config_with(tmp_path, keys).rope_scaling
    assert (scaling.kind, scaling.factor) == (kind, factor)
    assert scaling.magnitude == pytest.approx(magnitude)
    assert kind == "linear" or scaling.original_context == 256


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vocab_size": 300}, "llama.vocab_size is 300, which is ignored: there are 301 tokens"),
        (
            {"rope.freq_bale": 1e6, "a": [1, 2]},
            "ignored, since nothing is known of them: llama.rope.freq_bale, ",
        ),
    ],
)
def test_what_is_ignored_is_warned_of(tmp_path, keys, message):
    families.write_gguf("llama2-grouped", tmp_path / "model.gguf", keys)
    with pytest.warns(UserWarning, match=message):
        checkpoint = gguf.read(tmp_path / "model.gguf")
    assert checkpoint.config == config_with(tmp_path, {})


def test_more_embeddings_than_tokens_are_unused_tokens(tmp_path):
    families.write_gguf("llama2-grouped", tmp_path / "model.gguf", n_tokens=290)
    checkpoint = read_quietly(tmp_path / "model.gguf")
    assert checkpoint.config.vocab_size == len(checkpoint.vocabulary.pieces) == 301
    assert set(checkpoint.vocabulary.types[290:]) == {5}


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "llama",
            {"attention.head_count": [6, 3]},
            "head_count must be a positive whole number, not an array",
        ),
        (
            "llama",
            {"attention.sliding_window_pattern": [True, False]},
            "pattern is an array of 2: this changes",
        ),
        ("llama", {"expert_count": 8}, "expert_count is 8: a mixture of experts"),
        ("qwen3", {"attention.value_length": 32}, "value_length is 32, but head_dim is 24"),
        ("qwen3", {"rope.dimension_count": 12}, "qwen3.rope.dimension_count is 12, but head_dim is 24"),
        ("qwen2", {"rope.scaling.type": "dynamic"}, "scaling.type is 'dynamic', which isn't supported"),
    ],
)
def test_what_would_change_the_result_is_refused(tmp_path, name, keys, message):
    families.write_gguf(name, tmp_path / "model.gguf", keys)
    with pytest.raises(TinyllamaError, match=message):
        gguf.read(tmp_path / "model.gguf")
