"""Any text through any vocabulary of byte-level BPE's kind."""

from hypothesis import strategies as st

from tinyllama.formats.pre_tokenizers import RULES as NAMED
from tinyllama.formats.pre_tokenizers import words_of
from tinyllama.tokenizer import Vocabulary

from .. import texts
from ..bundle import bundle, unbundle
from .sentencepiece import text
from .tokenizer_model import PIECE

READS = ("tinyllama.tokenizer",)
WORDS = [
    b"=== pieces ===\n",
    b"=== merges ===\n",
    b"=== text ===\n",
    "Ġ".encode(),
    b"bytes",
    b"llama-bpe",
    b"4 0 ",
]

RULES = list(NAMED)
SEEDED = ["gpt-2", "smollm", "llama-bpe", "tekken", "deepseek-llm", "default"]


def check(data: bytes) -> bool:
    """The vocabulary is refused, or does right by the text."""
    files = unbundle(data)
    options = files.get("options", b"").decode("utf-8", "replace").split()
    pieces = texts.parsed(files.get("pieces", b"")) + (texts.LETTERS if "bytes" in options else [])
    vocabulary = Vocabulary(
        "bpe",
        pieces=tuple(piece for piece, _, _ in pieces),
        types=tuple(kind for _, _, kind in pieces),
        merges=tuple(files.get("merges", b"").decode("utf-8", "replace").split("\n")[:-1]),
        **words_of(next((option for option in options if option in RULES), "gpt-2")),
        bos_id=None,
        eos_id=0,
        unk_id=None,
        add_bos=False,
        add_space_prefix=False,
    )
    return texts.keeps_texts(vocabulary, "the vocabulary", [files.get("text", b"")])


@st.composite
def inputs(draw) -> bytes:
    """Merges of pieces into pieces, odd ones among them, and a text made of them and of anything."""
    pieces, merges = {"<|end|>": ("<|end|>", 0.0, 3)}, []
    letters = ["a", "b", "Ġ", "Ċ", "Ã", "©", "1"]
    known = [*letters]
    for _ in range(draw(st.integers(0, 8))):
        left, right = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        merges.append(f"{left} {right}")
        pieces[left + right] = (left + right, 0.0, 1)
        known.append(left + right)
    for piece in draw(st.lists(PIECE, max_size=2)):
        pieces.setdefault(piece[0], piece)
    merges = draw(st.permutations(merges)) + draw(st.lists(st.sampled_from(ODD_MERGES), max_size=1))
    options = draw(st.lists(st.sampled_from([b"bytes"] * 6 + [rule.encode() for rule in RULES])))
    spelled = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces]
    return bundle(
        {
            "options": b" ".join(options),
            "pieces": texts.written(list(pieces.values())),
            "merges": "".join(f"{merge}\n" for merge in merges).encode(),
            "text": draw(text(spelled)),
        }
    )


ODD_MERGES = ["", " ", "a", "a b c", "a  b", "x y", "a a", "a " + "a" * 3000, "\0 \0", "Ã ©", "Ċ a", "é é"]


def seeds() -> dict[str, bytes]:
    """A few merges, by each rule."""
    pieces = texts.written(
        [("<|end|>", 0.0, 3), ("<br>", 0.0, 4), *[(p, 0.0, 1) for p in ("Ġa", "ab", "Ġab")]]
    )
    merges = "Ġ a\na b\nĠa b\n".encode()
    files = {"pieces": pieces, "merges": merges, "text": b"it's  ab<br>\xff 1812\r\n<|end|>"}
    return {rule: bundle({"options": b"bytes " + rule.encode(), **files}) for rule in SEEDED}
