"""Text <-> token ids: SentencePiece (LLaMA) and byte-level BPE (SmolLM2, Llama 3).

Both start from small pieces and `merge` the best two neighbours again and again:

- SentencePiece merges into the piece of the highest score. It works on characters and writes a space as "▁"
  (U+2581), one of them put before the text. A character without a piece becomes its UTF-8 bytes, "<0xF0>".
- Byte-level BPE merges the pair that comes first in a list. It works on bytes, each shown as a character that
  prints ("Ġ" is the space), in each word by itself; a rule, which its file names, cuts text into words.

This is the definition. The packages sentencepiece and tokenizers, where installed, give the same ids faster
for long words (backends/libraries.py).
"""

import codecs
import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from heapq import heappop, heappush
from itertools import chain
from pathlib import Path
from unicodedata import normalize

import regex

from .backends import libraries
from .errors import TinyllamaError, check_cancelled, naming, require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]  # as SentencePiece spells them
SHORT, REMEMBERED = 64, 1 << 16  # characters of a word whose ids are kept, and how many such words
ENOUGH = 20_000  # characters of longer words from which on building a library pays
LARGEST_WORD = 500_000  # characters that a library cuts in half a second, and nothing can stop it
OFTEN = 4096  # words or symbols between two looks at whether to stop


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made from. Of the ids, None means that there is none."""

    kind: str  # "sentencepiece" or "bpe" (byte-level)
    pieces: tuple[str, ...] = ()  # in the order of the ids, as GGUF spells them: "▁Hello", "<0x0A>", "ĠHello"
    scores: tuple[float, ...] = ()  # of SentencePiece, one a piece: the highest is merged first
    types: tuple[int, ...] = ()  # one a piece: NORMAL, UNKNOWN, ...
    merges: tuple[str, ...] = ()  # "left right", the first is merged first; SentencePiece can do without
    pre: str = ""  # of byte-level BPE, the name of the rule that cuts text into words, for GGUF
    words: tuple[str, ...] = ()  # that rule (formats/pre_tokenizers.py): each cuts what the one before left
    ignore_merges: bool = False  # of byte-level BPE: a word that is a piece is taken as it is
    bos_id: int | None = 1
    eos_id: int | None = 2
    unk_id: int | None = 0
    fuse_unknown: bool = True  # of SentencePiece: unknown characters in a row are one unknown token
    stop_ids: tuple[int, ...] = ()  # tokens that end a text beside eos, "<|eot_id|>" say
    add_bos: bool = True  # put bos before every prompt
    add_space_prefix: bool = True  # put a space before the text
    prefixed: str = "part"  # before what: each "part" between special pieces, each "bare" one (that doesn't
    # begin with a space), the "first" if it is bare, or "text" (SentencePiece: user-defined pieces are in it)
    normal_form: str = ""  # of Unicode, "NFC", which text is brought into first
    path: Path | None = field(default=None, compare=False)  # the file beside the weights that it is from


def merge(symbols: Iterable[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Merge the two neighbours of the lowest rank, the leftmost of equal ones, until no two have a rank.

    Byte pair encoding (Sennrich et al., arXiv:1508.07909), with a heap of all pairs: n log n steps.
    """
    symbols, heap = [*symbols], []
    n = len(symbols)
    before, after = [*range(-1, n - 1)], [*range(1, n + 1)]  # where the neighbours of each symbol are

    def look_at(left: int, right: int) -> None:
        if right % OFTEN == 0:
            check_cancelled()
        found = rank(symbols[left], symbols[right]) if left >= 0 and right < n else None
        if found is not None:
            heappush(heap, (found, left, right, len(symbols[left]) + len(symbols[right])))

    for right in range(1, n):
        look_at(right - 1, right)
    while heap:
        _, left, right, length = heappop(heap)
        merged = symbols[left] + symbols[right]
        if symbols[left] and symbols[right] and len(merged) == length:  # neither has changed since
            symbols[left], symbols[right], after[left] = merged, "", after[right]
            if after[left] < n:
                before[after[left]] = left
            look_at(before[left], left)
            look_at(left, after[left])
    return [symbol for symbol in symbols if symbol]


