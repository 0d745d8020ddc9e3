"""Prompts of strangers, and what a tokenizer must do with each: keep it, or refuse the vocabulary."""

from pathlib import Path

import sentencepiece  # noqa: F401 (here, as it warns when it is imported)
import tokenizers  # noqa: F401

from tinyllama.errors import naming
from tinyllama.formats.checked import checked
from tinyllama.tokenizer import (
    BYTE,
    NORMAL,
    USER_DEFINED,
    TextStream,
    Tokenizer,
    Vocabulary,
    make_tokenizer,
)

from . import contract

#: The pieces of a small vocabulary: text, score, type. The first three must be there.
PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("▁", -1.0, 1),
    ("a", -2.0, 1),
    ("b", -3.0, 1),
]
PIECES += [("ab", -4.0, 1), ("▁a", -5.0, 1), ("é", -6.0, 1), ("\n", -7.0, 1), ("<|x|>", 0.0, 4), ("", 0.0, 5)]

#: All bytes, as SentencePiece and as byte-level BPE spell them.
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
LETTERS = [(chr(code), 0.0, NORMAL) for code in [*_PRINTED, *range(0x100, 0x100 + 256 - len(_PRINTED))]]

TEXTS = [
    b"",
    b" ",
    b"a b  ab\n",
    "▁é🦙\u2047\ufffd".encode(),
    b"<s></s><unk><0x0A><|x|><|im_end|>",
    b"\0\xff\xc3 \xa9\xf0\x9f\xa6",
    b"it's 1812, THEY'LL\r\n\t x=2**10;",
    b"ab" * 300,
]


def written(pieces: list[tuple[str, float, int]]) -> bytes:
    r"""Pieces as lines of type, score and spelling, with \n for a newline."""
    lines = [f"{kind} {score:g} {piece}".replace("\n", r"\n") + "\n" for piece, score, kind in pieces]
    return "".join(lines).encode()


def parsed(lines: bytes) -> list[tuple[str, float, int]]:
    """The pieces in such lines; a line that a fuzzer has broken gives a normal piece."""
    pieces = []
    for line in lines.decode("utf-8", "replace").split("\n")[:-1]:
        kind, _, rest = line.partition(" ")
        score, _, piece = rest.partition(" ")
        try:
            pieces.append((piece.replace(r"\n", "\n"), float(score), int(kind)))
        except ValueError:
            pieces.append((line, 0.0, NORMAL))
    return pieces


def keeps_texts(vocabulary: Vocabulary, path: Path | str, texts: list[bytes] = TEXTS) -> bool:
    """Whether the vocabulary makes a tokenizer, which then must do right by every text."""

    def make(path: Path | str) -> Tokenizer:
        with naming(path):
            return make_tokenizer(checked(vocabulary), path)

    tokenizer = contract.opened(make, path)
    if tokenizer is None:
        return False
    with contract.limits():
        fast = make_tokenizer(vocabulary, path)
        fast.encode("\0" * 20_000)  # from here on it asks a library for long words
        for text in texts:
            keeps(tokenizer, text)
            long = (text * 300)[:300]
            contract.must(fast.encode(long) == tokenizer.encode(long), "other ids by a library", long)
    return True


def encodes(vocabulary: Vocabulary, path: Path | str) -> bool:
    """As `keeps_texts`, of a vocabulary that changes texts on their way in."""
    tokenizer = contract.opened(lambda path: make_tokenizer(vocabulary, path), path)
    if tokenizer is not None:
        with contract.limits():
            for text in TEXTS:
                contract.must(tokenizer.encode(text) == tokenizer.encode(text), "other ids the second time")
    return tokenizer is not None


def keeps(tokenizer: Tokenizer, text: bytes) -> None:
    """Ids are in range and always the same; they decode to the text where the vocabulary has every byte."""
    ids = tokenizer.encode(text, bos=False)
    special = tokenizer.encode(text, special=True)
    back = tokenizer.decode_bytes(ids, strip_prefix=True)
    pieces = [tokenizer.piece(token_id) for token_id in {*ids, *special}]
    in_range = all(0 <= token_id < tokenizer.vocab_size for token_id in ids + special)
    contract.must(in_range, "an id out of range", ids)
    contract.must(ids == tokenizer.encode(text, bos=False), "other ids the second time")
    contract.must(all(isinstance(piece, str) for piece in pieces), "a piece that is no text")
    if has_every_byte(tokenizer):
        contract.must(back == text, "a text that didn't come back", f"{back!r} for {text!r}")
    streamed = TextStream(tokenizer, strip_prefix=True)
    joined = "".join(map(streamed.feed, ids)) + streamed.flush()
    contract.must(joined == tokenizer.decode(ids), "a stream that is another text", repr(joined))


def has_every_byte(tokenizer: Tokenizer) -> bool:
    """Whether every text can be kept. SentencePiece's user-defined pieces may hide the space in others."""
    pieces, types = tokenizer.vocabulary.pieces, tokenizer.vocabulary.types
    if tokenizer.prefix and tokenizer.vocabulary.prefixed in ("bare", "first"):
        return False  # a text's own space in front counts as the one that is put there
    if tokenizer.vocabulary.kind == "sentencepiece":
        has_space = ("▁", NORMAL) in zip(pieces, types, strict=True)
        return types.count(BYTE) == 256 and has_space and USER_DEFINED not in types
    return not tokenizer.missing_bytes
