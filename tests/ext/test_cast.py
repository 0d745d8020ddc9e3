"""Every cast in C gives the bytes of its definition in quant.py, on each level."""

from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nasty import GGUF_TYPES, OF_2023, SUPERBLOCKS, nasty, nasty_importance, nasty_rows, normal

pytest.importorskip("tinyllama._native", reason="the C backend is not built")

from tinyllama import _native, quant
from tinyllama.backends.native import Native
from tinyllama.quant import TYPES

NUMBERS = ["f32", "f16", "bf16"]
BLOCKS = [*GGUF_TYPES, *SUPERBLOCKS, *OF_2023]
LARGEST = {"f32": np.finfo(np.float32).max, "f16": np.float32(65504)}


def range_of(type: str) -> np.float32:
    return LARGEST["f32" if type in ("f32", "bf16") or "2023" in type else "f16"]


def whole_blocks(x: np.ndarray, to: str) -> np.ndarray:
    """The same numbers in rows that divide into blocks of a type; what is left over is missing."""
    n_cols = max(TYPES[to].block, x.shape[1])
    return x.reshape(-1)[: x.size // n_cols * n_cols].reshape(-1, n_cols)


def clipped(x: np.ndarray, source: str, to: str) -> np.ndarray:
    """x to what both types hold; bf16 rounds up."""
    largest = min(range_of(to), range_of(source)) * np.float32(0.99 if source == "bf16" else 1)
    return x.clip(-largest, largest)


def expect(found: np.ndarray, expected: np.ndarray) -> None:
    """The same bytes in the same form."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def same(x: np.ndarray, source: str, to: str) -> None:
    """x in a source type, clipped to what both types hold, is cast both ways."""
    blocks = quant.quantize(clipped(x, source, to), source)
    expect(Native(2).cast(blocks, source, to), quant.cast(blocks, source, to))


@cache
def hard_blocks(source: str, to: str) -> tuple[np.ndarray, np.ndarray]:
    """What is hard in a source type, and as another by the definition."""
    x = whole_blocks(hard(), to)
    if to in SUPERBLOCKS:
        x = np.concatenate([x, *(rows.reshape(-1, x.shape[1]) for rows in nasty_rows().values())])
    blocks = quant.quantize(clipped(x, source, to), source)
    return blocks, quant.cast(blocks, source, to)


def hard() -> np.ndarray:
    """[n, 64]: besides the nasty, both ends of float32's range and everything in between."""
    random = np.random.default_rng(1)
    normal = random.standard_normal((40, 64))
    bits = random.integers(0, 2**32, (200, 64), np.uint32)
    bits[100:] = np.where(random.random((100, 64)) < 0.5, bits[100:] & 0x80000000, bits[100:])  # many zeros
    spread = bits.view(np.float32)
    rows = [
        normal * 1e-38,  # d is below the smallest normal number
        normal * 3e-39,  # 1 / d is infinite, or twice it
        normal * 1e-44,
        normal * 1e38,
        np.abs(normal) * -1,
        np.where(random.random((40, 64)) < 0.02, 1000 * normal, normal),
        np.round(normal * 4) / 4,  # ties between largest elements and between steps
        np.where(random.random((40, 64)) < 0.5, 0.0, -0.0),
        np.where(np.arange(64) % 2, 3.4e38, -3.4e38)[None],  # their difference is infinite
    ]
    with np.errstate(over="ignore"):
        x = np.concatenate([nasty(), *(part.astype(np.float32) for part in rows), spread])
    return np.nan_to_num(x, nan=1, posinf=1, neginf=-1)


@pytest.mark.parametrize("to", [*NUMBERS, *BLOCKS])
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_it_gives_the_bytes_of_the_definition(level, source, to):
    blocks, expected = hard_blocks(source, to)
    expect(Native(2).cast(blocks, source, to), expected)


@pytest.mark.parametrize("source", BLOCKS)
def test_blocks_are_cast_as_the_numbers_they_stand_for(source):
    blocks = quant.quantize(whole_blocks(nasty(), source), source)
    for to in ("f32", "bf16", "q8_0"):
        expect(Native(2).cast(blocks, source, to), quant.cast(blocks, source, to))


@pytest.mark.parametrize("to", ["f16", "bf16", *BLOCKS])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=hnp.arrays(np.uint32, (1, 256), elements=st.integers(0, 2**32 - 1)))
def test_it_gives_them_for_any_finite_bits(level, to, bits):
    x = bits.view(np.float32)
    same(np.where(np.isfinite(x), x, np.float32(0)), "f32", to)


