from dataclasses import replace

import numpy as np
import pytest
from nasty import GGUF_TYPES, OF_2023, nasty

from tinyllama.quant import quantize
from tinyllama.tensor import Piece, Tensor, halves_order


def in_pieces(x: np.ndarray, type: str, axis: int, n_pieces: int = 2) -> Tensor:
    """Cut as Meta cut checkpoints; each piece lies behind a few bytes of something else."""
    pieces = []
    for part in np.split(x, n_pieces, axis):
        pieces.append(Piece(b"...." + quantize(part, type).tobytes(), 4, type, part.shape))
    return Tensor("w", x.shape, tuple(pieces), axis)


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", *GGUF_TYPES, *OF_2023])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_tensor_in_pieces_is_the_whole_tensor(type, axis):
    x = nasty()
    whole, cut = Tensor.from_array("w", x, type), in_pieces(x, type, axis)
    assert cut.nbytes == whole.nbytes
    assert np.array_equal(cut.dequantize(), whole.dequantize())
    for start, stop in ((0, 5), (30, 34), (32, 64), (60, 100)):
        assert np.array_equal(cut.dequantize(start, stop), whole.dequantize()[start:stop])
    rows = np.array([63, 0, 31, 32, 0])
    assert np.array_equal(cut.take(rows), whole.dequantize()[rows])
    assert np.array_equal(whole.take(rows), whole.dequantize()[rows])


@pytest.mark.parametrize("type", ["f16", "q4_0", "q4_1_2023"])
def test_rows_that_lie_in_another_order_come_in_the_weight_s(type):
    x, order = nasty(), np.random.default_rng(0).permutation(64)
    stored = Piece(quantize(x, type).tobytes(), 0, type, x.shape, order)
    tensor, plain = Tensor("w", x.shape, (stored,)), Tensor.from_array("w", x, type).dequantize()
    assert np.array_equal(tensor.dequantize(), plain[order])
    assert np.array_equal(tensor.dequantize(10, 20), plain[order[10:20]])
    assert np.array_equal(tensor.take(np.array([5, 0])), plain[order[[5, 0]]])


@pytest.mark.parametrize("type", ["f32", "q4_0", "q4_0_2023_planar"])
def test_some_rows_of_a_piece_are_a_piece(type):
    piece = in_pieces(nasty(), type, 0, 1).pieces[0]
    some = piece.rows(10, 30)
    assert some.nbytes == 20 * piece.row_bytes
    assert some.blocks().tobytes() == piece.blocks(10, 30).tobytes()


def test_blocks_that_lie_in_order_are_not_copied():
    piece = in_pieces(nasty(), "q4_0", 0, 1).pieces[0]
    assert not piece.blocks(3, 9).flags.owndata


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
def test_nan_and_infinity_are_found_in_any_piece(type, damage):
    x = np.ones((64, 64), np.float32)
    assert in_pieces(x, type, 1).is_finite()
    x[60, 63] = damage
    assert not in_pieces(x, type, 1).is_finite()


def test_an_infinite_scale_is_found():
    blocks = quantize(nasty(), "q4_0")
    blocks["d"][7, 1] = np.inf
    assert not Tensor.from_blocks("w", (64, 64), "q4_0", blocks).is_finite()


def test_rows_in_halves_are_read_in_pairs():
    plain = np.random.default_rng(3).standard_normal((24, 64)).astype(np.float32)
    order = halves_order(4, 6)
    for type in ("f32", "q4_0"):
        (stored,) = Tensor.from_array("wq", plain, type).pieces
        piece = replace(stored, order=order)
        expected = Tensor("wq", plain.shape, (stored,)).dequantize()[order]
        np.testing.assert_array_equal(Tensor("wq", plain.shape, (piece,)).dequantize(), expected)
        some = piece.rows(7, 19).rows(2, 5)
        assert (some.shape, some.nbytes) == ((3, 64), 3 * stored.row_bytes)
        np.testing.assert_array_equal(some.kind.dequantize(some.blocks()), expected[9:12])


def test_the_elements_of_a_vector_in_halves_are_read_in_pairs():
    (stored,) = Tensor.from_array("bias", np.arange(8, dtype=np.float32)).pieces
    bias = Tensor("bias", (8,), (replace(stored, order=halves_order(2, 4)),))
    assert bias.dequantize().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
