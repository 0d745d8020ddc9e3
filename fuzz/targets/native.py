"""The C backend: calls of every function, odd shapes, any bytes as blocks and any numbers, on every level.

An input is a list of choices. Where every argument that they make is right, the call gives what its
definition gives; where one is wrong, it is refused. Reading or writing out of bounds ends the process, and so
does whatever else C leaves undefined: `make fuzz` runs this on an extension that is built for that.
"""

from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from tinyllama import _native, ops, quant
from tinyllama.backends.native import Native
from tinyllama.quant import TYPES
from tinyllama.tensor import Piece, Tensor

from .. import sanitized
from ..calls import Call, Choices, close, wrong
from ..contract import Broken, must

#: Infinity and NaN, in single and in half precision.
WORDS = [b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\xff\x7f", b"\0\x7c", b"\xff\x7f", b"\xff\xff"]
WEIGHTS = list(TYPES)
NUMBERS = ["f32", "f16", "bf16"]
CASTS = [type for type in WEIGHTS if type not in ("bf16", "q6_k")]
TOKENS = [0, 1, 2, 3, 5, 6, 7, 12, 13, 17, 33, 40]
REFUSED = (TypeError, ValueError, IndexError, OverflowError, BufferError, SystemError, MemoryError)
LEVELS = _native.levels()
HUGE = 1e30  # inputs and scales beyond which what is computed on the way may be infinite

environment, coverage = sanitized.environment, sanitized.coverage


def check(data: bytes) -> bool:
    """Up to four calls, one after the other, since a call finds in memory what the last one left there."""
    choices, accepted = Choices(data), 0
    for _ in range(4):
        if choices.are_left():
            _native.use_level(choices.pick(LEVELS))
            with np.errstate(all="ignore"):
                accepted += called(choices.pick(CALLS)(choices), choices)
    return accepted > 0


def called(call: Call, choices: Choices) -> bool:
    """Call with right arguments, or with one that is wrong. Returns whether it was accepted."""
    is_wrong = choices.number(3) == 2
    arguments = wrong(choices, call) if is_wrong else call.arguments
    try:
        call.function(*arguments.values())
    except REFUSED as error:
        if is_wrong or (call.overflows and isinstance(error, OverflowError)):
            return False
        raise Broken(f"{call.function.__name__} refuses {arguments}") from error
    if is_wrong or call.overflows:
        raise Broken(f"{call.function.__name__} takes {arguments}")
    call.holds()
    return True


def inputs():
    """Any bytes are a list of choices: a few that can be made simpler, or enough for four calls."""
    many = st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).bytes(400))
    return st.binary(max_size=100) | many


def seeds() -> dict[str, bytes]:
    """Each call on the first level with the first of everything, and with random choices."""
    firsts = {f"{i}-{call.__name__}": bytes([0, i]) for i, call in enumerate(CALLS)}
    random = {f"random-{i}": np.random.default_rng(i).bytes(400) for i in range(8)}
    return firsts | random


# --- weights --------------------------------------------------------------------------------------


def tensor_of(choices: Choices, type: str, n_out: int, n_in: int) -> Tensor:
    """A weight of normally distributed numbers, of any numbers, or of any bytes; some in several parts."""
    kind, shape = TYPES[type], (n_out, n_in)
    if type != "q6_k" and choices.number(2):
        data = quant.quantize(choices.normal(shape), type).tobytes()
    else:
        data = choices.bytes(kind.nbytes(shape))
    skip = choices.pick([0, 0, 1])  # ggml's files align nothing
    whole, cut = Piece(bytes(skip) + data, skip, type, shape), choices.number(n_out)
    pieces = (whole.rows(0, cut), whole.rows(cut, n_out)) if cut else (whole,)
    return Tensor("", shape, pieces)


def prepared(choices: Choices, tensor: Tensor):
    """As a `_native.Weight`, copied or mapped."""
    return Native(choices.threads()).prepare(tensor, bool(choices.number(2)))


