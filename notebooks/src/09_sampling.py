# %% [markdown]
# # 09 Sampling: from logits to a word
#
# A model doesn't say a word. It says how likely each of its `vocab_size` tokens is, and somebody has to
# choose. Always the likeliest? Roll dice? Why do temperature, top-k and top-p exist, and what do they do?
#
# Before this: [08 the whole model](08_whole_model.ipynb). After it: [10 quantization](10_quantization.ipynb).
# Paper: [nucleus sampling](https://arxiv.org/abs/1904.09751).

# %%
import os

import numpy as np

import tinyllama
from tinyllama import ops, sampling
from tinyllama.lab import plots
from tinyllama.lab.lessons import check
from tinyllama.lab.widgets.session import PROMPTS
from tinyllama.settings import Settings

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
tokenizer = llama.tokenizer
llama

# %% [markdown]
# ## The question
#
# One number for each token: those are the **logits**, and any real number may be among them. They are all
# that a model gives. Here are the eight largest:

# %%
PROMPT = "The king said to the"
logits = llama.logits(PROMPT)[-1]  # [vocab_size]
order = np.argsort(-logits)  # ids, the likeliest first
names = [tokenizer.piece(int(token)) for token in order]

plots.bars(logits[order[:8]], names[:8], PROMPT + " …", "logit")

# %% [markdown]
# Softmax makes them a distribution: $p_i = e^{l_i} / \sum_j e^{l_j}$, with $l$ for `logits` and $p$ for
# `probs`. A logit that is larger by 1 means 2.7 times the probability.

# %%
probs = np.exp(logits - logits.max())
probs = probs / probs.sum()

assert np.allclose(probs, ops.softmax(logits), atol=1e-6)
plots.lines(
    {"probability": probs[order]},
    "rank of the token",
    "probability",
    "a few are likely, the tail is long",
    yscale="log",
)

# %% [markdown]
# ## Always the likeliest
#
# **Greedy** decoding takes the top bar every time. It is simple, repeatable, and on small models soon goes in
# circles: what stands in the text makes itself likelier.

# %%
print(PROMPT + llama.generate(PROMPT, n_predict=48, temp=0, repeat_penalty=1))

# %% [markdown]
# ## Rolling dice
#
# The opposite: draw each token with its own probability. Line the bars up between 0 and 1, throw a random
# number, and take the token it lands on. It is one line:

# %%
rng = np.random.default_rng(seed=1)
drawn = int(order[np.searchsorted(np.cumsum(probs[order]), rng.random())])
tokenizer.piece(drawn)

# %% [markdown]
# Do that a thousand times and the distribution comes back:

# %%
throws = order[np.searchsorted(np.cumsum(probs[order]), rng.random(1000))]
counted = [np.mean(throws == token) for token in order[:8]]

assert np.allclose(counted, probs[order[:8]], atol=0.06)  # a thousand throws are off by 0.016 or so
plots.bars(counted, names[:8], "share of 1000 throws")

# %% [markdown]
# The trouble is the tail. Each of its tokens is absurd and rare, but together they are drawn often. Over a
# text of a hundred tokens, one of the absurd ones is nearly certain, and the model goes on from there.

# %%
tail = 1 - np.cumsum(probs[order])[[0, 9, 39, 99]]
for n_first, rest in zip((1, 10, 40, 100), tail, strict=True):
    print(f"outside the {n_first:3} likeliest: {rest:.0%}, within 100 tokens {1 - (1 - rest) ** 100:.0%}")

# %% [markdown]
# ## Temperature
#
# $$p = \mathrm{softmax}(l / T)$$
#
# Dividing by a $T$ (`temp`) below 1 stretches the distances between logits: the likely get likelier. Above 1
# the bars become alike. At 0 only the top is left, which is greedy.

# %%
temps = {temp: ops.softmax(sampling.temperature(logits, temp)) for temp in (0.5, 0.8, 1.0, 1.5)}
for temp, at_temp in temps.items():
    assert np.allclose(at_temp, ops.softmax(logits / temp), atol=1e-6)

