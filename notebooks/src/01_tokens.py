# %% [markdown]
# # 01 Tokens: what a language model reads
#
# To the small model *Lily* is one token and *strawberries* are six. A LLaMA sees neither letters nor words,
# only numbers below `vocab_size`. Who decides where a word is cut, and why does it matter?
#
# Before this: [00 the map](00_map.ipynb). After it: [02 the checkpoint](02_checkpoint.ipynb). Papers: [BPE
# for text](https://arxiv.org/abs/1508.07909), [SentencePiece](https://arxiv.org/abs/1808.06226).

# %%
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex

import tinyllama
from tinyllama import ops
from tinyllama.formats.pre_tokenizers import GPT2
from tinyllama.lab import plots
from tinyllama.lab.lessons import check
from tinyllama.tokenizer import Vocabulary, make_tokenizer

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
tokenizer = llama.tokenizer
llama

# %% [markdown]
# ## The question
#
# Here is a sentence as the model gets it. Each box is a token, the number below it is its **id**: the row of
# the embedding matrix that [03](03_rmsnorm.ipynb) looks up. A "▁" is a space, and it belongs to the word that
# follows.

# %%
TEXT = "Lily wanted strawberries."
ids = tokenizer.encode(TEXT)
pieces = [tokenizer.piece(token) for token in ids]

plots.tokens({"": pieces}, [ids], TEXT)

# %% [markdown]
# Frequent words are one token, rare ones fall into pieces, and nothing is ever unknown. The first token,
# where there is one that isn't in the text, is `bos`: it says that a text begins here.
#
# One idea from 1994 does this: [**byte-pair encoding**](https://en.wikipedia.org/wiki/Byte-pair_encoding).

# %% [markdown]
# ## Learning: count pairs, merge the most frequent
#
# Start with single characters. Find the pair of neighbours that occurs most often, write it as one new piece,
# and repeat. That is all. We learn from the stories that ship with tinyllama, cut into words first, since no
# piece may cross a space. The rule for that is a regular expression,
# [GPT-2](https://github.com/openai/gpt-2)'s.

# %%
stories = Path("../data/held_out.txt").read_text(encoding="utf-8")[:60_000]
words = Counter(regex.findall(GPT2, stories))
words.most_common(5)

# %% [markdown]
# A space belongs to the word behind it. GPT-2 writes any byte as a character that prints, the space as "Ġ".
# So this is how each word is spelled at first:

