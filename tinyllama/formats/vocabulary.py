"""Vocabularies: of a GGUF file, of the files beside weights, and what is done to any of them."""

import os
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ..config import LARGEST
from ..errors import naming, require
from ..machine.files import read_file
from ..tokenizer import BYTE, BYTE_PIECES, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary
from .checked import checked
from .cursor import BOOL, F32, I32, NUMBERS, STRING
from .folders import read_json
from .pre_tokenizers import rule_of, words_of
from .tiktoken import recognizes, vocabulary_from_tiktoken
from .tokenizer_json import vocabulary_from_json
from .tokenizer_model import LARGEST_FILE, vocabulary_from_model

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

#: Pieces that end a text whatever their type and whether or not a key says so, as in llama.cpp.
END_PIECES = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>"}
END_PIECES |= {"<end_of_turn>", "<end_of_utterance>", "<EOT>", "<｜end▁of▁sentence｜>"}

WHOLE = {0, 1, 2, 3, 4, 5, 10, 11}  # GGUF's types of whole numbers
BYTES = frozenset(BYTE_PIECES)
NO_RULE = (
    "the file doesn't say how its tokenizer cuts text into words (tokenizer.ggml.pre is missing): it is cut "
    "by llama.cpp's default rule, which may not be the model's and then worsens its texts; get a newer file"
)
USUAL = {"bos_id": "<s>", "eos_id": "</s>"}
LARGEST_SETTINGS = 1 << 23  # bytes of a JSON file beside a vocabulary
LAST = -10000.0  # the score of a piece of SentencePiece that nothing is merged into


# --- whatever they came from ----------------------------------------------------------------------


def with_ends(vocabulary: Vocabulary) -> Vocabulary:
    """END_PIECES end a text, and stand for none."""
    ends = sorted(map(vocabulary.pieces.index, END_PIECES.intersection(vocabulary.pieces)))
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


def with_added(
    vocabulary: Vocabulary,
    added: dict[str, int],
    special: Collection[str] = (),
    vocab_size: int | None = None,
) -> Vocabulary:
    """With pieces that were added to it after training, {piece: id}; they are matched whole.

    Those that the vocabulary has are left as they are; those from vocab_size on, which the model has no
    embedding of, and those with another piece's id are left out with a warning.

    Args:
        special: those of them that stand for no text.
    """
    n, known = len(vocabulary.pieces), set(vocabulary.pieces)
    most = min(vocab_size or LARGEST["vocab_size"], LARGEST["vocab_size"])
    new = {token_id: piece for piece, token_id in added.items() if piece not in known}
    fitting = {token_id: piece for token_id, piece in new.items() if n <= token_id < most}
    if odd := new.keys() - fitting.keys():
        told = f"the added token {new[min(odd)]!r} is left out: its id can't be {min(odd)}"
        warnings.warn(told, stacklevel=2)
    if not fitting:
        return vocabulary
    pieces = [fitting.get(token_id, f"[PAD{token_id}]") for token_id in range(n, max(fitting) + 1)]
    types = [
        (CONTROL if piece in special else USER_DEFINED) if n + i in fitting else UNUSED
        for i, piece in enumerate(pieces)
    ]
    prefixed = "part" if vocabulary.prefixed == "text" else vocabulary.prefixed
    return replace(_longer(vocabulary, [*zip(pieces, types, strict=True)]), prefixed=prefixed)


def _longer(vocabulary: Vocabulary, more: list[tuple[str, int]]) -> Vocabulary:
    """With more pieces, and their types, at the end; of a name that is there already, an empty piece."""
    if not more:
        return vocabulary
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
    vocabulary = Vocabulary(
        kind=KINDS[model],
        pieces=arrays["pieces"],
        scores=(arrays["scores"] or (0.0,) * n)[:n] if is_spm else arrays["scores"],
        types=_types(arrays["types"][:n] or _usual_types(n, ids), arrays["pieces"] if is_spm else ()),
        merges=() if is_spm else arrays["merges"],
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids["unknown"],
        stop_ids=tuple(end for end in (ids["eot"], ids["eom"]) if end is not None),
        add_bos=metadata.value("tokenizer.ggml.add_bos_token", bool, is_spm or rule_of(pre).add_bos),
        add_space_prefix=is_spm and metadata.value("tokenizer.ggml.add_space_prefix", bool, True),
        **({} if is_spm else words_of(pre)),
    )
    return with_ends(checked(vocabulary))


def _array(metadata, key: str, kind: int) -> tuple:
    """Take an array out, empty where it is missing; another type of numbers will do, too."""
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


def _types(types: tuple[int, ...], pieces: tuple[str, ...]) -> tuple[int, ...]:
    """Types as llama.cpp takes them: an unknown one is NORMAL, SentencePiece's bytes go by spelling."""
    unknown = set(types) - set(range(NORMAL, BYTE + 1))
    known = [NORMAL if kind in unknown else kind for kind in types] if unknown else [*types]
    spelled = [i for i, piece in enumerate(pieces[: len(types)]) if piece in BYTES]
    for token_id in spelled if len(spelled) == len(BYTES) else ():
        known[token_id] = BYTE
    return tuple(known)


