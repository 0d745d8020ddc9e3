"""The files in a model's folder that a vocabulary is read from: tokenizer.json, tiktoken's, those beside."""

import base64
import json
from copy import deepcopy

from hypothesis import strategies as st

from tinyllama.formats.pre_tokenizers import RULES
from tinyllama.formats.tokenizer_json import FORMS
from tinyllama.formats.vocabulary import find_vocabulary

from .. import contract, texts
from ..bundle import bundle, unbundle
from ..damage import damaged
from .tokenizer_model import SPELLING

READS = ("tinyllama.formats.vocabulary", "tinyllama.formats.tokenizer_json", "tinyllama.formats.tiktoken")
NAMES = ["tokenizer.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json"]
NAMES += ["special_tokens_map.json", "generation_config.json", "config.json"]
WORDS = [f"=== {name} ===\n".encode() for name in NAMES] + [
    b'"merges": [',
    b'"vocab": {',
    b'"added_tokens": [',
]
WORDS += [b'"type": "Sequence"', b'"type": "ByteLevel"', b'"Regex": "', b'"eos_token_id": [', b"IQ== 0\n"]
MOST = 600  # embeddings


def check(data: bytes) -> bool:
    """A vocabulary that is read makes a tokenizer that keeps texts, or none."""
    with contract.folder(unbundle(data)) as folder:
        file = folder / "tokenizer.json"
        vocabulary = contract.opened(lambda path: find_vocabulary(path, MOST), file, folder)
        if vocabulary is None:
            return False
        contract.must(len(vocabulary.pieces) == MOST, "another number of pieces than of embeddings")
        keeps = texts.keeps_texts if not vocabulary.normal_form else texts.encodes
        return keeps(vocabulary, vocabulary.path)


# --- nearly valid folders -------------------------------------------------------------------------


@st.composite
def inputs(draw) -> bytes:
    """A tokenizer.json of either kind or tiktoken's text, with files beside it, one of them damaged."""
    kind = draw(st.sampled_from(["bytes", "bytes", "characters", "tiktoken"]))
    if kind == "tiktoken":
        files = {"tokenizer.model": tiktoken()}
    else:
        parts = byte_level() if kind == "bytes" else characters()
        for _ in range(draw(st.integers(0, 2))):
            odd(draw, parts)
        files = {"tokenizer.json": json.dumps(parts).encode()}
    for name in draw(st.lists(st.sampled_from(NAMES[2:]), max_size=2)):
        files[name] = json.dumps(draw(st.dictionaries(KEYS, VALUES, max_size=3))).encode()
    name = draw(st.sampled_from([*files]))
    if draw(st.booleans()):
        step = max(8, len(files[name]) // 64)
        files[name] = draw(damaged([files[name][at : at + step] for at in range(0, len(files[name]), step)]))
    return bundle(files)


KEYS = st.sampled_from(
    ["<x>", "eos_token_id", "eos_token", "bos_token", "add_bos_token", "added_tokens_decoder"]
)
KEYS |= SPELLING
SIMPLE = st.sampled_from(
    [None, True, -1, 0, 1, 400, 500, 1 << 40, 1.5, "<x>", "</s>", "", "▁", [], {}, [1, -1]]
).map(deepcopy)
VALUES = SIMPLE | st.sampled_from(
    [{"content": "<s>"}, {"400": {"content": "<x>", "special": True}}, {"x": 1}]
).map(deepcopy)
RULE = st.sampled_from(
    [words for rule in RULES.values() for words in rule.words] + ["(", "", "a|b", "(?i)x", "[a"]
)
STEPS = st.sampled_from(
    [
        {"type": "ByteLevel"},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        {"type": "Metaspace"},
        {"type": "Sequence", "pretokenizers": []},
        {"type": "Whitespace"},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        *({"type": form} for form in FORMS),
        {},
        None,
    ]
)
STEPS |= RULE.map(lambda words: {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated"})


def odd(draw, parts: dict) -> None:
    """Change one part of a tokenizer.json."""
    where = draw(
        st.sampled_from(["pre_tokenizer", "normalizer", "model", "vocab", "merges", "added_tokens", "top"])
    )
    if where in ("pre_tokenizer", "normalizer"):
        inner = "pretokenizers" if where == "pre_tokenizer" else "normalizers"
        parts[where] = {"type": "Sequence", inner: draw(st.lists(STEPS, max_size=3))}
    elif where in ("model", "vocab", "merges") and not isinstance(parts.get("model"), dict):
        parts.pop("model", None)
    elif where == "model":
        parts["model"][draw(st.sampled_from([*parts["model"], "fuse_unk", "end_of_word_suffix"]))] = draw(
            VALUES
        )
    elif where == "vocab" and isinstance(parts["model"].get("vocab"), dict):
        parts["model"]["vocab"][draw(SPELLING | st.text(max_size=3))] = draw(SIMPLE)
    elif where == "merges" and isinstance(parts["model"].get("merges"), list):
        merge = draw(st.sampled_from(["a b", "a", "a b c", ["a", "b"], ["a"], ["q", "q"], [1, 2], None]))
        parts["model"]["merges"].insert(0, merge)
    elif where == "added_tokens":
        token = {"id": draw(SIMPLE), "content": draw(SPELLING), "special": draw(st.booleans())}
        before = parts.get("added_tokens")
        parts["added_tokens"] = [*(before if isinstance(before, list) else []), token]
    else:
        parts[draw(st.sampled_from([*parts, "post_processor"]))] = draw(VALUES)


def byte_level() -> dict:
    """Llama 3's kind."""
    letters = [piece for piece, _, _ in texts.LETTERS]
    pieces = [*letters, "ab", "Ġa", "Ġab", "<s>", "<|im_end|>"]
    return {
        "added_tokens": [{"id": 259, "content": "<s>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": RULES["llama-bpe"].words[0]}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": ["a b", "Ġ a", "Ġ ab"],
        },
    }


def characters() -> dict:
    """Llama 2's kind."""
    pieces = ["<unk>", "<s>", "</s>", *(piece for piece, _, _ in texts.BYTES), "▁", "a", "b", "ab", "▁a", "é"]
    return {
        "added_tokens": [
            {"id": number, "content": piece, "special": True} for number, piece in enumerate(pieces[:3])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [["a", "b"], ["▁", "a"]],
        },
    }


def tiktoken() -> bytes:
    """The bytes, and two pieces more."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"ab", b" ab"]
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


def seeds() -> dict[str, bytes]:
    """One of each kind, and the files beside it."""
    config = {"added_tokens_decoder": {"300": {"content": "<x>", "special": True}}, "eos_token": "<s>"}
    beside = {"tokenizer_config.json": json.dumps(config).encode()}
    beside["generation_config.json"] = b'{"eos_token_id": [1, 2]}'
    return {
        "bytes": bundle({"tokenizer.json": json.dumps(byte_level()).encode(), **beside}),
        "characters": bundle({"tokenizer.json": json.dumps(characters()).encode(), **beside}),
        "tiktoken": bundle({"tokenizer.model": tiktoken()}),
    }
