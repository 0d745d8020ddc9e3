import numpy as np
import pytest

from tinyllama.commands.mixes import Choice
from tinyllama.commands.random_weights import RandomWeights
from tinyllama.config import Config
from tinyllama.errors import TinyllamaError
from tinyllama.formats import open_checkpoint
from tinyllama.quant import TYPES

SHAPE = Config(dim=256, n_layers=8, n_heads=4, vocab_size=300, hidden_dim=512, n_kv_heads=2)
NARROW = Config(dim=64, n_layers=1, n_heads=2, vocab_size=300, hidden_dim=96, n_kv_heads=2)


@pytest.mark.parametrize("type", TYPES)
def test_random_weights_have_the_shapes_of_the_model_and_sane_values(type):
    weights = RandomWeights(SHAPE, type)
    assert {name: tensor.shape for name, tensor in weights.items()} == SHAPE.tensor_shapes()
    assert weights["output.weight"].nbytes == weights.get("output.weight").nbytes
    for name in ("tok_embeddings.weight", "layers.7.feed_forward.w2.weight"):
        numbers = weights[name].dequantize()
        assert weights[name].type == type and numbers.shape == weights[name].shape
        deviation = numbers.shape[1] ** -0.5
        assert np.isfinite(numbers).all() and abs(numbers.mean()) < 0.15 * deviation  # q4_0 has -8 to 7
        assert numbers.std() == pytest.approx(deviation, rel=0.05)
    assert (weights["norm.weight"].dequantize() == 1).all()


@pytest.mark.parametrize("mix", ["Q4_K_M", "q4_k_m", "Q4_0", "IQ4_XS"])
def test_a_mix_gives_each_tensor_the_type_that_quantize_gives_it(mix):
    choice = Choice(mix.upper(), SHAPE, tied=False)
    for name, tensor in RandomWeights(SHAPE, mix).items():
        assert tensor.type == (choice.type_of(name, tensor.shape[1]) if len(tensor.shape) == 2 else "f32")


def test_rows_that_no_block_fits_get_what_quantize_gives_them():
    assert RandomWeights(NARROW, "q4_k")["layers.0.attention.wq.weight"].type == "q5_0"


def test_an_unknown_type_is_refused():
    with pytest.raises(TinyllamaError, match="q9_9"):
        RandomWeights(SHAPE, "q9_9")


@pytest.mark.parametrize("type", ["q4_0", "Q4_K_M", "f16"])
def test_a_file_holds_the_same_weights(type, tmp_path):
    weights, said = RandomWeights(SHAPE, type), []
    weights.write_gguf(tmp_path / "random.gguf", "random", said.append)
    checkpoint = open_checkpoint(tmp_path / "random.gguf")
    assert set(checkpoint.tensors) == set(weights) and len(checkpoint.vocabulary.pieces) == SHAPE.vocab_size
    for name, tensor in checkpoint.tensors.items():
        assert tensor.type == weights[name].type
        np.testing.assert_array_equal(tensor.dequantize(), weights[name].dequantize())
    assert said[0].startswith("write 0% of ") and len(set(said)) > 10


def test_a_type_that_a_file_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TinyllamaError, match="q4_0_2023"):
        RandomWeights(SHAPE, "q4_0_2023").write_gguf(tmp_path / "random.gguf", "random", print)
    assert not list(tmp_path.iterdir())
