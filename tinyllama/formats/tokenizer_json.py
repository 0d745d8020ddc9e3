"""tokenizer.json, the file of Hugging Face's package tokenizers, of its BPE kinds.

An object of a pipeline's parts, each an object with a "type":

- `normalizer`, what is done to the text first: to bring it into a form of Unicode (NFC), or SentencePiece's
  ways as Prepend "▁" and Replace " " by "▁".
- `pre_tokenizer`, what cuts text into words: Split by a regular expression, Digits, ByteLevel (each byte as a
  character that prints, the mark of byte-level BPE), Metaspace (SentencePiece's ways), a Sequence of these.
- `model`: `vocab` {piece: id}, `merges` ["left right", ...] or [["left", "right"], ...], `unk_token`,
  `byte_fallback` (a character without a piece becomes its bytes, "<0xF0>"), `ignore_merges`.
- `added_tokens`: pieces that are matched whole, before all of that.
- `post_processor`, of which the token that it puts before each text is read.

Without ByteLevel the vocabulary is of SentencePiece's kind. Its merges are kept as a list, as its scores, the
ranks of merges, don't tell which of two ways to the same piece comes first.
"""

import itertools
import re
import warnings
from pathlib import Path

import regex

from ..config import LARGEST
from ..errors import TinyllamaError, naming, require
from ..tokenizer import BYTE, BYTE_PIECES, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary
from .checked import checked
from .folders import read_json
from .pre_tokenizers import GPT2, RULES, name_of

LARGEST_FILE = 1 << 25  # bytes; Gemma's has 33 million, Llama 3's nine
LONGEST_CUT = 1.0  # seconds in which a rule must have cut a line; a real one takes microseconds
LONGEST_RULE = 4000  # characters of a regular expression; DeepSeek's has 300
UNREACHED = -1e9  # the score of a piece that no merge leads to
#: A set in a set, or the intersection of two, which the package regex takes otherwise than tokenizers does.
NESTED = re.compile(r"(?<!\\)\[\^?(?:\\.|\[:\^?\w+:\]|[^\]\[\\&]|&(?!&))*(?:\[(?!:)|&&)")
SPACE = "▁"
FORMS = ("NFC", "NFD", "NFKC", "NFKD")
SIGNS = r"[\p{P}!-/:-@\[-`{-~]"  # what Punctuation cuts


def vocabulary_from_json(path: str | Path) -> Vocabulary:
    """The vocabulary in a tokenizer.json.

    Raises TinyllamaError, naming the file, where it can't be read, is damaged, or wants what isn't supported.
    """
    path = Path(path)
    parts = read_json(path, LARGEST_FILE, unique=False)
    with naming(path):
        model = _object(parts, "model")
        kind = model.get("type") or "BPE"
        require(kind == "BPE", f"a tokenizer of the kind {kind!r}: only BPE is supported")
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            require(not model.get(name), f"a BPE with a {name}, which isn't supported")
        steps = _steps(parts.get("pre_tokenizer"), "pretokenizers")
        is_bytes = any(step["type"] == "ByteLevel" for step in steps)
        ignore_merges = bool(model.get("ignore_merges"))
        fields = _byte_level(steps, ignore_merges) if is_bytes else _sentencepiece(steps)
        fields |= _normalizer(_steps(parts.get("normalizer"), "normalizers"), is_bytes)
        added = _added(parts)
        ids = _ids(model, added)
        unk_id = ids.get(str(model.get("unk_token")))
        pieces, types = _pieces(ids, added)
        types = types if is_bytes else _sentencepiece_types(types, ids, unk_id, model.get("byte_fallback"))
        merges = _merges(model, ids)
        require(merges or is_bytes, "a tokenizer without merges")
        bos_id = _bos(parts.get("post_processor"), ids)
        vocabulary = Vocabulary(
            kind="bpe" if is_bytes else "sentencepiece",
            pieces=pieces,
            scores=() if is_bytes else _scores(pieces, merges),
            types=types,
            merges=merges,
            ignore_merges=ignore_merges,
            bos_id=bos_id,
            eos_id=None,
            unk_id=unk_id,
            fuse_unknown=bool(model.get("fuse_unk")),
            add_bos=bos_id is not None,
            path=path,
            **fields,
        )
        return checked(vocabulary)


