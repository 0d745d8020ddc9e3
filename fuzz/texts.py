"""Prompts of strangers, and what a tokenizer must do with each: keep it, or refuse the vocabulary."""

from pathlib import Path

from tinyllama.errors import TinyllamaError
from tinyllama.tokenizer import TextStream, Tokenizer, make_tokenizer
from tinyllama.vocabulary import BYTE, USER_DEFINED, Vocabulary

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

TEXTS = [
    b"",
    b" ",
    b"a b  ab\n",
    "▁é🦙\u2047\ufffd".encode(),
    b"<s></s><unk><0x0A><|x|><|im_end|>",
    b"\0\xff\xc3 \xa9\xf0\x9f\xa6",
    b"it's 1812, THEY'LL\r\n\t x=2**10;",
    b"ab" * 2000,
]


def keeps_texts(vocabulary: Vocabulary, path: Path, texts: list[bytes] = TEXTS) -> bool:
    """Whether the vocabulary makes a tokenizer, which then must do right by every text."""
    tokenizer = contract.opened(lambda path: make_tokenizer(vocabulary, path), path)
    for text in texts if tokenizer else ():
        keeps(tokenizer, text)
    return tokenizer is not None


def keeps(tokenizer: Tokenizer, text: bytes) -> None:
    """Ids are in range and always the same; they decode to the text where the vocabulary has every byte."""
    with contract.limits():
        ids = tokenizer.encode(text)
        special = tokenizer.encode(text, special=True)
        back = tokenizer.decode_bytes(ids, strip_prefix=True)
        pieces = [tokenizer.piece(token_id) for token_id in {*ids, *special}]
    contract.must(
        all(0 <= token_id < tokenizer.vocab_size for token_id in ids + special), "an id out of range"
    )
    contract.must(ids == tokenizer.encode(text), "other ids the second time")
    contract.must(all(isinstance(piece, str) for piece in pieces), "a piece that is no text")
    if has_every_byte(tokenizer):
        contract.must(back == text, f"{text!r} came back as {back!r}")
    streamed = TextStream(tokenizer, strip_prefix=True)
    joined = "".join(map(streamed.feed, ids)) + streamed.flush()
    contract.must(joined == tokenizer.decode(ids), f"the stream of {text!r} is {joined!r}")


def has_every_byte(tokenizer: Tokenizer) -> bool:
    """Whether every text can be kept. A user-defined piece may spell itself as it likes."""
    types = tokenizer.vocabulary.types
    if tokenizer.vocabulary.kind == "sentencepiece":
        return types.count(BYTE) == 256 and USER_DEFINED not in types
    return not tokenizer.missing_bytes


def refused(call) -> bool:
    """Whether a call raises TinyllamaError, in one line."""
    try:
        call()
    except TinyllamaError as error:
        contract.is_refused(error)
        return True
    return False
