"""What a LLaMA computes, once, in the terms of the paper (arXiv:2302.13971, section 2.2).

`forward` is the one forward pass of this project. It is handed a table of operations (`backends`), so
the same lines run in plain NumPy and in C, and any intermediate can be looked at through a tap.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import Config
from .ops import Tap, rope_freqs
from .quant import Tensor


@dataclass(frozen=True)
class Layer:
    """The weights of one transformer block, as the backend's `prepare` made them."""

    number: int
    attention_norm: Any
    wq: Any
    wk: Any
    wv: Any
    wo: Any
    ffn_norm: Any
    w1: Any
    w2: Any
    w3: Any

    @property
    def name(self) -> str:
        """What the names of its tensors and taps begin with."""
        return f"layers.{self.number}"


@dataclass(frozen=True)
class Model:
    """All weights of a LLaMA. `output` is `tok_embeddings` itself where the file has only one of them."""

    config: Config
    tok_embeddings: Any
    layers: list[Layer]
    norm: Any
    output: Any
    rope_factors: np.ndarray | None = None


def build(config: Config, tensors: dict[str, Tensor], prepare: Callable, progress: Callable = iter) -> Model:
    """Prepare every weight of a checkpoint for a backend.

    Args:
        tensors: by Meta's names.
        prepare: Tensor -> what the backend's operations take.
        progress: wraps the iteration over the tensors, as tqdm does.
    """
    ready = {name: prepare(tensors[name]) for name in progress(list(tensors))}
    return Model(
        config,
        ready["tok_embeddings.weight"],
        [_layer(number, ready) for number in range(config.n_layers)],
        ready["norm.weight"],
        ready.get("output.weight", ready["tok_embeddings.weight"]),
        ready.get("rope_freqs.weight"),
    )


def _layer(number: int, ready: dict) -> Layer:
    name = f"layers.{number}"
    attention = (ready[f"{name}.attention.{w}.weight"] for w in ("wq", "wk", "wv", "wo"))
    feed_forward = (ready[f"{name}.feed_forward.{w}.weight"] for w in ("w1", "w2", "w3"))
    norms = ready[f"{name}.attention_norm.weight"], ready[f"{name}.ffn_norm.weight"]
    return Layer(number, norms[0], *attention, norms[1], *feed_forward)


def forward(
    model: Model,
    ops,
    tokens: Iterable[int],
    pos: int,
    cache,
    *,
    last: bool = False,
    tap: Tap | None = None,
) -> np.ndarray:
    """Run tokens through the model and append their keys and values to the cache.

    Args:
        ops: the table of operations, a `backends.Backend`.
        tokens: ids, [n_tokens].
        pos: position of the first of them; the cache holds what came before.
        cache: of `ops.new_cache`.
        last: compute the logits of the last token only.
        tap: called as tap(name, array) after every step, in the order of `tap_shapes`: "embedding";
            "layers.0.attention." + norm, q, k, v, q_rope, k_rope, scores, weights, heads, output;
            "layers.0.feed_forward." + norm, gate, up, hidden, output; "layers.0.residual"; the other
            layers; "norm"; "logits".
    Returns:
        logits, [n_tokens, vocab_size] or [1, vocab_size].
    """
    tokens = np.asarray(tokens)
    config = model.config
    freqs = rope_freqs(config, pos, len(tokens), model.rope_factors)  # [n_tokens, head_dim / 2]
    x = ops.embedding(model.tok_embeddings, tokens)  # [n_tokens] -> [n_tokens, dim]
    _show(tap, "", embedding=x)
    for layer in model.layers:
        x = x + _attention(layer, ops, config, x, freqs, cache, pos, tap)
        x = x + _feed_forward(layer, ops, config, x, tap)
        _show(tap, f"{layer.name}.", residual=x)
    return unembed(model, ops, x[-1:] if last else x, tap)


def tap_shapes(config: Config, n_tokens: int) -> dict[str, tuple[int, ...]]:
    """What `forward` shows a tap of n_tokens without a past: {name: shape}, in the order of computation."""
    row, wide = (n_tokens, config.dim), (n_tokens, config.hidden_dim)
    q, k = ((n_tokens, n_heads, config.head_dim) for n_heads in (config.n_heads, config.n_kv_heads))
    square = (config.n_heads, n_tokens, n_tokens)
    attention = {"norm": row, "q": q, "k": k, "v": k, "q_rope": q, "k_rope": k}
    attention |= {"scores": square, "weights": square, "heads": row, "output": row}
    feed_forward = {"norm": row, "gate": wide, "up": wide, "hidden": wide, "output": row}
    shapes = {"embedding": row}
    for layer in range(config.n_layers):
        shapes |= {f"layers.{layer}.attention.{name}": shape for name, shape in attention.items()}
        shapes |= {f"layers.{layer}.feed_forward.{name}": shape for name, shape in feed_forward.items()}
        shapes[f"layers.{layer}.residual"] = row
    return shapes | {"norm": row, "logits": (n_tokens, config.vocab_size)}


def unembed(model: Model, ops, x: np.ndarray, tap: Tap | None = None) -> np.ndarray:
    """What a residual stream says about the next token: [n_tokens, dim] -> logits [n_tokens, vocab_size].

    Of the last layer's that is the model's answer; an earlier one's is a look into the model: the logit lens.
    """
    norm = ops.rms_norm(x, model.norm, model.config.norm_eps)
    logits = ops.matmul(norm, model.output)
    _show(tap, "", norm=norm, logits=logits)
    return logits


def _attention(layer, ops, config, x, freqs, cache, pos, tap):
    """[n_tokens, dim] -> [n_tokens, dim]: what each token takes from those before it."""
    n_tokens, prefix = len(x), f"{layer.name}.attention."
    norm = ops.rms_norm(x, layer.attention_norm, config.norm_eps)
    q, k, v = ops.matmul(norm, layer.wq, layer.wk, layer.wv)
    q = q.reshape(n_tokens, config.n_heads, config.head_dim)
    k = k.reshape(n_tokens, config.n_kv_heads, config.head_dim)
    v = v.reshape(n_tokens, config.n_kv_heads, config.head_dim)
    q_rope, k_rope = ops.rope(q, freqs), ops.rope(k, freqs)
    _show(tap, prefix, norm=norm, q=q, k=k, v=v, q_rope=q_rope, k_rope=k_rope)
    inner_tap = tap and (lambda name, array: tap(prefix + name, array))
    heads = ops.attention(q_rope, k_rope, v, cache, layer.number, pos, inner_tap)  # [n_tokens, dim]
    output = ops.matmul(heads, layer.wo)
    _show(tap, prefix, heads=heads, output=output)
    return output


def _feed_forward(layer, ops, config, x, tap):
    """[n_tokens, dim] -> [n_tokens, dim]: what each token makes of itself."""
    norm = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
    gate, up = ops.matmul(norm, layer.w1, layer.w3)  # [n_tokens, hidden_dim]
    hidden = ops.swiglu(gate, up)
    output = ops.matmul(hidden, layer.w2)
    _show(tap, f"{layer.name}.feed_forward.", norm=norm, gate=gate, up=up, hidden=hidden, output=output)
    return output


def _show(tap, prefix, **arrays):
    if tap:
        for name, array in arrays.items():
            tap(prefix + name, array)