class Tokenizer:
    """Text <-> ids. Its two kinds say how text is cut into words, words into ids, and what a token spells.

    Attributes:
        vocabulary: what it was made from.
        vocab_size: number of tokens.
        bos_id, eos_id: the tokens that begin and end a text, or None.
        stop_ids: all tokens that end a text; unused_ids: those that stand for nothing and are never drawn.
        add_bos: whether `encode` puts bos first if nobody says otherwise.
        prefix: what `encode` puts before a text.
        missing_bytes: bytes that no token stands for: `encode` can't keep them.
    """

    missing_bytes: frozenset[int] = frozenset()
    _verbatim = re.compile("([\udc80-\udcff]+)")  # what becomes tokens of single bytes: it isn't UTF-8
    _unk_id: int | None = None  # of a byte without a token; None: leave it out

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary.pieces)
        self.bos_id, self.eos_id, self.add_bos = vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos
        self.stop_ids = frozenset({vocabulary.eos_id, *vocabulary.stop_ids} - {None})
        ids = dict(zip(vocabulary.pieces, range(self.vocab_size), strict=True))
        self._of_type = {NORMAL: ids} | {kind: {} for kind in range(UNKNOWN, BYTE + 1)}  # type -> piece -> id
        others = [(number, kind) for number, kind in enumerate(vocabulary.types) if kind != NORMAL]  # few
        self.unused_ids = [number for number, kind in others if kind == UNUSED]
        for number, kind in others:
            self._of_type[kind][vocabulary.pieces[number]] = ids.pop(vocabulary.pieces[number], number)
        always = {} if vocabulary.prefixed == "text" else self._of_type[USER_DEFINED]  # found in every text
        self._special_ids = always | self._of_type[CONTROL] | self._of_type[UNKNOWN]
        self._special = {False: _any_of(always), True: _any_of(self._special_ids)}
        self.prefix = b" " if vocabulary.add_space_prefix else b""
        self._encode_short, self._n_long = lru_cache(REMEMBERED)(self._encode_word), 0

    def encode(self, text: str | bytes, bos: bool | None = None, special=False, filled=None) -> list[int]:
        """Text -> ids. `decode_bytes` gives the same text back, unless it is `special`, has `missing_bytes`,
        or has characters for which a SentencePiece vocabulary without byte pieces has only the unknown token;
        nor of a vocabulary that changes texts (`normal_form`, spaces in front where `prefixed` isn't "part").

        Args:
            text: bytes needn't be UTF-8; a str may hold undecodable bytes as Python's "surrogateescape" does.
            bos: put bos first; None: if the vocabulary says so.
            special: control tokens that are written out, "<|im_start|>", become those tokens. Leave it out
                for text of strangers.
            filled: {ord(char): what stands for it}, in which control tokens that are written out stay text.
        Raises TinyllamaError for half a surrogate pair, or bos=True where there is none.
        """
        require(not bos or self.bos_id is not None, "this vocabulary has no bos token")
        ids = [self.bos_id] if self.bos_id is not None and (self.add_bos if bos is None else bos) else []
        text = _bytes(text).decode("utf-8", errors="surrogateescape")
        runs = self._special[special].split(text)
        if filled:  # what comes in is cut as any text, and text and special pieces still take turns
            cut = self._special[False].split
            runs = [r for i, run in enumerate(runs) for r in ([run] if i % 2 else cut(run.translate(filled)))]
        for index, run in enumerate(runs):
            if index % 2:
                ids.append(self._special_ids[run])
            elif run:
                ids += self._encode_run(run, first=index == 0)
        return ids

    def decode_bytes(self, ids: Iterable[int], strip_prefix: bool = True) -> bytes:
        """Ids -> the bytes they stand for; control tokens stand for none.

        Args:
            strip_prefix: the ids are a whole text: drop the space that `encode` put before it. False: they
                continue one.
        """
        data = b"".join(map(self.token_bytes, ids))
        return data.removeprefix(self.prefix) if strip_prefix else data

    def decode(self, ids: Iterable[int], strip_prefix: bool = True) -> str:
        """As `decode_bytes`, as text: what isn't UTF-8 becomes "�"."""
        return self.decode_bytes(ids, strip_prefix).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds in the middle of a text; none of a control token."""
        return b"" if self.is_control(token_id) else self._spell(self.vocabulary.pieces[token_id], token_id)

    def piece(self, token_id: int) -> str:
        """A token for people to read: its text, "\\xf0" for a part of a character, a control token's name."""
        if self.is_control(token_id):
            return self.vocabulary.pieces[token_id]
        return self.token_bytes(token_id).decode("utf-8", errors="backslashreplace")

    def is_control(self, token_id: int) -> bool:
        """Whether a token stands for no text, as bos does. Raises TinyllamaError for an id out of range."""
        if not 0 <= token_id < self.vocab_size:
            raise TinyllamaError(f"there is no token {token_id}: the vocabulary has {self.vocab_size}")
        return self.vocabulary.types[token_id] == CONTROL

    def _encode_run(self, text: str, first: bool) -> list[int]:
        """Text between special pieces -> ids."""
        ids, form, prefixed = [], self.vocabulary.normal_form, self.vocabulary.prefixed
        text = normalize(form, text) if form else text
        if prefixed in ("text", "part") or (not text.startswith(" ") and (first or prefixed == "bare")):
            text = self.prefix.decode() + text
        for index, part in enumerate(self._verbatim.split(text)):
            if index % 2:
                found = (self._byte_ids.get(byte, self._unk_id) for byte in _bytes(part))
                ids += [token_id for token_id in found if token_id is not None]
                continue
            for number, word in enumerate(self._words(part)):
                if number % OFTEN == 0:
                    check_cancelled()
                ids += self._encode_short(word) if len(word) <= SHORT else self._encode_long(word)
        return ids

    def _words(self, text: str) -> Iterable[str]:
        """Cut text by the first rule, each part by the next, ..."""
        words = [text]
        for rule in self._rules:
            words = (match[0] for match in chain.from_iterable(map(rule.finditer, words)))
        return words

    def _encode_long(self, word: str) -> list[int]:
        """A word -> ids, by a library where that is faster and possible."""
        self._n_long += len(word)
        fast = self._library if self._n_long >= ENOUGH and len(word) <= LARGEST_WORD else None
        ids = fast and fast(word)
        return self._encode_word(word) if ids is None else ids


