"""Hugging Face's folder, as transformers' save_pretrained writes it:

    config.json                    hyper-parameters
    model.safetensors              the weights: safetensors.py has the layout; or pytorch_model.bin: pth.py
    model.safetensors.index.json   of weights in several files: which of them holds which
    tokenizer.json, ...            the vocabulary: vocabulary.py
    chat_template.jinja            how a chat becomes text; or "chat_template" in tokenizer_config.json

config.LAYER has its names of the weights. Its RoPE turns the first half of a head against the second, so the
rows of wq and wk lie in another order than Meta's (`tensor.halves_order`). RoPE's numbers are in
"rope_parameters", before version 5 in "rope_scaling" and "rope_theta". Keys not named here change nothing.
"""

import math
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from ..config import FAMILIES, STEPS, Config, Family, RopeScaling, steps_of, tensor_names
from ..errors import TinyllamaError, naming, require
from ..machine.files import read_file
from ..tensor import Tensor, turned_order
from . import Checkpoint
from .folders import folder_of, number, read_json
from .others import refusal
from .parts import Part
from .pth import read_part
from .safetensors import read_shards, read_tensors, shard_paths
from .vocabulary import find_vocabulary, json_beside, vocabulary_files

#: config.json's model_type and our family.
FAMILY_OF = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
WEIGHTS = {"model.safetensors": read_tensors, "pytorch_model.bin": read_part}

#: The numbers in config.json, the fields of Config that they give, and what they are where they are missing.
FIELDS = {
    "hidden_size": ("dim", None),
    "num_hidden_layers": ("n_layers", None),
    "num_attention_heads": ("n_heads", None),
    "vocab_size": ("vocab_size", None),
    "intermediate_size": ("hidden_dim", None),
    "num_key_value_heads": ("n_kv_heads", "num_attention_heads"),
    "head_dim": ("head_dim", 0),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "max_position_embeddings": ("max_seq_len", 2048),
}
#: Likewise of RoPE's scaling; the fields of RopeScaling have the same names.
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
#: Keys that may change what a model computes, and the values with which they don't.
WITHOUT_EFFECT = {"hidden_act": ("silu", "swish"), "mlp_bias": (False,), "partial_rotary_factor": (1,)}
FULL, SLIDING = "full_attention", "sliding_attention"  # in layer_types
IGNORED = "rotary_emb.inv_freq"  # follows from the numbers

LARGEST_TEMPLATE = 1 << 20  # bytes


def recognizes(path: Path) -> bool:
    """Whether a path is a folder of Hugging Face's, or in one a JSON file or one of weights."""
    folder, named = folder_of(path), path.is_dir() or path.suffix in (".json", ".safetensors")
    of_meta = (folder / "params.json").exists() and not _weights(folder)
    return named and (folder / "config.json").exists() and not of_meta


def read(path: str | Path) -> Checkpoint:
    """Open the model in a folder; its weights stay on disk, mapped into memory.

    Raises TinyllamaError, naming the file, where one is missing, says what can't be true, or needs what isn't
    supported.
    """
    folder = folder_of(Path(path))
    about, weights = folder / "config.json", _weights(folder) or "model.safetensors"
    values = read_json(about)
    with naming(about):
        _check(values)
    with naming(folder):
        found = read_shards(folder, weights, WEIGHTS[weights])
        part = {_full(name): piece for name, piece in found.items() if not name.endswith(IGNORED)}
    with naming(about):
        config = config_of(values, part)
    with naming(folder / weights):
        tensors = _tensors(part, config, tied=values.get("tie_word_embeddings") is not False)
    vocabulary = find_vocabulary(folder, config.vocab_size)
    files, template = list(dict.fromkeys(piece.data for piece in part.values())), find_template(folder)
    return Checkpoint(folder, "huggingface", config, tensors, vocabulary, files, values, template)


def stamp(path: Path) -> list[Path]:
    """The files that `read` looks at."""
    folder = folder_of(path)
    weights = _weights(folder) or "model.safetensors"
    around = ("config.json", f"{weights}.index.json", "chat_template.jinja", "tokenizer_config.json")
    paths = [*shard_paths(folder, weights), *(folder / name for name in around), *vocabulary_files(folder)]
    return [path for path in dict.fromkeys(paths) if path.exists()]


def _weights(folder: Path) -> str | None:
    """The name of the file of weights, whole or with an index."""
    there = (name for name in WEIGHTS for file in (name, f"{name}.index.json") if (folder / file).exists())
    return next(there, None)


