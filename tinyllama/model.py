"""What a LLaMA computes, once, in the terms of the paper (arXiv:2302.13971, section 2.2).

`forward` is the one forward pass of this project. It is handed a table of operations (`backends`), so
the same lines run in plain NumPy and in C, and every step can be looked at, and changed, through a tap.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .config import Config
from .errors import check_cancelled
from .ops import INNER, KVCache, Tap, rope_factors
from .tensor import Tensor


@dataclass(frozen=True)
class Model:
    """All weights of a LLaMA, as the backend's `prepare` made them."""

    config: Config
    tok_embeddings: Any
    layers: list[dict[str, Any]]  # of each a dict by the last word of Meta's name: "wq", "attention_norm"
    norm: Any
    output: Any  # `tok_embeddings` itself where the file has only one of them
    rope_factors: np.ndarray | None = None  # divisors of RoPE's frequencies, [head_dim / 2]


def build(config: Config, tensors: dict[str, Tensor], prepare: Callable, progress: Callable = iter) -> Model:
    """Prepare every weight of a checkpoint for a backend.

    Args:
        tensors: by Meta's names; of a machine that has but some layers, embedding or output may be missing.
        prepare: Tensor -> what the backend's operations take.
        progress: wraps the iteration over the tensors, as tqdm does.
    """
    ready, layers = {}, [{} for _ in range(config.n_layers)]
    for name in progress(list(tensors)):
        check_cancelled()
        short = name.removesuffix(".weight")
        ready[short] = prepare(tensors[name])
        if short.startswith("layers."):
            _, number, *words = short.split(".")
            layers[int(number)][_key(words)] = ready[short]
    output = ready.get("output", ready.get("tok_embeddings") if "norm" in ready else None)
    own, factors = tensors.get("rope_freqs.weight"), rope_factors(config)
    if own:  # of a file that has both, both count
        factors = own.dequantize() * (1 if factors is None else factors)
    return Model(config, ready.get("tok_embeddings"), layers, ready.get("norm"), output, factors)


def _key(words: list[str]) -> str:
    """["attention", "wq"] -> "wq", ["attention", "wq", "bias"] -> "wq.bias"."""
    return ".".join(words[-2:] if words[-1] == "bias" else words[-1:])


@dataclass
class Step:
    """Tokens of one text that go through the model at once."""

    tokens: Sequence[int]  # ids, [n_tokens]
    cache: KVCache  # of `ops.new_cache`: the tokens before them
    n_logits: int = 1  # for how many of them, the last ones, logits are computed
    taps: dict[str, Tap] = field(default_factory=dict)  # by the names of `tap_shapes`: who sees these values
    choose: Callable | None = None  # what becomes of logits that are on another machine: `choosing.Choice`


def forward(
    model: Model, ops, tokens: Sequence[int], cache: KVCache, *, last: bool = False, taps=None
) -> np.ndarray:
    """Run tokens of one text through the model, as `forward_texts`: logits, [n_tokens, vocab_size].

    Args:
        last: compute the logits of the last token only, [1, vocab_size].
        taps: as Step has them.
    """
    return forward_texts(model, ops, [Step(tokens, cache, 1 if last else len(tokens), taps or {})])[0]


def forward_texts(model: Model, ops, steps: Sequence[Step], x=None) -> list[np.ndarray]:
    """Run tokens of one or several texts through the model together, and append them to their caches.

    Their tokens are rows of one input, so a weight is read once for all; only attention takes each text by
    itself, since a token sees those of its own text.

    Args:
        ops: the table of operations, a `backends.Backend`.
        x: [n_tokens, dim], what the layers before made, if the model has but the later ones of another.
    Returns:
        logits of each text, [n_logits, vocab_size], or where the last layers are missing the residual stream.
    Raises:
        Cancelled: before the next layer at the latest; the caches then hold what they held before.
    """
    x = embed(model, ops, np.concatenate([step.tokens for step in steps]), steps) if x is None else x
    for table, first, stop in ops.stages(model.config.n_layers):
        x = run_layers(model, table, table.array(x), steps, first, stop)
    found = [ops.to_numpy(x)] if model.output is None else _logits(model, ops, x, steps)
    for step in steps:
        step.cache.extend(np.asarray(step.tokens).tolist(), len(x))
    return found