def _usual_types(n: int, ids: dict[str, int | None]) -> tuple[int, ...]:
    """The types where a file gives none: by the ids of the special tokens."""
    found = {token_id: UNKNOWN if name == "unknown" else CONTROL for name, token_id in ids.items()}
    return tuple(found.get(token_id, NORMAL) for token_id in range(n))


# --- beside the weights ---------------------------------------------------------------------------


def vocabulary_files(folder: str | Path) -> list[Path]:
    """All files that `find_vocabulary` looks for, in its order, whether or not they are there.

    They lie in the model's folder or beside it, where Meta puts one tokenizer for models of all sizes: beside
    a symbolic link first, then beside what it points to.
    """
    folder = Path(os.path.abspath(folder))
    places = dict.fromkeys([folder, folder.parent, folder.resolve().parent])
    return [place / name for place in places for name in (*TOKENIZERS, *SETTINGS)]


def find_vocabulary(folder: str | Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of the model in a folder, with as many pieces as the model has embeddings.

    Raises TinyllamaError, naming the file, where there is none, where it can't be read, or where it has more
    tokens than the model embeds.
    """
    files = vocabulary_files(folder)
    path = next((path for path in files if path.name in TOKENIZERS and path.is_file()), None)
    require(path, f"{Path(folder) / 'tokenizer.model'}: is missing, and it isn't one folder up either")
    beside = [files[0].parent, path.parent]
    settings = {name: json_beside(beside, name) for name in SETTINGS}
    with naming(path):
        vocabulary = TOKENIZERS[path.name](path)
        vocabulary = with_added(vocabulary, *_added(settings), vocab_size=vocab_size)
        n = len(vocabulary.pieces)
        if vocab_size > 1.1 * n + 1024:
            odd = f"{path}: {n} tokens, but the model embeds {vocab_size}: is it its own?"
            warnings.warn(odd, stacklevel=2)
        return padded(with_ends(_with_settings(vocabulary, settings)), vocab_size)


def _tokenizer_model(path: Path) -> Vocabulary:
    """Two kinds of files have this name."""
    data = read_file(path, LARGEST_FILE)
    return (vocabulary_from_tiktoken if recognizes(data) else vocabulary_from_model)(path, data)


#: The files that a vocabulary is read from, the first that is there; and those that say more about it.
TOKENIZERS = {"tokenizer.json": vocabulary_from_json, "tokenizer.model": _tokenizer_model}
SETTINGS = "added_tokens special_tokens_map tokenizer_config generation_config config"
SETTINGS = tuple(f"{name}.json" for name in SETTINGS.split())


def json_beside(places: list[Path], name: str) -> dict:
    """The object in the first of these files that is there; an empty one where none is."""
    path = next((place / name for place in places if (place / name).is_file()), None)
    return read_json(path, LARGEST_SETTINGS, unique=False) if path else {}


def _added(settings: dict[str, dict]) -> tuple[dict[str, int], set[str]]:
    """The tokens added after training, {piece: id}, and those of them that stand for no text."""
    added = {piece: i for piece, i in settings["added_tokens.json"].items() if type(i) is int}
    decoder, special = settings["tokenizer_config.json"].get("added_tokens_decoder"), set()
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdecimal():
            added[token["content"]] = int(number[:9])
            special |= {token["content"]} if token.get("special") else set()
    return added, special


def _with_settings(vocabulary: Vocabulary, settings: dict[str, dict]) -> Vocabulary:
    """As the files beside it say which tokens begin and end a text, and whether a text begins with one."""
    said = settings["special_tokens_map.json"] | settings["tokenizer_config.json"]
    ids, found = {piece: i for i, piece in enumerate(vocabulary.pieces)}, {}
    for name in ("bos", "eos", "unk"):
        token = said.get(f"{name}_token")
        piece = token.get("content") if isinstance(token, dict) else token
        if isinstance(piece, str) and piece in ids:
            found[f"{name}_id"] = ids[piece]
    for name, piece in USUAL.items():  # where no file says it, as transformers' LlamaTokenizer has it
        if getattr(vocabulary, name) is None and vocabulary.types[ids.get(piece, 0)] == CONTROL:
            found.setdefault(name, ids.get(piece))
    ends = _ends(settings["generation_config.json"], len(ids)) or _ends(settings["config.json"], len(ids))
    if vocabulary.eos_id is None and found.get("eos_id") is None and ends:
        found["eos_id"] = ends[0]
    if type(add := said.get("add_bos_token")) is bool:
        found["add_bos"] = add
    is_model = vocabulary.kind == "sentencepiece" and not vocabulary.merges  # a tokenizer.json says it itself
    if is_model and type(add := said.get("add_prefix_space")) is bool:
        found["add_space_prefix"] = add
    return replace(vocabulary, **found, stop_ids=tuple(dict.fromkeys([*vocabulary.stop_ids, *ends])))


def _ends(config: dict, n: int) -> list[int]:
    """The ids of the tokens that end a text; one that no token has is ignored with a warning."""
    ends = config.get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
    if odd := [end for end in ends if not 0 <= end < n]:
        warnings.warn(f"eos_token_id {odd[0]} is ignored: there are {n} tokens", stacklevel=4)
    return [end for end in ends if 0 <= end < n]
