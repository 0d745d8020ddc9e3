"""Mixes: which type each tensor of a quantized file gets, under the names of llama.cpp's llama-quantize.

Not all weights are equally sensitive. "Q4_K_M" stands for matrices of q4_k, but the output matrix, on which
every logit depends, gets q6_k, and so do attention.wv and feed_forward.w2 in the layers where it was seen to
help most. The choices are those of llama-quantize (src/llama-quant.cpp of llama.cpp, November 2026), so that
its files and ours hold the same bytes. Some differ with an importance matrix.

Nothing here needs NumPy.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..config import EMBEDDING, OUTPUT, Config
from ..errors import require
from .tables import split_name

WV, WO, W2 = "attention.wv.weight", "attention.wo.weight", "feed_forward.w2.weight"

#: What takes the place of a type of 256 weights a block where a row isn't a multiple of 256.
SUBSTITUTES = {
    "q2_k": "q4_0",  # iq4_nl in older versions
    "q3_k": "q4_0",  # likewise
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}
PLAIN = ("f32", "f16", "bf16")
UNWEIGHED = {*PLAIN, "q8_0"}  # what an importance matrix doesn't change
#: What a tensor may be told to become.
TYPES = (*PLAIN, "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", *SUBSTITUTES)


# --- where an exception holds: in layer i of n, of a model whose heads share keys in groups of so many; and
# whether errors are weighed, with an importance matrix ------------------------------------------------------


def _always(i, n, group, weighed):
    return True


def _more(i, n, group, weighed):
    """The first eighth of the layers, the last, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first(n_layers):
    return lambda i, n, group, weighed: i < n_layers


def _share(part, only=None):
    """The first n / part layers; only with an importance matrix (True), or without one (False)."""
    return lambda i, n, group, weighed: i < n // part and only in (None, weighed)


def _grouped(i, n, group, weighed):
    """wv is small there."""
    return group >= 4


@dataclass(frozen=True)
class Mix:
    """A row of the table below."""

    number: int  # in general.file_type: llama_ftype
    type: str  # of every matrix that isn't an exception
    #: A tensor of each layer -> types and where they hold; the first counts.
    exceptions: dict[str, tuple] = field(default_factory=dict)


_MORE_BITS = (("q6_k", _more),)
_IQ4 = {WV: (("q5_k", _grouped),), W2: (("q5_k", _share(8, only=False)),)}
_Q2_K = {WV: (("q4_k", _grouped), ("q3_k", _always)), WO: (("q3_k", _always),), W2: (("q3_k", _always),)}
_Q2_K_S = {WV: (("q4_k", _grouped),), W2: (("q4_k", _share(8)),)}
_Q3_K_M = {
    WV: (("q5_k", _first(2)), ("q4_k", _always)),
    WO: (("q4_k", _always),),
    W2: (("q5_k", _share(16)), ("q4_k", _always)),
}

