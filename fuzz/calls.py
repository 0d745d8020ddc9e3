"""Calls of C functions that are made of bytes: right arguments, and one of them wrong."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .contract import must

SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257]
ODD = np.array(
    [0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, 1e-38, 1e-37, 3e38, -3e38, 65504, 65520], np.float32
)
OUTPUTS = {"out", "outs", "keys", "values"}
LARGEST = 2**63 - 1


@dataclass
class Call:
    """A function, its arguments by name in their order, and what must hold when it has returned."""

    function: Callable
    arguments: dict
    holds: Callable[[], None]
    overflows: bool = False  # numbers among them are too large, and must be refused


class Choices:
    """Choices made by the bytes of an input; behind its end, the first of everything."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def are_left(self) -> bool:
        return self.at < len(self.data)

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, n: int) -> int:
        """One of 0..n-1."""
        return int.from_bytes(self.take(1 if n <= 256 else 2), "little") % n

    def pick(self, options):
        return options[self.number(len(options))]

    def size(self, largest: int = 257) -> int:
        """At least 1; most often where vectors, blocks and tiles begin or end."""
        return min(self.pick([*SIZES, 1 + self.number(largest)]), largest)

    def threads(self) -> int:
        return self.pick([1, 2, 3, 5])

    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.number(256))

    def bytes(self, n: int) -> bytes:
        """Random ones, or the input's own, again and again."""
        if self.number(2):
            return self.random().bytes(n)
        own = self.take(1 + self.number(64)) or b"\0"
        return (own * (n // len(own) + 1))[:n]

    def normal(self, shape: tuple) -> np.ndarray:
        return self.random().standard_normal(shape, dtype=np.float32)

    def floats(self, shape: tuple) -> np.ndarray:
        """Normally distributed, of every magnitude, with odd numbers among them, or any bits."""
        kind = self.pick(["normal", "normal", "large", "spread", "odd", "bits"])
        if kind == "bits":
            return np.frombuffer(self.bytes(4 * int(np.prod(shape))), np.float32).reshape(shape).copy()
        random, x = self.random(), np.asarray(self.normal(shape))
        if kind == "large":
            x = x * np.float32(10.0 ** random.integers(-45, 38))
        if kind == "spread":
            x = (x * 10.0 ** random.uniform(-45, 38, shape)).astype(np.float32)
        if kind == "odd":
            x = np.where(random.random(shape) < 0.02, random.choice(ODD, shape), x)
        return np.asarray(x, np.float32)


def close(found: np.ndarray, expected: np.ndarray, limit: np.ndarray, what: str) -> None:
    """No further apart than their limit, wherever that and what is expected are finite."""
    off = ~(np.abs(found - expected) <= limit) & np.isfinite(limit) & np.isfinite(expected)
    must(not off.any(), f"{what} is {found[off][:3]}, not {expected[off][:3]}")


# --- wrong arguments ------------------------------------------------------------------------------


def wrong(choices: Choices, call: Call) -> dict:
    """The arguments, one of which no longer fits."""
    name = choices.pick(list(call.arguments))
    value = call.arguments[name]
    if isinstance(value, tuple):
        bad = wrong_tuple(choices, name, value)
    elif isinstance(value, np.ndarray):
        bad = wrong_array(choices, name, value, call.function.__name__ == "read_all")
    elif isinstance(value, str):
        bad = choices.pick(["", "q9_9", "Q4_0", value + "\0", "\ud800", "x" * 5000, None, 3, b"f32"])
    elif isinstance(value, int):
        bad = choices.pick([-1, -(2**31), -LARGEST - 1, 2**64, None, "1", 1.5])
        if name != "threads":  # of which there are no more than there can be
            bad = choices.pick([bad, 2**62, 2**62, LARGEST, LARGEST - 31, 2**63])
    else:
        bad = choices.pick([None, "1", b"", object()])
        bad = b"" if bad is value else bad
    return call.arguments | {name: bad}


def wrong_tuple(choices: Choices, name: str, value: tuple):
    """Of another length, or with something else in it."""
    first = choices.pick([None, 3, "x"])
    if isinstance(value[0], np.ndarray) and choices.number(2):
        first = wrong_array(choices, name, value[0], False)
    return choices.pick(
        [list(value), (), value[:-1], (*value, value[0]), value * 17, (first, *value[1:]), None]
    )


def wrong_array(choices: Choices, name: str, value: np.ndarray, any_length: bool):
    """Of another type, shape or layout, or something else."""
    types = [
        type
        for type in ("f8", "f4", "f2", "i8", "i4", "u2", "u1", "i1", "c8", "O", ">f4", "V4")
        if value.dtype != type
    ]
    kind = choices.pick(["type", "dimension", "strides", "address", "shorter", "read-only", "something"])
    if kind == "type":
        return np.zeros(value.shape, choices.pick(types))
    if kind == "dimension":
        return value[None]
    if kind == "strides" and value.size and value.ndim and value.shape[-1] > 1:
        return value.repeat(2, -1)[..., ::2]
    if kind == "address" and value.size and value.itemsize > 1:
        shifted = np.empty(value.nbytes + 65, np.uint8)
        start = -shifted.ctypes.data % 64 + 1
        return shifted[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    if kind == "shorter" and value.size and value.ndim and not any_length:
        return value[..., :-1].copy()
    if kind == "read-only" and name in OUTPUTS:
        value = value.copy()
        value.flags.writeable = False
        return value
    return choices.pick([None, "text", 3, [1.0], object()])
