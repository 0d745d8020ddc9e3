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
| `head_dim`   | width of a head, in most models dim / n_heads        | 128   |
| `q_dim`      | width of all queries, n_heads * head_dim             | 4096  |
| `kv_dim`     | width of all keys, or values, n_kv_heads * head_dim  | 4096  |
| `hidden_dim` | width of the feed-forward layer                      | 11008 |

A weight is stored `[n_out, n_in]`, as torch.nn.Linear stores it, and computes `x @ weight.T`.
"""

import math
from collections.abc import Container
from dataclasses import dataclass, fields
from itertools import product

from .errors import require

#: Far beyond any LLaMA; a file that says more is damaged, and what is computed from these stays computable.
LARGEST = {"dim": 2**17, "hidden_dim": 2**20, "n_layers": 2**11, "vocab_size": 2**20}
WIDEST_HEAD = 256  # of Falcon3; ext/kernels.h has room for no more


@dataclass(frozen=True)
class Family:
    """What all models of a family add to LLaMA 1: steps of the forward pass, and how their files lie."""

    biases: bool = False  # q, k and v each get a bias
    qk_norms: bool = False  # each head's query and key pass an RMSNorm before RoPE turns them
    halves: bool = False  # rows of wq and wk lie in GGUF as Hugging Face's do: see `tensor.halves_order`


#: By GGUF's name of the architecture, which begins the names of its keys.
FAMILIES = {
    "llama": Family(),  # and Mistral, Yi, Falcon3, SmolLM2, ..., which differ in numbers alone
    "qwen2": Family(biases=True, halves=True),
    "qwen3": Family(qk_norms=True, halves=True),
}

#: Every weight of a layer: Meta's name, GGUF's, Hugging Face's, its axes, and the field of Config whose step
#: it is for (else all models have it). Files append ".weight" to a name, unless it ends in ".bias".
LAYER = (
    ("attention_norm", "attn_norm", "input_layernorm", ("dim",), None),
    ("attention.wq", "attn_q", "self_attn.q_proj", ("q_dim", "dim"), None),
    ("attention.wk", "attn_k", "self_attn.k_proj", ("kv_dim", "dim"), None),
    ("attention.wv", "attn_v", "self_attn.v_proj", ("kv_dim", "dim"), None),
    ("attention.wo", "attn_output", "self_attn.o_proj", ("dim", "q_dim"), None),
    ("attention.wq.bias", "attn_q.bias", "self_attn.q_proj.bias", ("q_dim",), "biases"),
    ("attention.wk.bias", "attn_k.bias", "self_attn.k_proj.bias", ("kv_dim",), "biases"),
    ("attention.wv.bias", "attn_v.bias", "self_attn.v_proj.bias", ("kv_dim",), "biases"),
    ("attention.wo.bias", "attn_output.bias", "self_attn.o_proj.bias", ("dim",), "output_bias"),
    ("attention.q_norm", "attn_q_norm", "self_attn.q_norm", ("head_dim",), "qk_norms"),
    ("attention.k_norm", "attn_k_norm", "self_attn.k_norm", ("head_dim",), "qk_norms"),
    ("ffn_norm", "ffn_norm", "post_attention_layernorm", ("dim",), None),
    ("feed_forward.w1", "ffn_gate", "mlp.gate_proj", ("hidden_dim", "dim"), None),
    ("feed_forward.w2", "ffn_down", "mlp.down_proj", ("dim", "hidden_dim"), None),
    ("feed_forward.w3", "ffn_up", "mlp.up_proj", ("hidden_dim", "dim"), None),
)

STEPS = frozenset(row[4] for row in LAYER if row[4])

#: The weights that no layer has, likewise.
WHOLE = (
    ("tok_embeddings", "token_embd", "model.embed_tokens", ("vocab_size", "dim"), None),
    ("norm", "output_norm", "model.norm", ("dim",), None),
    ("output", "output", "lm_head", ("vocab_size", "dim"), None),
)
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"  # Meta's names; a tied OUTPUT is the EMBEDDING


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE was stretched for a longer context than a model was first trained on: `ops.rope_factors`."""

    kind: str  # "linear", "yarn" or "llama3"
    factor: float  # how many times longer
    original_context: int = 0  # tokens; linear scaling doesn't look at it
    low_freq_factor: float = 1.0  # llama3: turns within the original context below which a pair is stretched
    high_freq_factor: float = 4.0  # and above which it is left alone
    beta_fast: float = 32.0  # yarn: likewise, the turns above which a pair is left alone
    beta_slow: float = 1.0  # and below which it is stretched
    attn_factor: float | None = None  # yarn: queries and keys grow by it; None for 0.1 ln(factor) + 1

    def __post_init__(self):
        require(self.kind in ("linear", "yarn", "llama3"), f"RoPE scaling of the kind {self.kind!r}")
        for name, number in vars(self).items():
            if type(number) in (int, float) and (name != "original_context" or self.kind != "linear"):
                right = 0 < number < math.inf
                require(right, f"{name} of RoPE's scaling must be a positive number, not {number}")
        require(self.low_freq_factor < self.high_freq_factor, "low_freq_factor isn't below high_freq_factor")

    @property
    def magnitude(self) -> float:
        """By which yarn lets queries and keys grow (arXiv:2309.00071, equation 22), 1 in the others."""
        usual = 0.1 * math.log(max(self.factor, 1)) + 1 if self.kind == "yarn" else 1.0
        return usual if self.attn_factor is None else self.attn_factor


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of a model (LLaMA, arXiv:2302.13971, table 2) and what follows from them.

    Raises TinyllamaError, naming the first, for numbers that no model has.
    """

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
    family: str = "llama"
    head_dim: int = 0  # 0 becomes dim / n_heads
    sliding_window: int = 0  # tokens that a token attends to, itself and those right before it; 0: to all
    rope_scaling: RopeScaling | None = None
    biases: bool = False  # as Family's, of this model: a few of LLaMA's architecture have them, too
    output_bias: bool = False  # wo has one
    qk_norms: bool = False

    def __post_init__(self):
        family, own = FAMILIES[self.family], self.head_dim
        steps = {"biases": self.biases or family.biases, "qk_norms": self.qk_norms or family.qk_norms}
        for name, value in {"head_dim": own or self.dim // max(self.n_heads, 1), **steps}.items():
            object.__setattr__(self, name, value)
        for field in fields(self):
            value, largest = getattr(self, field.name), LARGEST.get(field.name, math.inf)
            if field.type in (int, float) and field.name not in ("sliding_window", "head_dim"):
                require(0 < value < math.inf, f"{field.name} must be a positive number, not {value}")
                require(value <= largest, f"{field.name} is {value}: more than {largest} can't be right")
        require(self.norm_eps < 1, f"norm_eps is {self.norm_eps:g}: it must be far below 1")
        require(self.sliding_window >= 0, f"sliding_window is {self.sliding_window}: 0 stands for none")
        even = self.head_dim % 2 == 0 < self.head_dim
        fits = own or (even and self.dim % self.n_heads == 0)
        require(fits, f"dim {self.dim} doesn't divide into {self.n_heads} heads of an even width")
        fits = even and self.head_dim <= WIDEST_HEAD
        require(fits, f"head_dim is {self.head_dim}: it must be even and at most {WIDEST_HEAD}")
        shares = f"{self.n_heads} heads can't share {self.n_kv_heads} key/value heads evenly"
        require(self.n_heads % self.n_kv_heads == 0, shares)

    @property
    def q_dim(self) -> int:
        """Width of all queries of a token, n_heads * head_dim: dim in most models."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all keys (or values) of a token, n_kv_heads * head_dim."""
        return self.n_kv_heads * self.head_dim

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights that each layer has: their names in LAYER, and their shapes."""
        return {row[0]: self._shape(row) for row in LAYER if row[4] is None or getattr(self, row[4])}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Meta's name and the shape of every weight, in reading order."""
        first, *last = ((_suffixed(row[0]), self._shape(row)) for row in WHOLE)
        layer = self.layer_shapes().items()
        every = ((f"layers.{i}.{_suffixed(key)}", size) for i in range(self.n_layers) for key, size in layer)
        return dict([first, *every, *last])

    def _shape(self, row: tuple) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in row[3])

    def n_params(self) -> int:
        """How many weights there are: 6,738,415,616 for 7B."""
        return sum(map(math.prod, self.tensor_shapes().values()))


