"""Every operation of a LLaMA, in NumPy: the definition.

`embedding`, `rms_norm`, `matmul`, `rope`, `attention` and `swiglu` are the entries of the table that
`model.forward` is handed (see `backends`). A faster backend replaces entries; what it must compute is what
stands here. Numbers are float32.
"""

from collections.abc import Callable
from copy import copy

import numpy as np

from .config import Config
from .errors import require
from .tensor import Tensor

#: Weights that each thread turns to float32 at a time while a matrix is multiplied: 2 MB.
CHUNK = 2**19

#: Multiply-adds below which handing jobs to threads takes longer than doing them: about 0.3 ms.
WORTH_SHARING = 2**22

#: So many tokens go through a model together with the bits that each gets alone, on backend C. Steps of
#: several texts are no larger, and pieces of a long prompt no shorter.
FEW = 16

#: Sees a value, [n_tokens, ...], and may return another of the same shape, which takes its place.
Tap = Callable[[np.ndarray], np.ndarray | None]
INNER = ("scores", "weights")  # what only exists inside of `attention`, [n_heads, n_tokens, n_past]


def prepare(tensor: Tensor, copy: bool) -> Tensor | np.ndarray:
    """Turn a weight of the file into what the other operations take.

    Args:
        tensor: as it lies in the file.
        copy: dequantize it now, once. Otherwise it stays in its file, and `matmul` dequantizes it, a few rows
            at a time, on every call.
    Returns:
        A Tensor [n_out, n_in]; of a vector, which is small, its array in memory of its own.
    """
    if len(tensor.shape) == 1:
        return np.array(tensor.dequantize())
    return Tensor.from_array(tensor.name, np.array(tensor.dequantize())) if copy else tensor


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
    pairs, n_rows = list(zip(weights, outputs, strict=True)), max(1, CHUNK // x.shape[1])
    jobs = [(weight, out, row) for weight, out in pairs for row in range(0, weight.shape[0], n_rows)]

    def multiply(job: tuple[Tensor, np.ndarray, int]) -> None:
        weight, out, row = job
        out[:, row : row + n_rows] = (weight.dequantize(row, row + n_rows) @ x.T).T  # x @ w.T is slower

    n_multiply_adds = x.size * sum(weight.shape[0] for weight in weights)
    for _ in (run if n_multiply_adds >= WORTH_SHARING else map)(multiply, jobs):
        pass
    return outputs if len(weights) > 1 else outputs[0]


def rope_factors(config: Config) -> np.ndarray | None:
    """By what a model's RoPE scaling divides the frequencies, [head_dim / 2]; None if it has none.

    Stretched to `factor` times the context, a pair turns that much slower. linear does so with all pairs
    (arXiv:2306.15595). The others leave alone what turns often within the original context, and blend in
    between: llama3 by the number of turns, yarn (arXiv:2309.00071) by the number of the pair.
    """
    scaling, pairs = config.rope_scaling, np.arange(config.head_dim // 2)
    if scaling is None:
        return None
    theta, width = config.rope_theta, config.head_dim
    most = scaling.original_context / (2 * np.pi)  # turns, of the first pair
    if scaling.kind == "linear":
        kept = 0 * pairs  # the share of each pair's turns that is left alone
    elif scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((most * theta ** (-2 * pairs / width) - low) / (high - low), 0, 1)
    else:
        betas = np.array([scaling.beta_fast, scaling.beta_slow])
        first, last = np.log(most / betas) / np.log(theta) * width / 2  # the pairs that turn so often
        first, last = max(np.floor(first), 0), min(np.ceil(last), width - 1)
        kept = 1 - np.clip((pairs - first) / max(last - first, 0.001), 0, 1)
    return 1 / (kept + (1 - kept) / scaling.factor)


def rope_freqs(config: Config, positions: np.ndarray, factors: np.ndarray | None = None) -> np.ndarray:
    """The rotations of RoPE (arXiv:2104.09864): e^(i * position * theta^(-2j / head_dim)).

    Args:
        positions: of the tokens in their texts, [n_tokens].
        factors: divisors of the frequencies, [head_dim / 2], or None: a file's own, or `rope_factors`.
    Returns:
        complex64 [n_tokens, head_dim / 2]: Meta's freqs_cis. With yarn they are longer than 1.
    """
    freqs = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if factors is not None:
        freqs = freqs / factors
    turned = np.exp(1j * np.outer(positions, freqs))
    if config.rope_scaling:
        turned *= config.rope_scaling.magnitude
    return turned.astype(np.complex64)


def rope(x: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """Turn each pair (x[2j], x[2j+1]) of every head by its position's angle.

    [n_tokens, n_heads, head_dim] with freqs [n_tokens, head_dim / 2] -> the same shape as x.
    """
    pairs = np.ascontiguousarray(x).view(np.complex64)  # a pair is one complex number, turning is a product
    return (pairs * freqs[:, None, :]).view(np.float32)


class KVCache:
    """Keys and values of the tokens so far, so that a new token computes only its own.

    Its memory grows as it fills, a layer at a time.

    Attributes:
        ids: the tokens that it holds; their number is its length, and the position of the next token.
        n_ctx: how many it may hold.
        n_many: the first so many were computed with more than FEW others each.
        model: the Checkpoint that it is of, for `save`; None of a cache by itself.
        keys, values: of each layer, [n_kv_heads, room, head_dim].
        dtype: the name of their type, "float16".
        in_file: they lie in a file, read-only.
        edited: some were computed from values that `Llama.edit` replaced.
    """

    def __init__(self, config: Config, n_ctx: int, dtype: str = "float32", model=None):
        self.ids: list[int] = []
        self.n_ctx, self.n_many, self.model, self.dtype = n_ctx, 0, model, dtype
        self.in_file = self.edited = False
        self._heads, self._width = config.n_kv_heads, config.head_dim
        self.keys, self.values = ([self.new(i, 0) for i in range(config.n_layers)] for _ in range(2))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes now."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def trim(self, n_tokens: int) -> None:
        """Forget all but the first n_tokens."""
        del self.ids[n_tokens:]
        self.n_many = min(self.n_many, len(self))

    def extend(self, tokens: list[int], n_together: int) -> None:
        """Count tokens whose keys and values have been stored, of so many that were computed together."""
        if n_together > FEW and self.n_many == len(self):
            self.n_many += len(tokens)
        self.ids += tokens

    def fork(self, n_tokens: int | None = None, n_ctx: int | None = None) -> "KVCache":
        """A copy, of the first n_tokens if there are more, that goes on by itself, with room for n_ctx."""
        other = copy(self)
        other.ids, other.n_ctx, other.in_file = self.ids[:n_tokens], n_ctx or self.n_ctx, False
        other.n_many = min(self.n_many, len(other))
        other.keys = [other.grown(i, keys) for i, keys in enumerate(self.keys)]
        other.values = [other.grown(i, values) for i, values in enumerate(self.values)]
        return other

    def save(self, path, n_tokens: int | None = None) -> None:
        """Write it, or its first n_tokens, to a file, of which `Llama.load_cache` makes it again."""
        from .formats.cache_file import write  # here: few are saved

        write(self, path, n_tokens)

    def room(self, layer: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's arrays, with room for n_tokens more. Raises TinyllamaError where the context is full."""
        n_past = len(self.ids) + n_tokens
        if self.keys[layer].shape[1] < n_past:
            require(n_past <= self.n_ctx, f"the context is full: {n_past} tokens, ctx_size is {self.n_ctx}")
            for arrays in (self.keys, self.values):
                arrays[layer] = self.grown(layer, arrays[layer], n_tokens)
        return self.keys[layer], self.values[layer]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store k, v [n_tokens, n_kv_heads, head_dim] behind the tokens in `ids`.

        Returns all keys and values so far, [n_kv_heads, n_past, head_dim].
        """
        keys, values = self.room(layer, len(k))
        n_past = len(self) + len(k)
        keys[:, len(self) : n_past] = k.swapaxes(0, 1)
        values[:, len(self) : n_past] = v.swapaxes(0, 1)
        return keys[:, :n_past], values[:, :n_past]

    def grown(self, layer: int, array: np.ndarray, more: int = 0) -> np.ndarray:
        """A copy of keys or values of a layer with room for more tokens and a quarter beyond."""
        n_past = len(self) + more  # with little room, every token would copy all before it
        grown = self.new(layer, min(self.n_ctx, n_past + n_past // 4 + 32))
        grown[:, : len(self)] = array[:, : len(self)]
        return grown

    to_numpy = staticmethod(np.asarray)  # what `keys` and `values` have

    def new(self, layer: int, room: int) -> np.ndarray:
        """Where keys or values of so many tokens of a layer will lie."""
        return np.empty((self._heads, room, self._width), self.dtype)


def softmax(x: np.ndarray) -> np.ndarray:
    """e^x / sum(e^x) over the last axis, without overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def tapped(taps: dict[str, Tap] | None, name: str, array: np.ndarray) -> np.ndarray:
    """A value, or what the tap of its name has returned in its place."""
    new = taps[name](array) if taps and name in taps else None
    return array if new is None else new


def attention(q, k, v, cache: KVCache, layer: int, taps=None, window: int = 0, softmax=softmax) -> np.ndarray:
    """Append k and v to the cache, then let each token attend to itself and all before it.

    softmax(q @ keys.T / sqrt(head_dim)) @ values (arXiv:1706.03762). Where n_kv_heads < n_heads,
    neighbouring query heads share a key/value head (arXiv:2305.13245).

    Args:
        q: [n_tokens, n_heads, head_dim], turned by `rope`; so is k.
        k, v: [n_tokens, n_kv_heads, head_dim]
        taps: of the values in INNER.
        window: how many tokens each attends to, itself and those right before it; 0 for all.
        softmax: the function, for backends that have a faster one.
    Returns:
        [n_tokens, q_dim], the heads side by side.
    """
    n_tokens, n_heads, head_dim = q.shape
    keys, values = cache.append(layer, k, v)  # [n_kv_heads, n_past, head_dim]
    n_kv_heads, n_past, _ = keys.shape
    queries = q.reshape(n_tokens, n_kv_heads, n_heads // n_kv_heads, head_dim).transpose(1, 2, 0, 3)
    scores = (queries @ keys[:, None].swapaxes(-1, -2)).reshape(n_heads, n_tokens, n_past)
    scores *= np.float32(head_dim**-0.5)
    age = np.arange(len(cache), n_past)[:, None] - np.arange(n_past)  # of each past token, for each new one
    scores[:, (age < 0) | (age >= (window or n_past))] = -np.inf
    scores = tapped(taps, "scores", scores)
    weights = tapped(taps, "weights", softmax(scores))
    shared = weights.reshape(n_kv_heads, -1, n_tokens, n_past)  # by the heads that share keys and values
    return (shared @ values[:, None]).transpose(2, 0, 1, 3).reshape(n_tokens, n_heads * head_dim)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, where silu(x) = x / (1 + e^-x) (arXiv:2002.05202); [n_tokens, hidden_dim]."""
    with np.errstate(over="ignore"):  # below -88 e^-x is infinite, and x / infinity the 0 that is meant
        return gate / (1 + np.exp(-gate)) * up
