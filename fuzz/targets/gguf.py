"""GGUF files: header, key-values, tensor infos, blocks, and the vocabulary that comes with them."""

from dataclasses import replace

import gguf as oracle
import numpy as np
from hypothesis import strategies as st

from tinyllama.config import STEPS, Config, tensor_names
from tinyllama.formats import Checkpoint, gguf
from tinyllama.quant import TYPES

from .. import contract, texts
from ..damage import Field, Number, damaged, numbers, odd_tensors, pack

READS = ("tinyllama.formats.gguf", "tinyllama.formats.key_values")
WORDS = [b"GGUF", b"general.architecture", b"llama", b"general.alignment", b"tokenizer.ggml.tokens"]

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def check(data: bytes) -> bool:
    """A model that is read is whole and what the gguf package reads, and its tokenizer keeps texts."""
    with contract.folder({"model.gguf": data}) as folder:
        path = folder / "model.gguf"
        checkpoint = contract.opened(gguf.read, path)
        if checkpoint is None:
            return False
        contract.is_whole(checkpoint.tensors, checkpoint.config, len(data))
        contract.are_apart(checkpoint.tensors)
        agrees(checkpoint)
        texts.keeps_texts(checkpoint.vocabulary, path)
    return True


def agrees(checkpoint: Checkpoint) -> None:
    """Where the gguf package reads the file, too, it finds the same bytes in every tensor."""
    try:
        theirs = {tensor.name: tensor for tensor in oracle.GGUFReader(checkpoint.path).tensors}
    except Exception:  # it is stricter here and laxer there, and not what is tested
        return
    names = {name: gguf_name for name, gguf_name, _ in tensor_names(checkpoint.config.n_layers, STEPS)}
    for name, tensor in checkpoint.tensors.items():
        other = theirs[names.get(name, name)]
        in_order = replace(tensor.pieces[0], order=None).blocks()
        same = in_order.tobytes() == np.asarray(other.data).tobytes()
        contract.must(same, "not what the gguf package reads", name)


# --- nearly valid files ---------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """Models of one or two tiny layers with odd tensors, or odd key-values, or damage anywhere."""
    config, type = draw(configs()), draw(st.sampled_from(list(gguf.TYPE_OF_ID.values()))).name
    if TYPES[type].block > 1 and draw(st.booleans()):
        size = TYPES[type].block
        config = Config(size, 1, 2, config.vocab_size, size, 1)
    elif TYPES[type].block > 1:
        type = "f16"
    keys = keys_of(config, pieces=texts.PIECES[: config.vocab_size])
    what = draw(st.sampled_from(["tensors", "places", "keys", "fields", "everything"]))
    if what in ("keys", "everything"):
        for key in draw(st.lists(st.sampled_from([*keys, *ODD_KEYS, "other"]), max_size=2)):
            keys[key] = draw(values())
    alignment = draw(st.sampled_from([32, 32, 8, 64, 4096]))
    if alignment != 32:
        keys["general.alignment"] = [Number("I", U32), Number("I", alignment)]
    version = draw(st.sampled_from([3, 3, 2]))
    fill = draw(st.sampled_from([b"\0", b"\x11\x22\x33", b"\xff", b"\x00\x7c", b"\x00\x3c"]))
    shapes = shapes_of(config, tied=draw(st.booleans()))
    tensors = draw(odd_tensors(shapes)) if what in ("tensors", "everything") else list(shapes.items())
    places = draw(st.dictionaries(st.sampled_from(list(shapes)), PLACES, min_size=1, max_size=2))
    places = places if what in ("places", "everything") else {}
    whole = fields(keys, tensors, type, alignment, version, fill, places)
    return draw(damaged(whole)) if what in ("fields", "everything") else pack(whole)


ODD_KEYS = ["general.alignment", "llama.expert_count", "split.count", "llama.rope.scaling.type"]
ODD_KEYS += ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_space_prefix"]
ODD_KEYS += ["llama.attention.sliding_window", "llama.rope.scaling.factor", "llama.rope.scaling.attn_factor"]
ODD_KEYS += ["tokenizer.ggml.pre", "tokenizer.ggml.merges", "llama.vocab_size", "llama.attention.key_length"]


PLACES = st.sampled_from([0, 1, 32, 64, 2**40, 2**63, 2**64 - 32]) | st.integers(0, 40).map(lambda n: 8 * n)


def configs() -> st.SearchStrategy[Config]:
    """Widths of a few numbers."""
    heads = st.sampled_from([(1, 1), (2, 1), (2, 2)])
    shapes = st.tuples(st.integers(1, 2), heads, st.sampled_from([2, 4]), st.sampled_from([2, 6, 32]))
    vocab = st.integers(3, len(texts.PIECES))
    return st.builds(
        lambda shape, vocab_size: Config(
            shape[1][0] * shape[2], shape[0], shape[1][0], vocab_size, shape[3], shape[1][1]
        ),
        shapes,
        vocab,
    )


@st.composite
def values(draw) -> list[Field]:
    """A value of any type; sometimes an array, or an array of arrays of arrays."""
    kind = draw(st.sampled_from([*CODES, STRING, ARRAY, 13]))
    if kind != ARRAY:
        return [Number("I", kind), *draw(single(kind))]
    depth = draw(st.sampled_from([0, 0, 1, 50]))
    kind = draw(st.sampled_from([*CODES, STRING]))
    elements = draw(st.lists(single(kind), max_size=4))
    nested = [Number("I", ARRAY), Number("Q", 1)] * depth
    head = [Number("I", ARRAY), *nested, Number("I", kind), Number("Q", len(elements))]
    return head + [field for element in elements for field in element]