def hidden_dim_of(dim: int, multiple_of: int, multiplier: float = 1.0) -> int:
    """Meta's rule: two thirds of 4 * dim (times LLaMA 2's multiplier), rounded up to `multiple_of`."""
    hidden_dim = int(multiplier * (2 * (4 * dim) // 3))
    return (hidden_dim + multiple_of - 1) // multiple_of * multiple_of


def _suffixed(name: str) -> str:
    return name if name.endswith(".bias") else f"{name}.weight"


def tensor_names(n_layers: int, steps: Container[str] = ()) -> list[tuple[str, str, str]]:
    """What Meta, GGUF and Hugging Face call each tensor of a model with some of the optional STEPS."""
    names = [row[:3] for row in WHOLE]
    rows = [row for row in LAYER if row[4] is None or row[4] in steps]
    for i, (meta, gguf, hf, *_) in product(range(n_layers), rows):
        names.append((f"layers.{i}.{meta}", f"blk.{i}.{gguf}", f"model.layers.{i}.{hf}"))
    return [tuple(map(_suffixed, row)) for row in names]


def steps_of(names: Container[str]) -> dict[str, bool]:
    """The optional STEPS, and whether these weights (Meta's names) are for them."""
    return {row[4]: f"layers.0.{_suffixed(row[0])}" in names for row in LAYER if row[4]}


#: Meta's four sizes of March 2023. 65B alone was trained with another norm_eps.
PRESETS = {
    size: Config(dim, n_layers, n_heads, 32000, hidden_dim_of(dim, 256), n_heads, norm_eps=norm_eps)
    for size, dim, n_layers, n_heads, norm_eps in (
        ("7B", 4096, 32, 32, 1e-6),
        ("13B", 5120, 40, 40, 1e-6),
        ("30B", 6656, 60, 52, 1e-6),
        ("65B", 8192, 80, 64, 1e-5),
    )
}
