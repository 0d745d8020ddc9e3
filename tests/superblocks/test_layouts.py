"""What blocks of any bytes mean."""

import warnings

import gguf
import numpy as np
import pytest
from nasty import SUPERBLOCKS

from tinyllama.quant import TYPES, dequantize
from tinyllama.superblocks import planes

SCALES = [0.01, -3.0, 0.0, -0.0, 65504.0, 6e-8, 1e-6, np.inf, -np.inf, np.nan]


def oracle_type(type: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[type.upper()]


def same_as_ggml(raw: np.ndarray, type: str) -> None:
    """Bytes [n_rows, n_bytes] mean the same float32, bit for bit, and NaN where NaN is meant."""
    kind = TYPES[type]
    shape = (len(raw), raw.shape[1] // kind.dtype.itemsize * kind.block)
    with warnings.catch_warnings(action="error"):
        found = dequantize(kind.view(raw, shape), type)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, oracle_type(type))
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


@pytest.mark.parametrize("type", SUPERBLOCKS)
def test_any_bytes_mean_what_they_mean_to_ggml(type):
    raw = np.random.default_rng(0).integers(0, 256, (64, TYPES[type].row_bytes(2048)), np.uint8)
    same_as_ggml(raw, type)


@pytest.mark.parametrize("type", SUPERBLOCKS)
@pytest.mark.parametrize("fill", [0, 255, 0x80])
def test_any_scales_mean_what_they_mean_to_ggml(type, fill):
    kind = TYPES[type]
    blocks = kind.view(
        np.full(kind.row_bytes(2048) * len(SCALES) ** 2, fill, np.uint8), (len(SCALES) ** 2, 2048)
    )
    blocks["d"] = np.repeat(np.array(SCALES, "<f2"), len(SCALES))[:, None]
    if "dmin" in blocks.dtype.names:
        blocks["dmin"] = np.tile(np.array(SCALES, "<f2"), len(SCALES))[:, None]
    same_as_ggml(np.frombuffer(blocks.tobytes(), np.uint8).reshape(len(blocks), -1), type)


@pytest.mark.parametrize("type", SUPERBLOCKS)
def test_sizes_and_numbers_are_ggml_s(type):
    kind, theirs = TYPES[type], oracle_type(type)
    assert (kind.block, kind.dtype.itemsize) == gguf.GGML_QUANT_SIZES[theirs]
    assert kind.gguf_id == theirs
    names = {number.name for number in gguf.LlamaFileType if number == kind.file_type}
    assert names <= {f"MOSTLY_{type.upper()}", f"MOSTLY_{type.upper()}_S"} and names


def test_bits_per_weight():
    expected = [2.625, 3.4375, 4.5, 5.5, 6.5625, 4.5, 4.25]
    assert [TYPES[type].bits_per_weight for type in SUPERBLOCKS] == expected


@pytest.mark.parametrize("type", SUPERBLOCKS)
def test_an_infinite_or_missing_scale_is_noticed(type):
    kind = TYPES[type]
    good = kind.view(bytearray(kind.nbytes((4, 512))), (4, 512))
    assert kind.is_finite(good)
    for field in {"d", "dmin"} & set(good.dtype.names):
        for value in (np.inf, -np.inf, np.nan):
            bad = good.copy()
            bad[field][3, -1] = value
            assert not kind.is_finite(bad)


@pytest.mark.parametrize("bits, width", [(1, 32), (2, 32), (2, 4), (2, 1), (4, 64), (4, 32), (4, 8), (4, 1)])
def test_a_plane_gives_back_what_was_stored(bits, width):
    field = np.dtype([("plane", "u1", 64)])
    q = np.random.default_rng(0).integers(0, 1 << bits, (5, 64 * 8 // bits), np.uint8)
    blocks = np.zeros(5, field)
    planes.store(blocks, (("plane", bits, width),), q)
    assert np.array_equal(planes.load(blocks, (("plane", bits, width),)), q)


def test_a_byte_of_a_plane_holds_integers_that_are_a_width_apart():
    blocks, q = np.zeros(1, [("low", "u1", 64), ("high", "u1", 32)]), np.zeros((1, 256), np.uint8)
    q[0, [128 + 3, 128 + 35, 128 + 67, 128 + 99]] = 1, 2, 3, 4
    planes.store(blocks, (("low", 2, 32), ("high", 1, 32)), q)
    assert blocks["low"][0, 32 + 3] == 0b00_11_10_01
    assert blocks["high"][0, 3] == 0b1000_0000
    assert np.count_nonzero(blocks["low"]) == np.count_nonzero(blocks["high"]) == 1