class SentencePiece(Tokenizer):
    """LLaMA's tokenizer (Kudo and Richardson, arXiv:1808.06226). Where a vocabulary has no byte pieces, an
    unknown character becomes the unknown token, which decodes to " ⁇ "; without the piece "▁", a space "▁".
    """

    _verbatim = re.compile("([\u2581\udc80-\udcff]+)")  # a "▁" of the text's own would come back as a space

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        kinds = self._of_type
        self._frozen = kinds[USER_DEFINED] if vocabulary.prefixed == "text" else {}  # found, never merged
        self._ids = kinds[NORMAL] | kinds[USER_DEFINED]
        self._byte_ids = {int(piece[1:-1], 16): token_id for piece, token_id in kinds[BYTE].items()}
        self._unk_id = next(iter(kinds[UNKNOWN].values()), None)
        self._user_defined = _any_of(self._frozen)
        self._ranks = array("f", (-score for score in vocabulary.scores))  # float32: ties are as in the file
        self._pairs = {pair: number for number, pair in enumerate(vocabulary.merges)}
        across = any("▁" in piece.lstrip("▁") for piece in self._ids)  # pieces that go on into the next word
        words = vocabulary.words or (" *[^ ]+| +" if self._byte_ids and not across else "(?s:.+)",)
        self._rules = [*map(re.compile, words)]

    def _encode_word(self, word: str) -> list[int]:
        """What no piece goes beyond -> ids."""

        def rank(left: str, right: str) -> float | None:
            token_id = self._ids.get(left + right)
            if token_id is None or left in self._frozen or right in self._frozen:
                return None
            return self._pairs.get(f"{left} {right}") if self._pairs else self._ranks[token_id]

        runs = enumerate(self._user_defined.split(word.replace(" ", "▁")))
        symbols = (symbol for index, run in runs for symbol in ([run] if index % 2 else run))
        ids, unknown = [], [] if self._unk_id is None else [self._unk_id]
        for symbol in merge(symbols, rank):
            if symbol in self._ids:
                ids.append(self._ids[symbol])
            elif self._byte_ids:
                ids += [self._byte_ids[byte] for byte in symbol.encode()]
            elif ids[-1:] != unknown or not self.vocabulary.fuse_unknown:
                ids += unknown
        return ids

    @cached_property
    def _library(self) -> libraries.Encode | None:
        if self._frozen or self._pairs:
            return None
        return libraries.sentencepiece(self.vocabulary.pieces, self.vocabulary.scores, self.vocabulary.types)

    def _spell(self, piece: str, token_id: int) -> bytes:
        kind = self.vocabulary.types[token_id]
        if kind == BYTE:
            return bytes([int(piece[1:-1], 16)])
        spelled = piece if kind == USER_DEFINED and not self._frozen else piece.replace("▁", " ")
        return (" ⁇ " if kind == UNKNOWN else spelled).encode()


#: Bytes as byte-level BPE shows them (GPT-2): those that print as themselves, the others from U+0100 on.
_HIDDEN = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
_CHAR_OF = {byte: chr(byte) for byte in range(256)} | {byte: chr(0x100 + i) for i, byte in enumerate(_HIDDEN)}
_BYTE_OF = {char: byte for byte, char in _CHAR_OF.items()}


