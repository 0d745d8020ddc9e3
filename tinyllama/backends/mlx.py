"""The table on MLX, Apple's array library: on the GPU of a Mac, on NVIDIA's, or on a CPU, to try it.

MLX notes what is to be computed, until somebody looks: `to_numpy`, once a token, and `matmul`, where so much
has been noted that nobody could stop it soon. Weights become MLX's own form: integers of a few bits, and for
each 32 a scale and a bias, w = scale * q + bias. Most of ggml's types are that already, in another order of
bits; those with a scale for 16 weights become 8 bits or floats, which changes them a little.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from .. import ops
from ..config import Config
from ..errors import require
from ..quant import BLOCK, TYPES
from ..tensor import Tensor
from .numpy import FLOAT_LIMIT, HALF_LIMIT, INT8_LIMIT, Backend

try:
    from mlx import core as mx

    from ..machine.gpu import ON_GPU, compute, computing, device, free_memory, noting
except ImportError as error:
    raise ImportError(f"it takes mlx: pip install 'tinyllama-lab[mlx]' ({error})") from error
try:
    from .native import Native
except ImportError:
    Native = Backend

#: Types that MLX's form says exactly, and the bits of their integers (iq4: of those in the table of levels).
BITS = dict.fromkeys(("q4_0", "q4_1", "q4_k", "q4_0_2023", "q4_0_2023_planar", "q4_1_2023"), 4)
BITS |= dict.fromkeys(("q5_0", "q5_1", "q5_k"), 5) | dict.fromkeys(("q8_0", "iq4_nl", "iq4_xs"), 8)

#: Types of activations, and the error of a step that they explain, as in numpy.py.
LIMITS = {"float32": FLOAT_LIMIT, "float16": HALF_LIMIT, "bfloat16": INT8_LIMIT}

AT_ONCE = 10**11 if ON_GPU else 2 * 10**9  # multiply-adds between two looks at the flag that stops: 0.1 s
PORTION = 2**20  # weights that are packed at a time: they stay in the cache


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight as MLX multiplies by it."""

    type: str  # that it has in its file
    shape: tuple[int, int]  # [n_out, n_in]
    bits: int  # of an integer; 0: `arrays` is its numbers alone
    arrays: list[mx.array]  # uint32 [n_out, n_in * bits / 32]; scales and biases, [n_out, n_in / 32]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


def to_numpy(x) -> np.ndarray:
    """As float32, if it is MLX's."""
    with computing:
        return np.asarray(x.astype(mx.float32)) if isinstance(x, mx.array) else x


