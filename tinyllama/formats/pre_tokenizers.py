r"""Rules that cut text into words for byte-level BPE, by the names that llama.cpp gives them.

A rule is one regular expression or several: the first one's matches, and what lies between them, are each cut
by the next. They are those of the models' own tokenizer.json. llama.cpp's engine follows them but for
DeepSeek's: it keeps the digits of a number together and cuts odd spaces at other places. Here text is cut as
for the model's training.

`\p{L}` is a letter, `\p{N}` a number, `\p{M}` an accent, `\p{P}` a punctuation mark, `\p{S}` a symbol.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import require

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    rf"|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
)
# What DeepSeek LLM takes for a letter: those of a case, but not all that Unicode has had since.
_DEEPSEEK_LETTERS = (
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-"
    r"ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃ"
    r"ↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ\U00010400-\U0001044f\U000104b0-\U000104d3"
    r"\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    r"\U0001e900-\U0001e943"
)
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3 = (
    "[!\"#$%&'()"
    r"*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
)


@dataclass(frozen=True)
class Rule:
    """How byte-level BPE cuts text, and what llama.cpp makes of a file that says no more than its name."""

    words: tuple[str, ...]  # regular expressions, one applied after the other
    ignore_merges: bool = False  # a word that is a piece is taken as it is
    add_bos: bool = False  # bos comes before a prompt, unless the file says otherwise
    aliases: str = ""  # other names of the same rule
    published: tuple[str, ...] = ()  # the same as tokenizer.json files have it, where that is slower


RULES = {
    "gpt-2": Rule(
        (GPT2,), aliases="phi-2 gigachat mellum modern-bert exaone4 a.x-4.0 olmo mpt jais trillion"
    ),
    "smollm": Rule(
        (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",),
        aliases="starcoder refact command-r codeshell exaone minerva-7b mellum2",
        published=(r"\p{N}", GPT2),
    ),
    "llama-bpe": Rule(
        (_LLAMA3 % r"\p{N}{1,3}",),
        ignore_merges=True,
        add_bos=True,
        aliases="llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    "smaug-bpe": Rule((_LLAMA3 % r"\p{N}{1,3}",), aliases="dbrx chatglm-bpe"),
    "glm4": Rule((_LLAMA3 % r"\p{N}{1,3}",), ignore_merges=True, aliases="glm5"),
    "minicpm5": Rule((r"\p{N}{1,3}", _LLAMA3 % r"\p{N}+"), ignore_merges=True),
    "qwen2": Rule(
        (_LLAMA3 % r"\p{N}",),
        aliases="deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    ),
    "tekken": Rule((_CASED % ("", "", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "gpt-4o": Rule(
        (_CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?", r"\p{N}{1,3}"),),
        aliases="llama4 kanana2 talkie minimax-m2",
    ),
    "deepseek-llm": Rule(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CJK,
            r"\p{N}",
        )
    ),
    "deepseek-coder": Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3": Rule(
        (r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3),
        aliases="hunyuan-dense joyai-llm hy_v4",
    ),
    "seed-coder": Rule(
        (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",)
    ),
    "default": Rule((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
_NAMES = {alias: name for name, rule in RULES.items() for alias in (name, *rule.aliases.split())}


def rule_of(pre: str) -> Rule:
    """The rule of a name or alias; of "" llama.cpp's default. Raises TinyllamaError for an unknown one."""
    require(not pre or pre in _NAMES, f"the pre-tokenizer {pre!r} isn't supported, only {', '.join(RULES)}")
    return RULES[_NAMES[pre or "default"]]


def words_of(pre: str) -> dict:
    """The fields of a Vocabulary that say how text is cut: `pre`, `words`, `ignore_merges`."""
    rule = rule_of(pre)
    return {"pre": pre, "words": rule.words, "ignore_merges": rule.ignore_merges}


def name_of(words: Iterable[str], ignore_merges: bool) -> str:
    """The name of the rule of these regular expressions, however their characters are escaped; "" of none."""
    same = tuple(map(_unescaped, words))
    fitting = [n for n, rule in RULES.items() if same == tuple(map(_unescaped, rule.published or rule.words))]
    return next((name for name in fitting if RULES[name].ignore_merges == ignore_merges), "")


def _unescaped(words: str) -> str:
    r"""With characters in place of \n, \r, \u1234 and \U00012345."""
    found = r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|([nr]))"
    return re.sub(found, lambda m: {"n": "\n", "r": "\r"}.get(m[3]) or chr(int(m[1] or m[2], 16)), words)