def find_template(folder: Path) -> str:
    """How a chat becomes text, in Jinja; empty where the folder doesn't say."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        with naming(path):
            return read_file(path, LARGEST_TEMPLATE).decode()
    found = json_beside([folder], "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, each with a name
        named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else ""


# --- config.json ----------------------------------------------------------------------------------


def _check(values: dict) -> None:
    """Refuse another family, and weights that are no plain numbers."""
    kind = str(values.get("model_type"))
    require(kind in FAMILY_OF, refusal(kind))
    for key in ("quantization_config", "quantization"):
        if about := values.get(key):
            method = str(about.get("quant_method") if isinstance(about, dict) else about)
            why = "take the folder that it was made from, or a GGUF file"
            raise TinyllamaError(f"its weights are quantized by {method[:40]}, which isn't supported: {why}")


def config_of(values: dict, names: Container[str]) -> Config:
    """What config.json says; the names of the weights, Hugging Face's, say which optional steps there are.

    Raises TinyllamaError, naming the key, where a value is missing, of another kind, or not supported.
    """
    found, kinds = {}, Config.__annotations__
    for key, (field, default) in FIELDS.items():
        default = found["n_heads"] if field == "n_kv_heads" else default
        found[field] = number(values, key, kinds[field], default)
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    flat = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())
    require(flat, "RoPE's numbers differ from layer to layer, which isn't supported")
    for key, allowed in WITHOUT_EFFECT.items():
        value = (values | rope).get(key)
        fine = value is None or value in allowed
        require(fine, f"{key} is {str(value)[:40]}: this changes what a model computes, and isn't supported")
    family = FAMILY_OF[values["model_type"]]
    config = Config(
        **found,
        **_steps(values, FAMILIES[family], names),
        family=family,
        rope_theta=number(values | rope, "rope_theta", float, 10000.0),
        rope_scaling=_scaling(values, rope, found["max_seq_len"]),
    )
    return replace(config, sliding_window=_window(values, config))


def _steps(values: dict, family: Family, names: Container[str]) -> dict[str, bool]:
    """The optional steps that there are weights for, and that transformers takes."""
    own = bool(values.get("attention_bias")) and values["model_type"] != "qwen2"
    taken = {"biases": own or family.biases, "output_bias": own, "qk_norms": family.qk_norms}
    there = steps_of({meta for meta, _, theirs in tensor_names(1, STEPS) if theirs in names})
    return {step: there[step] and taken[step] for step in taken}


def _scaling(values: dict, rope: dict, max_seq_len: int) -> RopeScaling | None:
    """RoPE's scaling as transformers understands it; None where there is none."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = kind in ("default", "linear", "llama3", "yarn")
    require(known, f"RoPE of the kind {str(kind)[:40]} isn't supported")
    original = number(values | rope, "original_max_position_embeddings", int, max_seq_len)
    factor = number(rope, "factor", float, max_seq_len / max(original, 1))
    if kind == "default" or (kind == "linear" and factor == 1):
        return None
    require(rope.get("truncate", True), "yarn without truncate isn't supported")
    numbers = {name: number(rope, name, float, default) for name, default in SCALING.items()}
    magnitude = _magnitude(rope, factor) if kind == "yarn" else None
    original = 0 if kind == "linear" else original
    return RopeScaling(kind, factor, original, attn_factor=magnitude, **numbers)


def _magnitude(rope: dict, factor: float) -> float | None:
    """By how much yarn lets queries and keys grow; None for the usual."""
    names = ("attention_factor", "mscale", "mscale_all_dim")
    own, top, bottom = (number(rope, name, float, 0.0) for name in names)
    if own or min(top, bottom) <= 0:
        return own or None
    growth = 0.1 * math.log(max(factor, 1))
    return (growth * top + 1) / (growth * bottom + 1)


def _window(values: dict, config: Config) -> int:
    """How many tokens each attends to, 0 for all. Raises TinyllamaError where layers differ in it."""
    of_mistral = values["model_type"] == "mistral"
    used = values["model_type"] != "llama" and values.get("use_sliding_window", of_mistral)
    window = number(values, "sliding_window", int, 0 if "sliding_window" in values else 4096)
    if not used or window >= config.max_seq_len:
        return 0
    first = number(values, "max_window_layers", int, 0 if of_mistral else 28)  # the first that has one
    usual = [FULL] * (first > 0) + [SLIDING] * (first < config.n_layers)
    kinds = values["layer_types"] if isinstance(values.get("layer_types"), list) else usual
    same = kinds.count(SLIDING) in (0, len(kinds))
    require(same, "sliding_window is for some layers alone, which isn't supported")
    return window if SLIDING in kinds else 0


# --- tensors --------------------------------------------------------------------------------------


def _full(name: str) -> str:
    """The name of a weight with the word that a model without a head leaves out."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _tensors(part: Part, config: Config, tied: bool) -> dict[str, Tensor]:
    """Every tensor by Meta's name, its rows in Meta's order."""
    shapes, tensors = config.tensor_shapes(), {}
    names = {theirs: meta for meta, _, theirs in tensor_names(config.n_layers, STEPS) if meta in shapes}
    missing = names.keys() - part.keys() - ({"lm_head.weight"} if tied else set())
    require(not missing, f"{len(missing)} tensors are missing, {min(missing, default='')} among them")
    others = part.keys() - names.keys()
    require(not others, f"the tensor {min(others, default='')} is none that such a model has")
    for theirs, meta in names.items():
        if piece := part.get(theirs):
            shape = shapes[meta]
            require(piece.shape == shape, f"{theirs} has the shape {list(piece.shape)}, not {list(shape)}")
            piece = replace(piece, order=turned_order(meta, shape[0], config.head_dim))
            tensors[meta] = Tensor(meta, shape, (piece,))
    return tensors
