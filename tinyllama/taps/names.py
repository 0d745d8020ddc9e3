"""What the values inside a model are called, here and by others, and which of them a pattern means."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..config import Config
from ..errors import TinyllamaError, require
from ..model import tap_shapes
from ..texts.keywords import nearest

#: Our name, TransformerLens's and llama.cpp's for the same value, {} being the layer. Shapes are always ours.
#: What isn't listed isn't the same value: TransformerLens's ln1.hook_normalized lacks the norm's weight.
NAMES = (
    ("embedding", "hook_embed", "inp_embd"),
    ("layers.{}.attention.norm", "", "attn_norm-{}"),
    ("layers.{}.attention.q", "blocks.{}.attn.hook_q", "Qcur-{}"),  # llama.cpp's after RoPE, too
    ("layers.{}.attention.k", "blocks.{}.attn.hook_k", "Kcur-{}"),
    ("layers.{}.attention.v", "blocks.{}.attn.hook_v", "Vcur-{}"),
    ("layers.{}.attention.q_rope", "blocks.{}.attn.hook_rot_q", ""),
    ("layers.{}.attention.k_rope", "blocks.{}.attn.hook_rot_k", ""),
    ("layers.{}.attention.scores", "blocks.{}.attn.hook_attn_scores", "kq-{}"),  # llama.cpp's: not scaled
    ("layers.{}.attention.weights", "blocks.{}.attn.hook_pattern", "kq_soft_max-{}"),
    ("layers.{}.attention.heads", "blocks.{}.attn.hook_z", "kqv_out-{}"),
    ("layers.{}.attention.output", "blocks.{}.hook_attn_out", "attn_out-{}"),
    ("layers.{}.residual_mid", "blocks.{}.hook_resid_mid", "ffn_inp-{}"),
    ("layers.{}.feed_forward.norm", "", "ffn_norm-{}"),
    ("layers.{}.feed_forward.gate", "blocks.{}.mlp.hook_pre", "ffn_gate-{}"),
    ("layers.{}.feed_forward.up", "blocks.{}.mlp.hook_pre_linear", "ffn_up-{}"),
    ("layers.{}.feed_forward.hidden", "blocks.{}.mlp.hook_post", "ffn_swiglu-{}"),
    ("layers.{}.feed_forward.output", "blocks.{}.hook_mlp_out", "ffn_out-{}"),
    ("layers.{}.residual", "blocks.{}.hook_resid_post", "l_out-{}"),
    ("norm", "", "result_norm"),
    ("logits", "", "result_output"),
)

#: The value that a weight is multiplied with, by the weight's name in a layer.
INPUTS = {
    "attention.wq": "attention.norm",
    "attention.wk": "attention.norm",
    "attention.wv": "attention.norm",
    "attention.wo": "attention.heads",
    "feed_forward.w1": "feed_forward.norm",
    "feed_forward.w3": "feed_forward.norm",
    "feed_forward.w2": "feed_forward.hidden",
}


def others_names(config: Config) -> dict[str, str]:
    """Every name that others have for a value -> ours."""
    found = {"blocks.0.hook_resid_pre": "embedding"}
    for layer in range(config.n_layers):
        for ours, *others in NAMES:
            if config.qk_norms and ours.endswith((".q", ".k")):  # theirs are those before the norm
                others = [ours[-1].upper() + "cur_normed-{}"]
            found |= {other.format(layer): ours.format(layer) for other in others if other}
        if layer:
            found[f"blocks.{layer}.hook_resid_pre"] = f"layers.{layer - 1}.residual"
    return found


def matching(config: Config, patterns: str | Sequence[str]) -> dict[str, str]:
    """The names that patterns mean -> our names of the same values, in the order of computation.

    Args:
        patterns: one or several in shell style, "layers.*.attention.weights"; of names of others, only what
            matches none of ours.
    Raises TinyllamaError where a pattern matches nothing.
    """
    order = {name: at for at, name in enumerate(tap_shapes(config, 1))}
    others, found = others_names(config), {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        require(isinstance(pattern, str), f"a value's name is text, not {pattern!r:.60}")
        names = [name for name in order if fnmatchcase(name, pattern)]
        known = dict(zip(names, names, strict=True)) or {
            name: ours for name, ours in others.items() if fnmatchcase(name, pattern)
        }
        if not known:
            raise TinyllamaError(f"nothing in this model is named {pattern!r:.80}: {_hint(config, pattern)}")
        found |= known
    return dict(sorted(found.items(), key=lambda pair: order[pair[1]]))


def _hint(config: Config, pattern: str) -> str:
    """What somebody may have meant by a name that there isn't."""
    layer = re.match(r"(?:layers|blocks)\.(\d+)\.|.*-(\d+)$", pattern)
    if layer and int(layer[1] or layer[2]) >= config.n_layers:
        return f"its layers are 0 to {config.n_layers - 1}"
    names = [*tap_shapes(config, 1), *others_names(config)]
    meant = nearest(pattern, names)
    return f"did you mean {meant}?" if meant else f"there are {', '.join(names[:9])}, ..."


def synonyms(name: str) -> set[str]:
    """All names of the value that has this one."""
    layer = re.search(r"\d+", name)
    general = re.sub(r"\d+", "{}", name, count=1)
    rows = [row for row in NAMES if general in row]
    return {name} | {other.format(layer and layer[0]) for row in rows for other in row if other}
