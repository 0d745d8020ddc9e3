# %% [markdown]
# # 03 RMSNorm: the residual stream, kept in bounds
#
# A token enters the model as a row of a table and leaves it as a guess at the next token. In between it is
# one vector, to which every layer adds something. What does that vector look like, and why is it normalized
# before each step?
#
# Before this: [02 the checkpoint](02_checkpoint.ipynb). After it: [04 RoPE](04_rope.ipynb). Paper: [Root Mean
# Square Layer Normalization](https://arxiv.org/abs/1910.07467).

# %%
import os

import numpy as np

import tinyllama
from tinyllama import ops
from tinyllama.lab import plots
from tinyllama.lab.lessons import check, same

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
config = llama.config
llama

# %% [markdown]
# ## The embedding is a table
#
# `tok_embeddings` has a row of `dim` numbers for each token of the vocabulary. Looking a token up is taking
# its row: no arithmetic at all.

# %%
PROMPT = "Lily had a cat named Tom. One day, Tom and"
tokens = llama.tokens(PROMPT)
pieces = [llama.tokenizer.piece(token) for token in tokens]
taps = llama.trace(PROMPT)

table = llama.weight("tok_embeddings")  # [vocab_size, dim]
x = table[tokens]  # [n_tokens, dim]
assert same(x, taps["embedding"], llama)
table.shape, x.shape

# %%
plots.matrix(x[:, :64], pieces, "dim (the first 64)", "embedding: a row for each token")

# %% [markdown]
# The two rows of *Tom* are equal: at this point a token doesn't know where it stands, nor what stands before
# it. Row by row, these numbers say nothing to us. Compared with each other they do.
#
# ## What a row knows
#
# Tokens that are used alike get rows that point the same way. The cosine of the angle between two rows tells;
# these are the nearest to some words.

# %%
directions = table / np.linalg.norm(table, axis=1, keepdims=True)


def nearest(word, n=5):
    """The n tokens whose rows point most nearly the way of a word's last token."""
    token = llama.tokenizer.encode(word, bos=False)[-1]
    others = np.argsort(-(directions @ directions[token]))
    return [llama.tokenizer.piece(int(i)).strip() for i in others if i != token][:n]


{word: nearest(word) for word in ["red", "ran", "happy", "king"]}

# %% [markdown]
# In the small model colours stand by colours and verbs by verbs. Nobody told it what a colour is: these words
# are simply followed, and preceded, by the same words.

# %% [markdown]
# ## The residual stream
#
# From here on every layer *adds*: first what [attention](05_attention.ipynb) took from other tokens, then
# what the [feed-forward network](07_swiglu.ipynb) makes of it. Nothing is ever overwritten. With $x$ for one
# token's vector:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x))$$
#
# $$x \leftarrow x + \mathrm{feedforward}(\mathrm{norm}(x))$$

# %%
stream = [x]
for layer in range(config.n_layers):
    added = taps[f"layers.{layer}.attention.output"] + taps[f"layers.{layer}.feed_forward.output"]
    stream.append(stream[-1] + added)  # [n_tokens, dim]

assert same(stream[-1], taps[f"layers.{config.n_layers - 1}.residual"], llama, n_steps=2)
len(stream), stream[-1].shape


# %% [markdown]
# So the stream after the last layer is the embedding plus all outputs of all layers, a plain sum. This is the
# picture to keep: a bus that runs through the model, and parts that read from it and write to it ([residual
# networks](https://arxiv.org/abs/1512.03385)).
#
# ## It grows
#
# How large are the numbers? Their **root mean square** tells, over the `dim` numbers of a token:
#
# $$\mathrm{rms}(x) = \sqrt{\frac{1}{n}\sum_{i=1}^{n} x_i^2}$$
#
# where $n$ is `dim`.


# %%
def rms(x):
    """[..., dim] -> [...]"""
    return np.sqrt(np.mean(x**2, axis=-1))


sizes = {
    f"{number} {piece.strip()}": [rms(x[number]) for x in stream] for number, piece in enumerate(pieces[:7])
}
names = ["embedding", *(f"layer {layer}" for layer in range(config.n_layers))]
plots.lines(sizes, "after", "rms of the residual stream", xticks=names, yscale="log")

# %% [markdown]
# On its way through the small model a token's vector becomes about sixty times larger. A matrix that had to
# read numbers of size 0.1 in one layer and 7 in another would have to be trained for both; and one token is
# larger than its neighbours. The first token stands out in most models ([massive
# activations](https://arxiv.org/abs/2402.17762)).

# %% [markdown]
# ## RMSNorm
#
# So every part reads the stream through a norm. It divides a token's vector by its root mean square, then
# multiplies each of the `dim` numbers by a weight of its own, $g_i$:
#
# $$\mathrm{norm}(x)_i = \frac{x_i}{\sqrt{\mathrm{rms}(x)^2 + \epsilon}}\; g_i$$
#
# $\epsilon$ is `norm_eps`; it only matters where all numbers are nearly 0. The stream itself stays as it is.

