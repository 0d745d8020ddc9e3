"""The ggml file of March 2023, its other parts, and what may lie beside it."""

import json

from hypothesis import strategies as st

from tinyllama.config import Config, hidden_dim_of
from tinyllama.formats import ggml
from tinyllama.formats.parts import share
from tinyllama.quant import TYPES

from .. import contract, texts
from ..bundle import bundle, unbundle
from ..damage import Field, Number, damaged, odd_tensors, pack
from . import tokenizer_model

READS = ("tinyllama.formats.ggml", "tinyllama.formats.parts")
WORDS = [b"lmgg", b"=== m.bin ===\n", b"=== m.bin.1 ===\n", b"=== params.json ===\n"]
WORDS += [b"=== tokenizer.model ===\n", b"tok_embeddings.weight", b"layers.0.attention.wq.weight"]

TEXTS = [b"", b"", b"", *[b"\xef\xbf\xbd"] * 256, b" ", b"a", b" a", b"ab", b"  "]


def check(data: bytes) -> bool:
    """A model that is read is whole, its tensors share no bytes, and its tokenizer keeps texts."""
    with contract.folder(unbundle(data)) as folder:
        path = folder / "m.bin"
        checkpoint = contract.opened(ggml.read, path, named=folder)
        if checkpoint is None:
            return False
        contract.is_whole(checkpoint.tensors, checkpoint.config, len(data))
        contract.are_apart(checkpoint.tensors)
        texts.keeps_texts(checkpoint.vocabulary, checkpoint.vocabulary.path or path)
    return True


# --- nearly valid files ---------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """Files of one or two parts, some damaged, sometimes with params.json or tokenizer.model beside."""
    dim, ftype = draw(st.sampled_from([(4, 0), (8, 1), (64, 2), (64, 3), (32, 2)]))
    config = tiny(dim, draw(st.integers(1, 2)) if dim < 32 else 1)
    n_parts = draw(st.sampled_from([1, 1, 2])) if dim != 32 else 1
    fill = draw(st.sampled_from([b"\0", b"\x11\x22\x33", b"\xff", b"\x00\x00\x80\x3f"]))
    files = {}
    for number in range(n_parts):
        what = draw(st.sampled_from(["tensors", "fields", "nothing"]))
        shapes = shapes_of(config, n_parts)
        tensors = draw(odd_tensors(shapes)) if what == "tensors" else shapes.items()
        part = fields(config, tensors, ftype, fill)
        files["m.bin" + f".{number}" * (number > 0)] = draw(damaged(part)) if what == "fields" else pack(part)
    if draw(st.integers(0, 3)) == 0:
        odd = draw(st.dictionaries(st.sampled_from([*params_of(config), "rope_theta"]), VALUES, max_size=2))
        files["params.json"] = json.dumps(params_of(config) | odd).encode()
    if draw(st.integers(0, 3)) == 0:
        files["tokenizer.model"] = draw(tokenizer_model.inputs())
    return bundle(files)


VALUES = st.sampled_from([0, -1, 1e-5, 1e308, 10**400, float("nan"), None, "1e-5", [], {}, True])


def tiny(dim: int, n_layers: int) -> Config:
    """As ggml's header can say it."""
    return Config(dim, n_layers, 2, len(TEXTS), hidden_dim_of(dim, dim), 2, dim)


def params_of(config: Config) -> dict:
    """params.json of the same model."""
    names = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
    return {name: getattr(config, name) for name in names}


def shapes_of(config: Config, n_parts: int = 1) -> dict[str, tuple[int, ...]]:
    """The tensors of one part."""
    return {name: share(name, shape, n_parts) for name, shape in config.tensor_shapes().items()}


def fields(config: Config, tensors, ftype: int, fill: bytes = b"\0") -> list[Field]:
    """One part. All are alike but for what the weights are."""
    numbers = (config.vocab_size, config.dim, config.multiple_of, config.n_heads, config.n_layers)
    head = [b"lmgg", *(Number("i", n) for n in (*numbers, config.head_dim, ftype))]
    vocabulary = [(Number("i", len(text)), text) for text in TEXTS]
    head += [pack([field for token in vocabulary[:-9] for field in token])]  # one field, they are all alike
    head += [field for token in vocabulary[-9:] for field in token]
    for name, shape in tensors:
        number = ftype if len(shape) == 2 else 0
        size = TYPES[("f32", "f16", "q4_0_2023", "q4_1_2023")[number]].nbytes(shape)
        head += [Number("i", len(shape)), Number("i", len(name)), Number("i", number)]
        head += [Number("i", axis) for axis in reversed(shape)]
        head += [name.encode(), (fill * size)[:size]]
    return head


def seeds() -> dict[str, bytes]:
    """f16 in two parts, q4_0 with tokenizer.model and params.json beside it, q4_1."""
    half, blocks = tiny(8, 1), tiny(32, 1)
    part = pack(fields(half, shapes_of(half, 2).items(), 1, b"\x00\x3c"))
    params = json.dumps(params_of(blocks)).encode()
    q4_0 = pack(fields(blocks, shapes_of(blocks).items(), 2))
    beside = {"tokenizer.model": tokenizer_model.seeds()["bytes"], "params.json": params}
    return {
        "f16_two_parts": bundle({"m.bin": part, "m.bin.1": part}),
        "q4_0": bundle({"m.bin": q4_0, **beside}),
        "q4_1": bundle({"m.bin": pack(fields(blocks, shapes_of(blocks).items(), 3))}),
    }
