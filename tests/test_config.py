import math

import pytest

from tinyllama.config import PRESETS, Config, hidden_dim_of, tensor_names
from tinyllama.errors import TinyllamaError


@pytest.mark.parametrize(
    ("size", "hidden_dim", "n_params"),
    [
        ("7B", 11008, 6_738_415_616),
        ("13B", 13824, 13_015_864_320),
        ("30B", 17920, 32_528_943_616),
        ("65B", 22016, 65_285_660_672),
    ],
)
def test_the_published_sizes_have_the_published_number_of_weights(size, hidden_dim, n_params):
    assert PRESETS[size].hidden_dim == hidden_dim
    assert PRESETS[size].n_params() == n_params


def test_hidden_dim_is_two_thirds_of_four_dim_rounded_up():
    assert hidden_dim_of(4096, 256) == 11008
    assert hidden_dim_of(64, 32) == 192


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"n_heads": 5},
        {"n_kv_heads": 3},
        {"n_layers": -1},
        {"dim": 4},
        {"norm_eps": math.nan},
        {"rope_theta": 0},
    ],
)
def test_hyper_parameters_that_contradict_each_other_are_refused(wrong):
    good = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96, "hidden_dim": 160, "n_kv_heads": 2}
    with pytest.raises(TinyllamaError):
        Config(**(good | wrong))


def test_every_tensor_of_a_model_has_one_name_in_each_convention():
    config = PRESETS["7B"]
    names = tensor_names(config.n_layers)
    assert {meta for meta, _, _ in names} == set(config.tensor_shapes())
    for convention in zip(*names, strict=True):
        assert len(set(convention)) == len(names)