class ByteLevelBPE(Tokenizer):
    """GPT-2's kind of tokenizer: BPE on bytes, in each word by itself.

    Not every such vocabulary holds all 256 bytes: SmolLM2's lacks 21 that UTF-8 text seldom or never has.
    Bytes without a token (`missing_bytes`) are left out, as llama.cpp and Hugging Face do.
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        ids, pieces, merges = dict(self._of_type[NORMAL]), set(vocabulary.pieces), vocabulary.merges
        for kind in (UNKNOWN, USER_DEFINED, BYTE):  # their "Ġ" isn't a space but means itself
            ids |= {piece: token_id for piece, token_id in self._of_type[kind].items() if piece.isascii()}
        self._ids, self._ranks = ids, dict(zip(merges, range(len(merges)), strict=True))
        for pair in [pair for pair in merges if pair.replace(" ", "", 1) not in ids]:
            is_piece = pair.replace(" ", "", 1) in pieces  # of a type that nothing is merged into
            require(is_piece, f"the merge {pair[:80]!r} isn't of two pieces into a third")
            self._ranks.pop(pair, None)
        self._byte_ids = {byte: ids[char] for byte, char in _CHAR_OF.items() if char in ids}
        self.missing_bytes = frozenset(range(256)) - self._byte_ids.keys()
        # A word is also what lies between those that a rule finds.
        self._rules = [regex.compile(f"(?m)(?:{rule})|(?:(?!{rule})(?s:.))+") for rule in vocabulary.words]

    def _encode_word(self, word: str) -> list[int]:
        """A word -> ids."""
        spelled = printed(word.encode())
        if self.vocabulary.ignore_merges and spelled in self._ids:
            return [self._ids[spelled]]
        symbols = (char for char in spelled if char in self._ids)
        return [self._ids[s] for s in merge(symbols, lambda left, right: self._ranks.get(f"{left} {right}"))]

    @cached_property
    def _library(self) -> libraries.Encode | None:
        pairs = (tuple(pair.split(" ")) for pair in self.vocabulary.merges)
        possible = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= self._ids.keys()]
        encode = libraries.tokenizers(self._ids, possible, self.vocabulary.ignore_merges)
        return encode and (lambda word: encode(printed(word.encode())))

    def _spell(self, piece: str, token_id: int) -> bytes:
        if self.vocabulary.types[token_id] == NORMAL and all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        return piece.encode()


def printed(data: bytes) -> str:
    """Bytes as byte-level BPE spells them."""
    return data.decode("latin-1").translate(_CHAR_OF)


def _any_of(pieces: Iterable[str]) -> re.Pattern:
    """Splits text before and after these pieces; of two that begin together the longer one is meant."""
    longest_first = sorted(filter(None, pieces), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _bytes(text: str | bytes) -> bytes:
    """As UTF-8; lone surrogates become the bytes that they stand for (PEP 383)."""
    try:
        return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise TinyllamaError(f"the text holds half a character at position {error.start}") from None


def make_tokenizer(vocabulary: Vocabulary, path: str | Path = "the vocabulary") -> Tokenizer:
    """The tokenizer of a vocabulary. Raises TinyllamaError, naming its file, where parts contradict it."""
    with naming(vocabulary.path or path, regex.error):
        return (SentencePiece if vocabulary.kind == "sentencepiece" else ByteLevelBPE)(vocabulary)


def token_texts(vocabulary: Vocabulary) -> list[bytes]:
    """What each token adds to a text, as UTF-8: "�" for a part of a character, nothing for control tokens."""
    tokenizer = make_tokenizer(vocabulary)
    return [tokenizer.decode([token], strip_prefix=False).encode() for token in range(tokenizer.vocab_size)]


class TextStream:
    """Ids in, text out as soon as it is whole: a character is never split between two pieces.

    All pieces and `flush` joined are what `decode` makes of all ids. As generated ids continue a prompt, its
    `strip_prefix` is False here unless asked for.
    """

    def __init__(self, tokenizer: Tokenizer, strip_prefix: bool = False):
        self._tokenizer = tokenizer
        self._prefix = tokenizer.prefix if strip_prefix else b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes, often its own, sometimes ""."""
        data = self._tokenizer.token_bytes(token_id)
        if data:
            data, self._prefix = data.removeprefix(self._prefix), b""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """At the end: "�" if half a character is left over."""
        return self._decoder.decode(b"", final=True)
