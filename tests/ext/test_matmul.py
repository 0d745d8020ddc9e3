"""Products of every type, level and odd shape, against the definition."""

import threading

import numpy as np
import pytest

pytest.importorskip("tinyllama._native", reason="the C backend is not built")

from tinyllama import _native, ops
from tinyllama.backends.native import Native
from tinyllama.quant import TYPES
from tinyllama.tensor import Piece, Tensor

#: Limits of the mean squared error of a product, as a fraction of the product's mean square.
#: Float weights: what float32 sums in another order leave.
FLOAT_LIMIT = 1e-10
#: Activations as int8, a scale for 32: rounding to 1/127 of the largest gives 3e-5 for a normal distribution.
#: One large value in a block coarsens its 31 neighbours; where such blocks are few, refining takes that away.
INT8_LIMIT, INT8_LIMIT_OUTLIERS = 5e-5, 1e-4
#: Weights and activations as bf16: rounding to 8 bits gives 2.8e-6 for each.
BF16_LIMIT = 1e-5

FLOATS = ["f32", "f16", "bf16"]
K_TYPES = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]  # super-blocks
BLOCKS = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"]
OF_2023 = ["q4_0_2023", "q4_0_2023_planar", "q4_1_2023"]
ALL = [*FLOATS, *BLOCKS, *OF_2023]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def prepared(tensor: Tensor):
    return Native(2).prepare(tensor, True)


def left_in_file(tensor: Tensor):
    return Native(2).prepare(tensor, False)


def matmul(x, *tensors, threads=2):
    return Native(threads).matmul(x, *(prepared(tensor) for tensor in tensors))


def random_weight(type: str, n_out: int, n_in: int, seed: int = 0) -> Tensor:
    """Any bytes in the blocks, and scales and minima of every size that is usual."""
    rng, blocks = np.random.default_rng(seed), empty_blocks(type, n_out, n_in)
    for name in blocks.dtype.names:
        field = blocks[name]
        if field.dtype.kind == "f":
            field[...] = rng.uniform(-0.1, 0.1, field.shape)
        else:
            field[...] = rng.integers(0, 256, field.shape).astype(np.uint8).view(field.dtype)
    return Tensor.from_blocks("", (n_out, n_in), type, blocks)


def some_weight(type: str, n_out: int, n_in: int) -> Tensor:
    """Without the searches by which super-blocks are quantized."""
    if type in K_TYPES:
        return random_weight(type, n_out, n_in)
    return Tensor.from_array("", normal(n_out, n_in), type)


def limit(type: str, n_tokens: int, level: str) -> float:
    """Of the error of many sums. More than a few tokens AMX multiplies in bf16."""
    if level == "amx" and n_tokens > _native.FEW:
        return BF16_LIMIT
    return FLOAT_LIMIT if type in FLOATS else INT8_LIMIT


def relative_error(got, expected) -> float:
    return float(np.mean((got - expected) ** 2, dtype=np.float64) / np.mean(expected**2, dtype=np.float64))


@pytest.mark.parametrize("shape", [(1, 32), (70, 64), (33, 96), (32, 576), (65, 1568), (5, 4096 + 32)])
@pytest.mark.parametrize("type", ALL)
def test_matmul_stays_within_its_limit_for_any_shape(type, shape, level):
    tensor = Tensor.from_array("", normal(*shape), type)
    for n_tokens in (1, 2, 3, 4, 5, 6, 7, 11, 13, 32, 65):
        x = normal(n_tokens, shape[1], seed=n_tokens)
        got, expected = matmul(x, tensor), ops.matmul(x, tensor)
        assert got.shape == expected.shape and got.dtype == np.float32
        # the error of few sums scatters: the limit is that of many
        scatter = 1 if got.size > 1000 else 5
        assert relative_error(got, expected) < limit(type, n_tokens, level) * scatter, n_tokens


@pytest.mark.parametrize("shape", [(33, 256), (70, 512), (161, 768), (34, 4096 + 256)])
@pytest.mark.parametrize("type", [*K_TYPES, *BLOCKS])
def test_any_bytes_in_blocks_are_multiplied_within_the_limit(type, shape, level):
    tensor = random_weight(type, *shape)
    for n_tokens in (1, 2, 3, 4, 6, 8, 16, 64):
        x = normal(n_tokens, shape[1], seed=n_tokens)
        got, expected = matmul(x, tensor), ops.matmul(x, tensor)
        scatter = 1 if got.size > 1000 else 5
        assert relative_error(got, expected) < limit(type, n_tokens, level) * scatter, n_tokens


