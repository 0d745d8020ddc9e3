"""A folder of Hugging Face: config.json, weights in one file or several, and what lies around them."""

import json

from hypothesis import strategies as st

from tinyllama.config import STEPS, Config, tensor_names
from tinyllama.formats import huggingface

from .. import contract
from ..bundle import bundle, unbundle
from ..damage import damaged
from . import safetensors
from .meta import ODD, TOKENIZER

READS = ("tinyllama.formats.huggingface", "tinyllama.formats.folders", "tinyllama.config")
WORDS = [b"=== config.json ===\n", b"=== model.safetensors ===\n", b"=== model.safetensors.index.json ===\n"]
WORDS += [
    b'"model_type": "qwen3"',
    b'"rope_scaling": ',
    b'"yarn"',
    b'"llama3"',
    b'"sliding_window": 1',
    b"NaN",
]

SHAPE = {"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 6, "hidden_dim": 24, "n_kv_heads": 1}
ABOUT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 6,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1,
    "mscale_all_dim": 1,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def check(data: bytes) -> bool:
    """A model that is read is whole, and its tensors share no bytes."""
    with contract.folder(unbundle(data)) as folder:
        checkpoint = contract.opened(huggingface.read, folder)
        if checkpoint is not None:
            contract.is_whole(checkpoint.tensors, checkpoint.config, len(data))
            contract.are_apart(checkpoint.tensors)
    return checkpoint is not None


# --- nearly valid folders -------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """Models of every family in one file or two, one file damaged or lost, or odd numbers in config.json."""
    kind, type = (
        draw(st.sampled_from(list(huggingface.FAMILY_OF))),
        draw(st.sampled_from(["f16", "bf16", "f32"])),
    )
    files = model(kind, type, draw(st.booleans()))
    about = {"model_type": kind, **ABOUT} | draw(st.sampled_from(ROPES))
    about |= draw(st.dictionaries(st.sampled_from([*about, *MORE]), VALUES, max_size=2))
    files["config.json"] = json.dumps(about).encode()
    name = draw(st.sampled_from([*files, "nothing"]))
    what = draw(st.sampled_from(["damage", "lose", "nothing"]))
    if name in files and what == "damage":
        cut = [files[name][start : start + 16] for start in range(0, len(files[name]), 16)]
        files[name] = draw(damaged(cut))
    elif name in files and what == "lose":
        del files[name]
    if draw(st.booleans()):
        template = draw(st.sampled_from(["x", ["x"], [{"name": "default", "template": "x"}], [{}], 3]))
        files["tokenizer_config.json"] = json.dumps({"chat_template": template}).encode()
    return bundle(files)


ROPES = [
    {},
    {"rope_scaling": YARN},
    {"rope_scaling": LLAMA3},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
]
MORE = ["head_dim", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"]
MORE += [
    "tie_word_embeddings",
    "quantization_config",
    "mlp_bias",
    "hidden_act",
    "rope_scaling",
    "rope_parameters",
]
ROPE = st.dictionaries(
    st.sampled_from([*YARN, *LLAMA3, "rope_theta", "attention_factor", "beta_fast"]),
    st.sampled_from([*ODD, "linear", "yarn", "llama3", "dynamic", 4.0, 16]),
    max_size=4,
)
VALUES = (
    st.sampled_from([*ODD, "silu", ["sliding_attention"], [], {}, "x" * 3000, 4, 64]) | ROPE | st.integers()
)


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names of the tensors of a model of a family, and their shapes."""
    shapes = Config(**SHAPE, family=huggingface.FAMILY_OF[kind]).tensor_shapes()
    return {theirs: shapes[meta] for meta, _, theirs in tensor_names(1, STEPS) if meta in shapes}


def model(kind: str, type: str, cut: bool = False) -> dict[str, bytes]:
    """The files of a model, its weights in one or in two."""
    shapes = list(shapes_of(kind).items())
    files = {"config.json": json.dumps({"model_type": kind, **ABOUT}).encode(), "tokenizer.model": TOKENIZER}
    if not cut:
        return files | {"model.safetensors": safetensors.file(shapes, type)}
    parts = {"model_1.safetensors": shapes[:5], "model_2.safetensors": shapes[5:]}
    places = {name: file for file, part in parts.items() for name, _ in part}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    return files | {file: safetensors.file(part, type) for file, part in parts.items()}


def seeds() -> dict[str, bytes]:
    """A LLaMA of f16, a Qwen of bf16 in two files."""
    return {"llama": bundle(model("llama", "f16")), "qwen3_two_files": bundle(model("qwen3", "bf16", True))}