def _object(parts: dict, name: str) -> dict:
    value = parts.get(name)
    require(isinstance(value, dict), f"its {name!r} is missing or no object")
    return value


def _steps(step: object, name: str) -> list[dict]:
    """The steps of a Sequence, or the one that there is instead; each has a type."""
    if step is None:
        return []
    inner = step.get(name) if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    require(isinstance(inner, list), f"a Sequence without {name}")
    for one in inner:
        right = isinstance(one, dict) and isinstance(one.get("type"), str) and one["type"] != "Sequence"
        require(right, f"one of its {name} has no type, or is a Sequence in another")
    return inner


# --- how text is cut ------------------------------------------------------------------------------


def _byte_level(steps: list[dict], ignore_merges: bool) -> dict:
    """The fields of a Vocabulary that say how a byte-level one cuts text."""
    words, prefix = [], False
    last = [step["type"] for step in steps].index("ByteLevel") == len(steps) - 1
    require(last, "a pre_tokenizer behind ByteLevel, which isn't supported")
    for step in steps:
        prefix = step["type"] == "ByteLevel" and step.get("add_prefix_space", True)
        why = "a pre_tokenizer that puts a space before every word isn't supported"
        require(not prefix or not words, why)
        words += _words(step)
    name = name_of(words, ignore_merges) or name_of(words, not ignore_merges)
    for rule in () if name else words:
        _check_rule(rule)
    words = RULES[name].words if name else tuple(words)
    return {"pre": name, "words": words, "add_space_prefix": bool(prefix), "prefixed": "bare"}


def _check_rule(rule: str) -> None:
    """Refuse a stranger's rule that isn't one, or that takes forever on a line of like signs."""
    require(not NESTED.search(rule), f"its rule {rule[:80]!r} has a set of characters in another")
    try:
        compiled = regex.compile(rule)
        for sign, end in itertools.product("aA1 !\n我", "b2 !"):
            for _ in compiled.finditer(sign * 100 + end, timeout=LONGEST_CUT):
                pass
    except regex.error as error:
        raise TinyllamaError(f"its rule {rule[:80]!r} isn't a regular expression: {error}") from None
    except TimeoutError:
        raise TinyllamaError(f"its rule {rule[:80]!r} takes forever to cut a text") from None


def _words(step: dict) -> list[str]:
    """The regular expression of a step, or none."""
    kind, behavior = step["type"], step.get("behavior", "Isolated")
    if kind == "ByteLevel":
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
    if kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
        return [SIGNS if behavior == "Isolated" else f"{SIGNS}+"]
    require(kind == "Split", f"the pre_tokenizer {kind!r} ({behavior}) isn't supported")
    pattern = step.get("pattern")
    kinds = pattern if isinstance(pattern, dict) else {}
    words = kinds.get("Regex", kinds.get("String"))
    require(isinstance(words, str), "a Split without a pattern")
    words = words if "Regex" in kinds else re.escape(words)
    inverted = behavior == "Removed" and step.get("invert") and words.endswith(r"|\s+")
    whole = behavior == "Isolated" or inverted
    require(whole, f"a Split that is {behavior!r} isn't supported, only 'Isolated'")
    require(len(words) <= LONGEST_RULE, "a regular expression that is absurdly long")
    return [words]


def _sentencepiece(steps: list[dict]) -> dict:
    """The fields that say how one of SentencePiece's kind cuts text, and where it puts a space."""
    if not steps:
        return {"add_space_prefix": False, "prefixed": "part"}
    step = steps[0]
    right = len(steps) == 1 and step["type"] == "Metaspace" and step.get("replacement", SPACE) == SPACE
    require(right, f"the pre_tokenizer {step['type']!r} isn't supported here")
    scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
    require(scheme in ("always", "first", "never"), f"the prepend_scheme {scheme!r} isn't supported")
    return {
        "words": (r" [^ ]*|[^ ]+",) if step.get("split", True) else (),
        "add_space_prefix": scheme != "never",
        "prefixed": "first" if scheme == "first" else "bare",
    }