def _logits(model, ops, x, steps):
    """Of each text the last n_logits tokens'."""
    ends = [replace(step, tokens=step.tokens[len(step.tokens) - step.n_logits :]) for step in steps]
    last = ops.concatenate([x[rows.stop - step.n_logits : rows.stop] for step, rows in _rows(steps)])
    none = np.empty((0, model.config.vocab_size), np.float32)
    logits = ops.to_numpy(unembed(model, ops, last, ends)) if len(last) else none
    return np.split(logits, np.cumsum([step.n_logits for step in steps])[:-1])


def _rows(steps: Sequence[Step]) -> Iterator[tuple[Step, slice]]:
    """Where the tokens of each text lie in the residual stream."""
    end = 0
    for step in steps:
        start, end = end, end + len(step.tokens)
        yield step, slice(start, end)


def seeing(ops, steps: Sequence[Step], prefix: str = "") -> Callable:
    """see(name, array) -> array, through which every value goes: texts that tap it see their rows.

    What a tap returns, [n_tokens, ...] like what it was shown, takes the place of these rows; None changes
    nothing. The name is what follows the prefix.
    """
    if not any(step.taps for step in steps):
        return lambda name, array: array

    def see(name: str, array):
        taps = [step.taps.get(prefix + name) for step in steps]
        if not any(taps):
            return array
        whole = ops.to_numpy(array)
        parts = [(tap, whole[rows]) for tap, (_, rows) in zip(taps, _rows(steps), strict=True)]
        seen = [(part, tap(part) if tap and len(part) else None) for tap, part in parts]
        changed = any(new is not None for _, new in seen)
        return ops.array(np.concatenate([p if new is None else new for p, new in seen])) if changed else array

    return see


def embed(model: Model, ops, tokens: np.ndarray, steps: Sequence[Step] = ()) -> np.ndarray:
    """The first residual stream: ids [n_tokens] -> [n_tokens, dim]."""
    see = seeing(ops, steps)
    return see("embedding", ops.embedding(model.tok_embeddings, tokens))


def run_layers(
    model: Model, ops, x: np.ndarray, steps: Sequence[Step], first: int = 0, stop: int | None = None
) -> np.ndarray:
    """Run a residual stream through layers first:stop, [n_tokens, dim] -> [n_tokens, dim].

    Keys and values are stored behind what the caches hold; they count once the caller adds the tokens to
    them.
    """
    config, factors = model.config, model.rope_factors
    positions = np.concatenate([len(step.cache) + np.arange(len(step.tokens)) for step in steps])
    freqs = ops.rope_freqs(config, positions, factors)  # [n_tokens, head_dim / 2]
    for number, layer in list(enumerate(model.layers))[first:stop]:
        check_cancelled()
        see = seeing(ops, steps, f"layers.{number}.")
        x = see("residual_mid", x + _attention(layer, ops, config, x, freqs, steps, number))
        x = see("residual", x + _feed_forward(layer, ops, config, x, steps, number))
    return x


def unembed(model: Model, ops, x: np.ndarray, steps: Sequence[Step] = ()) -> np.ndarray:
    """What a residual stream says about the next token: [n_tokens, dim] -> logits [n_tokens, vocab_size].

    For the last layer's it is the model's answer. For an earlier layer's it is what the model would say if it
    stopped there (the logit lens).
    """
    see = seeing(ops, steps)
    norm = see("norm", ops.rms_norm(ops.array(x), model.norm, model.config.norm_eps))
    return see("logits", ops.matmul(norm, model.output))


