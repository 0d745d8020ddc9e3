"""Vocabularies: of a GGUF file, of the files beside weights, and what is done to them whatever they came from."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

from ..config import LARGEST
from ..errors import naming, require
from ..machine.files import read_file
from ..tokenizer import BYTE, BYTE_PIECES, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary
from .cursor import BOOL, F32, I32, NUMBERS, STRING
from .pre_tokenizers import rule_of, words_of
from .tokenizer_model import vocabulary_from_model

#: Arrays of a GGUF file that become a Vocabulary: its field, and the type of the elements that is written.
ARRAYS = {
    "tokenizer.ggml.tokens": ("pieces", STRING),
    "tokenizer.ggml.scores": ("scores", F32),
    "tokenizer.ggml.token_type": ("types", I32),
    "tokenizer.ggml.merges": ("merges", STRING),
}
KINDS = {"llama": "sentencepiece", "gpt2": "bpe"}  # tokenizer.ggml.model
#: The ids of special tokens: GGUF's key, and llama.cpp's default for SentencePiece.
SPECIAL = {"bos": 1, "eos": 2, "unknown": 0, "eot": None, "eom": None}

#: Pieces that end a text whatever their type and whether or not a key says so; llama.cpp has such a list, too.
END_PIECES = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>"}
END_PIECES |= {"<end_of_turn>", "<end_of_utterance>", "<EOT>", "<｜end▁of▁sentence｜>"}

WHOLE = {0, 1, 2, 3, 4, 5, 10, 11}  # GGUF's types of whole numbers
BYTES = frozenset(BYTE_PIECES)
NO_RULE = (
    "the file doesn't say how its tokenizer cuts text into words (tokenizer.ggml.pre is missing): it is cut by "
    "llama.cpp's default rule, which may not be the model's and then makes its texts worse; get a newer file"
)
LAST = -10000.0  # the score of a piece of SentencePiece that nothing is merged into


# --- whatever they came from ----------------------------------------------------------------------


def with_ends(vocabulary: Vocabulary) -> Vocabulary:
    """END_PIECES end a text, and stand for none."""
    ends = [i for i, piece in enumerate(vocabulary.pieces) if piece in END_PIECES]
    types, stops = list(vocabulary.types), dict.fromkeys([*vocabulary.stop_ids, *ends])
    for token_id in ends:
        types[token_id] = CONTROL
    stops.pop(vocabulary.eos_id, None)
    return replace(vocabulary, types=tuple(types), stop_ids=tuple(stops))


def padded(vocabulary: Vocabulary, vocab_size: int) -> Vocabulary:
    """With unused pieces up to vocab_size: models have more embeddings than tokens, often a multiple of 64.

    Raises TinyllamaError where there are fewer.
    """
    n = len(vocabulary.pieces)
    require(n <= vocab_size, f"a vocabulary of {n} tokens, but the model embeds {vocab_size}")
    names = (f"[PAD{token_id}]" for token_id in range(n, vocab_size))
    return _longer(vocabulary, [(name, UNUSED) for name in names])


def with_added(vocabulary: Vocabulary, added: dict[str, int], vocab_size: int | None = None) -> Vocabulary:
    """With pieces that were added to it after training, {piece: id}; they are matched whole, as llama.cpp does.

    Those that the vocabulary has are left as they are; those beyond vocab_size, which the model has no
    embedding of, and those with the id of another piece are left out with a warning.
    """
    pieces, n = vocabulary.pieces, len(vocabulary.pieces)
    known, most = set(pieces), min(vocab_size or LARGEST["vocab_size"], LARGEST["vocab_size"])
    new = {token_id: piece for piece, token_id in added.items() if piece not in known}
    fitting = {token_id: piece for token_id, piece in new.items() if n <= token_id < most}
    if odd := new.keys() - fitting.keys():
        warnings.warn(f"the added token {new[min(odd)]!r} is left out: its id {min(odd)} can't be", stacklevel=2)
    more = [(fitting.get(i, f"[PAD{i}]"), USER_DEFINED if i in fitting else UNUSED) for i in range(n, max(fitting, default=0) + 1)]
    rule = "part" if vocabulary.prefixed == "text" else vocabulary.prefixed
    return replace(_longer(vocabulary, more), prefixed=rule)


def _longer(vocabulary: Vocabulary, more: list[tuple[str, int]]) -> Vocabulary:
    """With more pieces, and their types, at the end; of a name that is there already, an empty piece."""
    known = set(vocabulary.pieces)
    return replace(
        vocabulary,
        pieces=vocabulary.pieces + tuple("" if piece in known else piece for piece, _ in more),
        types=vocabulary.types + tuple(kind for _, kind in more),
        scores=vocabulary.scores and vocabulary.scores + (LAST,) * len(more),
    )


# --- GGUF -----------------------------------------------------------------------------------------


def from_gguf(metadata) -> Vocabulary:
    """Take the vocabulary's arrays out of a GGUF file's key-values (gguf.Metadata).

    Missing arrays, ids and flags are as llama.cpp has them. Raises TinyllamaError, naming the key, where one
    can't be; warns of what is ignored.
    """
    model = metadata.value("tokenizer.ggml.model", str, "")
    require(model in KINDS, f"a tokenizer of the kind {model!r}: only 'llama' and 'gpt2' are supported")
    arrays = {field: _array(metadata, key, kind) for key, (field, kind) in ARRAYS.items()}
    require(arrays["pieces"], "there is no vocabulary in it (tokenizer.ggml.tokens)")
    is_spm, n = model == "llama", len(arrays["pieces"])
    ids = {name: _special_id(metadata, name, n, SPECIAL[name] if is_spm else None) for name in SPECIAL}
    pre = "" if is_spm else metadata.value("tokenizer.ggml.pre", str, "")
    if not is_spm and not pre:
        warnings.warn(NO_RULE, stacklevel=2)
    return with_ends(
        Vocabulary(
            kind=KINDS[model],
            pieces=arrays["pieces"],
            scores=(arrays["scores"] or (0.0,) * n)[:n] if is_spm else arrays["scores"],
            types=_known_types(arrays["types"][:n]) or _usual_types(arrays["pieces"], ids, is_spm),
            merges=() if is_spm else arrays["merges"],
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            unk_id=ids["unknown"],
            stop_ids=tuple(end for end in (ids["eot"], ids["eom"]) if end is not None),
            add_bos=metadata.value("tokenizer.ggml.add_bos_token", bool, is_spm or rule_of(pre).add_bos),
            add_space_prefix=is_spm and metadata.value("tokenizer.ggml.add_space_prefix", bool, True),
            prefixed="part",
            **({} if is_spm else words_of(pre)),
        )
    )


def _array(metadata, key: str, kind: int) -> tuple:
    """Take an array out; of numbers any type will do, of whole ones any whole one. Empty where it's missing."""
    values, found = metadata.pop(key, []), metadata.types.pop(key, kind)
    allowed = {STRING: {STRING}, I32: WHOLE, F32: NUMBERS.keys() - {BOOL}}[kind]
    right = isinstance(values, list) and (found in allowed or not values)
    require(right, f"the key {key} isn't an array of values of type {kind}")
    return tuple(values)