class Cache(ops.KVCache):
    """Keys and values on the device."""

    to_numpy = staticmethod(to_numpy)

    def __init__(self, *what):
        with noting():
            super().__init__(*what)

    def new(self, layer: int, room: int):
        return mx.zeros((self._heads, room, self._width), getattr(mx, self.dtype))

    def append(self, layer: int, k, v) -> tuple:  # all in NumPy if k and v are
        found = super().append(layer, k, v)
        return found if isinstance(k, mx.array) else tuple(map(to_numpy, found))

    def fork(self, *what) -> "Cache":
        with noting():
            return super().fork(*what)

    def extend(self, *what) -> None:
        self.compute()  # also what no logits need
        super().extend(*what)

    def compute(self) -> None:
        """Keys and values that have been noted."""
        compute(self.keys, self.values)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class Mlx(Backend):
    """NumPy's table with its entries on MLX; options as `get_backend` says."""

    name = "mlx"
    uses_blas, makes_scores, cache = False, not ON_GPU, Cache
    cast, concatenate = Native.cast, staticmethod(lambda a: mx.concatenate(a) if len(a) > 1 else a[0])
    rms_norm, free_memory = staticmethod(mx.fast.rms_norm), staticmethod(free_memory)
    swiglu = staticmethod(mx.compile(_swiglu, shapeless=True) if ON_GPU else _swiglu)  # CPUs compile slowly

    def __init__(self, threads: int, dtype: str | None = None, inexact_as: str = "8-bit"):
        super().__init__(threads)
        self.cache_type = dtype or ("float16" if ON_GPU else "float32")
        require(self.cache_type in LIMITS, f"no dtype {dtype!r}: there are {', '.join(LIMITS)}")
        require(inexact_as in ("8-bit", "float"), f"no inexact_as {inexact_as!r}: there are 8-bit, float")
        self._dtype = getattr(mx, self.cache_type)
        if self.cache_type == "float16":
            self.hint = ", or has numbers too large for float16: try dtype bfloat16 or float32"
        self._sums = self._dtype if ON_GPU else mx.float32  # GPUs sum in float32; CPUs are slow in others
        self._inexact_bits, self._noted = 8 * (inexact_as == "8-bit"), 0

    @contextmanager
    def running(self, cancel=None) -> Iterator[None]:
        with super().running(cancel), noting():
            yield

    def array(self, x) -> mx.array:
        return mx.array(x).astype(self._dtype)

    def to_numpy(self, x) -> np.ndarray:
        self._noted = 0
        return to_numpy(x)

    # --- weights --------------------------------------------------------------------------------------

    def bits(self, type: str) -> int:  # of an integer, as in Matrix
        return 0 if TYPES[type].block == 1 else BITS.get(type, self._inexact_bits)

    def prepare(self, tensor: Tensor, copy: bool = True):
        """As ops.prepare, but a matrix becomes a Matrix, and all are copies."""
        if len(tensor.shape) == 1:
            return self._held(tensor, np.array(tensor.dequantize()))
        pieces = []
        for piece in tensor.pieces:
            step = max(1, PORTION // piece.shape[1])
            parts = dict.fromkeys(range(0, piece.shape[0], step))

            def pack(start: int, piece=piece, step=step, parts=parts) -> None:
                with noting():
                    parts[start] = self._packed(tensor, piece.blocks(start, start + step))
                    compute(parts[start])

            self._share(pack, list(parts))
            pieces.append([mx.concatenate(arrays) for arrays in zip(*parts.values(), strict=True)])
        whole = [mx.concatenate(arrays, tensor.axis) for arrays in zip(*pieces, strict=True)]
        compute(whole)
        return Matrix(tensor.type, tensor.shape, self.bits(tensor.type), whole)

    def _packed(self, tensor: Tensor, blocks: np.ndarray) -> list[mx.array]:
        """Some rows, as Matrix.arrays."""
        kind, bits, held = TYPES[tensor.type], self.bits(tensor.type), lambda x: self._held(tensor, x)
        if kind.name in BITS:
            scale, minimum = (x if x is None else x.reshape(len(x), -1) for x in kind.factors(blocks))
            zero = 0 if minimum is not None else 1 << (bits - 1)
            q = kind.integers(blocks).reshape(len(blocks), -1).view(np.uint8) + np.uint8(zero)
            eights = q.view(np.uint64)  # each becomes `bits` bytes: neighbours close up, then pairs, fours
            for n in (1, 2, 4):
                low = np.uint64(((1 << n * bits) - 1) * sum(1 << at for at in range(0, 64, 16 * n)))
                eights = eights & low | eights >> np.uint64(n * (8 - bits)) & low << np.uint64(n * bits)
            q = eights[..., None].view(np.uint8)[..., :bits].reshape(len(blocks), -1).view(np.uint32)
            return [mx.array(q), held(scale), held(-zero * scale if minimum is None else -minimum)]
        bf16 = kind.name == "bf16"
        numbers = mx.array(blocks).view(mx.bfloat16) if bf16 else mx.array(kind.dequantize(blocks))
        if not bits:
            return [held(numbers)]
        q, *factors = mx.quantize(numbers, BLOCK, bits)
        return [q, *map(held, factors)]

    def _held(self, tensor: Tensor, numbers) -> mx.array:
        """Numbers as `dtype`, if that can hold them."""
        held = self.array(numbers)
        lost = mx.any(mx.isinf(held) & ~mx.isinf(mx.array(numbers)))
        require(not to_numpy(lost), f"{tensor.name} is too large for {self.cache_type}: name another dtype")
        return held

    # --- operations, as `ops` defines them ------------------------------------------------------------

    def embedding(self, table: Matrix, tokens: np.ndarray) -> mx.array:
        rows = [array[mx.array(tokens)] for array in table.arrays]
        return mx.dequantize(*rows, BLOCK, table.bits) if table.bits else rows[0]

    def matmul(self, x: mx.array, *weights: Matrix):
        wide, outs = x.astype(self._sums), []
        for weight in weights:
            bits, arrays = weight.bits, weight.arrays
            out = mx.quantized_matmul(wide, *arrays, True, BLOCK, bits) if bits else wide @ arrays[0].T
            outs.append(out.astype(self._dtype))
            self._noted += x.size * weight.shape[0]
        if self._noted > AT_ONCE:
            compute(outs)
            self._noted = 0
        return outs if len(outs) > 1 else outs[0]

    def rope_freqs(self, config: Config, positions: np.ndarray, factors: np.ndarray | None = None) -> tuple:
        """What `rope` takes, which makes the rotations itself: positions, divisors of angles, length."""
        divisors = config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        divisors = mx.array(divisors if factors is None else divisors * factors).astype(mx.float32)
        return mx.array(positions), divisors, config.rope_scaling.magnitude if config.rope_scaling else 1

    def rope(self, x: mx.array, freqs: tuple) -> mx.array:
        positions, divisors, length = freqs
        how = {"traditional": True, "base": None, "scale": 1.0, "offset": positions, "freqs": divisors}
        turned = mx.fast.rope(x[:, :, None], x.shape[-1], **how)[:, :, 0]  # each token as a text by itself
        return turned if length == 1 else turned * length

    def attention(self, q, k, v, cache: Cache, layer: int, taps=None, window: int = 0) -> mx.array:
        if taps:  # it looks at what only exists in the definition
            return self.array(ops.attention(*map(to_numpy, (q, k, v)), cache, layer, taps, window))
        keys, values = (x[None] for x in cache.append(layer, k, v))  # [1, n_kv_heads, n_past, head_dim]
        (n_tokens, _, head_dim), n_past, mask = q.shape, keys.shape[2], "causal" if len(q) > 1 else None
        if 0 < window < n_past:
            age = np.arange(len(cache), n_past)[:, None] - np.arange(n_past)
            mask = mx.array((age >= 0) & (age < window))
        how = {"scale": head_dim**-0.5, "mask": mask}
        heads = mx.fast.scaled_dot_product_attention(q.swapaxes(0, 1)[None], keys, values, **how)
        return heads[0].swapaxes(0, 1).reshape(n_tokens, -1)

    def tolerance(self, operation: str, types: Iterable[str] = ()) -> float:
        """Rounding to `dtype`; RoPE's angles in float32; weights that aren't exact."""
        inexact = any(self.bits(type) and type not in BITS for type in types)
        return max(LIMITS[self.cache_type], HALF_LIMIT * (operation == "rope"), INT8_LIMIT * inexact)

    def prepared_bytes(self, tensor: Tensor) -> int:
        bits, size, n = self.bits(tensor.type), self._dtype.size, math.prod(tensor.shape)
        return n * bits // 8 + 2 * size * n // BLOCK if bits else size * n

    def keeps_in_file(self, tensors: dict[str, Tensor], mmap: bool = False) -> bool:
        return False

    @property
    def title(self) -> str:
        return f"backend mlx ({device()}), {self.cache_type}"
