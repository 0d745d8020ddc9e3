"""Hyper-parameters of a LLaMA, its published sizes, and the names of its tensors.

The axis names that shapes are written in, everywhere in this project:

| Axis         | Meaning                                              | 7B    |
|--------------|------------------------------------------------------|-------|
| `n_tokens`   | tokens computed in this call                         |       |
| `n_past`     | tokens in the KV cache, this call's included         |       |
| `vocab_size` | different tokens                                     | 32000 |
| `dim`        | width of the residual stream                         | 4096  |
| `n_layers`   | transformer blocks                                   | 32    |
| `n_heads`    | attention heads (of queries)                         | 32    |
| `n_kv_heads` | heads of keys and values; fewer means shared         | 32    |
| `head_dim`   | width of a head, dim / n_heads                       | 128   |
| `hidden_dim` | width of the feed-forward layer                      | 11008 |

A weight is stored `[n_out, n_in]`, as torch.nn.Linear stores it, and computes `x @ weight.T`.
"""

import math
from dataclasses import dataclass

from .errors import TinyllamaError


def hidden_dim_of(dim: int, multiple_of: int, multiplier: float = 1.0) -> int:
    """Meta's rule: two thirds of 4 * dim (times LLaMA 2's multiplier), rounded up to `multiple_of`."""
    hidden_dim = int(multiplier * (2 * (4 * dim) // 3))
    return (hidden_dim + multiple_of - 1) // multiple_of * multiple_of


def _whole(params: dict, name: str, default: int | None = None) -> int:
    value = default if params.get(name) is None else params[name]
    if value is None:
        raise TinyllamaError(f"{name} is missing")
    if type(value) is not int:
        raise TinyllamaError(f"{name} must be a whole number, not {_shown(value)}")
    return value


def _number(params: dict, name: str, default: float) -> float:
    """JSON knows no difference between 1 and 1.0; it may be too large for a float."""
    value = default if params.get(name) is None else params[name]
    if type(value) not in (int, float) or abs(value) > 1e30:
        raise TinyllamaError(f"{name} must be a number, not {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    return repr(value)[:40] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


#: Far beyond any LLaMA; a file that says more is damaged, and what is computed from these stays computable.
LARGEST = {"dim": 2**17, "hidden_dim": 2**20, "n_layers": 2**11, "vocab_size": 2**20}


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of params.json (LLaMA, arXiv:2302.13971, table 2) and what follows from them."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    hidden_dim: int
    n_kv_heads: int
    multiple_of: int = 256
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_seq_len: int = 2048

    def __post_init__(self):
        for name, number in vars(self).items():
            if not 0 < number < math.inf:
                raise TinyllamaError(f"{name} must be a positive number, not {number}")
            if number > LARGEST.get(name, number):
                raise TinyllamaError(f"{name} is {number}: more than {LARGEST[name]} can't be right")
        if self.norm_eps >= 1:
            raise TinyllamaError(f"norm_eps is {self.norm_eps:g}: it must be far below 1")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise TinyllamaError(f"dim {self.dim} doesn't divide into {self.n_heads} heads of an even width")
        if self.n_heads % self.n_kv_heads:
            raise TinyllamaError(f"{self.n_heads} heads can't share {self.n_kv_heads} key/value heads evenly")

    @classmethod
    def from_params(cls, params: dict, vocab_size: int) -> "Config":
        """Read Meta's params.json, as a dict. Its own vocab_size is -1: the tokenizer's is passed in.

        Raises TinyllamaError, naming the key, where a value is missing or of another kind.
        """
        dim, multiple_of = _whole(params, "dim"), _whole(params, "multiple_of", 256)
        n_heads, multiplier = _whole(params, "n_heads"), _number(params, "ffn_dim_multiplier", 1.0)
        if not 0 < dim <= LARGEST["dim"] or not 0 < multiple_of <= LARGEST["hidden_dim"]:
            raise TinyllamaError(f"dim {dim} and multiple_of {multiple_of} can't be right")
        if params.get("use_scaled_rope"):  # of Llama 3.1
            raise TinyllamaError("use_scaled_rope, other frequencies of RoPE, isn't supported")
        if not 0 < multiplier <= LARGEST["hidden_dim"]:
            raise TinyllamaError(f"ffn_dim_multiplier can't be {multiplier}")
        return cls(
            dim=dim,
            n_layers=_whole(params, "n_layers"),
            n_heads=n_heads,
            vocab_size=vocab_size,
            hidden_dim=hidden_dim_of(dim, multiple_of, multiplier),
            n_kv_heads=_whole(params, "n_kv_heads", n_heads),
            multiple_of=multiple_of,
            norm_eps=_number(params, "norm_eps", 1e-6),
            rope_theta=_number(params, "rope_theta", 10000.0),
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        """Width of all keys (or values) of a token, n_kv_heads * head_dim."""
        return self.n_kv_heads * self.head_dim

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Meta's name and the shape of every weight, in reading order."""
        shapes = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        return shapes | {"norm.weight": (self.dim,), "output.weight": (self.vocab_size, self.dim)}

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "attention_norm.weight": (self.dim,),
            "attention.wq.weight": (self.dim, self.dim),
            "attention.wk.weight": (self.kv_dim, self.dim),
            "attention.wv.weight": (self.kv_dim, self.dim),
            "attention.wo.weight": (self.dim, self.dim),
            "ffn_norm.weight": (self.dim,),
            "feed_forward.w1.weight": (self.hidden_dim, self.dim),
            "feed_forward.w2.weight": (self.dim, self.hidden_dim),
            "feed_forward.w3.weight": (self.hidden_dim, self.dim),
        }

    def n_params(self) -> int:
        """How many weights there are: 6,738,415,616 for 7B."""
        return sum(map(math.prod, self.tensor_shapes().values()))


def _llama(dim: int, n_layers: int, n_heads: int, norm_eps: float = 1e-6) -> Config:
    return Config(dim, n_layers, n_heads, 32000, hidden_dim_of(dim, 256), n_heads, norm_eps=norm_eps)


#: Meta's four sizes of March 2023. 65B alone was trained with another norm_eps.
PRESETS = {
    "7B": _llama(4096, 32, 32),
    "13B": _llama(5120, 40, 40),
    "30B": _llama(6656, 60, 52),
    "65B": _llama(8192, 80, 64, norm_eps=1e-5),
}

#: Into how many parts Meta cut a checkpoint of this dim; ggml files keep the cut.
N_PARTS = {4096: 1, 5120: 2, 6656: 4, 8192: 8}

#: Meta's name, GGUF's name, Hugging Face's name of each tensor, without the ".weight" that all end in.
#: {} is the layer's number.
TENSOR_NAMES = (
    ("tok_embeddings", "token_embd", "model.embed_tokens"),
    ("norm", "output_norm", "model.norm"),
    ("output", "output", "lm_head"),
    ("layers.{}.attention_norm", "blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    ("layers.{}.attention.wq", "blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    ("layers.{}.attention.wk", "blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    ("layers.{}.attention.wv", "blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    ("layers.{}.attention.wo", "blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
    ("layers.{}.ffn_norm", "blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
    ("layers.{}.feed_forward.w1", "blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    ("layers.{}.feed_forward.w2", "blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
    ("layers.{}.feed_forward.w3", "blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
)


def tensor_names(n_layers: int) -> list[tuple[str, str, str]]:
    """TENSOR_NAMES spelled out for every layer: (Meta's, GGUF's, Hugging Face's)."""
    once = [names for names in TENSOR_NAMES if "{}" not in names[0]]
    per_layer = [names for names in TENSOR_NAMES if "{}" in names[0]]
    spelled = once + [[name.format(i) for name in names] for i in range(n_layers) for names in per_layer]
    return [tuple(f"{name}.weight" for name in names) for names in spelled]