@pytest.mark.parametrize("n_tokens, shape", [(600, (34, 64)), (140, (100, 4128))])
@pytest.mark.parametrize("type", ["f16", "q4_0", "q5_1"])
def test_many_tokens_and_wide_panels_stay_within_the_limit(type, n_tokens, shape, level):
    tensor, x = Tensor.from_array("", normal(*shape), type), normal(n_tokens, shape[1], seed=1)
    for threads in (1, 2):
        got = matmul(x, tensor, threads=threads)
        assert relative_error(got, ops.matmul(x, tensor)) < limit(type, n_tokens, level)


@pytest.mark.parametrize("n_in", [1, 7, 33, 1025])
@pytest.mark.parametrize("type", FLOATS)
def test_rows_of_numbers_may_have_any_length(type, n_in, level):
    tensor = Tensor.from_array("", normal(37, n_in), type)
    for n_tokens in (1, 3, 4, 13):
        x = normal(n_tokens, n_in, seed=1)
        got, expected = matmul(x, tensor), ops.matmul(x, tensor)
        assert relative_error(got, expected) < limit(type, n_tokens, level)


@pytest.mark.parametrize("n_tokens", [1, 9, 16])
def test_outliers_among_the_activations_cost_little(n_tokens, level):
    tensor = Tensor.from_array("", normal(256, 1024), "q4_0")
    x = normal(n_tokens, 1024, seed=1)
    x[:, 100:120:9] *= 20
    assert relative_error(matmul(x, tensor), ops.matmul(x, tensor)) < INT8_LIMIT_OUTLIERS


def empty_blocks(type: str, n_out: int, n_in: int) -> np.ndarray:
    kind, shape = TYPES[type], (n_out, n_in)
    return kind.view(bytearray(kind.nbytes(shape)), shape)


def whole_numbers(type: str, n_out: int, n_in: int, seed: int) -> Tensor:
    """Blocks of random quants whose scales are 1, or small whole numbers, and whose minima are whole."""
    tensor = random_weight(type, n_out, n_in, seed)
    rng, blocks = np.random.default_rng(seed), tensor.pieces[0].blocks()
    for name in blocks.dtype.names:
        field = blocks[name]
        if field.dtype.kind == "f":
            field[...] = 1 if name == "d" else rng.integers(-3, 4, field.shape)
    return tensor


@pytest.mark.parametrize("n_tokens", [1, 2, 4, 6, 13, 40])
@pytest.mark.parametrize("type", [*BLOCKS, *K_TYPES])
def test_integer_sums_are_exact(type, n_tokens, level):
    """Inputs that are whole numbers up to 127 quantize to themselves, so every sum is a whole number.

    Small scales make them too large for a float where all inputs are large.
    """
    if level == "amx" and n_tokens > _native.FEW and type in K_TYPES:
        pytest.skip("a small scale times a quant may have more than bf16's 8 bits")
    n_in = 768 if type in K_TYPES else 672
    tensor = whole_numbers(type, 37, n_in, seed=n_tokens)
    x = np.random.default_rng(7).integers(-127, 128, (n_tokens, n_in)).astype(np.float32)
    if type in K_TYPES:
        x[:, np.random.default_rng(8).random(n_in) < 0.9] = 0
    x.reshape(n_tokens, -1, 32)[..., 5] = 127
    expected = x.astype(np.int64) @ tensor.dequantize().astype(np.int64).T
    np.testing.assert_array_equal(matmul(x, tensor), expected)


@pytest.mark.parametrize("type", ["q4_0", "q8_0"])
def test_inputs_round_as_the_reference_rounds_them(type, level):
    """The unit matrix shows the quantized inputs themselves; a unit of theirs is 1/127/254 of the largest."""
    unit = Tensor.from_array("", np.eye(160, dtype=np.float32) * 8, type)
    x = np.concatenate([normal(5, 160), np.full((1, 160), 0.5, np.float32), np.zeros((1, 160), np.float32)])
    x[0, :32] *= 1e-30
    got = matmul(x, unit)
    _native.use_level("ref")
    np.testing.assert_allclose(got, matmul(x, unit), rtol=1e-6, atol=0)


@pytest.mark.parametrize("type", [*ALL, *K_TYPES])
def test_several_weights_give_what_each_gives(type, level):
    tensors = [some_weight(type, n, 256) for n in (64, 33, 1)]
    for n_tokens in (1, 7):
        x = normal(n_tokens, 256)
        for together, tensor in zip(matmul(x, *tensors), tensors, strict=True):
            np.testing.assert_array_equal(together, matmul(x, tensor))


@pytest.mark.parametrize("n_tokens", [1, 40])
@pytest.mark.parametrize("type", ["f16", "q4_0", "q4_1", "q8_0", "q2_k", "q6_k"])
def test_any_number_of_threads_gives_the_same_bits(type, n_tokens, level):
    x, tensor = normal(n_tokens, 512), some_weight(type, 777, 512)
    one = matmul(x, tensor, threads=1)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(matmul(x, tensor, threads=threads), one)


