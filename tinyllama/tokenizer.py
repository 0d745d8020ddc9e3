"""Text <-> token ids: SentencePiece (LLaMA) and byte-level BPE (SmolLM2, Llama 3).

Both start from small pieces (characters or bytes) and merge the best neighbouring pair again and again.
They differ in what "best" means (SentencePiece: the highest score of the merged piece; BPE: the first in
a list of merges) and in how they keep every text writable:

- SentencePiece works on characters and writes a space as "▁" (U+2581), one of them put before the text.
  What has no piece of its own falls back to the pieces of its UTF-8 bytes, "<0xF0>".
- Byte-level BPE works on bytes, each shown as a printable character ("Ġ" is the space), after cutting the
  text into words by a rule that its model file names.
"""

import _thread
import codecs
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from queue import SimpleQueue

from .errors import TinyllamaError
from .machine.limits import require_memory
from .vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary, check, vocabulary_from_model

LONG = 100_000  # characters; what cutting a shorter text takes of memory isn't worth a look
ENCODED = 200  # bytes of memory for each byte of a text that is being cut


def make_tokenizer(vocabulary: Vocabulary, path: str | Path = "the vocabulary") -> "Tokenizer":
    """The tokenizer of a vocabulary.

    Raises TinyllamaError where its tokenizer.model can't be read or its pieces contradict each other, which
    names the tokenizer.model, or else the path of the file that the vocabulary is from.
    """
    if vocabulary.model is not None:
        vocabulary, path = vocabulary_from_model(vocabulary.model), vocabulary.model
    if vocabulary.kind not in ("sentencepiece", "bpe"):
        raise TinyllamaError(f"{path}: a vocabulary of the unknown kind {vocabulary.kind!r}")
    try:
        check(vocabulary)
        return (SentencePiece if vocabulary.kind == "sentencepiece" else ByteLevelBPE)(vocabulary)
    except TinyllamaError as error:
        raise TinyllamaError(f"{path}: {error}") from None


class Tokenizer:
    """Text <-> ids; its two kinds say how plain text becomes ids and which bytes a token stands for.

    Attributes:
        vocabulary: what it was made from, with all its pieces.
        vocab_size: number of tokens.
        bos_id, eos_id: the tokens that begin and end a text, or None.
        stop_ids: all tokens that end a text.
        add_bos: whether `encode` puts bos first if nobody says otherwise.
        missing_bytes: bytes that no token stands for: `encode` can't keep them.
    """

    prefix = b""  # what `encode` puts before a text
    missing_bytes: frozenset[int] = frozenset()
    _always_special: frozenset[int] = frozenset()  # types of pieces that are looked for in every text

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary.pieces)
        self.bos_id, self.eos_id, self.add_bos = vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos
        stops = (vocabulary.eos_id, *vocabulary.stop_ids)
        self.stop_ids = frozenset(token_id for token_id in stops if token_id is not None)
        self._special = {special: _Known(self._written_out(special)) for special in (False, True)}

    def encode(self, text: str | bytes, bos: bool | None = None, special: bool = False) -> list[int]:
        """Text -> ids. Unless it is `special` or has `missing_bytes`, `decode_bytes` gives exactly it back.

        Args:
            text: bytes needn't be UTF-8; a str may hold undecodable bytes as Python's "surrogateescape" does.
            bos: put bos first; None: if the vocabulary says so.
            special: control tokens that are written out, "<|im_start|>", become those tokens. Leave it out
                for text of strangers.
        Raises TinyllamaError for half a surrogate pair, or bos=True where there is none.
        """
        ids, text = self._bos(bos), _lenient(text)
        if len(text) > LONG:
            require_memory(ENCODED * len(_bytes(text)), f"cutting {len(text)} characters into tokens")
        known = self._special[special]
        for run in known.cut(text):
            ids += [known.ids[run]] if run in known.ids else self._encode_text(run)
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

    def _bos(self, wanted: bool | None) -> list[int]:
        if wanted and self.bos_id is None:
            raise TinyllamaError("this vocabulary has no bos token")
        put = self.add_bos and self.bos_id is not None if wanted is None else wanted
        return [self.bos_id] if put else []

    def _written_out(self, special: bool) -> dict[str, int]:
        """Pieces that are looked for before anything else, -> their ids."""
        types, pieces = self._always_special | ({CONTROL} if special else set()), self.vocabulary.pieces
        ids = [token_id for token_id, kind in enumerate(self.vocabulary.types) if kind in types]
        return {pieces[token_id]: token_id for token_id in ids if pieces[token_id]}

    def _encode_text(self, text: str) -> list[int]:
        """Text without special pieces, not empty -> ids."""
        raise NotImplementedError

    def _spell(self, piece: str, token_id: int) -> bytes:
        """The bytes that a token which is no control token stands for."""
        raise NotImplementedError


