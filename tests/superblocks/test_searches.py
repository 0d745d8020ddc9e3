"""What weights become. The bytes are ggml's."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import refused
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nasty import SUPERBLOCKS, nasty_rows, normal

from tinyllama import quant
from tinyllama.quant import TYPES, cast, dequantize, quantize
from tinyllama.superblocks import k, search

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "golden" / "superblocks.json").read_text()
)  # by the script there
ROWS = nasty_rows()

PLAIN = hnp.arrays(np.float16, (1, 256), elements=st.floats(-1000, 1000, width=16)).map(np.float32)
ANY = hnp.arrays(np.float32, (1, 256), elements=st.floats(-65504, 65504, width=32))


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", ROWS)
def test_the_weights_are_those_that_were_recorded(name):
    assert digest(ROWS[name]) == GOLDEN["weights"][name]


@pytest.mark.parametrize("type", SUPERBLOCKS)
def test_blocks_are_those_that_llama_cpp_wrote(type):
    found = {name: digest(quantize(x, type)) for name, x in ROWS.items()}
    assert found == GOLDEN["blocks"][type]


@pytest.mark.parametrize("type", SUPERBLOCKS)
@given(x=PLAIN | ANY)
def test_blocks_of_any_weights_are_those_of_ggml(type, x):
    libgguf = pytest.importorskip("libgguf", reason="libgguf, the oracle, is not installed")
    expected = libgguf.quantize_rows_raw(TYPES[type].gguf_id, x, *x.shape)
    assert quantize(x, type).tobytes() == expected


@pytest.mark.parametrize("type", SUPERBLOCKS)
def test_a_block_does_not_depend_on_those_beside_it(type, monkeypatch):
    x = normal((3, 2560), 7)
    whole = quantize(x, type)
    assert (
        quantize(x[1:2, 256:1024], type).tobytes()
        == whole[1, 256 // TYPES[type].block :][: 768 // TYPES[type].block].tobytes()
    )
    assert quantize(x[::-1][:, ::-1], type).shape == whole.shape  # however it lies in memory
    assert quantize(np.asfortranarray(x), type).tobytes() == whole.tobytes()
    monkeypatch.setattr(k, "AT_ONCE", 7)
    assert quantize(x, type).tobytes() == whole.tobytes()


# --- what comes back ------------------------------------------------------------------------------


def test_more_bits_err_less():
    x = normal((64, 1024), 8)
    errors = {type: quant.error(x, type) for type in (*SUPERBLOCKS, "q4_0", "q4_1", "q8_0")}
    ordered = ["q2_k", "q3_k", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0"]
    assert sorted(ordered, key=errors.get, reverse=True) == ordered
    assert max(errors["iq4_nl"], errors["iq4_xs"], errors["q4_k"]) < errors["q4_0"]
    assert errors["q2_k"] < 0.32 and errors["q6_k"] < 0.02


@pytest.mark.parametrize("type", SUPERBLOCKS)
def test_weights_keep_their_sign_or_become_small(type):
    x = np.concatenate([ROWS["normal"], ROWS["heavy tails"], ROWS["sparse"]])
    back, peak = dequantize(quantize(x, type), type), np.abs(x).max(axis=1, keepdims=True)
    assert np.all((np.sign(back) == np.sign(x)) | (np.abs(back) <= 0.4 * peak))


@pytest.mark.parametrize("type", SUPERBLOCKS)
def test_zeros_come_back_as_zeros(type):
    assert not dequantize(quantize(ROWS["zeros of both signs"], type), type).any()


@pytest.mark.parametrize("type", ["q2_k", "q4_k", "q5_k"])
def test_minima_are_never_above_zero(type):
    _, subtracted = TYPES[type].factors(quantize(ROWS["far above 0"], type))
    assert subtracted.min() == 0
    assert quantize(ROWS["far below 0"], type)["dmin"].all()


def test_an_outlier_spoils_its_own_part_only():
    x = normal((1, 256), 9)
    x[0, 100] = 60
    difference = np.abs(dequantize(quantize(x, "q6_k"), "q6_k") - x).reshape(16, 16)
    elsewhere = np.delete(difference, 100 // 16, axis=0)
    assert elsewhere.max() < difference[100 // 16].max() / 3


def test_a_search_errs_less_than_fitting_the_largest_weight():
    x = normal((16, 500), 10)
    weights = np.ones_like(x)
    scale, low, q = search.affine(x, weights, 15, -1.0, 21, False)
    span = x.max(0) - np.minimum(x.min(0), 0)
    plain = np.round((x - np.minimum(x.min(0), 0)) / span * 15) * span / 15 + np.minimum(x.min(0), 0)
    errors, plain_errors = (((back - x) ** 2).sum(0) for back in (scale * q + low, plain))
    assert np.all(errors <= plain_errors * 1.0001) and errors.sum() < 0.9 * plain_errors.sum()


def test_nearest_rounds_ties_to_even():
    v = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.4999998, 4194303.0, -4194304.0, np.nan, np.inf], np.float32)
    assert search.nearest(v).tolist() == [0, 2, 2, 0, -2, 2, 4194303, -4194304, 0, -4194304]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("type", sorted(set(SUPERBLOCKS) - {"iq4_nl"}))
def test_rows_are_whole_blocks(type):
    refused(lambda: quantize(np.ones((2, 128), np.float32), type), f"{type} needs", "multiple of 256", "128")


@pytest.mark.parametrize("type", SUPERBLOCKS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -70000])
def test_a_cast_refuses_what_no_scale_holds(type, value):
    x = normal((2, 512), 11)
    x[1, 300] = value
    with pytest.raises(OverflowError, match=type):
        cast(x, "f32", type)


@pytest.mark.parametrize("type", SUPERBLOCKS)
def test_a_cast_goes_from_and_to_other_types(type):
    x = normal((4, 512), 12)
    blocks = quantize(x, type)
    assert (
        cast(x.astype(np.float16), "f16", type).tobytes()
        == quantize(np.float32(np.float16(x)), type).tobytes()
    )
    assert cast(blocks, type, "f32").tobytes() == dequantize(blocks, type).tobytes()
    assert cast(blocks, type, "q8_0").tobytes() == quantize(dequantize(blocks, type), "q8_0").tobytes()
