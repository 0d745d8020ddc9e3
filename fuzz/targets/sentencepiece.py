"""Any text through any vocabulary of SentencePiece's kind."""

from hypothesis import strategies as st

from tinyllama.tokenizer import Vocabulary

from .. import texts
from ..bundle import bundle, unbundle
from .tokenizer_model import PIECE, SPELLING

READS = ("tinyllama.tokenizer",)
WORDS = [
    b"=== pieces ===\n",
    b"=== text ===\n",
    "▁".encode(),
    b"\\n",
    b"bytes",
    b"prefix",
    b"1 0 ",
    b"5 nan ",
]


def check(data: bytes) -> bool:
    """The vocabulary is refused, or does right by the text."""
    files = unbundle(data)
    options = files.get("options", b"").split()
    pieces = texts.parsed(files.get("pieces", b"")) + (texts.BYTES if b"bytes" in options else [])
    spellings, scores, types = zip(*pieces, strict=True) if pieces else ((), (), ())
    vocabulary = Vocabulary(
        "sentencepiece",
        pieces=spellings,
        scores=scores,
        types=types,
        add_bos=b"bos" in options,
        add_space_prefix=b"prefix" in options,
    )
    return texts.keeps_texts(vocabulary, "the vocabulary", [files.get("text", b"")])


@st.composite
def inputs(draw) -> bytes:
    """A few pieces, odd ones among them, and a text made of them and of anything."""
    pieces = texts.PIECES[:4] + draw(st.lists(st.sampled_from(texts.PIECES[4:]) | PIECE, max_size=8))
    if draw(st.integers(0, 5)):
        pieces = list({piece[0]: piece for piece in pieces}.values())
    options = b" ".join(draw(st.lists(st.sampled_from([b"bytes", b"bytes", b"prefix", b"bos"]))))
    return bundle(
        {"options": options, "pieces": texts.written(pieces), "text": draw(text([p[0] for p in pieces]))}
    )


def text(pieces: list[str]) -> st.SearchStrategy[bytes]:
    """Bytes, characters, and pieces again and again."""
    of_pieces = st.lists(st.sampled_from([*pieces, " "]) | SPELLING).map("".join)
    long = st.tuples(of_pieces, st.integers(1, 300)).map(lambda made: (made[0] * made[1])[:4000])
    return st.binary() | (st.text() | of_pieces | long).map(str.encode)


def seeds() -> dict[str, bytes]:
    """Without the bytes and with them."""
    pieces, text = texts.written(texts.PIECES[:9]), "a b  ab▁é\n🦙".encode()
    return {
        "few": bundle({"pieces": pieces, "text": text}),
        "bytes": bundle({"options": b"bytes prefix bos", "pieces": pieces, "text": text + b"\xff"}),
    }