class _Known:
    """Pieces that are looked for before anything else. A regular expression of them all would take a hundred
    bytes of memory for each of their characters, and of those a file may have millions.

    Attributes:
        ids: piece -> its id.
    """

    def __init__(self, ids: dict[str, int]):
        self.ids, self._longest = ids, max(map(len, ids), default=0)

    @cached_property
    def _pieces(self) -> list[str]:
        return sorted(self.ids)

    @cached_property
    def _first(self) -> re.Pattern:
        """Any character with which one begins."""
        return re.compile(f"[{re.escape(''.join({piece[0] for piece in self.ids}))}]")

    def cut(self, text: str) -> list[str]:
        """Cut text before and after every known piece; of two that begin together the longer one is meant."""
        runs, start, match = [], 0, self._first.search(text) if self.ids else None
        while match:
            at, piece = match.start(), self._at(text, match.start())
            if piece:
                runs += [text[start:at], piece]
                start = at + len(piece)
            match = self._first.search(text, start if piece else at + 1)
        return [run for run in (*runs, text[start:]) if run]

    def _at(self, text: str, at: int) -> str:
        """The longest known piece with which text goes on at a place, "" if there is none."""
        rest, last = text[at : at + self._longest], len(self._pieces)
        while last := bisect_right(self._pieces, rest, hi=last):
            # The piece that sorts last of those up to the rest begins as the rest does for the longest.
            piece = self._pieces[last - 1]
            if rest.startswith(piece):
                return piece
            rest = commonprefix((piece, rest))  # noqa: RUF071 (of text, not of paths)
        return ""


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


#: Characters that are encoded in about a twentieth of a second.
LONG = 100_000


def _interruptibly(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """encode(text), of a long text in a thread of its own: inside of one call Ctrl-C wouldn't be heard."""
    if len(text) < LONG:
        return encode(text)
    answer = SimpleQueue()

    def work() -> None:
        try:
            answer.put((encode(text), None))
        except Exception as error:
            answer.put((None, error))

    _thread.start_new_thread(work, ())  # bare, as in threads.py
    ids, error = answer.get()
    if error:
        raise error
    return ids


# --- SentencePiece --------------------------------------------------------------------------------

#: What SentencePiece would change: a "▁" of the text's own would come back as a space, a byte that isn't
#: UTF-8 (a lone surrogate after `_lenient`) not at all. They become byte pieces instead.
_NOT_VERBATIM = re.compile("([\u2581\udc80-\udcff]+)")


class SentencePiece(Tokenizer):
    """LLaMA's tokenizer (Kudo and Richardson, arXiv:1808.06226), through the sentencepiece package.

    Without byte pieces in the vocabulary, unknown characters become `unk_id`, which decodes to " ⁇ "; without
    the piece "▁", a space comes back as "▁".
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self._processor = _processor(vocabulary)
        self._unk_id = vocabulary.types.index(UNKNOWN)  # unk_id() only knows one named "<unk>"
        rows = enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
        self._byte_ids = {int(piece[1:-1], 16): token_id for token_id, (piece, kind) in rows if kind == BYTE}
        self.prefix = b" " if vocabulary.add_space_prefix else b""

    def _encode_text(self, text: str) -> list[int]:
        # The prefix comes after a control token, too: for LLaMA that is where the next text begins.
        ids = []
        for index, run in enumerate(_NOT_VERBATIM.split(self.prefix.decode() + text)):
            if index % 2:
                ids += [self._byte_ids.get(byte, self._unk_id) for byte in _bytes(run)]
            else:
                ids += _interruptibly(self._processor.encode, run)
        return ids

    def _spell(self, piece: str, token_id: int) -> bytes:
        kind = self.vocabulary.types[token_id]
        if kind == BYTE:
            return bytes([int(piece[1:-1], 16)])
        return " ⁇ ".encode() if kind == UNKNOWN else piece.replace("▁", " ").encode()


def _processor(vocabulary: Vocabulary):
    """Build SentencePiece from pieces, scores and types, with nothing done to the text on its way in."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = BYTE in vocabulary.types
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    try:
        rows = enumerate(zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True))
        for token_id, (piece, score, kind) in rows:
            if kind == CONTROL and len(piece) == 1:  # SentencePiece would find it in plain text
                piece = f"<control {token_id}>"
            proto.pieces.add(piece=piece, score=score, type=kind)
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (RuntimeError, ValueError) as error:
        raise TinyllamaError(f"SentencePiece can't use this vocabulary: {_one_line(error)}") from None