# %%
char_of = {byte: chr(byte) for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")}
hidden = [byte for byte in range(256) if byte not in char_of]
char_of |= {byte: chr(0x100 + number) for number, byte in enumerate(hidden)}

spelling = {word: [char_of[byte] for byte in word.encode()] for word in words}
spelling[" the"], len(char_of)


# %%
def count_pairs():
    """How often each pair of neighbours occurs in the text."""
    pairs = Counter()
    for word, symbols in spelling.items():
        for pair in pairwise(symbols):
            pairs[pair] += words[word]
    return pairs


count_pairs().most_common(5)


# %%
def merge(symbols, left, right):
    """The same word, with every `left` before a `right` joined to it."""
    joined = []
    for symbol in symbols:
        if joined and joined[-1] == left and symbol == right:
            joined[-1] += right
        else:
            joined.append(symbol)
    return joined


merge(list("Ġmeet"), "e", "t")

# %% [markdown]
# Now the loop. The longer it runs, the fewer tokens the text takes: after 300 merges, less than half as many
# as it has characters. LLaMA's vocabulary holds 29,612 merged pieces, the small model's 1,215; the rest are
# single characters, bytes and marks like `bos`.

# %%
merges, lengths = [], []
for _ in range(300):
    pairs = count_pairs()
    best = max(pairs, key=lambda pair: (pairs[pair], pair))
    spelling = {word: merge(symbols, *best) for word, symbols in spelling.items()}
    merges.append(best)
    lengths.append(sum(words[word] * len(symbols) for word, symbols in spelling.items()))

print(" ".join(left + right for left, right in merges[:16]), "...", merges[-1][0] + merges[-1][1])
plots.lines({"tokens": lengths}, "merges", "tokens of the text", "the text gets shorter with every merge")

# %% [markdown]
# Beginnings and little words come first, then whole words of the stories. Nobody told the algorithm what a
# word is; it found out which letters keep company.

# %% [markdown]
# ## Using it: the best pair first
#
# To cut a new word, start with characters again and merge while any pair is in the vocabulary. Which one
# first matters. Byte-level BPE takes the pair that was learnt earliest; SentencePiece gives every piece a
# score, and the highest wins. For a piece learnt as number $n$ that score is $-n$: the same thing.

# %%
vocabulary = tokenizer.vocabulary
if vocabulary.kind == "sentencepiece":
    scores = dict(zip(vocabulary.pieces, vocabulary.scores, strict=True))
else:
    scores = {merge.replace(" ", ""): -number for number, merge in enumerate(vocabulary.merges)}


def cut(word):
    """Every stage of a word on its way from characters to tokens."""
    stages = [list(word)]
    while True:
        pairs = [left + right for left, right in pairwise(stages[-1])]
        best = max((pair for pair in pairs if pair in scores), key=scores.get, default=None)
        if best is None:
            return stages
        at = pairs.index(best)
        stages.append([*stages[-1][:at], best, *stages[-1][at + 2 :]])


# %%
SPACE = "▁" if vocabulary.kind == "sentencepiece" else "Ġ"
stages = cut(SPACE + "strawberries")
plots.tokens({f"after {n}": stage for n, stage in enumerate(stages)}, title="strawberries, merge by merge")

# %% [markdown]
# Read it from the top: each row has one box fewer. It ends where no two neighbours are a piece together.
#
# Is this what tinyllama does? It has a `merge`, too, in [tokenizer.py](../tinyllama/tokenizer.py). That takes
# a `rank` for each pair, the lowest first, and keeps the pairs in a
# [heap](https://docs.python.org/3/library/heapq.html), so that it needn't look at all of them again.


# %%
def rank(left, right):
    """The lowest is merged first; None: the two aren't a piece together."""
    return -scores[left + right] if left + right in scores else None


assert tinyllama.tokenizer.merge(SPACE + "strawberries", rank) == stages[-1]

# %% [markdown]
# And a whole sentence, down to the ids:

# %%
SENTENCE = " There was a strange garden behind the house of the old farmer."
number = {piece: token for token, piece in enumerate(vocabulary.pieces)}
spelled = [SPACE + word for word in re.findall(r"\w+|\.", SENTENCE)]
spelled[-1] = "."  # no space before it

mine = [number[piece] for word in spelled for piece in cut(word)[-1]]
real = tokenizer.encode(SENTENCE.removeprefix(tokenizer.prefix.decode()), bos=False)
assert mine == real
len(SENTENCE), len(mine)

# %% [markdown]
# ## The space in front
#
# Because the space belongs to the word behind it, *dog* after a space and *dog* inside *hotdog* are different
# tokens. LLaMA's tokenizer therefore puts a space before every text, so that a first word is the word it is
# elsewhere. Byte-level tokenizers don't.

# %%
rows = {text: tokenizer.encode(text, bos=False) for text in ("dog", "the dog", "hotdog")}
plots.tokens(
    {text: [tokenizer.piece(token) for token in ids] for text, ids in rows.items()}, list(rows.values())
)

# %% [markdown]
# It also explains an old trap: **don't end a prompt with a space**. The model has learnt that a space comes
# with its word. A space alone says that the next word is one that is *not* a piece with its space.

# %%
shown = []
for prompt in ("Once upon a", "Once upon a "):
    probs = ops.softmax(llama.logits(prompt)[-1])
    top = np.argsort(-probs)[:3]
    shown += [(f"“{prompt}” {tokenizer.piece(int(token))}", probs[token]) for token in top]

names, values = zip(*shown, strict=True)
plots.bars(values, names, "what comes next, without and with a space at the end")

# %% [markdown]
# ## Bytes: nothing is unknown
#
# No vocabulary holds every character. What has no piece is written in the bytes of its UTF-8: LLaMA has 256
# pieces for them, ids 3 to 258 (**byte fallback**). A llama takes four. Byte-level BPE starts from bytes in
# the first place.

# %%
llama_ids = tokenizer.encode("🦙", bos=False)
rows = {"🦙".encode().hex(" "): [tokenizer.piece(token) for token in llama_ids]}
assert tokenizer.decode_bytes(llama_ids) == "🦙".encode()
plots.tokens(rows, [llama_ids], "UTF-8 bytes of a llama, and its tokens")

# %% [markdown]
# That is why a text that is being written arrives in whole characters, not in tokens: `TextStream` in
# [tokenizer.py](../tinyllama/tokenizer.py) waits for the last byte of a character.

# %% [markdown]
# ## What costs more
#
# A model works, and forgets, by the token. Text like that of its training is cheap: its words were merged
# whole. A rare word was never counted often enough to earn merges of its own, so it is paid for in pieces.
# Numbers are dear because [LLaMA](https://arxiv.org/abs/2302.13971) (section 2.1) splits them into digits, so
# that a 7 is the same token in every number.

# %%
samples = {
    "a story": "Once upon a time there was a little girl who had a cat.",
    "rare words": "Photosynthesis oxidizes chlorophyll's electron donors.",
    "numbers": "3.14159265358979 and 2.71828182845905",
    "German": "Über den Wolken muß die Freiheit grenzenlos sein.",
    "Python": "for i in range(10): print(i ** 2)",
    "Japanese": "吾輩は猫である。名前はまだ無い。",
}
per_token = [len(text.encode()) / len(tokenizer.encode(text, bos=False)) for text in samples.values()]
plots.bars(per_token, list(samples), "the longer the bar, the cheaper the text", "bytes a token")


# %% [markdown]
# ## The two kinds side by side
#
# The merges that we learnt above *are* a byte-level tokenizer. Together with the 256 bytes that it starts
# from, and the rule by which GPT-2 cuts words, `make_tokenizer` takes them like those of a model file.


# %%
def as_tokenizer(merges):
    """The byte-level tokenizer of a list of pairs (left, right)."""
    learnt = [*sorted(char_of.values()), *dict.fromkeys(left + right for left, right in merges)]
    return make_tokenizer(
        Vocabulary(
            kind="bpe",
            pieces=tuple(learnt),
            types=(1,) * len(learnt),  # all normal: none is bos, none is a byte in disguise
            merges=tuple(f"{left} {right}" for left, right in merges),
            words=(GPT2,),
            add_space_prefix=False,
            **dict.fromkeys(["bos_id", "eos_id", "unk_id"]),
        )
    )


ours = as_tokenizer(merges)
assert [ours.vocabulary.pieces[token] for token in ours.encode(" little")] == spelling[" little"]
ours.vocab_size

# %%
rows = {MODEL: tokenizer, "ours": ours}
rows = {name: (one, one.encode("The cat saw a 🦙.", bos=False)) for name, one in rows.items()}
plots.tokens(
    {name: [one.piece(token) for token in ids] for name, (one, ids) in rows.items()},
    [ids for _, ids in rows.values()],
    f"{tokenizer.vocab_size} pieces, and our {ours.vocab_size}",
)

# %% [markdown]
# [SmolLM2](https://arxiv.org/abs/2502.02737) and [Llama 3](https://arxiv.org/abs/2407.21783) use this kind,
# with 49,152 and 128,256 pieces; the first two LLaMAs use SentencePiece. Which words our tokenizer knows by
# heart tells what it was trained on.

# %% [markdown]
# ## At 7B
#
# A larger vocabulary means shorter texts but larger matrices at both ends of the model. LLaMA's 32,000 pieces
# take this share of its weights:

# %%
big = tinyllama.config.PRESETS["7B"]
at_both_ends = 2 * big.vocab_size * big.dim
print(f"{at_both_ends:,} weights, {at_both_ends / big.n_params():.1%} of all")
print(f"a context of {big.max_seq_len} tokens: about {big.max_seq_len * 3 // 4:,} English words")

# %% [markdown]
# (Three words to four tokens is the usual rule for English; count your own text with `tinyllama inspect
# --tokens`.)

# %% [markdown]
# ## Exercises
#
# **1.** Which ids does a giraffe have, without the space in front? Find them from its UTF-8 bytes without
# calling `encode`: `tokenizer.token_bytes(id)` says which bytes an id stands for.

# %% tags=["exercise"]
giraffe = ...  # a list of ids for "🦒"

check(
    giraffe,
    expected=[token for token in tokenizer.encode("🦒", bos=False) if tokenizer.piece(token) != " "],
    axes="n_tokens",
    mistakes={"These are the bytes; which tokens stand for them?": list("🦒".encode())},
    hint="Is a token there that stands for several of the bytes?",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# The longest token that fits comes first, in case that two bytes are a piece together.
#
# ```python
# left, giraffe = "🦒".encode(), []
# spelled_by = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
# while left:
#     size = max(n for n in range(1, len(left) + 1) if left[:n] in spelled_by)
#     giraffe.append(spelled_by[left[:size]])
#     left = left[size:]
# ```
#
# </details>

# %% [markdown]
# **2.** How many tokens would *princess*, after a space, take if we had stopped after 100 merges? Work it out
# with `merge` and `merges`.

# %% tags=["exercise"]
after_100 = ...  # a number

check(
    after_100,
    expected=len(as_tokenizer(merges[:100]).encode(" princess")),
    mistakes={
        "That is with all merges; take the first 100.": len(ours.encode(" princess")),
        "The space counts, too: spell it Ġ.": len(as_tokenizer(merges[:100]).encode("princess")),
    },
    hint="Start with the characters of Ġprincess and let the merges act in the order they were learnt in.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# symbols = list("Ġprincess")
# for left, right in merges[:100]:
#     symbols = merge(symbols, left, right)
# after_100 = len(symbols)
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Why not letters, or words?* Letters make texts four times longer, and attention's work grows with the
#   square of that; words would need millions of rows and still miss new ones.
# - *Who makes the vocabulary?* Whoever trains the model, once, from its training text. Afterwards weights and
#   vocabulary belong together.
# - *Why can't it count the r in strawberry?* It never saw the letters: look at the first picture.
# - *Where does the vocabulary lie?* In `tokenizer.model` or inside the GGUF file: [02](02_checkpoint.ipynb)
#   and [11](11_conversion.ipynb).
# - *What does the model do with an id?* It looks up a row: [03 RMSNorm](03_rmsnorm.ipynb).
