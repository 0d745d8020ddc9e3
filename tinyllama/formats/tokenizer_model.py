"""tokenizer.model, SentencePiece's file: a protocol buffer (protobuf.dev/programming-guides/encoding).

A message is a list of fields: a number that says which field follows and of what wire type it is (0 a number;
2 a length and so many bytes; 5 and 1: 4 and 8 bytes), then the value. A number takes 7 bits a byte, the
lowest first; a byte's highest bit says that more follow. sentencepiece_model.proto numbers the fields: of the
model, 1 is a piece (1 its text, 2 its score, 3 its type), 2 how it was trained, 3 what is done to a text.
"""

import struct
from pathlib import Path

from ..config import LARGEST
from ..errors import TinyllamaError, naming, require
from ..machine.files import read_file
from ..tokenizer import NORMAL, Vocabulary
from .checked import checked

LARGEST_FILE = 1 << 25  # bytes; LLaMA's has half a million
PIECE, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER = 0x0A, 0x12, 0x1A, 0x22, 0x2A  # number << 3 | wire type
TEXT, SCORE, TYPE = 0x0A, 0x15, 0x18
WIDTHS = {1: 8, 5: 4}  # of wire types, in bytes


def vocabulary_from_model(path: str | Path, data: bytes | None = None) -> Vocabulary:
    """The pieces of a tokenizer.model, whose bytes may have been read already.

    Raises TinyllamaError, naming the file, where it can't be read, is no such file or isn't of the BPE kind.
    """
    path, data = Path(path), read_file(path, LARGEST_FILE) if data is None else data
    with naming(path):
        require(data.lstrip()[:1] != b"<", "a web page, no SentencePiece model")
        many = data.count(b"\n") > 2 * LARGEST["vocab_size"]  # a byte 10 begins each piece
        require(not many, "no SentencePiece model, or one of absurdly many pieces")
        try:
            fields = _fields(data)
            found = [_fields(value) for key, value in fields if key == PIECE]
            rows = list(map(dict, found))
            others = {key for key, _ in fields} - {PIECE, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER}
            others |= set().union(*rows) - {TEXT, SCORE, TYPE}
            if others or sum(map(len, rows)) < sum(map(len, found)):  # a piece has no field twice
                raise ValueError
            pieces = tuple(row.get(TEXT, b"").decode() for row in rows)
            spec, normalizer = (dict(_fields(dict(fields)[key])) for key in (TRAINER, NORMALIZER))
        except (IndexError, KeyError, ValueError):
            raise TinyllamaError("no SentencePiece model, or a damaged one") from None
        require(spec.get(0x18) == 2, "a SentencePiece model, but not of the BPE kind, which LLaMA's is")
        ids = {"unk_id": spec.get(0x140, 0), "bos_id": spec.get(0x148, 1), "eos_id": spec.get(0x150, 2)}
        vocabulary = Vocabulary(
            kind="sentencepiece",
            pieces=pieces,
            scores=struct.unpack(f"<{len(rows)}f", b"".join(row.get(SCORE, bytes(4)) for row in rows)),
            types=tuple(row.get(TYPE, NORMAL) for row in rows),
            **{name: found if found < 1 << 31 else None for name, found in ids.items()},  # below zero: none
            add_space_prefix=bool(normalizer.get(0x18, True)),
            prefixed="text",
            path=path,
        )
        return checked(vocabulary)


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(number << 3 | wire type, value) of each field. Raises IndexError, KeyError or ValueError."""
    at, fields = 0, []
    while at < len(data):
        key, at = (data[at], at + 1) if data[at] < 0x80 else _number(data, at)
        value = WIDTHS[key & 7] if key & 5 else data[at]  # the value, or the length of what follows
        if not key & 5:
            value, at = (value, at + 1) if value < 0x80 else _number(data, at)
        if key & 7:
            value, at = data[at : at + value], at + value
        fields.append((key, value))
    if at > len(data):
        raise IndexError
    return fields


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of several bytes, and where it ends."""
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise ValueError
