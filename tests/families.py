"""Small random models of each family, made by transformers, and the same weights as tinyllama takes them.

`made(name)` is transformers' model, in float32; `made(name).save_pretrained(folder)` writes it down.
`config_of` and `tensors_of` map it to a Config and to Tensors without a file in between. All widths are odd
ones: what is only right for powers of two, or where n_heads * head_dim is dim, shows.
"""

from functools import cache

import gguf
import numpy as np
import torch
import transformers

from tinyllama.config import FAMILIES, STEPS, Config, RopeScaling, tensor_names
from tinyllama.ops import rope_factors
from tinyllama.tensor import Tensor, halves_order

VOCAB_SIZE, N_PAST = 301, 300

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
OWN_WIDTH = {"hidden_size": 176, "num_attention_heads": 4, "head_dim": 24}  # 96 wide, in a stream of 176
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
STRETCHED = {"rope_parameters": YARN, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 64}
LLAMA3 |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

#: By name: transformers' model_type, and what differs from SIZES.
VARIANTS = {
    "llama": ("llama", {"num_key_value_heads": 6}),
    "llama2-grouped": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "codellama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "deepseek-coder": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}},
    ),
    "llama-yarn": ("llama", STRETCHED),
    "llama-yarn-own-numbers": (
        "llama",
        STRETCHED
        | {"rope_parameters": YARN | {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "llama-biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 37}),
    "mistral-nemo": ("mistral", OWN_WIDTH | {"sliding_window": None}),
    "falcon3": ("llama", OWN_WIDTH | {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", STRETCHED),
    "qwen3": ("qwen3", OWN_WIDTH | {"num_hidden_layers": 3}),
    "qwen3-tied": ("qwen3", OWN_WIDTH | {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3-yarn": ("qwen3", OWN_WIDTH | STRETCHED),
}


@cache
def made(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model with weights of a scale at which every step matters; norms near 1. Don't change it."""
    model_type, numbers = VARIANTS[name]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | numbers))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 2 / weight.shape[-1] ** 0.5 if weight.ndim == 2 else noise / 10)
        for key, weight in model.named_parameters():
            if key.endswith("norm.weight"):
                weight += 1
    return model


def assert_close_in_c(got, expected, table) -> None:
    """Of logits by backend c: keys and values in half precision, or bf16 products, leave errors that grow."""
    limit = (100 if table.level == "amx" else 10) * table.tolerance("attention")
    assert np.mean((got - expected) ** 2) < limit * np.mean(expected**2)


@cache
def logits_of(name: str, n_tokens: int = N_PAST) -> np.ndarray:
    """What transformers computes of `text(n_tokens)`: [n_tokens, vocab_size]."""
    with torch.no_grad():
        return made(name)(torch.tensor([text(n_tokens)])).logits[0].numpy()


def text(n_tokens: int = N_PAST) -> list[int]:
    """Random ids."""
    return np.random.default_rng(0).integers(3, VOCAB_SIZE, n_tokens).tolist()


def config_of(model: transformers.PreTrainedModel) -> Config:
    """Our Config of a model of transformers."""
    theirs, rope = model.config, model.config.rope_parameters
    family = "llama" if theirs.model_type == "mistral" else theirs.model_type
    bias = bool(getattr(theirs, "attention_bias", False))
    return Config(
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.vocab_size,
        theirs.intermediate_size,
        theirs.num_key_value_heads,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        max_seq_len=theirs.max_position_embeddings,
        family=family,
        head_dim=getattr(theirs, "head_dim", None) or 0,
        sliding_window=(theirs.model_type == "mistral" and theirs.sliding_window) or 0,
        rope_scaling=_scaling(rope),
        biases=bias,
        output_bias=bias,
    )


def _scaling(rope: dict) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    original = rope.get("original_max_position_embeddings", 0)
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    numbers = {name: rope[name] for name in names if rope.get(name)}
    factor = rope.get("attention_factor")
    return RopeScaling(rope["rope_type"], rope["factor"], original, attn_factor=factor, **numbers)


def tensors_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Our tensors, by Meta's names; rows of wq, wk and what belongs to them in pairs."""
    config, state = config_of(model), model.state_dict()
    tensors = {}
    for meta, _, theirs in tensor_names(config.n_layers, STEPS):
        if theirs in state and not (meta == "output.weight" and model.config.tie_word_embeddings):
            array = state[theirs].numpy()
            if meta.split(".")[3:4] in (["wq"], ["wk"], ["q_norm"], ["k_norm"]):
                array = array[halves_order(len(array) // config.head_dim, config.head_dim)]
            tensors[meta] = Tensor.from_array(meta, array)
    return tensors


def write_gguf(name: str, path, keys: dict | None = None, n_tokens: int = VOCAB_SIZE, split: int = 0) -> None:
    """The model as a GGUF file, as llama.cpp's converter would write it, by the gguf package.

    Args:
        keys: behind the architecture's name, instead of or beside the usual ones; None leaves one out. A
            value may come with its type: (value, GGUFValueType).
        n_tokens: of the vocabulary.
        split: how many tensors a part has; 0 for one file.
    """
    model = made(name)
    config, tensors = config_of(model), tensors_of(model)
    writer = gguf.GGUFWriter(path, config.family, split_max_tensors=split)
    known = {
        "block_count": config.n_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.dim,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window or None,
    }
    if scaling := config.rope_scaling:
        if scaling.kind == "llama3":
            factors = rope_factors(config).astype(np.float32)
            tensors["rope_freqs.weight"] = Tensor.from_array("rope_freqs.weight", factors)
        else:
            known |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
            known["rope.scaling.original_context_length"] = scaling.original_context or None
    for key, value in (known | (keys or {})).items():
        _add(writer, f"{config.family}.{key}", value)
    _add_vocabulary(writer, n_tokens)
    names = {meta: gguf_name for meta, gguf_name, _ in tensor_names(config.n_layers, STEPS)}
    for meta, tensor in tensors.items():
        array = tensor.dequantize()
        if FAMILIES[config.family].halves and {"wq", "wk", "q_norm", "k_norm"} & set(meta.split(".")):
            array = array[np.argsort(halves_order(len(array) // config.head_dim, config.head_dim))]
        writer.add_tensor(names.get(meta, meta), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, key: str, value) -> None:
    kinds = gguf.GGUFValueType
    usual = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    if value is not None:
        value, kind = value if isinstance(value, tuple) else (value, usual[type(value)])
        writer.add_key_value(key, value, kind)


def _add_vocabulary(writer, n_tokens: int) -> None:
    """SentencePiece's: three special pieces, the bytes, and words."""
    words = [f"▁w{number}" for number in range(n_tokens - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    writer.add_token_scores([0.0] * n_tokens)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(words)])
