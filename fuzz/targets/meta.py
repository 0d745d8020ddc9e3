"""A folder of Meta's: params.json, consolidated.NN.pth, tokenizer.model."""

import json

from hypothesis import strategies as st

from tinyllama.config import Config
from tinyllama.formats import meta
from tinyllama.formats.parts import axis_of
from tinyllama.quant import TYPES

from .. import contract
from ..bundle import bundle, unbundle
from ..damage import damaged, pack
from . import pth, safetensors

READS = ("tinyllama.formats.meta", "tinyllama.formats.parts", "tinyllama.config")
WORDS = [b"=== params.json ===\n", b"=== consolidated.00.pth ===\n", b"=== consolidated.01.pth ===\n"]
WORDS += [b'"n_kv_heads": 1', b'"ffn_dim_multiplier": 1e308', b'"dim": 1e99', b'"vocab_size": -1', b"NaN"]

CONFIG = Config(8, 1, 2, 6, 24, 2)
PARAMS = {"dim": 8, "multiple_of": 8, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-6, "vocab_size": -1}

#: Six pieces of one letter, a trainer of the BPE kind, a normalizer that puts a space before the text.
TOKENIZER = (
    b"".join(b"\n\x03\n\x01" + bytes([letter]) for letter in b"abcdef") + b"\x12\x02\x18\x02\x1a\x02\x18\x01"
)


def check(data: bytes) -> bool:
    """A checkpoint that is read is whole."""
    with contract.folder(unbundle(data)) as folder:
        checkpoint = contract.opened(meta.read, folder)
        if checkpoint is not None:
            contract.is_whole(checkpoint.tensors, checkpoint.config, len(data))
    return checkpoint is not None


# --- nearly valid folders -------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """Checkpoints of one to four parts, with one file damaged, lost or of another checkpoint."""
    n_parts = draw(st.sampled_from([1, 1, 2, 4]))
    files = checkpoint(n_parts, draw(st.sampled_from(list(pth.STORAGES))))
    if n_parts == 1 and draw(st.integers(0, 3)) == 0:
        shapes = CONFIG.tensor_shapes().items()
        files["consolidated.safetensors"] = safetensors.file(shapes, draw(st.sampled_from(["f16", "bf16"])))
        del files["consolidated.00.pth"]
    params = PARAMS | draw(st.dictionaries(st.sampled_from([*PARAMS, *MORE]), VALUES, max_size=2))
    files["params.json"] = json.dumps(params).encode()
    name = draw(st.sampled_from([*files, "nothing"]))
    what = draw(st.sampled_from(["damage", "lose", "other", "again", "nothing"]))
    if name in files and what == "damage":
        files[name] = draw(
            damaged([files[name][start : start + 16] for start in range(0, len(files[name]), 16)])
        )
    elif name in files and what == "lose":
        del files[name]
    elif name in files and what == "other":
        files[name] = checkpoint(draw(st.sampled_from([1, 2, 4])), "f32").get(name, b"")
    elif what == "again":
        files[f"consolidated.{draw(st.integers(0, 5)):02d}.pth"] = files.get("consolidated.00.pth", b"")
    return bundle(files)


MORE = ["n_kv_heads", "rope_theta", "ffn_dim_multiplier", "other", "hidden_dim", "head_dim", "sliding_window"]
MORE += ["use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_position_embeddings", "moe"]
ODD = [0, -1, 1, 2, 3, 8, 10**6, 2**31, 2**63, 10**400, 1e-6, 1e308, float("nan"), float("inf"), None, True]
VALUES = st.sampled_from([*ODD, "8", "x" * 3000, [], [8], {}, {"dim": 8}, 7.5]) | st.integers()


def share(name: str, shape: tuple[int, ...], n_parts: int) -> tuple[int, ...]:
    """What a part holds of a tensor; too little where it doesn't divide, as 6 tokens by 4 parts."""
    cut = axis_of(name) if len(shape) == 2 else None
    return tuple(n // n_parts if axis == cut else n for axis, n in enumerate(shape))


def checkpoint(n_parts: int, type: str) -> dict[str, bytes]:
    """The files of a checkpoint in so many parts."""
    files = {"params.json": json.dumps(PARAMS).encode(), "tokenizer.model": TOKENIZER}
    for number in range(n_parts):
        shapes = {name: share(name, shape, n_parts) for name, shape in CONFIG.tensor_shapes().items()}
        steps = pth.program(shapes.items(), type)
        sizes = [TYPES[type].nbytes(shape) for shape in shapes.values()]
        members = {f"data/{key}": bytes(size) for key, size in enumerate(sizes)}
        files[f"consolidated.{number:02d}.pth"] = pack(pth.archive({"data.pkl": pack(steps), **members}))
    return files


def seeds() -> dict[str, bytes]:
    """One part, two, and Mistral's one file of safetensors."""
    mistral = {"consolidated.safetensors": safetensors.file(CONFIG.tensor_shapes().items(), "bf16")}
    numbers = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "head_dim": 4, "sliding_window": 3}
    mistral |= {"params.json": json.dumps(numbers).encode(), "tokenizer.model": TOKENIZER}
    parts = {"one_part": checkpoint(1, "f16"), "two_parts": checkpoint(2, "bf16"), "mistral": mistral}
    return {name: bundle(files) for name, files in parts.items()}