def width(choices: Choices, type: str) -> int:
    """Of a row of a weight."""
    return choices.size() if TYPES[type].block == 1 else TYPES[type].block * choices.pick([1, 2, 3, 5, 9])


def weight(choices: Choices) -> Call:
    """A new Weight, in memory of its own or in a file."""
    type = choices.pick(["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
    n_out, n_in = choices.size(), width(choices, type)
    arguments, mapped = {"type": type, "n_out": n_out, "n_in": n_in, "factor": 0.5}, bool(choices.number(2))

    def holds():
        made = _native.Weight(*arguments.values(), mapped=mapped)
        must((made.type, made.shape) == (type, (n_out, n_in)), "another weight")
        must((made.nbytes == 0) == mapped, "a mapped weight takes memory, another one none")

    return Call(_native.Weight, arguments, holds)


def pack(choices: Choices) -> Call:
    """A file's blocks, put into a weight as a whole: each row can be read back."""
    type = choices.pick(WEIGHTS)
    tensor = tensor_of(choices, type, choices.size(), width(choices, type))
    n_out, n_in = tensor.shape
    kind, mapped = TYPES[type].prepared, bool(choices.number(2))
    highest = max(field.max() for field in fields_of(tensor)) if "2023" in type else 0
    factor = 2.0 ** (np.floor(np.log2(highest)) - 10) if 0 < highest < np.inf else 1.0
    made = _native.Weight(kind, n_out, n_in, factor, mapped=mapped)
    data = np.frombuffer(b"".join(piece.blocks().tobytes() for piece in tensor.pieces), np.uint8)
    names = ("type", "data", "n_rows", "n_cols", "weight", "row", "col", "threads")
    values = (type, data, n_out, n_in, made, 0, 0, choices.threads())

    def holds():
        rows = np.empty((n_out, n_in), np.float32)
        _native.rows(made, np.arange(n_out), rows)
        expected = tensor.dequantize()
        if kind == type:
            must(np.array_equal(rows, expected, equal_nan=True), f"{type}: other rows than were put in")
        elif type == "q6_k":
            blocks = expected.reshape(n_out, -1, 32)
            limit = np.abs(blocks).max(-1, keepdims=True) * 0.006 + 2**-17
            limit = np.where(
                limit < 40000, limit, np.inf
            )  # beyond 65504 a scale is infinite in half precision
            close(rows, expected, np.broadcast_to(limit, blocks.shape).reshape(rows.shape), "rows of q6_k")
        else:  # scales become half precision
            d, m = fields_of(tensor)
            limit = (8 * d + m) * 2**-10 + factor * 2**-20
            close(rows, expected, limit if np.isfinite(d + m).all() else np.inf, f"rows of {type}")

    return Call(_native.pack, dict(zip(names, values, strict=True)), holds)


def rows(choices: Choices) -> Call:
    """Rows of a weight, some of them more than once."""
    type = choices.pick([*NUMBERS, "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
    tensor = tensor_of(choices, type, choices.size(), width(choices, type))
    indices = np.array([choices.number(tensor.shape[0]) for _ in range(choices.number(5))], np.int64)
    out = np.empty((len(indices), tensor.shape[1]), np.float32)
    arguments = {"weight": prepared(choices, tensor), "rows": indices, "out": out}

    def holds():
        expected = tensor.take(indices) if len(indices) else out
        must(np.array_equal(out, expected, equal_nan=True), f"other rows of {type}")

    return Call(_native.rows, arguments, holds)


def fields_of(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """|d| and |m| of each element, [n_out, n_in]; zeros of plain numbers, and of q6_k, with its many d."""
    found = []
    for name in "dm":
        stored = [piece.blocks() for piece in tensor.pieces]
        parts = [np.abs(part[name].astype(np.float64)) for part in stored if name in (part.dtype.names or ())]
        whole = np.concatenate(parts) if parts and tensor.type != "q6_k" else np.zeros((tensor.shape[0], 1))
        found.append(whole.repeat(tensor.shape[1] // whole.shape[1], 1))
    return tuple(found)


# --- products -------------------------------------------------------------------------------------


def matmul(choices: Choices) -> Call:
    """One input times one to three weights of any types, which must share a width."""
    types = [choices.pick(WEIGHTS) for _ in range(choices.pick([1, 1, 2, 3]))]
    n_in = (
        256 * choices.pick([1, 1, 2, 5])
        if "q6_k" in types
        else width(choices, max(types, key=lambda t: TYPES[t].block))
    )
    tensors = [tensor_of(choices, type, choices.size(), n_in) for type in types]
    x = choices.floats((choices.pick(TOKENS), n_in))
    weights = tuple(prepared(choices, tensor) for tensor in tensors)
    outs = tuple(np.empty((len(x), tensor.shape[0]), np.float32) for tensor in tensors)
    arguments = {"x": x, "weights": weights, "outs": outs, "threads": choices.threads()}

    def holds():
        for tensor, weight, out in zip(tensors, weights, outs, strict=True):
            is_product(out, x, weight, tensor)
            again = Native(1).matmul(x, weight)
            must(
                np.array_equal(out, again, equal_nan=True), f"{tensor.type}: another product with one thread"
            )

    return Call(_native.matmul, arguments, holds)


def is_product(out: np.ndarray, x: np.ndarray, weight, tensor: Tensor) -> None:
    """Within what rounding the inputs can do at the most; not finite where the definition isn't."""
    numbers = np.empty(tensor.shape, np.float32)
    _native.rows(weight, np.arange(len(numbers)), numbers)
    bad_rows, bad_tokens = ~np.isfinite(numbers).all(1), ~np.isfinite(x).all(1)
    huge_tokens = ~(np.abs(x).max(1, initial=0) < HUGE)
    huge_rows = ~(sum(fields_of(tensor)).max(1) < HUGE) | bad_rows
    usual = ~huge_tokens[:, None] & ~huge_rows
    exact_x = np.where(huge_tokens[:, None], 0, x).astype(np.float64)
    exact_w = np.where(huge_rows[:, None], 0, numbers).astype(np.float64)
    limit = product_limit(exact_x, exact_w, tensor)
    limit = np.where(usual & (np.abs(exact_x) @ np.abs(exact_w).T < 1e37), limit, np.inf)
    close(out, exact_x @ exact_w.T, limit, f"a product with {tensor.type}")
    shows = bad_tokens[:, None] | (bad_rows if "2023" not in tensor.type else False)
    must(
        not np.isfinite(out[np.broadcast_to(shows, out.shape)]).any(),
        f"{tensor.type}: NaN or infinity is lost",
    )


def product_limit(x: np.ndarray, w: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The most that a product of float64 x and w can be off by, [n_tokens, n_out]."""
    n_in = x.shape[1]
    d, m = (np.where(np.isfinite(field), field, 0) for field in fields_of(tensor))
    sums = np.abs(x) @ (np.abs(w) + 32 * d + m).T  # what cancels is rounded, too
    limit = 4e-6 * sums + 1e-35 * (np.abs(w).sum(1) + np.abs(x).sum(1)[:, None] + n_in)
    if _native.level() == "amx" and len(x) >= 13:  # both as bf16, and differences from 2^15 d
        return limit + 0.01 * np.abs(x) @ np.abs(w).T + 2**-8 * np.abs(x) @ d.T
    if TYPES[tensor.type].block == 1:
        return limit
    largest = np.abs(x).reshape(len(x), n_in // 32, 32).max(2, initial=0)  # inputs are rounded to 1/127 of it
    return limit + 0.501 / 127 * largest @ np.abs(w).reshape(len(w), -1, 32).sum(2).T


# --- what else a layer does -----------------------------------------------------------------------


def rms_norm(choices: Choices) -> Call:
    """Rows whose squares stay finite have their root mean square; NaN isn't lost."""
    x = choices.floats((choices.size() - 1, choices.size()))
    scale, out = choices.floats(x.shape[1:]), np.empty_like(x)
    arguments = {"x": x, "weight": scale, "eps": 1e-6, "out": out, "threads": choices.threads()}

    def holds():
        expected = ops.rms_norm(x.astype(np.float64), scale.astype(np.float64), 1e-6)
        size = np.abs(x).max(1, initial=0, keepdims=True)
        limit = np.where(
            (size < 1e15) & np.isfinite(scale) & (np.abs(scale) < 1e15),
            1e-5 * np.abs(expected) + 1e-30,
            np.inf,
        )
        close(out, expected, limit, "rms_norm")
        must(not np.isfinite(out[np.isnan(x).any(1)]).any(), "rms_norm loses NaN")

    return Call(_native.rms_norm, arguments, holds)


def swiglu(choices: Choices) -> Call:
    """Any number of dimensions; next to nothing below -80, where e^x nears the end of float32."""
    shape = [(), (choices.size() - 1,), (3, choices.size()), (2, 1, choices.size())][choices.number(4)]
    gate, up = choices.floats(shape), choices.floats(shape)
    out = np.empty_like(gate)
    arguments = {"gate": gate, "up": up, "out": out, "threads": choices.threads()}

    def holds():
        expected = ops.swiglu(gate.astype(np.float64), up.astype(np.float64))
        usual = np.isfinite(gate) & np.isfinite(up) & (np.abs(expected) < 1e37) & (gate > -80)
        close(
            out,
            expected,
            np.where(usual, 1e-5 * np.abs(expected) + 3e-45 * np.abs(up) + 1e-37, np.inf),
            "swiglu",
        )
        below = np.isfinite(up) & (gate <= -80) & np.isfinite(gate)
        least = np.maximum(1e-30, 1e-37 * np.abs(gate[below]))  # the kernels' e^x ends at e^-86.5, 3e-38
        must(
            (np.abs(out[below]) <= least * np.abs(up[below]) + 1e-37).all(),
            "swiglu of a low gate isn't next to 0",
        )
        must(not np.isfinite(out[np.isnan(gate) | np.isnan(up)]).any(), "swiglu loses NaN")

    return Call(_native.swiglu, arguments, holds)


def rope(choices: Choices) -> Call:
    """Pairs are complex numbers, and so are what they are multiplied by."""
    x = choices.floats((choices.number(12), choices.number(5), 2 * choices.number(40)))
    freqs = choices.floats((len(x), x.shape[2])).view(np.complex64)
    out = np.empty_like(x)
    arguments = {"x": x, "freqs": freqs, "out": out, "threads": choices.threads()}

    def holds():
        pairs, turns = x.view(np.complex64), np.broadcast_to(freqs[:, None], (*x.shape[:2], freqs.shape[1]))
        size = np.abs(pairs.astype(np.complex128)) * np.abs(turns.astype(np.complex128))
        limit = np.where(np.isfinite(size) & (size < 1e37), 1e-6 * size + 1e-37, np.inf).repeat(2, 2)
        exact = (pairs.astype(np.complex128) * turns).view(np.float64)
        close(out, exact, limit, "rope")

    return Call(_native.rope, arguments, holds)


def half(x: np.ndarray) -> np.ndarray:
    """float32 as the cache keeps it."""
    return x.astype(np.float16).astype(np.float32)


def attention(choices: Choices) -> Call:
    """A prompt, perhaps, and then the call that is looked at, on what the prompt left in the cache."""
    n_kv_heads, shared = choices.pick([1, 2, 3]), choices.pick([1, 2, 3, 7, 16, 64])
    head_dim = choices.size(256 if shared < 16 else 33)
    past, n_tokens = choices.pick([0, 1, 5, 63, 255, 300]), choices.pick([1, 1, 2, 7, 17, 37, 65])
    n_tokens = min(
        n_tokens, 1 + 10**7 // (n_kv_heads * shared * head_dim * (past + n_tokens))
    )  # emulated tiles are slow
    shape = n_kv_heads, past + n_tokens + choices.number(3), head_dim
    keys, values = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
    if past:
        before = [choices.floats((past, n, head_dim)) for n in (n_kv_heads, n_kv_heads)]
        queries, out = (
            np.zeros((past, n_kv_heads, head_dim), np.float32),
            np.empty((past, n_kv_heads * head_dim), np.float32),
        )
        _native.attention(queries, *before, keys, values, 0, out, 1)
    q, k, v = (choices.floats((n_tokens, n, head_dim)) for n in (n_kv_heads * shared, n_kv_heads, n_kv_heads))
    out = np.empty((n_tokens, n_kv_heads * shared * head_dim), np.float32)
    cache = ops.KVCache(SimpleNamespace(n_layers=1, n_kv_heads=n_kv_heads, head_dim=head_dim), shape[1])
    cache.ids, cache.keys, cache.values = [0] * past, [keys.astype(np.float32)], [values.astype(np.float32)]
    window = min(choices.pick([0, 0, 1, 5, 64, 300]), shape[1])
    names = ("q", "k", "v", "keys", "values", "pos", "out", "threads", "window")
    arguments = dict(zip(names, (q, k, v, keys, values, past, out, choices.threads(), window), strict=True))

    def holds():
        expected = ops.attention(q, half(k), half(v), cache, 0, window=window)
        must(np.array_equal(keys, cache.keys[0], equal_nan=True), "other keys in the cache")
        must(np.array_equal(values, cache.values[0], equal_nan=True), "other values in the cache")
        seen = [np.abs(part[:, : past + n_tokens].astype(np.float64)).max() for part in (keys, values)]
        score = np.abs(q.astype(np.float64)).max() * seen[0] * head_dim**0.5
        if not np.isfinite(score + seen[1]) or score > 1e3:
            return  # an exponential of so large a score is any number
        rounding = (8e-3 + 1e-4 * score) if _native.level() == "amx" else (1e-5 + 4e-6 * score)
        close(out, expected, rounding * seen[1] + 1e-30, "attention")

    return Call(_native.attention, arguments, holds)


def cast(choices: Choices) -> Call:
    """Numbers as another type, also with an importance matrix: the definition's bytes, or both overflow."""
    source, to = choices.pick(NUMBERS), choices.pick(CASTS)
    n_rows, n_cols = choices.number(5), choices.size()
    if TYPES[to].block > 1:
        n_rows, n_cols = n_rows + 1, TYPES[to].block * choices.pick([1, 2, 5, 9])
    x = choices.floats((n_rows, n_cols))
    blocks = (
        x
        if source == "f32"
        else x.astype(np.float16)
        if source == "f16"
        else (x.view(np.uint32) >> 16).astype(np.uint16)
    )
    more = {}
    if choices.pick([False, True]):
        more["importance"] = np.nan_to_num(np.abs(choices.floats((n_cols,)))).clip(0, 1e18)
    try:
        expected = quant.cast(blocks, source, to, **more).tobytes()
    except OverflowError:
        expected = None
    out = np.empty(TYPES[to].nbytes(x.shape), np.uint8)
    arguments = {"type": source, "numbers": blocks, "to": to, "out": out, **more}

    def holds():
        must(out.tobytes() == expected, f"other bytes of {to} from {source}")

    return Call(_native.cast, arguments, holds, overflows=expected is None)


def read_all(choices: Choices) -> Call:
    """The sum of its words, wherever it begins."""
    data = np.frombuffer(choices.bytes(choices.pick([0, 1, 63, 64, 65, 1000, 300000]) + 3), np.uint8)[
        choices.number(4) :
    ]
    whole = data[: len(data) // 64 * 64].tobytes()
    threads = choices.threads()
    expected = int(np.frombuffer(whole, np.uint64).sum(dtype=np.uint64))
    return Call(
        _native.read_all,
        {"data": data, "threads": threads},
        lambda: must(_native.read_all(data, threads) == expected, "another sum"),
    )


CALLS = (matmul, attention, pack, rows, weight, cast, rms_norm, swiglu, rope, read_all)