def test_inputs_may_begin_at_any_float(level):
    x, tensor = normal(5 * 128 + 3), Tensor.from_array("", normal(40, 128), "q4_0")
    for start in range(4):
        view = x[start : start + 5 * 128].reshape(5, 128)
        np.testing.assert_array_equal(matmul(view, tensor), matmul(view.copy(), tensor))


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-7, 1e4])
@pytest.mark.parametrize("type", [*BLOCKS, "q4_0_2023", "q4_1_2023"])
def test_blocks_of_zeros_and_of_tiny_or_large_weights(type, scale, level):
    array = normal(64, 256) * np.float32(scale)
    array[:, 64:96] = 0
    with np.errstate(over="ignore"):  # 1 / d of a block of zeros, whose d is not quite 0 in q4_1_2023
        tensor = Tensor.from_array("", array, type)
    for n_tokens in (1, 6):
        x = normal(n_tokens, 256, seed=1)
        expected = ops.matmul(x, tensor)
        # f16 itself cannot hold scales below 6e-8: those are zero, or coarse, in the file already
        np.testing.assert_allclose(matmul(x, tensor), expected, rtol=0, atol=0.05 * np.abs(expected).max())


#: NaN as processors make it, of all ones, with the sign and signalling; infinity.
NOT_FINITE = [
    np.array(bits, np.uint16).view(np.float16) for bits in (0x7E00, 0x7FFF, 0xFFFF, 0x7C01, 0x7C00, 0xFC00)
]


@pytest.mark.parametrize("field", ["d", "m", "dmin"])
@pytest.mark.parametrize("type", [*BLOCKS, *K_TYPES])
def test_a_scale_that_is_not_finite_shows_in_every_product_with_its_row(type, field, level):
    if field not in TYPES[type].dtype.names:
        pytest.skip(f"{type} has no {field}")
    for number in NOT_FINITE:
        tensor = some_weight(type, 40, 512)
        tensor.pieces[0].blocks()[field][33, 1] = number
        others = np.arange(40) != 33
        for n_tokens in (1, 3, 12, 16, 40):
            for weight in (prepared(tensor), left_in_file(tensor)):
                got = Native(1).matmul(normal(n_tokens, 512), weight)
                assert not np.isfinite(got[:, 33]).any() and np.isfinite(got[:, others]).all()


