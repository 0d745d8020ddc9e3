"""What a tokenizer is made from: pieces of text with their numbers, and where they come from."""

import math
from dataclasses import dataclass
from pathlib import Path

from .config import LARGEST
from .errors import TinyllamaError
from .machine.opening import read_file

LARGEST_MODEL = 1 << 25  # bytes of a tokenizer.model; LLaMA's has half a million
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made from: a tokenizer.model, or the pieces that a model file carries.

    Attributes:
        kind: "sentencepiece" or "bpe" (byte-level).
        model: path of a tokenizer.model, or None; if there is one, the pieces below are empty.
        pieces: every piece in the order of the ids, as GGUF spells them ("▁Hello", "<0x0A>", "ĠHello").
        scores: of SentencePiece, one a piece: the higher is merged first.
        types: one a piece: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
        merges: of byte-level BPE, "left right", the first is merged first.
        pre: of byte-level BPE, the rule that cuts text into words first ("gpt-2", "smollm", "llama-bpe").
        bos_id, eos_id, unk_id: None where there is none.
        stop_ids: tokens that end a text beside eos, "<|eot_id|>" say.
        add_bos: put bos before every prompt.
        add_space_prefix: of SentencePiece, put a space before the text.
    """

    kind: str
    model: Path | None = None
    pieces: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    pre: str = ""
    bos_id: int | None = 1
    eos_id: int | None = 2
    unk_id: int | None = 0
    stop_ids: tuple[int, ...] = ()
    add_bos: bool = True
    add_space_prefix: bool = True


def vocabulary_from_model(path: str | Path) -> Vocabulary:
    """The pieces, scores and types of a SentencePiece tokenizer.model.

    Raises TinyllamaError, naming the file, where it can't be read, is no such file or isn't of the BPE kind.
    """
    proto = _read_proto(Path(path))
    trainer = proto.trainer_spec
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type).lower()
        raise TinyllamaError(f"{path}: a SentencePiece model of the {kind} kind, LLaMA's are of the bpe kind")
    pieces = tuple(piece.piece for piece in proto.pieces)
    if not all(isinstance(piece, str) for piece in pieces):  # protobuf gives what isn't UTF-8 as bytes
        raise TinyllamaError(f"{path}: a SentencePiece model with a piece that isn't UTF-8")
    return Vocabulary(
        kind="sentencepiece",
        pieces=pieces,
        scores=tuple(piece.score for piece in proto.pieces),
        types=tuple(piece.type for piece in proto.pieces),
        bos_id=trainer.bos_id if trainer.bos_id >= 0 else None,
        eos_id=trainer.eos_id if trainer.eos_id >= 0 else None,
        unk_id=trainer.unk_id if trainer.unk_id >= 0 else None,
        add_space_prefix=proto.normalizer_spec.add_dummy_prefix,
    )


def _read_proto(path: Path):
    """tokenizer.model is a protocol buffer, described by sentencepiece_model.proto of SentencePiece."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    data, proto = read_file(path, LARGEST_MODEL), sentencepiece_model_pb2.ModelProto()
    # Each piece begins with the byte 10, so that these are more than there are pieces.
    if data.count(b"\n") > 2 * LARGEST["vocab_size"]:
        raise TinyllamaError(f"{path}: no SentencePiece model, or one of absurdly many pieces")
    try:
        proto.ParseFromString(data)
    except DecodeError:
        is_page = data.lstrip()[:1] == b"<"
        what = "a web page" if is_page else "damaged, or something else"
        raise TinyllamaError(f"{path}: no SentencePiece model but {what}") from None
    # They follow the pieces in this order.
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise TinyllamaError(f"{path}: no SentencePiece model, or only its beginning")
    return proto


def check(vocabulary: Vocabulary) -> None:
    """Raises TinyllamaError where the parts of a vocabulary contradict each other."""
    n_pieces = len(vocabulary.pieces)
    if not n_pieces:
        raise TinyllamaError("the vocabulary is empty")
    if n_pieces > LARGEST["vocab_size"]:
        raise TinyllamaError(f"a vocabulary of {n_pieces} pieces can't be right")
    for field in ("types", "scores") if vocabulary.kind == "sentencepiece" else ("types",):
        if len(getattr(vocabulary, field)) != n_pieces:
            raise TinyllamaError(
                f"a vocabulary of {n_pieces} pieces, but {len(getattr(vocabulary, field))} {field}"
            )
    for token_id, score in enumerate(vocabulary.scores):
        if not math.isfinite(score):
            raise TinyllamaError(f"the score of token {token_id} is {score}")
    if not NORMAL <= min(vocabulary.types) <= max(vocabulary.types) <= BYTE:
        raise TinyllamaError("the types of a vocabulary's pieces must be 1 to 6")
    if len(set(vocabulary.pieces)) < n_pieces:
        first: dict[str, int] = {}
        twice = next(
            (i, piece) for i, piece in enumerate(vocabulary.pieces) if first.setdefault(piece, i) != i
        )
        raise TinyllamaError(f"the tokens {first[twice[1]]} and {twice[0]} are the same piece, {twice[1]!r}")
    for token_id in (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, *vocabulary.stop_ids):
        if token_id is not None and not 0 <= token_id < n_pieces:
            raise TinyllamaError(f"a special token is number {token_id} of a vocabulary of {n_pieces}")