@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_rows_of_any_number_fill_the_output_and_no_more(level, source):
    x = np.resize(hard(), (37, 41)).clip(-6e4, 6e4)
    for n_rows, n_cols in ((1, 1), (1, 31), (3, 11), (37, 41), (0, 5)):
        for to in NUMBERS:
            same(x[:n_rows, :n_cols].copy(), source, to)
    x = np.resize(x, (7, 7 * 256))
    for n_rows, n_blocks in ((1, 1), (1, 7), (3, 3), (7, 5)):
        for to in BLOCKS:
            same(x[:n_rows, : n_blocks * TYPES[to].block].copy(), source, to)


@pytest.mark.parametrize("to", [*NUMBERS, *BLOCKS])
def test_what_the_type_can_t_hold_is_refused_wherever_it_stands(level, to):
    largest = range_of(to)
    with np.errstate(over="ignore"):
        too_large = np.nextafter(largest, np.float32(np.inf))
    for bad in (np.nan, -np.inf, too_large):
        for row, col in ((0, 0), (2, 511), (1, 50)):
            x = np.full((3, 512), -largest, np.float32)
            x[row, col] = bad
            for cast in (Native(1).cast, quant.cast):
                with pytest.raises(OverflowError, match=f"NaN or numbers too large for {to}"):
                    cast(x, "f32", to)


@cache
def weighed(to: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Hard rows, and rows whose blocks don't fill what is cast at once; the same by the definition."""
    names = "normal", "outliers", "far below 0", "magnitudes in a muddle", "zeros of both signs"
    hard = np.concatenate([nasty_rows()[name][:16] for name in names])
    rows = [hard, normal((7, 768), 3), normal((1, 256), 4)]
    return [(x, quant.cast(x, "f32", to, nasty_importance()[: x.shape[1]])) for x in rows]


@pytest.mark.parametrize("to", [*NUMBERS, *BLOCKS])
def test_it_gives_them_with_an_importance_matrix(level, to):
    for x, expected in weighed(to):
        expect(Native(2).cast(x, "f32", to, nasty_importance()[: x.shape[1]]), expected)


@pytest.mark.parametrize("source", ["f16", "bf16"])
@pytest.mark.parametrize("to", ["q4_0", "q5_1", "iq4_nl", "q4_k"])
def test_importance_counts_whatever_the_numbers_are(level, source, to):
    blocks, importance = quant.quantize(normal((5, 1024), 5), source), nasty_importance()
    expect(Native(2).cast(blocks, source, to, importance), quant.cast(blocks, source, to, importance))


X = np.ones((2, 64), np.float32)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (("f32", X, "q4_0", np.empty(71, np.uint8)), ValueError),
        (("f32", X, "q4_0", np.empty(73, np.uint8)), ValueError),
        (("f32", X, "q4_0", np.empty(73, np.uint8)[1:]), ValueError),
        (("f32", X, "q4_0", bytes(72)), BufferError),
        (("f32", X[:, :33].copy(), "q4_0", np.empty(36, np.uint8)), ValueError),
        (("f32", X[:, ::2], "q4_0", np.empty(36, np.uint8)), ValueError),
        (("f32", X[0], "q4_0", np.empty(36, np.uint8)), ValueError),
        (("f16", X, "q4_0", np.empty(72, np.uint8)), TypeError),
        (("bf16", X.astype(np.float16), "q4_0", np.empty(72, np.uint8)), TypeError),
        (("q4_0", X, "f16", np.empty(256, np.uint8)), ValueError),
        (("f32", X, "bf16", np.empty(255, np.uint8)), ValueError),
        (("f32", X.reshape(1, 128), "iq4_xs", np.empty(68, np.uint8)), ValueError),
        (("f32", X, "q6_k", np.empty(72, np.uint8)), ValueError),
        (("f32", None, "q4_0", np.empty(72, np.uint8)), TypeError),
        (("f32", X, "q4_0", np.empty(72, np.uint8), X[0, :32]), ValueError),
        (("f32", X, "q4_0", np.empty(72, np.uint8), X), ValueError),
        (("f32", X, "q4_0", np.empty(72, np.uint8), X[0].astype(np.float64)), TypeError),
        (("f32", X, "q4_0", np.empty(72, np.uint8), None), TypeError),
    ],
)
def test_what_doesn_t_fit_is_refused(arguments, error):
    with pytest.raises(error):
        _native.cast(*arguments)
