import warnings

import gguf
import historical
import numpy as np
import pytest
from checkpoints import refused
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nasty import GGUF_TYPES, OF_2023, nasty

from tinyllama import quant
from tinyllama.quant import TYPES, dequantize, quantize

SCALAR = {
    "q4_0_2023": historical.q4_0,
    "q4_0_2023_planar": lambda row: historical.q4_0(row, planar=True),
    "q4_1_2023": historical.q4_1,
}


def test_zeros_keep_the_sign_that_the_first_of_them_gives():
    """gguf-py leaves this to NumPy; ggml compares with <, which doesn't tell zeros apart."""
    x = np.zeros((4, 32), np.float32)
    x[1] = -0.0
    x[2, 0], x[3, 1] = -0.0, -0.0
    x[2:, 7] = 1
    for type in ("q4_0", "q5_0"):
        assert np.signbit(quantize(x, type)["d"]).ravel().tolist() == [True, True, True, True]
    for type in ("q4_1", "q5_1", "q4_1_2023"):
        assert np.signbit(quantize(x, type)["m"]).ravel().tolist() == [False, True, True, False]


def test_zeros_of_both_signs_have_no_negative_range():
    x = np.where(np.arange(32) % 2, np.float32(-0.0), np.float32(0))[None]
    for type in ("q4_1", "q5_1", "q4_1_2023"):
        assert not np.signbit(quantize(x, type)["d"]).any()


def test_scales_at_the_end_of_float32_s_range_still_count_steps():
    """The inverse of 5e-39 is a float32, twice that isn't."""
    x = np.array([[5e-39 * 7, 5e-39 * 3] + [0.0] * 30], np.float32)
    q = TYPES["q4_0_2023"].integers(quantize(x, "q4_0_2023"))
    assert q[0, 0, :3].tolist() == [7, 3, 0]


def floats(low: float, high: float):
    blocks = hnp.arrays(np.float16, (2, 64), elements=st.floats(low, high, width=16))
    return blocks.map(lambda x: x.astype(np.float32))


# --- the bytes of ggml ----------------------------------------------------------------------------


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_blocks_are_those_of_ggml(type):
    x = nasty()
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[type.upper()])
    assert quantize(x, type).tobytes() == expected.tobytes()


@pytest.mark.parametrize("type", GGUF_TYPES)
@given(x=floats(-1000, 1000))
def test_blocks_of_any_weights_are_those_of_ggml(type, x):
    x = x + 0  # without -0.0
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[type.upper()])
    assert quantize(x, type).tobytes() == expected.tobytes()


@pytest.mark.parametrize("type", OF_2023)
def test_blocks_are_those_of_llama_cpp_in_march_2023(type):
    x = nasty()
    expected = b"".join(SCALAR[type](row) for row in x)
    assert quantize(x, type).tobytes() == expected


@pytest.mark.parametrize("type", OF_2023)
@given(x=floats(-8, 8))
def test_blocks_of_any_weights_are_those_of_march_2023(type, x):
    assert quantize(x, type).tobytes() == b"".join(SCALAR[type](row) for row in x)


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_weights_come_back_as_from_ggml(type):
    blocks = quantize(nasty(), type)
    raw = np.frombuffer(blocks.tobytes(), np.uint8).reshape(len(blocks), -1)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type.upper()])
    assert np.array_equal(dequantize(blocks, type), expected)


@pytest.mark.parametrize("type", [*GGUF_TYPES, *OF_2023])
def test_infinite_scales_come_back_without_a_warning(type):
    blocks = quantize(nasty(), type)
    blocks["d"] = np.inf
    with warnings.catch_warnings(action="error"):
        assert not np.isfinite(dequantize(blocks, type)).any()


def test_bf16_rounds_to_nearest_even_as_ggml_does():
    x = np.concatenate([nasty().ravel(), np.array([np.inf, -np.inf, np.nan, 1.00390625, 1.01171875], "f4")])
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    assert np.array_equal(quantize(x, "bf16"), expected)


