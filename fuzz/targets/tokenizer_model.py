"""tokenizer.model: SentencePiece's protocol buffer, from which a vocabulary and then a tokenizer is made."""

from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from tinyllama.formats.tokenizer_model import vocabulary_from_model
from tinyllama.tokenizer import token_texts

from .. import contract, texts
from ..damage import damaged

READS = ("tinyllama.tokenizer",)
WORDS = [b"<unk>", b"<s>", b"<0x0A>", b"identity", b"nmt_nfkc", "▁".encode()]


def check(data: bytes) -> bool:
    """A vocabulary that is read makes a tokenizer that keeps texts, or none; so for ggml's texts."""
    with contract.folder({"tokenizer.model": data}) as folder:
        path = folder / "tokenizer.model"
        vocabulary = contract.opened(vocabulary_from_model, path)
        if vocabulary is not None:
            contract.must(
                all(isinstance(piece, str) for piece in vocabulary.pieces), "a piece that is no text"
            )
            contract.opened(lambda path: token_texts(vocabulary), path)
        return vocabulary is not None and texts.keeps_texts(vocabulary, path)


# --- nearly valid files ---------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """Models of a few pieces, odd ones among them, or with the whole file damaged."""
    pieces = draw(
        st.lists(st.sampled_from(texts.PIECES), unique=True).map(lambda more: texts.PIECES[:3] + more)
    )
    pieces = list(dict.fromkeys(pieces)) + draw(st.lists(PIECE, max_size=2))
    if draw(st.booleans()):
        pieces += texts.BYTES
    proto = model(pieces)
    for name, values in FIELDS.items():
        if draw(st.integers(0, 5)) == 0:
            spec, field = name.split(".")
            setattr(getattr(proto, spec), field, draw(values))
    data = proto.SerializeToString()
    if draw(st.integers(0, 5)) == 0:
        return data.replace(draw(st.sampled_from(pieces[3:] or pieces))[0].encode(), b"\xd7")
    return draw(damaged([data[start : start + 4] for start in range(0, len(data), 4)]))


SPELLING = st.sampled_from(
    ["", "▁", " ", "a", "\0", "\n", "<0x41>", "<0xZZ>", "x" * 3000, "▁▁", "é", "🦙", "<s>"]
)
SCORE = st.sampled_from([0.0, -1.0, 1e38, float("inf"), float("-inf"), float("nan")])
SCORE |= st.just(-9.5)  # most scores are numbers
PIECE = st.tuples(SPELLING | st.text(max_size=4) | st.sampled_from("abé0"), SCORE, st.integers(1, 6))
IDS = st.sampled_from([-1, 0, 1, 2, 3, 10**6, 2**31 - 1, -(2**31)])
FIELDS = {
    "trainer_spec.model_type": st.integers(1, 4),
    "trainer_spec.unk_id": IDS,
    "trainer_spec.bos_id": IDS,
    "trainer_spec.eos_id": IDS,
    "trainer_spec.byte_fallback": st.booleans(),
    "trainer_spec.unk_surface": SPELLING,
    "trainer_spec.treat_whitespace_as_suffix": st.booleans(),
    "normalizer_spec.name": st.sampled_from(["identity", "nmt_nfkc", ""]),
    "normalizer_spec.add_dummy_prefix": st.booleans(),
    "normalizer_spec.remove_extra_whitespaces": st.booleans(),
    "normalizer_spec.escape_whitespaces": st.booleans(),
    "normalizer_spec.precompiled_charsmap": st.binary(max_size=64),
    "denormalizer_spec.precompiled_charsmap": st.binary(max_size=64),
}


def model(pieces: list[tuple[str, float, int]]):
    """A SentencePiece model as LLaMA's is set."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = any(kind == 6 for _, _, kind in pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    return proto


def seeds() -> dict[str, bytes]:
    """A few pieces, without the bytes and with them."""
    dot = [(".", -9.0, 1)]
    return {
        "few": model(texts.PIECES[:9] + dot).SerializeToString(),
        "bytes": model([*texts.PIECES[:3], *texts.BYTES, *texts.PIECES[3:7], *dot]).SerializeToString(),
    }