def _normalizer(steps: list[dict], is_bytes: bool) -> dict:
    """The fields of a Vocabulary that say what is done to a text."""
    fields = {}
    for step in steps:
        kind = step["type"]
        if kind in FORMS and not fields:
            fields["normal_form"] = kind
        elif not is_bytes and kind == "Prepend" and step.get("prepend") == SPACE:
            fields |= {"add_space_prefix": True, "prefixed": "part"}
        else:
            spaces = kind, step.get("pattern"), step.get("content")
            fine = spaces == ("Replace", {"String": " "}, SPACE) and not is_bytes
            require(fine, f"the normalizer {kind!r} isn't supported here")
    return fields


# --- pieces and merges ----------------------------------------------------------------------------


def _ids(model: dict, added: list[dict]) -> dict[str, int]:
    """Piece -> id, of the vocabulary and of the added tokens that aren't in it."""
    ids = dict(_object(model, "vocab"))
    for token in added:
        ids.setdefault(token["content"], token["id"])
    most = LARGEST["vocab_size"]
    require(ids, "its vocabulary is empty")
    require(all(type(i) is int and 0 <= i < most for i in ids.values()), f"an id that isn't 0 to {most - 1}")
    require(len(set(ids.values())) == len(ids), "two pieces of its vocabulary have one id")
    odd = [t["content"] for t in added if any(t.get(flag) for flag in ("lstrip", "rstrip", "single_word"))]
    if odd:
        told = f"that {odd[0]!r} takes the spaces around it, or is a whole word, is ignored"
        warnings.warn(told, stacklevel=4)
    return ids


def _added(parts: dict) -> list[dict]:
    added = parts.get("added_tokens") or []
    right = isinstance(added, list) and all(isinstance(token, dict) for token in added)
    right = right and all(isinstance(t.get("content"), str) and type(t.get("id")) is int for t in added)
    require(right, "its added_tokens aren't a list of objects with content and id")
    return added


def _pieces(ids: dict[str, int], added: list[dict]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The pieces and their types by id; where no piece has an id, an unused one."""
    n = max(ids.values()) + 1
    pieces, types = [f"[PAD{i}]" for i in range(n)], [UNUSED] * n
    for piece, token_id in ids.items():
        pieces[token_id], types[token_id] = piece, NORMAL
    for token in added:
        types[ids[token["content"]]] = CONTROL if token.get("special") else USER_DEFINED
    pieces = [piece if ids.get(piece, i) == i else "" for i, piece in enumerate(pieces)]
    return tuple(pieces), tuple(types)


def _sentencepiece_types(types: tuple, ids: dict[str, int], unk_id: int | None, has_bytes: object) -> tuple:
    """The types, with those that a byte-level vocabulary doesn't have: the unknown piece and bytes."""
    bytes_ = [ids.get(piece) for piece in BYTE_PIECES] if has_bytes else []
    special = {} if unk_id is None else {unk_id: UNKNOWN}
    special |= {} if None in bytes_ else dict.fromkeys(bytes_, BYTE)
    return tuple(special.get(i, kind) for i, kind in enumerate(types))


def _merges(model: dict, ids: dict[str, int]) -> tuple[str, ...]:
    """Merges as "left right", whichever way they are written."""
    merges = model.get("merges") or []
    require(isinstance(merges, list), "its merges aren't a list")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    right = all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in pairs)
    require(right, "a merge that isn't two pieces")
    for left, other in pairs:
        known = left in ids and other in ids and left + other in ids
        shown = f"{left} {other}"[:80]
        require(known, f"the merge {shown!r} isn't of two pieces into a third")
    return tuple(f"{left} {other}" for left, other in pairs if " " not in left + other)  # no word has a space


def _scores(pieces: tuple[str, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """The earlier a piece is merged, the higher its score."""
    ranks = {merge.replace(" ", "", 1): float(-rank) for rank, merge in reversed(list(enumerate(merges)))}
    return tuple(ranks.get(piece, UNREACHED) for piece in pieces)


def _bos(processor: object, ids: dict[str, int]) -> int | None:
    """The token that is put before every text, if there is one."""
    for step in _steps(processor, "processors"):
        template = step.get("single") if step["type"] == "TemplateProcessing" else None
        first = template[0] if isinstance(template, list) and template else None
        token = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(token, dict) and token.get("id") in ids:
            return ids[token["id"]]
    return None