def _attention(layer, ops, config, x, freqs, steps, number):
    """[n_tokens, dim] -> [n_tokens, dim]: what each token takes from itself and those before it."""
    n_tokens, prefix = len(x), f"layers.{number}.attention."
    see = seeing(ops, steps, prefix)
    norm = see("norm", ops.rms_norm(x, layer["attention_norm"], config.norm_eps))
    q, k, v = ops.matmul(norm, layer["wq"], layer["wk"], layer["wv"])
    if config.biases:
        q, k, v = q + layer["wq.bias"], k + layer["wk.bias"], v + layer["wv.bias"]
    q = q.reshape(n_tokens, config.n_heads, config.head_dim)
    k = k.reshape(n_tokens, config.n_kv_heads, config.head_dim)
    v = v.reshape(n_tokens, config.n_kv_heads, config.head_dim)
    if config.qk_norms:
        q, k = _norm_heads(ops, q, layer["q_norm"], config), _norm_heads(ops, k, layer["k_norm"], config)
    q, k, v = see("q", q), see("k", k), see("v", v)
    q_rope, k_rope = see("q_rope", ops.rope(q, freqs)), see("k_rope", ops.rope(k, freqs))
    window, attended = config.sliding_window, []
    for step, rows in _rows(steps):
        own = q_rope[rows], k_rope[rows], v[rows]
        taps = {name: step.taps[prefix + name] for name in INNER if prefix + name in step.taps}
        attended.append(ops.attention(*own, step.cache, number, taps, window))
    heads = see("heads", ops.concatenate(attended))  # [n_tokens, q_dim]
    output = ops.matmul(heads, layer["wo"])
    if config.output_bias:
        output = output + layer["wo.bias"]
    return see("output", output)


def _norm_heads(ops, heads, weight, config):
    """RMSNorm of each head by itself, [n_tokens, n_heads, head_dim] -> the same."""
    return ops.rms_norm(heads.reshape(-1, config.head_dim), weight, config.norm_eps).reshape(heads.shape)


def _feed_forward(layer, ops, config, x, steps, number):
    """[n_tokens, dim] -> [n_tokens, dim]: what each token makes of itself."""
    see = seeing(ops, steps, f"layers.{number}.feed_forward.")
    norm = see("norm", ops.rms_norm(x, layer["ffn_norm"], config.norm_eps))
    gate, up = ops.matmul(norm, layer["w1"], layer["w3"])  # [n_tokens, hidden_dim]
    gate, up = see("gate", gate), see("up", up)
    hidden = see("hidden", ops.swiglu(gate, up))
    return see("output", ops.matmul(hidden, layer["w2"]))


def tap_shapes(config: Config, n_tokens: int) -> dict[str, tuple[int, ...]]:
    """What `forward` shows a tap of n_tokens without a past: {name: shape}, in the order of computation."""
    row, wide = (n_tokens, config.dim), (n_tokens, config.hidden_dim)
    q, k = ((n_tokens, n_heads, config.head_dim) for n_heads in (config.n_heads, config.n_kv_heads))
    square = (config.n_heads, n_tokens, n_tokens)
    steps = {"norm": row, "q": q, "k": k, "v": k, "q_rope": q, "k_rope": k}
    steps |= {"scores": square, "weights": square, "heads": (n_tokens, config.q_dim), "output": row}
    steps = {f"attention.{name}": shape for name, shape in steps.items()} | {"residual_mid": row}
    feed_forward = {"norm": row, "gate": wide, "up": wide, "hidden": wide, "output": row}
    steps |= {f"feed_forward.{name}": shape for name, shape in feed_forward.items()} | {"residual": row}
    layers = {f"layers.{i}.{name}": steps[name] for i in range(config.n_layers) for name in steps}
    return {"embedding": row, **layers, "norm": row, "logits": (n_tokens, config.vocab_size)}