def single(kind: int) -> st.SearchStrategy[list[Field]]:
    """A value of one type."""
    if kind in CODES:
        return numbers({"?": "B"}.get(CODES[kind], CODES[kind])).map(lambda number: [number])
    text = st.sampled_from([b"", b"llama", b"gpt2", b"smollm", b"a\nb", b"\xff", b"x" * 2000]) | st.binary(
        max_size=9
    )
    return text.map(string)


def string(data: bytes) -> list[Field]:
    """A length and so many bytes."""
    return [Number("Q", len(data)), data]


def strings(pieces: list[bytes]) -> list[Field]:
    """The type and value of an array of strings."""
    head = [Number("I", ARRAY), Number("I", STRING), Number("Q", len(pieces))]
    return head + [field for piece in pieces for field in string(piece)]


def keys_of(config: Config, pieces: list[tuple[str, float, int]]) -> dict[str, list[Field]]:
    """The key-values of a model: name -> the fields of type and value."""
    counts = {
        "block_count": config.n_layers,
        "context_length": 64,
        "embedding_length": config.dim,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "rope.dimension_count": config.head_dim,
    }
    spellings = [piece.encode() for piece, _, _ in pieces]
    head = [Number("I", ARRAY), Number("I", F32), Number("Q", len(pieces))]
    scores = head + [Number("f", score) for _, score, _ in pieces]
    head = [Number("I", ARRAY), Number("I", I32), Number("Q", len(pieces))]
    types = head + [Number("i", kind) for _, _, kind in pieces]
    if config.q_dim != config.dim:
        counts["attention.key_length"] = config.head_dim
    return {
        "general.architecture": [Number("I", STRING), *string(config.family.encode())],
        **{
            f"{config.family}.{name}": [Number("I", U32), Number("I", count)]
            for name, count in counts.items()
        },
        f"{config.family}.attention.layer_norm_rms_epsilon": [Number("I", F32), Number("f", 1e-5)],
        "tokenizer.ggml.model": [Number("I", STRING), *string(b"llama")],
        "tokenizer.ggml.tokens": strings(spellings),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": [Number("I", U32), Number("I", 2)],
    }


def shapes_of(config: Config, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """GGUF's name and the shape of every tensor."""
    shapes, names = config.tensor_shapes(), tensor_names(config.n_layers, STEPS)
    there = ((name, gguf) for name, gguf, _ in names if name in shapes)
    return {gguf: shapes[name] for name, gguf in there if not (tied and gguf == "output.weight")}


def fields(keys, tensors, type="f16", alignment=32, version=3, fill=b"\0", places=None) -> list[Field]:
    """A whole file; `places` are offsets of tensors that say another one than where their data is."""
    infos, data, end = [], [], 0
    for name, shape in tensors:
        kind = TYPES[type if len(shape) == 2 else "f32"]
        n_bytes = kind.nbytes(shape)
        axes = [Number("Q", axis) for axis in reversed(shape)]
        infos += [*string(name.encode()), Number("I", len(axes)), *axes]
        infos += [Number("I", kind.gguf_id), Number("Q", (places or {}).get(name, end))]
        padded = -(-n_bytes // alignment) * alignment
        data += [(fill * n_bytes)[:n_bytes], bytes(padded - n_bytes)]
        end += padded
    head = [b"GGUF", Number("I", version), Number("Q", len(tensors)), Number("Q", len(keys))]
    head += [field for key, value in keys.items() for field in [*string(key.encode()), *value]]
    head += infos
    return [*head, bytes(-len(pack(head)) % alignment), *data]


def seeds() -> dict[str, bytes]:
    """SentencePiece models: f16, q4_0 with tied embeddings, Qwen2, Qwen3; a byte-level one of q8_0."""
    small, blocks = Config(8, 2, 2, 8, 12, 1), Config(32, 1, 2, 8, 32, 2)
    pieces = texts.PIECES[:8]
    bpe = keys_of(blocks, pieces) | {
        "tokenizer.ggml.model": [Number("I", STRING), *string(b"gpt2")],
        "tokenizer.ggml.pre": [Number("I", STRING), *string(b"smollm")],
        "tokenizer.ggml.tokens": strings([b"a", b"b", b"ab", b"<|im_end|>", b"c", b"abc", b"0", b"\xc4\xa0"]),
        "tokenizer.ggml.merges": strings([b"a b", b"ab c"]),
        "general.alignment": [Number("I", U32), Number("I", 64)],
    }
    qwen2 = Config(8, 1, 2, 8, 12, 1, family="qwen2")
    qwen3 = Config(8, 2, 2, 8, 12, 1, family="qwen3", head_dim=6)
    yarn = {
        "qwen2.rope.scaling.type": [Number("I", STRING), *string(b"yarn")],
        "qwen2.rope.scaling.factor": [Number("I", F32), Number("f", 4.0)],
    }
    whole, tied = shapes_of(blocks).items(), shapes_of(blocks, tied=True).items()
    f16 = fields(keys_of(small, pieces), shapes_of(small).items(), fill=b"\x00\x3c\x00\x38")
    return {
        "f16": pack(f16),
        "q4_0_tied": pack(fields(keys_of(blocks, pieces), tied, "q4_0", fill=b"\x11\x22\x33")),
        "q8_0_bpe": pack(fields(bpe, whole, "q8_0", alignment=64, version=2)),
        "qwen2_yarn": pack(fields(keys_of(qwen2, pieces) | yarn, shapes_of(qwen2).items())),
        "qwen3": pack(fields(keys_of(qwen3, pieces), shapes_of(qwen3).items())),
    }