def test_every_float16_becomes_the_float32_of_the_same_value():
    x = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = x[np.isfinite(x)]
    assert np.array_equal(
        dequantize(finite, "f16").view(np.uint32), finite.astype(np.float32).view(np.uint32)
    )
    assert np.array_equal(dequantize(x, "f16"), x.astype(np.float32), equal_nan=True)
    assert dequantize(x.reshape(256, 256)[::3, 5:], "f16").shape == (86, 251)


def test_every_bfloat16_becomes_the_float32_of_the_same_value():
    bits = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(dequantize(bits, "bf16").view(np.uint32), bits.astype(np.uint32) << 16)


# --- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("type", OF_2023)
def test_weights_of_2023_come_back_as_q_times_d(type):
    x = nasty()[:16]
    blocks = quantize(x, type)
    bytes_ = np.frombuffer(blocks.tobytes(), np.uint8).reshape(16, -1)
    for row, back in zip(bytes_, dequantize(blocks, type), strict=True):
        assert np.array_equal(back, by_hand(row, type))


def by_hand(row: np.ndarray, type: str) -> np.ndarray:
    """A row of two blocks."""
    floats = row.view("<f4")
    if type == "q4_1_2023":
        m, d, nibbles = floats[:2], floats[2:4], [row[16:32], row[32:48]]
    elif type == "q4_0_2023_planar":
        m, d, nibbles = None, floats[:2], [row[8:24], row[24:40]]
    else:
        m, d, nibbles = None, floats[[0, 5]], [row[4:20], row[24:40]]
    x = []
    for block in range(2):
        for byte in nibbles[block]:
            for q in (int(byte) & 15, int(byte) >> 4):
                x.append(
                    np.float32(q) * d[block] + m[block] if m is not None else np.float32(q - 8) * d[block]
                )
    return np.array(x, np.float32)


@pytest.mark.parametrize("type", GGUF_TYPES + OF_2023)
@given(x=floats(-8, 8))
def test_no_weight_is_off_by_more_than_a_step(type, x):
    back = dequantize(quantize(x, type), type).reshape(2, 2, 32)
    x = x.reshape(2, 2, 32)
    levels = {"q4": 15, "q5": 31, "q8": 254}[type[:2]]
    span = 2 * np.abs(x).max(-1) if "_0" in type else x.max(-1) - x.min(-1)
    if type == "q4_1_2023":
        span = np.maximum(x.max(-1), 0) - x.min(-1)
    tolerance = 1.2 * span / levels + np.abs(x).max(-1) / 500 + 1e-5
    assert np.all(np.abs(back - x) <= tolerance[..., None])


def test_integers_are_centred_where_there_is_no_minimum():
    x = nasty()
    for type, low, high in (
        ("q4_0", -8, 7),
        ("q5_0", -16, 15),
        ("q8_0", -127, 127),
        ("q4_1", 0, 15),
        ("q5_1", 0, 31),
    ):
        q = TYPES[type].integers(quantize(x, type))
        assert (q.min(), q.max()) == (low, high)


def test_quantizing_refuses_odd_rows():
    refused(lambda: quantize(np.ones((2, 33), np.float32), "q4_0"), "multiple of 32", "33")
    refused(lambda: quantize(np.ones((2, 288), np.float32), "q4_k"), "multiple of 256", "288")


# --- in memory ------------------------------------------------------------------------------------


def test_a_view_copies_nothing_and_has_the_offset(tmp_path):
    for type in TYPES:
        kind = TYPES[type]
        buffer = bytes(3) + np.random.default_rng(0).bytes(4 * kind.row_bytes(512))
        blocks = kind.view(buffer, (4, 512), 3)
        assert len(blocks) == 4
        assert blocks.tobytes() == buffer[3:]
        assert not blocks.flags.owndata


# --- what it costs --------------------------------------------------------------------------------


def test_bits_per_weight_count_the_scales():
    expected = {"f16": 16, "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q8_0": 8.5, "q4_0_2023": 5, "q4_1_2023": 6}
    assert {type: TYPES[type].bits_per_weight for type in expected} == expected


def test_more_bits_err_less():
    x = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    errors = [quant.error(x, type) for type in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16")]
    assert errors == sorted(errors, reverse=True)
    assert 0.08 < errors[0] < 0.11
    assert quant.error(x, "f32") == 0