def _special_id(metadata, name: str, n: int, default: int | None) -> int | None:
    """The id of a special token; one that no token has is ignored with a warning."""
    key = f"tokenizer.ggml.{name}_token_id"
    found = metadata.get(key, default)
    require(type(found) in (int, type(None)), f"the key {key} must be a whole number, not {str(found)[:40]}")
    if key in metadata and not 0 <= found < n:
        warnings.warn(f"the key {key} is ignored: there is no token {found} among {n}", stacklevel=3)
        found = default
    return found if found is not None and 0 <= found < n else None


def _known_types(types: tuple[int, ...]) -> tuple[int, ...]:
    """Types as llama.cpp takes them: one that it doesn't know is an ordinary piece."""
    return tuple(kind if NORMAL <= kind <= BYTE else NORMAL for kind in types)


def _usual_types(pieces: tuple[str, ...], ids: dict[str, int | None], is_spm: bool) -> tuple[int, ...]:
    """The types where a file gives none: by the ids, and of SentencePiece the bytes' by their spelling."""
    types = [BYTE if is_spm and piece in BYTES else NORMAL for piece in pieces]
    for name, token_id in ids.items():
        if token_id is not None:
            types[token_id] = UNKNOWN if name == "unknown" else CONTROL
    return tuple(types)


# --- beside the weights ---------------------------------------------------------------------------


def vocabulary_files(folder: str | Path) -> list[Path]:
    """All files that `find_vocabulary` looks at, those that aren't there included, in its order.

    They lie in the folder, beside it (of a symbolic link: beside the link, then beside its target), where
    Meta puts one tokenizer for models of all sizes.
    """
    folder = Path(os.path.abspath(folder))
    places = dict.fromkeys([folder, folder.parent, folder.resolve().parent])
    return [place / name for place in places for name in (*TOKENIZERS, *SETTINGS)]


def find_vocabulary(folder: str | Path, vocab_size: int) -> tuple[Vocabulary, list[Path]]:
    """The vocabulary of a model in a folder, with as many pieces as the model has embeddings.

    Returns it and all files that were looked for. Raises TinyllamaError, naming the file, where there is
    none, or it has more tokens than the model embeds.
    """
    files = vocabulary_files(folder)
    path = next((path for path in files if path.name in TOKENIZERS and path.is_file()), None)
    missing = f"{Path(folder) / 'tokenizer.model'}: is missing, and it isn't one folder up either"
    require(path, missing)
    with naming(path):
        vocabulary = with_ends(TOKENIZERS[path.name](path))
        return padded(vocabulary, vocab_size), files


TOKENIZERS = {"tokenizer.model": vocabulary_from_model}
SETTINGS = ("added_tokens.json",)