MIXES = {
    "F32": Mix(0, "f32"),
    "F16": Mix(1, "f16"),
    "BF16": Mix(32, "bf16"),
    "Q4_0": Mix(2, "q4_0", {W2: (("q4_1", _share(8, only=True)),)}),
    "Q4_1": Mix(3, "q4_1"),
    "Q5_0": Mix(8, "q5_0", {W2: (("q5_1", _share(8, only=True)),)}),
    "Q5_1": Mix(9, "q5_1"),
    "Q8_0": Mix(7, "q8_0"),
    "Q2_K": Mix(10, "q2_k", _Q2_K),
    "Q2_K_S": Mix(21, "q2_k", _Q2_K_S),
    "Q3_K_S": Mix(11, "q3_k"),
    "Q3_K_M": Mix(12, "q3_k", _Q3_K_M),
    "Q3_K_L": Mix(13, "q3_k", dict.fromkeys((WV, WO, W2), (("q5_k", _always),))),
    "Q4_K_S": Mix(14, "q4_k", {WV: (("q5_k", _first(4)),), W2: (("q5_k", _share(8)),)}),
    "Q4_K_M": Mix(15, "q4_k", {WV: _MORE_BITS, W2: _MORE_BITS}),
    "Q5_K_S": Mix(16, "q5_k"),
    "Q5_K_M": Mix(17, "q5_k", {WV: _MORE_BITS, W2: _MORE_BITS}),
    "Q6_K": Mix(18, "q6_k"),
    "IQ4_NL": Mix(25, "iq4_nl", _IQ4),
    "IQ4_XS": Mix(30, "iq4_xs", _IQ4),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
ALIASES |= {str(mix.number): name for name, mix in MIXES.items()}


def find_mix(name: object) -> str:
    """A key of MIXES, from it in upper or lower case, an alias, or llama_ftype's number.

    Raises TinyllamaError for anything else.
    """
    wanted = str(name).upper()
    found = ALIASES.get(wanted, wanted)
    require(found in MIXES, f"quantize to {', '.join(MIXES)}, not to {name}")
    return found


def find_type(name: str) -> str:
    """A key of quant.TYPES, from it in upper or lower case. Raises TinyllamaError for what GGUF hasn't."""
    require(str(name).lower() in TYPES, f"the type of a tensor is one of {', '.join(TYPES)}, not {name}")
    return name.lower()


@dataclass(frozen=True)
class Choice:
    """Everything that decides over the types of a file's tensors."""

    mix: str  # a key of MIXES
    config: Config
    tied: bool  # there is no output matrix: the embedding is used for it
    pure: bool = False  # no exceptions
    output_type: str | None = None  # of the output matrix, whatever the mix says
    embedding_type: str | None = None  # of the embedding, likewise
    weighed: bool = False  # there is an importance matrix

    def type_of(self, name: str, n_cols: int) -> str:
        """What a matrix of rows of so many weights becomes; names are Meta's."""
        return fitting(self.wanted(name, n_cols), n_cols)

    def wanted(self, name: str, n_cols: int) -> str:
        """What it would become if its rows divided into blocks."""
        base, is_plain = MIXES[self.mix].type, MIXES[self.mix].type in PLAIN
        if name == EMBEDDING and self.embedding_type:
            return self.embedding_type
        if name == OUTPUT and self.output_type:
            return self.output_type
        if is_plain or self.pure:
            return base
        if name == OUTPUT or (name == EMBEDDING and self.tied):
            return self.output_type or ("q8_0" if base == "q8_0" or n_cols % block(base) else "q6_k")
        return self._in_layer(name, base)

    def _in_layer(self, name: str, base: str) -> str:
        layer, role = split_name(name)
        config, rules = self.config, MIXES[self.mix].exceptions.get(role, ())
        group = config.n_heads // config.n_kv_heads
        where = layer or 0, config.n_layers, group, self.weighed
        found = next((type for type, holds in rules if holds(*where)), base)
        # Of the models that have 80 layers, LLaMA 2 and 3 70B and Qwen2 72B, wv is an eighth of wq.
        groups = {"llama": 2, "qwen2": 1}.get(config.family, group + 1)  # llama-quantize's way to tell
        is_70b = config.n_layers == 80 and group >= groups
        return "q5_k" if role == WV and is_70b and found in ("q3_k", "q4_k") else found


def block(type: str) -> int:
    """Weights in a block."""
    return 1 if type in PLAIN else 256 if type in SUBSTITUTES else 32


def fitting(type: str, n_cols: int) -> str:
    """A type itself, or what rows that don't divide into its blocks get instead."""
    if n_cols % block(type):
        type = SUBSTITUTES.get(type, type)
    return type if n_cols % block(type) == 0 else "f16"


def needs_importance(mix: str, types: Iterable[tuple[str, str]], known: Iterable[str]) -> str:
    """The first of (name, type) that llama-quantize won't quantize so without an importance matrix, or "".

    known: the tensors of which there is one. Its authors call the result without it garbage.
    """
    free = {OUTPUT, EMBEDDING, *known}
    if mix != "Q2_K_S":
        return ""
    return next((name for name, type in types if type == "q2_k" and name not in free), "")


def file_order(names: Iterable[str]) -> list[str]:
    """GGUF's names as llama-quantize orders them: first what is in no layer, then by layers, by names."""
    layer = {name: re.match(r"blk\.(\d+)\.", name) for name in names}
    return sorted(layer, key=lambda name: (int(layer[name][1]) if layer[name] else -1, name))