# --- byte-level BPE -------------------------------------------------------------------------------

#: Bytes as byte-level BPE shows them (GPT-2): those that print as themselves, the others from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}

#: Llama 3's rule: contractions; a word with the sign before it; up to three digits; signs; line ends; spaces.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ByteLevelBPE(Tokenizer):
    """GPT-2's kind of tokenizer (Sennrich et al., arXiv:1508.07909, on bytes), by the tokenizers package.

    Not every such vocabulary holds all 256 bytes: SmolLM2's lacks 21 that UTF-8 text seldom or never has.
    Bytes without a token (`missing_bytes`) are left out, as llama.cpp and Hugging Face do.
    """

    _always_special = frozenset({USER_DEFINED})

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        plain = dict(zip(vocabulary.pieces, range(self.vocab_size), strict=True))
        for token_id, kind in enumerate(vocabulary.types):
            piece = vocabulary.pieces[token_id]
            if kind == CONTROL or (kind != NORMAL and not piece.isascii()):  # "Ġ" means itself, not a space
                del plain[piece]
        self._byte_ids = {byte: plain[char] for char, byte in _BYTE_OF.items() if char in plain}
        self.missing_bytes = frozenset(range(256)) - self._byte_ids.keys()
        self._bpe = _bpe(vocabulary, plain)

    def _encode_text(self, text: str) -> list[int]:
        ids = []
        for index, run in enumerate(re.split("([\udc80-\udcff]+)", text)):
            if index % 2:
                ids += [self._byte_ids[byte] for byte in _bytes(run) if byte in self._byte_ids]
            else:
                ids += _interruptibly(self._encode_run, run)
        return ids

    def _encode_run(self, run: str) -> list[int]:
        if len(run) < LONG:
            return self._bpe.encode(run, add_special_tokens=False).ids
        return self._bpe.encode_batch([run], add_special_tokens=False)[0].ids  # which lets go of Python

    def _spell(self, piece: str, token_id: int) -> bytes:
        if self.vocabulary.types[token_id] == NORMAL and all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        return piece.encode()


def _bpe(vocabulary: Vocabulary, plain: dict[str, int]):
    import tokenizers

    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    # A merge into no piece can end tokenizers in a Rust panic, which isn't even an Exception.
    wrong = next((merge for merge in merges if not _is_merge(merge, plain)), None)
    if wrong is not None:
        shown = repr(" ".join(wrong)[:80])
        raise TinyllamaError(f"the merge {shown} isn't of two pieces of the vocabulary into a third")
    try:
        # Llama 3's rule takes a word that is a piece as it is, without looking for merges that lead to it.
        model = tokenizers.models.BPE(plain, merges, ignore_merges=vocabulary.pre == "llama-bpe")
    except Exception as error:
        raise TinyllamaError(f"tokenizers can't use this vocabulary: {_one_line(error)}") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary.pre)
    return tokenizer


def _is_merge(merge: tuple[str, ...], plain: dict[str, int]) -> bool:
    return len(merge) == 2 and merge[0] in plain and merge[1] in plain and merge[0] + merge[1] in plain


def _pre_tokenizer(name: str):
    """The rule that cuts text into words, by the name that llama.cpp gives it."""
    from tokenizers import Regex, pre_tokenizers

    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules = {
        "gpt-2": [gpt2_words],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2_words],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"), bytes_only],
    }
    if name not in rules:
        raise TinyllamaError(f"the pre-tokenizer {name!r} isn't supported, only {', '.join(rules)}")
    return pre_tokenizers.Sequence(rules[name])


# --- bytes that are no text ----------------------------------------------------------------------


def _lenient(text: str | bytes) -> str:
    """As str, with each byte that isn't UTF-8 as the lone surrogate U+DC00 + byte (PEP 383)."""
    try:
        data = text if isinstance(text, bytes) else _bytes(text)
    except UnicodeEncodeError as error:
        raise TinyllamaError(f"the text holds half a character at position {error.start}") from None
    return data.decode("utf-8", errors="surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
