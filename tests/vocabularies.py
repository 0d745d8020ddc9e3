"""Small vocabularies, trained in a blink, and a slow and obvious BPE to compare with."""

import functools
import io
import itertools
import re
import unicodedata
from collections import Counter

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from tinyllama.formats.pre_tokenizers import RULES, words_of
from tinyllama.tokenizer import Vocabulary

TEXT = """\
In old times, when wishing still helped one, there lived a king whose daughters were all beautiful, but the
youngest was so beautiful that the sun itself, which has seen so much, was astonished whenever it shone in her
face. Close by the king's castle lay a great dark forest, and under an old lime-tree in the forest was a well,
and when the day was very warm, the king's child went out into the forest and sat down by the side of the cool
fountain, and when she was bored she took a golden ball, and threw it up on high and caught it, and this ball
was her favourite plaything. It's 1812, they'll say: 3 wishes, 12 brothers, 1001 nights: "we've seen it"!
"""

LANGUAGES = [
    "The quick brown fox jumps over the lazy dog.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを、我が世 誰ぞ 常ならむ。",
    "我能吞下玻璃而不伤身体。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "This is 🦙.cpp, 👩‍👩‍👧‍👦 and e\u0301, \u00bd, \u2167, 2¹⁰ = 1024.",
    "\tdef f(x):\n\t\treturn  x ** 2    # four   spaces\r\n\r\n",
    "   leading,   inner and trailing   ",
    "<s> and </s>, <0x0A>, <unk>, <|im_start|>user",
]


@functools.cache
def sentencepiece_model(model_type: str = "bpe", byte_fallback: bool = True) -> bytes:
    """A tokenizer.model made the way LLaMA's was, but of 400 pieces; it takes sentencepiece to train one."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type=model_type,
        vocab_size=400 if byte_fallback else 120,
        byte_fallback=byte_fallback,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def bpe(pre: str = "gpt-2") -> Vocabulary:
    """A byte-level BPE of 400 pieces: two control pieces, a user-defined one, all bytes, merges."""
    words = Counter(tuple(map(_printable, word.encode())) for word in _words(TEXT, "gpt-2"))
    special = ["<|endoftext|>", "<|im_start|>", "<br>"]
    pieces, merges = special + sorted(map(_printable, range(256))), []
    while len(pieces) < 400:
        pairs = Counter()
        for word, count in words.items():
            pairs.update({pair: count * n for pair, n in Counter(itertools.pairwise(word)).items()})
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(" ".join(best))
        pieces.append("".join(best))
        words = Counter({tuple(_merge(list(word), best)): count for word, count in words.items()})
    return Vocabulary(
        "bpe",
        pieces=tuple(pieces),
        types=(3, 3, 4) + (1,) * (len(pieces) - 3),
        merges=tuple(merges),
        **words_of(pre),
        bos_id=0,
        eos_id=0,
        unk_id=None,
        add_bos=False,
        add_space_prefix=False,
    )


def bpe_by_hand(vocabulary: Vocabulary, text: str) -> list[int]:
    """Byte-level BPE as the paper has it: in each word merge the pair that is listed first, and again."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(vocabulary.merges)}
    token_ids = {piece: token_id for token_id, piece in enumerate(vocabulary.pieces)}
    ids = []
    for word in _words(text, vocabulary.pre):
        symbols = [_printable(byte) for byte in word.encode()]
        if vocabulary.pre == "llama-bpe" and "".join(symbols) in token_ids:
            symbols = ["".join(symbols)]
        while True:
            pairs = [pair for pair in itertools.pairwise(symbols) if pair in ranks]
            if not pairs:
                break
            symbols = _merge(symbols, min(pairs, key=ranks.get))
        ids += [token_ids[symbol] for symbol in symbols]
    return ids


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] = "".join(pair)
            merged.append(None)  # a merged symbol isn't merged again in the same round
        else:
            merged.append(symbol)
    return [symbol for symbol in merged if symbol is not None]


def _printable(byte: int) -> str:
    """GPT-2's character for a byte: itself if it is printable, otherwise the next one free from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return chr(byte) if byte in printable else chr(256 + sum(other not in printable for other in range(byte)))


def _words(text: str, pre: str) -> list[str]:
    """Cut text by a pre-tokenizer's rule, in terms of Python's own re."""
    letter, number = _class(text, "L"), _class(text, "N")
    other = f"(?:(?!{letter}|{number})\\S)"
    gpt2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{number}+| ?{other}+|\s+(?!\S)|\s+"
    if pre == "gpt-2":
        return re.findall(gpt2, text)
    if pre == "smollm":
        return [word for run in re.split(f"({number})", text) for word in re.findall(gpt2, run)]
    before = rf"(?:(?!{letter}|{number}|[\r\n])(?s:.))"
    llama = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{before}?{letter}+|{number}{{1,3}}| ?{other}+[\r\n]*"
    return re.findall(llama + r"|\s*[\r\n]+|\s+(?!\S)|\s+", text)


def _class(text: str, category: str) -> str:
    """A regular expression for those characters of a text that are of a Unicode category."""
    chars = sorted(char for char in set(text) if unicodedata.category(char)[0] == category)
    return f"(?:[{''.join(map(re.escape, chars))}])" if chars else "(?:(?!))"


# --- tokenizers, from end to end ------------------------------------------------------------------

#: What tokenizer.json files of models have as their pre_tokenizer, by the names that llama.cpp gives them:
#: "digits" by themselves, a regular expression, or "gpt-2", the one that is built into ByteLevel.
_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PUBLISHED = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"],  # llama.cpp's alone
    "gpt-2": ["gpt-2"],
    "smollm": ["digits", "gpt-2"],
    "llama-bpe": [_LLAMA % r"\p{N}{1,3}"],
    "smaug-bpe": [_LLAMA % r"\p{N}{1,3}"],
    "glm4": [_LLAMA % r"\p{N}{1,3}"],
    "minicpm5": [r"\p{N}{1,3}", _LLAMA % r"\p{N}+"],
    "qwen2": [_LLAMA % r"\p{N}"],
    "tekken": [_TEKKEN % ("", "", r"\p{N}")],
    "gpt-4o": [_TEKKEN % (*["(?i:'s|'t|'re|'ve|'m|'ll|'d)?"] * 2, r"\p{N}{1,3}")],
    "deepseek-llm": [
        "[\r\n]",
        RULES["deepseek-llm"].words[1],  # its letters are 200 ranges
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        "digits",
    ],
    "deepseek-coder": [
        "[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        "digits",
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
    "seed-coder": [
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}"
        "| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ],
}


def published_rule(pre: str) -> pre_tokenizers.PreTokenizer:
    """A rule as tokenizer.json files have it."""
    steps = []
    for words in PUBLISHED[pre]:
        if words == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif words != "gpt-2":
            steps.append(pre_tokenizers.Split(tokenizers.Regex(_onigurumas(words)), "isolated"))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=PUBLISHED[pre][-1] == "gpt-2")
    return pre_tokenizers.Sequence([*steps, last])


def _onigurumas(words: str) -> str:
    r"""With characters in place of Python's \u1234 and \U00012345."""
    escaped = r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})"
    return re.sub(escaped, lambda match: chr(int(match[1] or match[2], 16)), words)


def hugging_faces(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The package tokenizers, made from a vocabulary: it cuts text into words by the published rules."""
    ids = {piece: token_id for token_id, piece in enumerate(vocabulary.pieces)}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, ignore_merges=vocabulary.ignore_merges))
    made.pre_tokenizer = published_rule(vocabulary.pre)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made
