"""What weights become with an importance matrix. The bytes are ggml's."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nasty import GGUF_TYPES, OF_2023, SUPERBLOCKS, nasty_importance, nasty_rows, normal

from tinyllama.quant import TYPES, dequantize, quantize

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "superblocks.json").read_text())
ROWS, IMPORTANCE = nasty_rows(), nasty_importance()
WEIGHED = sorted({*GGUF_TYPES, *SUPERBLOCKS} - {"q8_0"})  # the types that make use of it

WEIGHTS = hnp.arrays(np.float16, (2, 256), elements=st.floats(-1000, 1000, width=16)).map(np.float32)
MEANS = hnp.arrays(np.float32, 256, elements=st.floats(0, 2**60, width=32))


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def test_the_importance_is_what_was_recorded():
    assert digest(IMPORTANCE) == GOLDEN["importance"]


@pytest.mark.parametrize("type", GOLDEN["weighed"])
def test_blocks_are_those_that_llama_cpp_wrote(type):
    found = {name: digest(quantize(x, type, IMPORTANCE)) for name, x in ROWS.items()}
    assert found == GOLDEN["weighed"][type]


@pytest.mark.parametrize("type", WEIGHED)
@settings(max_examples=30, deadline=None)
@given(x=WEIGHTS, importance=MEANS)
def test_blocks_of_any_weights_and_any_importance_are_those_of_ggml(type, x, importance):
    libgguf = pytest.importorskip("libgguf", reason="libgguf, the oracle, is not installed")
    expected = libgguf.quantize_rows_raw(TYPES[type].gguf_id, x, *x.shape, importance)
    assert quantize(x, type, importance).tobytes() == expected


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", *OF_2023])
def test_these_types_have_no_use_for_it(type):
    x = normal((8, 1024), 1)
    assert quantize(x, type, IMPORTANCE).tobytes() == quantize(x, type).tobytes()


@pytest.mark.parametrize("type", WEIGHED)
def test_where_errors_count_more_there_are_fewer(type):
    x, importance = normal((64, 512), 2), np.ones(512, np.float32)
    importance[::16] = 1000
    plain, weighed = (
        (dequantize(blocks, type) - x) ** 2 for blocks in (quantize(x, type), quantize(x, type, importance))
    )
    assert weighed[:, ::16].mean() < 0.75 * plain[:, ::16].mean()
    assert (weighed * importance).mean() < 0.8 * (plain * importance).mean()
    assert weighed.mean() < 2 * plain.mean()


@pytest.mark.parametrize("type", WEIGHED)
def test_a_row_does_not_depend_on_those_beside_it(type):
    x = normal((3, 2560), 3)
    importance = np.resize(IMPORTANCE, 2560)
    whole = quantize(x, type, importance)
    assert quantize(x[1:2], type, importance).tobytes() == whole[1].tobytes()
