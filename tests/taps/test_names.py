"""Values have our names, TransformerLens's and llama.cpp's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from twin import twin

import tinyllama
from tinyllama.errors import TinyllamaError
from tinyllama.model import tap_shapes
from tinyllama.taps.names import NAMES, matching, others_names

PROMPT = "Once upon a time, there was a little girl"


@pytest.fixture(scope="module")
def llama():
    return tinyllama.load("small", "numpy")


def test_the_table_lists_every_value_of_the_forward_pass_in_order(llama):
    names = dict.fromkeys(
        name.replace(".1.", ".{}.") for name in tap_shapes(llama.config, 1) if ".0." not in name
    )
    listed = [ours for ours, *_ in NAMES]
    assert [name for name in names if not name.startswith(("layers.2", "layers.3"))] == listed


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row[0])
def test_all_names_of_a_value_give_it_under_the_name_that_was_asked_for(row, llama):
    asked = [name.format(2) for name in row if name]
    taps = llama.trace(PROMPT, *asked)
    assert set(taps) == set(asked)
    for name in asked:
        np.testing.assert_array_equal(taps[name], taps[asked[0]])


def test_a_layer_s_residual_before_is_that_after_the_layer_before(llama):
    before, after = (llama.trace(PROMPT, f"blocks.*.hook_resid_{end}") for end in ("pre", "post"))
    assert [*before] == [f"blocks.{n}.hook_resid_pre" for n in range(4)]
    np.testing.assert_array_equal(
        before["blocks.0.hook_resid_pre"], llama.trace(PROMPT, "embedding")["embedding"]
    )
    np.testing.assert_array_equal(before["blocks.3.hook_resid_pre"], after["blocks.2.hook_resid_post"])


def test_a_pattern_means_names_of_others_only_where_none_of_ours_match(llama):
    assert set(matching(llama.config, "*norm*").values()) == set(matching(llama.config, "*norm*"))
    assert matching(llama.config, "kq_soft_max-[01]") == {
        "kq_soft_max-0": "layers.0.attention.weights",
        "kq_soft_max-1": "layers.1.attention.weights",
    }


def test_a_name_that_matches_nothing_is_refused_with_the_nearest(llama):
    with pytest.raises(
        TinyllamaError, match=r"named 'blocks.1.attn.hook_patern': did you mean blocks\.\d\.attn"
    ):
        llama.trace(PROMPT, "blocks.1.attn.hook_patern")
    for name in ("layers.9.residual", "l_out-9"):
        with pytest.raises(TinyllamaError, match=f"named '{name}': its layers are 0 to 3"):
            llama.trace(PROMPT, name)


def test_names_of_queries_before_their_norm_are_none_of_ours_after_it(llama):
    """Of Qwen3 ours are normalized, and theirs aren't yet."""
    names = others_names(replace(llama.config, family="qwen3"))
    assert (
        names["Qcur_normed-1"] == "layers.1.attention.q" and names["Kcur_normed-1"] == "layers.1.attention.k"
    )
    assert not {"Qcur-1", "Kcur-1", "blocks.1.attn.hook_q", "blocks.1.attn.hook_k"} & names.keys()


def test_patterns_may_be_a_list(llama):
    assert [*llama.trace(PROMPT, ["norm", "logits"])] == ["norm", "logits"]


#: TransformerLens's values, from transformers' modules: (module of a layer, input or output, layer's axes).
THEIRS = {
    "hook_resid_pre": ("", "in"),
    "hook_resid_post": ("", "out"),
    "hook_attn_out": ("self_attn", "out"),
    "hook_resid_mid": ("post_attention_layernorm", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "attn.hook_v": ("self_attn.v_proj", "out"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "mlp.hook_pre": ("mlp.gate_proj", "out"),
    "mlp.hook_pre_linear": ("mlp.up_proj", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_value_is_what_transformers_computes_at_the_place_of_that_name(name, llama):
    module, side = THEIRS[name]
    model, seen, ids = twin(llama), {}, llama.tokens(PROMPT)

    def keep(_, inputs, output):
        value = inputs[0] if side == "in" and inputs else output[0] if isinstance(output, tuple) else output
        seen["value"] = value[0].numpy()

    layer = model.model.layers[2]
    (layer.get_submodule(module) if module else layer).register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([ids]))
    found = llama.trace(ids, f"blocks.2.{name}")[f"blocks.2.{name}"]
    np.testing.assert_allclose(found.reshape(seen["value"].shape), seen["value"], rtol=1e-3, atol=1e-4)


def test_attention_weights_are_transformers(llama):
    ids, model = llama.tokens(PROMPT), twin(llama)
    with torch.no_grad():
        weights = model(torch.tensor([ids]), output_attentions=True).attentions
    found = llama.trace(ids, "blocks.*.attn.hook_pattern")
    np.testing.assert_allclose(np.stack([*found.values()]), np.concatenate(weights), rtol=0, atol=1e-5)
