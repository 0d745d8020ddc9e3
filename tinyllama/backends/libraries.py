"""The packages sentencepiece and tokenizers, which cut long words ten times faster than `tokenizer.merge`.

They get words only: how text is cut into words, and what becomes of special tokens and of bytes that aren't
UTF-8, is tokenizer.py's alone. So their own rules and Unicode tables don't matter, and any version does. They
are no faster for a whole text: tokenizer.py remembers the words that it has cut.
"""

import struct
from collections.abc import Callable, Sequence
from functools import wraps

Encode = Callable[[str], list[int] | None]  # a word -> ids; None if that failed
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of pieces, as in tokenizer.py


def _safe(function: Callable) -> Callable:
    """The same, but None for whatever a version of a package raises: tokenizer.py does without."""

    @wraps(function)
    def safe(*args):
        try:
            return function(*args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a Rust panic is none of the Exceptions
            return None

    return safe


@_safe
def sentencepiece(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> Encode | None:
    """SentencePiece's BPE. None where the package is missing or can't use these pieces."""
    from sentencepiece import SentencePieceProcessor

    return _safe(SentencePieceProcessor(model_proto=_model(pieces, scores, types)).encode)


@_safe
def tokenizers(ids: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool) -> Encode | None:
    """Byte-level BPE, of words as it spells them. None where the package is missing or can't use the pieces.

    Args:
        ids: of the pieces.
        merges: of two of them into one of them: another could end it in a Rust panic.
        ignore_merges: take a word that is a piece as it is.
    """
    from tokenizers.models import BPE

    bpe = BPE(ids, merges, ignore_merges=ignore_merges)
    return _safe(lambda word: [token.id for token in bpe.tokenize(word)])


def _model(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> bytes:
    """A tokenizer.model (sentencepiece_model.proto) that does nothing to the text on its way in."""
    listed = []
    for token_id, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
        hidden = kind not in (NORMAL, UNKNOWN, BYTE) or not piece
        # SentencePiece finds a control token of one character in plain text; no word has a space in it.
        name, kind = (f" {token_id}", CONTROL) if hidden else (piece, kind)
        body = _field(1, name.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
        listed.append(_field(1, body))
    byte_fallback = b"\x98\x02\x01" if BYTE in types else b""
    trainer = _field(2, b"\x18\x02" + byte_fallback)  # model_type: BPE
    normalizer = _field(3, _field(1, b"identity") + b"\x18\x00\x20\x00")  # no prefix; keep all spaces
    return b"".join(listed) + trainer + normalizer


def _field(number: int, value: bytes) -> bytes:
    length, encoded = len(value), b""
    while length >= 0x80:
        encoded, length = encoded + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + encoded + bytes([length]) + value