@pytest.mark.parametrize("type", ["f16", "q4_0", "q5_1", "q8_0", "q2_k", "q5_k", "q6_k", "iq4_xs"])
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_shows_in_its_tokens_products(number, type, level):
    tensor = some_weight(type, 40, 256)
    for n_tokens in (1, 3, 12, 16, 40):
        for col in range(64, 96, 5):
            x = normal(n_tokens, 256, seed=1)
            x[n_tokens // 2, col] = number
            others, got = np.arange(n_tokens) != n_tokens // 2, matmul(x, tensor)
            assert not np.isfinite(got[n_tokens // 2]).any() and np.isfinite(got[others]).all()


@pytest.mark.parametrize("type", [*BLOCKS, *K_TYPES])
def test_a_token_has_the_same_bits_alone_and_among_a_few(type, level):
    """Some of the tokens have outliers, each in other blocks, which are refined."""
    x, tensor = normal(_native.FEW, 768), some_weight(type, 37, 768)
    for token in range(0, _native.FEW, 3):
        x[token, 32 * token : 32 * token + 2] *= 50
    weight = prepared(tensor)
    alone = np.concatenate([Native(1).matmul(x[i : i + 1], weight) for i in range(len(x))])
    for n_tokens in range(2, _native.FEW + 1):
        together = Native(2).matmul(x[-n_tokens:], weight)
        np.testing.assert_array_equal(together.view(np.int32), alone[-n_tokens:].view(np.int32))


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-37, 1e-36, 1e-34, 1e30, 8e36])
def test_inputs_at_the_ends_of_their_range_are_multiplied_like_others(scale, level):
    """The inverse of a small block's scale is infinite, and so is 127 times a large one's."""
    tensor, x = Tensor.from_array("", normal(40, 64) / 1000, "q4_0"), normal(6, 64, seed=1)
    x *= 40 / np.abs(x).max()
    for n_tokens in (1, 6):
        tiny = np.float32(scale) * x[:n_tokens]
        got, expected = matmul(tiny, tensor), ops.matmul(tiny, tensor)
        np.testing.assert_allclose(got, expected, rtol=0, atol=max(2e-2 * np.abs(expected).max(), 1e-38))


def in_pieces(array: np.ndarray, type: str, n_pieces: int, axis: int) -> Tensor:
    pieces = (Tensor.from_array("", part, type).pieces[0] for part in np.split(array, n_pieces, axis))
    return Tensor("", array.shape, tuple(pieces), axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("type", ["f16", "q4_0", *OF_2023, "q3_k", "q5_k"])
def test_a_weight_in_pieces_is_put_together(type, axis, level):
    array, x = normal(48, 512), normal(2, 512, seed=1)
    whole, cut = Tensor.from_array("", array, type), in_pieces(array, type, 2, axis)
    np.testing.assert_array_equal(matmul(x, cut), matmul(x, whole))


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", *BLOCKS, *K_TYPES])
def test_embedding_gives_a_row_as_the_file_has_it(type):
    tensor = some_weight(type, 50, 512)
    rows = np.array([49, 0, 7, 7])
    np.testing.assert_array_equal(Native(2).embedding(prepared(tensor), rows), ops.embedding(tensor, rows))


@pytest.mark.parametrize("shape", [(1, 256), (70, 512), (64, 256), (161, 768), (5, 4096 + 256)])
@pytest.mark.parametrize("type", [*ALL, *K_TYPES])
def test_a_mapped_weight_gives_the_bits_of_a_packed_one(type, shape, level):
    tensor = some_weight(type, *shape)
    copied, mapped = prepared(tensor), left_in_file(tensor)
    assert mapped.nbytes == 0 and mapped.shape == copied.shape and mapped.type == copied.type
    for n_tokens in (1, 2, 3, 5, 12, 33, 65):
        x = normal(n_tokens, shape[1], seed=n_tokens)
        expected, got = (Native(2).matmul(x, w) for w in (copied, mapped))
        np.testing.assert_array_equal(got, expected)
    rows = np.array([shape[0] - 1, 0])
    np.testing.assert_array_equal(Native(2).embedding(mapped, rows), Native(2).embedding(copied, rows))


@pytest.mark.parametrize("type", [*ALL, *K_TYPES])
def test_a_settled_weight_gives_the_bits_of_a_packed_one(type, level):
    array, x = normal(54, 768), normal(7, 768, seed=1)
    for axis in (0, 1):
        tensor = in_pieces(array, type, 3, axis)
        weight, copied = left_in_file(tensor), prepared(tensor)
        Native(2).settle(weight, tensor)
        assert weight.nbytes == weight.bytes_read == copied.nbytes
        np.testing.assert_array_equal(Native(2).matmul(x, weight), Native(2).matmul(x, copied))


def test_products_are_the_same_while_their_weight_is_settled(level):
    tensor, x = some_weight("q4_k", 2048, 1024), normal(3, 1024)
    expected = matmul(x, tensor)
    for _ in range(20):
        weight = left_in_file(tensor)
        settling = [threading.Thread(target=Native(2).settle, args=(weight, tensor)) for _ in range(2)]
        for thread in settling:
            thread.start()
        while any(thread.is_alive() for thread in settling):
            np.testing.assert_array_equal(Native(2).matmul(x, weight), expected)
        assert weight.nbytes > 0
        np.testing.assert_array_equal(Native(2).matmul(x, weight), expected)


@pytest.mark.parametrize("type, n_in", [("f32", 33), ("f16", 7), ("f16", 34), ("bf16", 1025), ("q4_0", 96)])
def test_mapped_rows_may_have_any_length_and_begin_at_any_byte(type, n_in, level):
    tensor = Tensor.from_array("", normal(45, n_in), type)
    data = b"\1" + tensor.pieces[0].blocks().tobytes()
    moved = Tensor("", tensor.shape, (Piece(data, 1, type, tensor.shape),))
    for n_tokens in (1, 6, 40):
        x = normal(n_tokens, n_in, seed=1)
        expected = Native(2).matmul(x, prepared(tensor))
        np.testing.assert_array_equal(Native(2).matmul(x, left_in_file(moved)), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("type", ["f16", "q4_0", "q5_1", *OF_2023, "q2_k", "q6_k"])
def test_a_mapped_weight_may_lie_in_pieces(type, axis, level):
    array, x = normal(54, 768), normal(7, 768, seed=1)
    tensor = in_pieces(array, type, 3, axis)
    expected = Native(2).matmul(x, prepared(tensor))
    np.testing.assert_array_equal(Native(2).matmul(x, left_in_file(tensor)), expected)


def test_mapped_and_packed_weights_may_share_an_input(level):
    tensors, x = [Tensor.from_array("", normal(n, 128, seed=n), "q4_0") for n in (40, 64, 8)], normal(3, 128)
    weights = [left_in_file(tensors[0]), prepared(tensors[1]), left_in_file(tensors[2])]
    for together, tensor in zip(Native(2).matmul(x, *weights), tensors, strict=True):
        np.testing.assert_array_equal(together, matmul(x, tensor))
