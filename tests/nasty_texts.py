"""Texts that tokenizers stumble over, in families: all that two tokenizers must agree about."""

LANGUAGES = [
    "The quick brown fox jumps over the lazy dog.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. ÄÖÜẞ ÉCOLE École ÉcoleÀlui McDonald iPhone",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis. L'ÉTÉ N'EST",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. МОСКВА Москва мОСКВА",
    "いろはにほへと ちりぬるを、我が世 誰ぞ 常ならむ。カタカナ ﾊﾝｶｸ 「引用」",
    "我能吞下玻璃而不伤身体。我想在apple工作1314151天～ 龥鿿㐀𠀀",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ١٢٣٤ مُحَمَّد",
    "דג סקרן שט בים מאוכזב שָׁלוֹם \u202babc\u202c \u200fדג\u200e",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश १२३ क्षत्रिय",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "Γαζέες καὶ μυρτιὲς δὲν θὰ βρῶ πιὰ στὸ χρυσαφὶ ξέφωτο ΣΊΣΥΦΟΣ",
    "កាន់តែពិសេសអាច नमस्ते 你好 γεια ԲԱՐԵՎ ქართული ᲥᲐᲠᲗᲣᲚᲘ ᏣᎳᎩ ꮳꮃꭹ 𐐀𐐨 𞤀𞤢",
]

SIGNS = [
    "It's 1812: they'll say \"we've\", I'd, I'm, you're, can't; IT'S THEY'LL WE'VE I'D I'M YOU'RE CAN'T",
    "'s 't 're 've 'm 'll 'd 'S 'Ll 'ſ ’s ''s x''t 'x '1 'really 'dog 'tis",
    "3 33 333 3333 33333 333333 3333333 33333333 333333333",
    "3.3 3..3 3...3 1,000,000.50 -5 +7 1e-5 0x1F 2¹⁰ ½ Ⅷ ٣٤٥ ৪৫৬ ①②",
    "a1b22c333d4444e 12ab 34cd5 x² H₂O 3rd 2nd 1st №5 §4 100% $5.00 €10 £3 ¥7 50°C",
    "!!!!!! ?!?! ... …… --- ___ *** === <<>> (([{}])) /* */ // # @user #tag a/b\\c ~`^|&",
    "def f(x):\n\treturn {'a': [1, 2], \"b\": x ** 2 != 3 and x >= -1}  # four   spaces\n\n\n    pass",
    "<div class=\"x\">&nbsp;</div>\n```python\nprint('hi')\n```\n| a | b |\n|---|---|\n\\frac{1}{2}$$x_i$$",
    "https://example.org/a-b_c?d=e&f=%20#g me@example.com C:\\Users\\x",
    "«quotes» „low“ ‚single‘ ‹a› 「corner」 （full）！？：；，。、～ ‐‑‒–—― · • ‣ © ® ™ † ‡ ¶ ≠≤≥±×÷∑√∞ →⇒",
    "$+<=>^~|` $a+b<c=d>e^f~g|h`i $$ ++ << == >> ^^ ~~ || ``",
]

SPACES = [
    "   leading,   inner and trailing   ",
    "\tdef f(x):\n\t\treturn  x\r\n\r\n",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
    "a\nb\n\nc\n\n\nd \ne\n f\r\ng\rh\r\n\r\ni",
    "a b  c   d    e     f      g       h        i" + " " * 40 + "j" + " " * 100,
    "x" + " " * 300 + "y\n" + "\n" * 70 + "\t" * 70 + "z",
    "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g\u1680h\u202fi\u205fj",
    "a\u200bb\u200cc\u200dd\ufeffe\u2060f\u00adg\u180eh",
    "\u00a0 \u00a0\u3000 \u3000\n\u2028\u2028x \u00a0y",
    "a\vb\fc\x1cd\x1ee\x1ff",
    " \n",
    "\n ",
    "  \n  x",
    "\r",
    "\n\n\n\n\n",
    " ",
    "  ",
    "   ",
    "\t",
    "",
]

CHARACTERS = [
    "🦙 🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅ 🦙🦙 👩‍👩‍👧‍👦 👍🏽 🇫🇷🇩🇪 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣",
    "e\u0301 o\u0308 n\u0303o a\u0300\u0301\u0302b E\u0301 \u0301x \u0301",
    "Z\u0351\u036b\u0343a\u0357l\u034dg\u0321o",
    "ﬁ ﬃ ſ ß ẞ İ ı ǅ ªº Å\u212b Ω\u2126 K\u212a 한 \u1112\u1161\u11ab ｆｕｌｌ ℌ𝔣𝓼𝕕 Ⓐ",
    "\x00 \x01\x02\x07\x08\x0b\x0e\x1b[31m\x7f\x80\x9f",
    "\ufffd \ufffe \uffff \U0010ffff \ue000 \U000f0000 \u0378",
    "<s> </s> <unk> <0x0A> <0xZZ> <|im_start|> <|im_end|> <|endoftext|> <|eot_id|>",
    "[INST] [/INST] <<SYS>> [PAD5]",
    "Ġhello Ċ Ã© âĢĻ ĊĊ Ġ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "camelCaseAndPascalCase snake_case_name SCREAMING_CASE kebab-case XMLHttpRequest aB Ab AB ab ABc aBC",
    "我" * 80,
    "é" * 65,
    "🦙" * 33,
    "1" * 100,
    "=" * 100,
    "-x" * 50,
    "' " * 40,
    "ab" * 200,
]

TEXTS = [*LANGUAGES, *SIGNS, *SPACES, *CHARACTERS]
TEXTS += ["\n".join(TEXTS), *(f" {text}" for text in LANGUAGES[:4]), *(f"{text}\n" for text in SIGNS[:4])]
