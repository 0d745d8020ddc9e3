"""What GGUF's key-values mean: the hyper-parameters of a model. `gguf.py` describes the bytes they lie in."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..config import FAMILIES, STEPS, Config, RopeScaling, steps_of, tensor_names
from ..errors import printable, require
from .others import EXPERTS

#: The architecture's keys (behind "llama.") and the fields of Config that they give.
FIELDS = {
    "block_count": "n_layers",
    "context_length": "max_seq_len",
    "embedding_length": "dim",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
#: Fields whose keys may be missing, and a value that says no more.
OPTIONAL = {"n_kv_heads": None, "rope_theta": None, "head_dim": 0, "sliding_window": 0}
#: Keys that say again what follows from others.
IMPLIED = {"rope.dimension_count": "head_dim", "attention.value_length": "head_dim"}
#: Keys that would change what is computed, and the values with which they don't.
NONE, UNIT = (0, False), (0, 1)
NEUTRAL = {
    "attention.causal": (True,),
    "attention.clamp_kqv": NONE,
    "attention.max_alibi_bias": NONE,
    "attention.scale": NONE,  # or what it is anyway
    "attention.shared_kv_layers": NONE,
    "attention.sliding_window_pattern": (1, True),
    "attention.temperature_scale": NONE,
    "attn_logit_softcapping": NONE,
    "embedding_scale": UNIT,
    "expert_count": NONE,
    "final_logit_softcapping": NONE,
    "logit_scale": UNIT,
    "nextn_predict_layers": NONE,
    "residual_scale": UNIT,
    "rope.scaling.alpha": UNIT,
    "rope.scaling.yarn_ext_factor": (1,),
    "swin_norm": NONE,
    "use_parallel_residual": NONE,
}
#: The first words of keys that say nothing about the computation, or nothing without experts.
SILENT = ("tensor_data_layout", "expert_", "attention.layer_norm_epsilon", "rope.scal", "vocab_size")

LARGEST_ALIGNMENT = 1 << 16  # bytes, several times what any file has; so many are written before the data
WANTED = {int: "a positive whole number", float: "a positive number", bool: "true or false", str: "a string"}


class Metadata(dict):
    """Key-values as plain Python values that remember their GGUF types, so that writing them loses nothing.

    `types[key]` is the number of a value's type, or of its elements' type where the value is a list.
    """

    def __init__(self, values=(), types: dict[str, int] | None = None):
        super().__init__(values)
        self.types = dict(types or {})

    def set(self, key: str, value, kind: int) -> None:
        """Give a key a value of a type (a list: of elements of this type)."""
        self[key], self.types[key] = value, kind

    def value(self, key: str, kind: type, default=None):
        """A string, a bool, or a positive int or float, or what a list has for each layer alike.

        Raises TinyllamaError where it is missing or something else.
        """
        value = self.get(key, default)
        require(value is not None, f"the key {key} is missing")
        same = alike(value) if kind in (int, float) else value
        same = float(same) if kind is float and type(same) is int else same
        right = type(same) is kind and (kind in (bool, str) or 0 < same < math.inf)
        require(right, f"the key {key} must be {WANTED[kind]}, not {shown(value)}")
        return same

    def alignment(self) -> int:
        """What the offsets of tensors are multiples of, in bytes."""
        alignment = self.value("general.alignment", int, 32)
        fine = alignment <= LARGEST_ALIGNMENT and alignment & (alignment - 1) == 0
        require(fine, f"general.alignment is {alignment}, not a power of two up to {LARGEST_ALIGNMENT}")
        return alignment


def shown(value: object) -> str:
    """A value for an error message."""
    return f"an array of {len(value)}" if isinstance(value, list) else repr(value)[:40]


def alike(value: object) -> object:
    """A value; of an array, what it says of each layer, if it is the same."""
    same = isinstance(value, list) and value and value.count(value[0]) == len(value)
    return value[0] if same else value


# --- what they mean -------------------------------------------------------------------------------


def config_of(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], n_tokens: int) -> Config:
    """The hyper-parameters of a model.

    Args:
        shapes: of its weights, by GGUF's names: they say which optional steps there are.
        n_tokens: of its vocabulary; there may be more embeddings.
    Raises:
        TinyllamaError: names the key that is missing, can't be true or isn't supported.
    Warns of keys that are ignored.
    """
    family, found = metadata["general.architecture"], {}
    for key, field in FIELDS.items():
        if field not in OPTIONAL or metadata.get(f"{family}.{key}") not in (None, OPTIONAL[field]):
            found[field] = metadata.value(f"{family}.{key}", Config.__annotations__[field])
    n_rows, *_ = shapes.get("token_embd.weight", (0,))
    steps = steps_of({meta for meta, name, _ in tensor_names(1, STEPS) if name in shapes})
    config = Config(
        **({"n_kv_heads": found["n_heads"]} | found),
        vocab_size=max(n_tokens, n_rows),
        family=family,
        rope_scaling=_rope_scaling(metadata, family, found["max_seq_len"]),
        **(steps | {"qk_norms": FAMILIES[family].qk_norms}),
    )
    for key, field in IMPLIED.items():
        number, implied = alike(metadata.get(f"{family}.{key}", 0)), getattr(config, field)
        require(number in (0, implied), f"{family}.{key} is {shown(number)}, but {field} is {implied}")
    _check_keys(metadata, config, n_tokens)
    return config


def _rope_scaling(metadata: Metadata, family: str, trained: int) -> RopeScaling | None:
    """RoPE's scaling, or None; Llama 3.1's is a tensor. Without a type it is linear, as llama.cpp has it."""

    def number(name: str, default: float) -> float:
        key = f"{family}.rope.{name}"
        return metadata.value(key, float) if metadata.get(key) else default

    kind = metadata.value(f"{family}.rope.scaling.type", str, "linear")
    why = "which isn't supported: only linear and yarn are"
    require(kind in ("none", "linear", "yarn"), f"the key {family}.rope.scaling.type is {kind!r}, {why}")
    factor = 1.0 if kind == "none" else number("scaling.factor", number("scale_linear", 1.0))
    if kind == "yarn":
        betas = {
            "beta_fast": number("scaling.yarn_beta_fast", 32.0),
            "beta_slow": number("scaling.yarn_beta_slow", 1.0),
        }
        scaling = RopeScaling(kind, factor, int(number("scaling.original_context_length", trained)), **betas)
    else:
        scaling = RopeScaling("linear", factor)
    usual = scaling.magnitude
    less = 0.1 * number("scaling.yarn_log_multiplier", 0.0) * math.log(max(factor, 1)) + 1
    magnitude = number("scaling.yarn_attn_factor", usual / less * number("scaling.attn_factor", 1.0))
    if factor == magnitude == 1:
        return None
    return scaling if magnitude == usual else replace(scaling, attn_factor=magnitude)


def _check_keys(metadata: Metadata, config: Config, n_tokens: int) -> None:
    """Refuse what would have to be computed in another way; warn of what is ignored."""
    unknown, known = [], FIELDS.keys() | IMPLIED.keys() | NEUTRAL.keys()
    for key, value in metadata.items():
        family, _, name = key.partition(".")
        if family != config.family:
            continue
        if name in NEUTRAL:
            same = name == "attention.scale" and alike(value) == float(np.float32(config.head_dim**-0.5))
            why = "this changes what a model computes, and isn't supported"
            why = f"{EXPERTS}, isn't supported" if name == "expert_count" else why
            require(same or alike(value) in NEUTRAL[name], f"the key {key} is {shown(value)}: {why}")
        elif name == "vocab_size" and value not in (n_tokens, config.vocab_size):
            told = f"the key {key} is {shown(value)}, which is ignored"
            warnings.warn(f"{told}: there are {n_tokens} tokens", stacklevel=4)
        elif name not in known and not name.startswith(SILENT):
            unknown.append(key)
    if unknown:
        warnings.warn(
            f"ignored, since nothing is known of them: {printable(', '.join(unknown))[:300]}", stacklevel=4
        )
