"""What holds for every vocabulary, whatever file it came from."""

from array import array
from collections import Counter
from math import isfinite

from ..config import LARGEST
from ..errors import TinyllamaError, require
from ..tokenizer import BYTE, BYTE_PIECES, CONTROL, NORMAL, USER_DEFINED, Vocabulary

LARGEST_SPECIAL = 1 << 17  # characters of all pieces that are looked for; Llama 3's have 7,000


def checked(vocabulary: Vocabulary) -> Vocabulary:
    """The same. Raises TinyllamaError, or ValueError for half a character, where its parts can't be right."""
    pieces, types, n = vocabulary.pieces, vocabulary.types, len(vocabulary.pieces)
    is_spm, scores = vocabulary.kind == "sentencepiece", array("f", vocabulary.scores)
    require(0 < n <= LARGEST["vocab_size"], f"a vocabulary of {n} pieces can't be right")
    require(len(types) == n, f"a vocabulary of {n} pieces, but {len(types)} types")
    require(not is_spm or len(scores) == n, f"a vocabulary of {n} pieces, but {len(scores)} scores")
    require(set(types) <= set(range(NORMAL, BYTE + 1)), "the types of a vocabulary's pieces must be 1 to 6")
    require(all(map(isfinite, scores)), "a score of the vocabulary is NaN or infinite")
    "".join(pieces).encode()  # half a surrogate pair is a ValueError
    if len(set(pieces)) + max(0, pieces.count("") - 1) < n:  # empty ones stand for nothing
        named = Counter(filter(None, pieces)).most_common(1)[0][0]
        raise TinyllamaError(f"two tokens are the same piece, {named!r}")
    for token_id in {vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, *vocabulary.stop_ids} - {None}:
        require(0 <= token_id < n, f"a special token is number {token_id} of a vocabulary of {n}")
    special = "".join(p for p, kind in zip(pieces, types, strict=True) if kind in (CONTROL, USER_DEFINED))
    require(len(special) <= LARGEST_SPECIAL, "control and user-defined pieces that are absurdly long")
    if is_spm:
        found = {piece for piece, kind in zip(pieces, types, strict=True) if kind == BYTE}
        require(found in (set(), set(BYTE_PIECES)), "byte pieces that aren't <0x00> to <0xFF>")
    return vocabulary