plots.lines(
    {f"temp {temp}": at_temp[order[:12]] for temp, at_temp in temps.items()},
    "",
    "probability",
    "one distribution at four temperatures",
    xticks=names[:12],
    yscale="log",
)

# %% [markdown]
# ## Top-k
#
# Keep the `k` likeliest tokens, forget the rest, and scale what is left to a sum of 1. It cuts the tail off
# ([Fan et al.](https://arxiv.org/abs/1805.04833)). But `k` is the same number everywhere, and sentences
# aren't:

# %%
prompts = [PROMPT, "Once upon a", "She opened the box and found a"]
ranked = {prompt: np.sort(ops.softmax(llama.logits(prompt)[-1]))[::-1] for prompt in prompts}
plots.lines(
    {prompt: np.cumsum(p[:40]) for prompt, p in ranked.items()},
    "the likeliest so many tokens",
    "their probability together",
    "how many tokens are reasonable depends on the sentence",
    x=np.arange(1, 41),
)

# %% [markdown]
# After "Once upon a" one token is right; 39 more let nonsense in. Where anything may follow, 40 are too few.
#
# ## Top-p
#
# So keep as many as it takes to reach a **probability** `p` together: few where the model is sure, many
# where it isn't. This is nucleus sampling.

# %%
for prompt, p in ranked.items():
    n_kept = int(np.argmax(np.cumsum(p) >= 0.9)) + 1
    assert abs(n_kept - sampling.top_p(p, 0.9)) <= 1  # float32 sums may differ in the last digit
    print(f"{n_kept:4} tokens make up 90% after “{prompt}”")

# %% [markdown]
# ## All stages on one page
#
# The order in llama.cpp of March 2023, and here: repetition penalty, temperature, top-k, top-p, draw. With
# `stages=True` a text remembers what each stage left of its tokens. This is the first token's record:

# %%
OPEN = "She opened the box and found a"
text = llama.generate(OPEN, n_predict=1, seed=1, temp=0.8, top_k=40, top_p=0.8, stages=True)
stages = text.tokens[0].stages

left = {stage.name: dict(zip(stage.kept.tolist(), stage.probs, strict=True)) for stage in stages}
ranked = list(left["logits"])  # ids, the likeliest first
plots.lines(
    {name: [kept.get(token, np.nan) for token in ranked] for name, kept in left.items()},
    "rank of the token",
    "probability",
    "what each stage makes of the same distribution",
    yscale="log",
)

# %% [markdown]
# Temperature tilts the line; top-k and top-p end it early, and what they leave moves up, since it must sum
# to 1 again.

# %%
for stage in stages:
    print(f"{stage.name:8} keeps {stage.n_kept:5} tokens, removes {stage.n_removed}")

# %% [markdown]
# By hand, all of it is a few lines. `top_k` and `top_p` sort, so the random number meets the same bars in the
# same order: the same seed gives the same token.

# %%
open_logits = llama.logits(OPEN)[-1]
kept = np.argsort(-open_logits)[:40]
p = ops.softmax(open_logits[kept] / np.float32(0.8))
p = p[: np.searchsorted(np.cumsum(p), 0.8) + 1]
thrown = np.random.default_rng(1).random() * p.sum()
mine = int(kept[np.searchsorted(np.cumsum(p), thrown)])

settings = Settings(temp=0.8, top_k=40, top_p=0.8)
assert mine == sampling.sample(open_logits, settings, recent=[], rng=np.random.default_rng(1))
tokenizer.piece(mine)

# %% [markdown]
# ## Repetition penalty
#
# Whatever stood in the last `repeat_last_n` tokens gets a smaller logit: divided by the penalty if it is
# positive, multiplied if it is negative ([CTRL](https://arxiv.org/abs/1909.05858)). It breaks circles. It
# also punishes "the", so small doses: 1.1 to 1.3.