# %%
gain = llama.weight("layers.0.attention_norm")  # [dim]
mine = stream[0] / np.sqrt(rms(stream[0])[:, None] ** 2 + config.norm_eps) * gain

assert same(mine, taps["layers.0.attention.norm"], llama)
assert same(mine, ops.rms_norm(stream[0], gain, config.norm_eps), llama)
mine.shape

# %% [markdown]
# That is `ops.rms_norm`, the whole of it. There are two norms in every layer and one before the logits. What
# they do to size can be seen at once:

# %%
parts = [
    f"layers.{layer}.{part}" for layer in range(config.n_layers) for part in ("attention", "feed_forward")
]
read = [stream[0]]  # what each part would read without a norm
for layer in range(config.n_layers):
    read += [read[-1] + taps[f"layers.{layer}.attention.output"], stream[layer + 1]]

before = [rms(x).mean() for x in read[:-1]]
after = [rms(taps[f"{part}.norm"]).mean() for part in parts]
plots.lines({"before the norm": before, "after it": after}, "", "mean rms", xticks=parts, yscale="log")

# %% [markdown]
# ## The weights of a norm
#
# Without $g$ every part would read with an rms of exactly 1. Training lets each choose how loud it listens,
# in each of the `dim` directions.

# %%
gains = {f"layer {layer}": llama.weight(f"layers.{layer}.attention_norm") for layer in range(config.n_layers)}
plots.lines({name: np.sort(gain) for name, gain in gains.items()}, "dim, sorted", "attention_norm")

# %% [markdown]
# ## Why not LayerNorm?
#
# [LayerNorm](https://arxiv.org/abs/1607.06450), which came before, also subtracts the mean of the `dim`
# numbers. RMSNorm leaves that out: one pass fewer, and as good. How much would there be to subtract?

# %%
mean, size = stream[-1].mean(axis=-1), rms(stream[-1])
plots.bars(np.abs(mean) / size, pieces, "mean of the stream, as a share of its rms", "|mean| / rms")

# %% [markdown]
# Little. Squared, it is the share of the vector that LayerNorm would take away: in the small model less than
# 1% for every token.

# %% [markdown]
# ## At 7B

# %%
big = tinyllama.config.PRESETS["7B"]
n_norms = 2 * big.n_layers + 1
share = n_norms * big.dim / big.n_params()
print(f"{n_norms} norms of {big.dim} weights: {n_norms * big.dim:,}, {share:.4%} of all")
print(f"embedding: {big.vocab_size * big.dim:,} weights, of which a token reads {big.dim:,}")

# %% [markdown]
# The norms are so small that no file format quantizes them: they stay float32 while the matrices become
# [4-bit](10_quantization.ipynb). A norm's cost isn't arithmetic, it is reading and writing the vector.

# %% [markdown]
# ## Exercises
#
# **1.** The gain can be hidden in the matrix behind the norm, so that a norm without weights is enough.
# Compute the queries of layer 0 as `normalized @ folded.T`, with a `folded` that you make from `wq` and
# `gain`.

# %% tags=["exercise"]
wq = llama.weight("layers.0.attention.wq")  # [dim, dim]; gain is [dim]
normalized = ops.rms_norm(stream[0], np.ones(config.dim), config.norm_eps)
queries = ...

check(
    queries,
    expected=taps["layers.0.attention.q"].reshape(len(tokens), config.dim),
    axes="n_tokens, dim",
    mistakes={"The gain is missing.": normalized @ wq.T},
    hint="A weight is [n_out, n_in]: which of the two axes does the gain multiply?",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# A weight is `[n_out, n_in]`, and the gain multiplies what comes in. So NumPy's broadcasting over the last
# axis is right.
#
# ```python
# folded = wq * gain
# queries = normalized @ folded.T
# ```
#
# </details>

# %% [markdown]
# **2.** Make the stream behind the last layer ten times as large. What becomes of the logits? Predict before
# you run: compute the logits from `10 * stream[-1]`, with the weights `norm` and `output`.

# %% tags=["exercise"]
logits = ...  # [n_tokens, vocab_size]

check(
    logits,
    expected=taps["logits"],
    axes="n_tokens, vocab_size",
    mistakes={"The last norm is missing.": 10 * stream[-1] @ llama.weight("output").T},
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# They stay the same: the norm divides by the size, so a factor is lost. Only directions count.
#
# ```python
# logits = ops.rms_norm(10 * stream[-1], llama.weight("norm"), config.norm_eps) @ llama.weight("output").T
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Why is the norm before each part and not behind it?* Then the stream itself stays a plain sum, and deep
#   models train more stably ([pre-norm](https://arxiv.org/abs/2002.04745)).
# - *Where does position come in?* Not here: [04 RoPE](04_rope.ipynb).
# - *Can the stream be read at every layer?* Yes, with the last norm and the output matrix: the logit lens in
#   [08 the whole model](08_whole_model.ipynb).
# - *Why is the embedding of the small model its output matrix too?* It was trained so; see
#   [data/README.md](../data/README.md). LLaMA has two.
