"""Every operation of a LLaMA, in NumPy: the definition.

Each function here is an entry of the table that `model.forward` is handed (see `backends`). A faster
backend replaces entries; what it must compute is what stands here. All numbers are float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .config import Config
from .quant import Tensor

#: Weights that each thread turns to float32 at a time while a matrix is multiplied: 2 MB.
CHUNK = 2**19

#: Multiply-adds below which handing jobs to threads takes longer than doing them: about 0.3 ms.
WORTH_SHARING = 2**22

Tap = Callable[[str, np.ndarray], None]


def as_numbers(tensor: Tensor) -> np.ndarray:
    """All of a weight as float32 in memory of its own: what its file holds may change."""
    array = tensor.dequantize()
    return array.copy() if tensor.type == "f32" and len(tensor.parts) == 1 else array


def prepare(tensor: Tensor, copy: bool, suspect: Callable[[str], None] | None = None) -> Tensor | np.ndarray:
    """Turn a weight of the file into what the other operations take.

    Args:
        tensor: as it lies in the file.
        copy: dequantize it now, once. Otherwise it stays in its file, and `matmul` dequantizes it, a few rows
            at a time, on every call.
        suspect: called with the name of one that holds NaN or infinity; of those that stay in their file
            nobody knows.
    Returns:
        A Tensor [n_out, n_in]; of a norm, which is small, its array [dim].
    """
    if suspect and (copy or len(tensor.shape) == 1) and not tensor.is_finite():
        suspect(tensor.name)
    if len(tensor.shape) == 1:
        return as_numbers(tensor)
    return Tensor(tensor.name, "f32", tensor.shape, (as_numbers(tensor),)) if copy else tensor


def embedding(table: Tensor, tokens: np.ndarray) -> np.ndarray:
    """Look up each token's row: ids [n_tokens] -> [n_tokens, dim]."""
    return table.take(tokens)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / rms(x) * weight over the last axis, [n_tokens, dim] -> [n_tokens, dim] (arXiv:1910.07467)."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + np.float32(eps)) * weight


def matmul(x: np.ndarray, *weights: Tensor, run: Callable = map):
    """Multiply one input by one or several weights.

    Args:
        x: [n_tokens, n_in]
        weights: each [n_out, n_in], of any type.
        run: how jobs are carried out: `map`, or a thread pool's. Jobs are cut the same way however many
            threads there are, so the result is the same to the last bit.
    Returns:
        x @ weight.T, [n_tokens, n_out]: an array for one weight, a list for several.
    """
    outputs = [np.empty((len(x), weight.shape[0]), np.float32) for weight in weights]

    def multiply(weight, out, start, stop):
        np.matmul(x, weight.dequantize(start, stop).T, out=out[:, start:stop])

    jobs = [
        (weight, out, start, stop)
        for weight, out in zip(weights, outputs, strict=True)
        for start, stop in _row_chunks(weight)
    ]
    n_multiply_adds = len(x) * sum(out.shape[1] * x.shape[1] for out in outputs)
    for _ in (run if n_multiply_adds >= WORTH_SHARING else map)(multiply, *zip(*jobs, strict=True)):
        pass
    return outputs if len(weights) > 1 else outputs[0]


def _row_chunks(weight: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of runs of rows with about CHUNK weights each."""
    n_out, n_in = weight.shape
    step = max(1, CHUNK // n_in)
    return [(start, min(start + step, n_out)) for start in range(0, n_out, step)]


def rope_freqs(config: Config, pos: int, n_tokens: int, factors: np.ndarray | None = None) -> np.ndarray:
    """The rotations of RoPE (arXiv:2104.09864): e^(i * position * theta^(-2j / head_dim)).

    Args:
        pos: position of the first token.
        factors: Llama 3.1's divisors of the frequencies, [head_dim / 2], or None.
    Returns:
        complex64 [n_tokens, head_dim / 2]: Meta's freqs_cis.
    """
    freqs = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if factors is not None:
        freqs = freqs / factors
    return np.exp(1j * np.outer(np.arange(pos, pos + n_tokens), freqs)).astype(np.complex64)


def rope(x: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """Turn each pair (x[2j], x[2j+1]) of every head by its position's angle.

    [n_tokens, n_heads, head_dim] with freqs [n_tokens, head_dim / 2] -> the same shape as x.
    """
    pairs = np.ascontiguousarray(x).view(np.complex64)  # a pair is one complex number, turning is a product
    return (pairs * freqs[:, None, :]).view(np.float32)


@dataclass
class KVCache:
    """Keys and values of every token so far, so that a new token computes only its own.

    Attributes:
        keys, values: [n_layers, n_kv_heads, n_ctx, head_dim]
    """

    keys: np.ndarray
    values: np.ndarray

    def append(self, layer: int, pos: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store k, v [n_tokens, n_kv_heads, head_dim] from `pos` on.

        Returns all keys and values so far, [n_kv_heads, n_past, head_dim].
        """
        n_past = pos + len(k)
        self.keys[layer, :, pos:n_past] = k.swapaxes(0, 1)
        self.values[layer, :, pos:n_past] = v.swapaxes(0, 1)
        return self.keys[layer, :, :n_past], self.values[layer, :, :n_past]


def new_cache(config: Config, n_ctx: int) -> KVCache:
    """Room for n_ctx tokens. The system gives the memory as it is written to, not here."""
    shape = (config.n_layers, config.n_kv_heads, n_ctx, config.head_dim)
    return KVCache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def softmax(x: np.ndarray) -> np.ndarray:
    """e^x / sum(e^x) over the last axis, without overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cache: KVCache,
    layer: int,
    pos: int,
    tap: Tap | None = None,
    softmax: Callable = softmax,
) -> np.ndarray:
    """Append k and v to the cache, then let each token attend to itself and all before it.

    softmax(q @ keys.T / sqrt(head_dim)) @ values (arXiv:1706.03762). Where n_kv_heads < n_heads,
    neighbouring query heads share a key/value head (arXiv:2305.13245).

    Args:
        q: [n_tokens, n_heads, head_dim], turned by `rope`; so is k.
        k, v: [n_tokens, n_kv_heads, head_dim]
        pos: position of the first token.
        tap: called with "scores" and "weights", [n_heads, n_tokens, n_past].
        softmax: the function, for backends that have a faster one.
    Returns:
        [n_tokens, dim], the heads side by side.
    """
    n_tokens, n_heads, head_dim = q.shape
    keys, values = cache.append(layer, pos, k, v)  # [n_kv_heads, n_past, head_dim]
    n_kv_heads, n_past, _ = keys.shape
    queries = q.reshape(n_tokens, n_kv_heads, n_heads // n_kv_heads, head_dim).transpose(1, 2, 0, 3)
    scores = queries @ keys[:, None].swapaxes(-1, -2)  # [n_kv_heads, heads that share, n_tokens, n_past]
    scores *= np.float32(head_dim**-0.5)
    if n_tokens > 1:
        future = np.arange(n_past) > np.arange(pos, n_past)[:, None]
        scores[..., future] = -np.inf
    weights = softmax(scores)
    if tap:
        tap("scores", scores.reshape(n_heads, n_tokens, n_past))
        tap("weights", weights.reshape(n_heads, n_tokens, n_past))
    return (weights @ values[:, None]).transpose(2, 0, 1, 3).reshape(n_tokens, n_heads * head_dim)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, where silu(x) = x / (1 + e^-x) (arXiv:2002.05202); [n_tokens, hidden_dim]."""
    with np.errstate(over="ignore"):  # below -88 e^-x is infinite, and x / infinity the 0 that is meant
        return gate / (1 + np.exp(-gate)) * up