# %%
recent = llama.tokens(PROMPT)
penalized = logits.copy()
for token in set(recent):
    penalized[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3

assert np.allclose(penalized, sampling.repetition_penalty(logits, recent, 1.3))
shown = [*order[:8], *(token for token in dict.fromkeys(recent) if token not in order[:8])]
plots.lines(
    {"before": probs[shown], "penalty 1.3": ops.softmax(penalized)[shown]},
    "the eight likeliest tokens, and those of the prompt",
    "probability",
    "what the penalty does to one distribution",
    xticks=[tokenizer.piece(int(token)) for token in shown],
    yscale="log",
)

# %% [markdown]
# In the small model *king*, which the prompt has already, falls behind *prince*; what it loses goes to all
# others in proportion. (A logit near 0, like that of *the*, hardly changes: the rule isn't a fair one.)
# Compare this text with the greedy one above: the same model, no dice, only the penalty.

# %%
print(PROMPT + llama.generate(PROMPT, n_predict=48, temp=0, repeat_penalty=1.3))

# %% [markdown]
# ## Seeds
#
# The dice are a sequence of numbers that follows from the **seed**. So a text can be written again, on any
# number of threads. A text knows its seed and all its settings: `tinyllama.generate(**text.settings)` writes
# it again.

# %%
once = llama.generate(PROMPT, n_predict=16, seed=7)
again = llama.generate(PROMPT, n_predict=16, seed=once.seed)
other = llama.generate(PROMPT, n_predict=16, seed=8)

assert once == again
print(PROMPT + once, PROMPT + other, sep="\n\n")

# %% [markdown]
# ## The prompts of 2023
#
# When LLaMA first ran on a MacBook, [one article](https://til.simonwillison.net/llms/llama-7b-m2) tried it
# with these four. Your 7B answers them; the small model has only ever read stories, and makes one of
# everything. That, too, is sampling from what was learnt.

# %%
for prompt in PROMPTS:
    print(prompt + llama.generate(prompt, n_predict=24, seed=2, temp=0.8), end="\n\n")

# %% [markdown]
# ## At 7B
#
# The stages are the same, the vocabulary is larger. Sorting 32,000 numbers for every token would cost more
# than it seems; `top_k` therefore sorts only what it keeps. Beside reading the weights it is nothing:

# %%
big = tinyllama.config.PRESETS["7B"]
print(
    f"{4 * big.vocab_size / 1e3:.0f} kB of logits, after {big.n_params() / 2 / 1e9:.1f} GB of 4-bit weights"
)

# %% [markdown]
# ## Exercises
#
# **1.** *Surprise* is $-\log_2 p$, in bits. The mean surprise of a distribution is its **entropy**: how many
# yes-or-no questions the next token is worth. Compute it for `probs`.

# %% tags=["exercise"]
entropy = ...  # a number, in bits

expected_surprise = sum(p * tinyllama.generation.Token(0, "", p).surprise for p in probs.tolist() if p)
check(
    entropy,
    expected=expected_surprise,
    mistakes={
        "That is in nats: take the logarithm to base 2.": expected_surprise * np.log(2),
        "That is the mean over tokens; weight each by its probability.": float(np.mean(-np.log2(probs))),
    },
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# entropy = -(probs * np.log2(probs)).sum()
# ```
#
# </details>

# %% [markdown]
# **2.** *Min-p* is a younger idea: keep every token that is at least a tenth as likely as the likeliest. How
# many does it keep of `probs`? (It adapts as top-p does, but looks at the top instead of the sum.)

# %% tags=["exercise"]
n_kept = ...  # a number

check(
    n_kept,
    expected=sum(p >= max(probs.tolist()) / 10 for p in probs.tolist()),
    mistakes={"That compares with 0.1; compare with a tenth of the likeliest.": int((probs >= 0.1).sum())},
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# n_kept = int((probs >= probs.max() / 10).sum())
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Which settings are good?* For stories temp 0.8 and top-p 0.9 or so; for facts and code 0 to 0.3. Try them
#   live: [the playground](playground.ipynb).
# - *Is a model sure when its top bar is high?* Sure of the text, not of the world.
# - *What about beam search?* It looks for the likeliest whole text; people find such texts
#   [dull](https://arxiv.org/abs/1904.09751).
# - *Does the seed make two computers agree?* If both compute the same logits. A flipped last digit can tip a
#   throw that falls between two bars.
# - *Can other tokens be forbidden?* Yes, by setting their logits to minus infinity: that is how models are
#   made to write valid JSON.
