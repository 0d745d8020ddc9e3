"""tokenizer.model of Llama 3: tiktoken's text, a line for each piece, its bytes in base64 and its id.

    IQ== 0
    Ig== 1

Of two neighbours those are merged first that make the piece of the lowest id. The file names no special
tokens: 256 of them follow the pieces (llama-models, llama3/tokenizer.py). They have the names that they got
with Llama 3.1; in Llama 3.0 a few of them were still reserved.
"""

import base64
import re
from pathlib import Path

from ..config import LARGEST
from ..errors import TinyllamaError, naming, require
from ..tokenizer import CONTROL, NORMAL, Vocabulary, printed
from .checked import checked
from .pre_tokenizers import words_of

LONGEST_PIECE = 256  # bytes; Llama 3's longest has 128
N_SPECIAL = 256
NAMED = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id"
NAMED += " step_id start_header_id end_header_id eom_id eot_id python_tag"


def recognizes(data: bytes) -> bool:
    """Whether a file begins as tiktoken's text does."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data[:1024]) is not None


def special_pieces() -> list[str]:
    """Llama 3's special tokens, in the order of their ids."""
    named = NAMED.split()
    reserved = [f"reserved_special_token_{number}" for number in range(2, N_SPECIAL - len(named) + 2)]
    return [f"<|{name}|>" for name in (*named, *reserved)]


def vocabulary_from_tiktoken(path: Path, data: bytes) -> Vocabulary:
    """The vocabulary of Llama 3 in the bytes of such a file.

    Raises TinyllamaError, naming the file, where it is damaged.
    """
    with naming(path):
        ranks, special = _ranks(data), special_pieces()
        n = len(ranks)
        stops = [n + special.index(piece) for piece in ("<|eom_id|>", "<|eot_id|>")]
        vocabulary = Vocabulary(
            kind="bpe",
            pieces=(*map(printed, ranks), *special),
            types=(NORMAL,) * n + (CONTROL,) * len(special),
            merges=_merges(ranks),
            **words_of("llama-bpe"),
            bos_id=n,
            eos_id=n + 1,
            unk_id=None,
            stop_ids=tuple(stops),
            add_space_prefix=False,
            path=path,
        )
        return checked(vocabulary)


def _ranks(data: bytes) -> dict[bytes, int]:
    """Piece -> id, in the order of the ids, which are 0, 1, 2, ..."""
    lines = data.split()
    n, odd = len(lines) // 2, "no text of tiktoken's, or a damaged one"
    require(len(lines) % 2 == 0 and 256 <= n <= LARGEST["vocab_size"] - N_SPECIAL, odd)
    try:
        rows = zip(lines[::2], lines[1::2], strict=True)
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in rows}
    except ValueError:
        raise TinyllamaError(odd) from None
    require([*ranks.values()] == [*range(n)] and len(min(ranks, key=len)) > 0, odd)
    require(len(max(ranks, key=len)) <= LONGEST_PIECE, "a piece that is absurdly long")
    return ranks


def _merges(ranks: dict[bytes, int]) -> tuple[str, ...]:
    """The merges that lead to each piece: of all ways to make it those of two other pieces, by their ids.

    They are what Hugging Face's converter writes, too, and give tiktoken's ids.
    """
    merges = []
    for piece in ranks:
        halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        ways = [(left, right) for left, right in halves if left in ranks and right in ranks]
        ways.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{printed(left)} {printed(right)}" for left, right in ways]
    return tuple(merges)
