# %% [markdown]
# # 08 The whole model: from tokens to the next one
#
# Embedding, norm, rotation, attention, feed-forward: you have built all parts by hand. Do they, stacked, give
# what the model gives? And when, on the way up through the layers, does it know its answer?
#
# Before this: [07 SwiGLU](07_swiglu.ipynb). After it: [09 sampling](09_sampling.ipynb). Paper:
# [LLaMA](https://arxiv.org/abs/2302.13971), section 2.2.

# %%
import os

import numpy as np

import tinyllama
from tinyllama import ops
from tinyllama.config import PRESETS
from tinyllama.lab import plots
from tinyllama.lab.lessons import check, same
from tinyllama.quant import TYPES

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
config = llama.config
plots.machine(config, f"{MODEL}: the whole machine; grey numbers are notebooks")


# %% [markdown]
# ## By hand, all of it
#
# Three functions. Attention is [notebook 05](05_attention.ipynb) for all heads at once, `[n_tokens, dim]` in
# and out:


# %%
def attention(x, name):
    norm = ops.rms_norm(x, llama.weight(f"{name}.attention_norm"), config.norm_eps)
    q, k, v = (norm @ llama.weight(f"{name}.attention.{w}").T for w in ("wq", "wk", "wv"))
    q, k, v = (array.reshape(len(x), -1, config.head_dim) for array in (q, k, v))
    freqs, shared = ops.rope_freqs(config, np.arange(len(x))), config.n_heads // config.n_kv_heads
    q, k, v = ops.rope(q, freqs), ops.rope(k, freqs).repeat(shared, axis=1), v.repeat(shared, axis=1)
    q, k, v = (array.swapaxes(0, 1) for array in (q, k, v))  # [n_heads, n_tokens, head_dim]
    scores = q @ k.swapaxes(1, 2) / config.head_dim**0.5
    scores += np.triu(np.full(scores.shape[1:], -np.inf, np.float32), 1)  # the future
    heads = (ops.softmax(scores) @ v).swapaxes(0, 1).reshape(x.shape)
    return heads @ llama.weight(f"{name}.attention.wo").T


# %% [markdown]
# The feed-forward network is [notebook 07](07_swiglu.ipynb):


# %%
def feed_forward(x, name):
    norm = ops.rms_norm(x, llama.weight(f"{name}.ffn_norm"), config.norm_eps)
    gate, up = (norm @ llama.weight(f"{name}.feed_forward.{w}").T for w in ("w1", "w3"))
    return gate / (1 + np.exp(-gate)) * up @ llama.weight(f"{name}.feed_forward.w2").T


# %% [markdown]
# And the model looks up, adds, adds, and asks the output matrix:


# %%
def forward(tokens):
    """ids [n_tokens] -> logits [n_tokens, vocab_size]"""
    x = llama.weight("tok_embeddings")[tokens]
    for layer in range(config.n_layers):
        x = x + attention(x, f"layers.{layer}")
        x = x + feed_forward(x, f"layers.{layer}")
    return ops.rms_norm(x, llama.weight("norm"), config.norm_eps) @ llama.weight("output").T


PROMPT = "Lily had a cat named Tom. One day, Tom and"
tokens = llama.tokens(PROMPT)
pieces = [llama.tokenizer.piece(token) for token in tokens]
logits = forward(tokens)
taps = llama.trace(PROMPT)

assert same(logits, taps["logits"], llama, n_steps=15 * config.n_layers)
logits.shape

# %% [markdown]
# That is LLaMA, in thirty lines. The real [model.py](../tinyllama/model.py) says the same: its `forward` is
# `embed`, `run_layers`, `unembed`. What it has besides is a [cache](06_kv_cache.ipynb), taps, and a table of
# operations which C may replace.
#
# ## Logits
#
# `output` has a row for each token of the vocabulary. A logit is the dot product of that row with the
# normalized stream: how well does this token fit as the next one? [Softmax](05_attention.ipynb#Softmax) makes
# probabilities of them.

# %%
probs = ops.softmax(logits)  # [n_tokens, vocab_size]
best = np.argsort(-probs[-1])[:6]
names = [llama.tokenizer.piece(int(token)) for token in best]
plots.bars(probs[-1, best], names, "after the last token")

# %% [markdown]
# There is a guess after *every* token, not only after the last. In training all of them are scored at once;
# when writing, only the last row is needed, so `forward(..., last=True)` skips the output matrix for the
# others.

# %%
scored = probs[np.arange(len(tokens) - 1), tokens[1:]]  # how likely was each token that really came?
plots.bars(scored, pieces[1:], "how likely the model thought each token of its own prompt")


# %% [markdown]
# Names and the beginning of a sentence surprise it; a name that it has read before does less. The mean of
# $-\log p$ over a long text is the loss that training lowers; its exponential is the **perplexity**
# ([score.py](../tinyllama/texts/score.py)).

# %% [markdown]
# ## The logit lens
#
# Every layer adds to one stream, and the last norm and the output matrix can read that stream anywhere. What
# would the model say if it ended after layer 0, 1, 2? This trick is the [logit
# lens](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).


# %%
def lens(stream):
    """[n_tokens, dim] -> probabilities [n_tokens, vocab_size]"""
    norm = ops.rms_norm(stream, llama.weight("norm"), config.norm_eps)
    return ops.softmax(norm @ llama.weight("output").T)


streams = [taps["embedding"], *(taps[f"layers.{layer}.residual"] for layer in range(config.n_layers))]
seen = np.array([lens(stream) for stream in streams])  # [n_layers + 1, n_tokens, vocab_size]
assert same(seen[-1], ops.softmax(taps["logits"]), llama, n_steps=20)

said = [[llama.tokenizer.piece(int(token)) for token in row] for row in seen.argmax(axis=-1)]
plots.logit_lens(said, seen.max(axis=-1), pieces, "what the model would say after each layer")

# %% [markdown]
# Read a column from below. At the bottom stands the token itself, for an embedding points at its own row (in
# models like the small one, whose output matrix is the embedding). Then the stream turns from *what is read*
# to *what comes next*. In the last column the name appears only near the top: first [a
# head](05_attention.ipynb) has to fetch it.

# %%
curves = {name: seen[:, -1, token] for name, token in zip(names[:4], best[:4], strict=True)}
rows = ["embedding", *(f"layer {layer}" for layer in range(config.n_layers))]
plots.lines(curves, "after", "probability", "the last column, in numbers", xticks=rows)


# %% [markdown]
# ## What a token costs
#
# Multiplying a weight and adding is two floating-point operations. A token meets each weight once; of the
# embedding it only reads a row. Besides, attention's scores and sums grow with the text: $4\, n\, d$
# operations a layer, with $n$ = `n_past` and $d$ = `dim`.


# %%
def flops(config, n_past):
    """Floating-point operations to compute one token."""
    weights = config.n_params() - config.vocab_size * config.dim
    return 2 * weights + 4 * config.n_layers * n_past * config.dim


big = PRESETS["7B"]
for n_past in [1, 512, big.max_seq_len]:
    print(f"{n_past:5} tokens in the cache: {flops(big, n_past) / 1e9:.2f} billion operations")

# %% [markdown]
# And it has to *read* each of these weights from memory:

# %%
for type in ["f16", "q8_0", "q4_0"]:
    n_bytes = (big.n_params() - big.vocab_size * big.dim) * TYPES[type].bits_per_weight / 8
    print(f"{type:5} {n_bytes / 1e9:5.2f} GB a token, {flops(big, 1) / n_bytes:.1f} operations a byte")


# %% [markdown]
# A few operations for each byte: a processor can do many times more in the time that one byte takes to
# arrive. So one token at a time, the speed of memory decides, and [4-bit weights](10_quantization.ipynb) are
# three to four times as fast because they are smaller. A prompt of 512 tokens uses each byte 512 times, and
# arithmetic decides: [12 speed](12_speed.ipynb).
#
# ## Where the weights are


# %%
def shares(config):
    """Part -> share of all weights."""
    count = {"embedding": config.vocab_size * config.dim, "output": config.vocab_size * config.dim}
    count["attention"] = config.n_layers * 2 * (config.dim + config.kv_dim) * config.dim
    count["feed-forward"] = config.n_layers * 3 * config.dim * config.hidden_dim
    count["norms"] = (2 * config.n_layers + 1) * config.dim
    assert sum(count.values()) == config.n_params()
    return {part: n / config.n_params() for part, n in count.items()}


plots.bars(list(shares(big).values()), list(shares(big)), f"7B: {big.n_params():,} weights", "share")

# %% [markdown]
# ## Exercises
#
# **1.** Attention's own share grows with the text. At how many tokens in the cache does it take as many
# operations as all the weights of 7B do?

# %% tags=["exercise"]
n_past = ...

weights_alone, one_more = flops(big, 0), flops(big, 1) - flops(big, 0)
check(
    n_past,
    expected=weights_alone / one_more,
    mistakes={
        "Attention runs in every layer.": big.n_layers * weights_alone / one_more,
        "Each weight takes two operations, a multiplication and an addition.": weights_alone / one_more / 2,
    },
    hint="Set the two summands of `flops` equal. The embedding is only looked up.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# Set $2W = 4 L n d$ and solve for $n$: 25,000 tokens, twelve times what LLaMA was trained on. In its context,
# the weights are what counts.
#
# ```python
# n_weights = big.n_params() - big.vocab_size * big.dim
# n_past = 2 * n_weights / (4 * big.n_layers * big.dim)
# ```
#
# </details>

# %% [markdown]
# **2.** How surprised is the model by its own prompt? Compute the mean of $-\log p$ over all tokens but the
# first, in nats, from `logits`.

# %% tags=["exercise"]
loss = ...

check(
    loss,
    expected=-np.log(scored).mean(dtype=np.float64),
    mistakes={
        "That is in bits; nats use the natural logarithm.": -np.log2(scored).mean(),
        "That is the perplexity, the exponential of the loss.": np.exp(-np.log(scored).mean()),
        "Row i guesses token i + 1, not token i.": -np.log(probs[np.arange(len(tokens)), tokens]).mean(),
    },
    hint="For each token but the first, take its probability in the row before; then -log, then the mean.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
# loss = -np.mean([log_probs[i, tokens[i + 1]] for i in range(len(tokens) - 1)])
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *How is a token chosen from the probabilities?* [09 sampling](09_sampling.ipynb).
# - *Why do the layers all look alike?* Each has its own weights; the shape is the same because it works.
#   Which layer does what isn't designed, it is found out afterwards.
# - *Can I look at 7B like this?* Yes: set `MODEL` to its path; [13 seven billion](13_seven_billion.ipynb)
#   does so through the fast backend.
# - *How were the weights found?* By lowering that loss over 1.0 to 1.4 trillion tokens
#   ([LLaMA](https://arxiv.org/abs/2302.13971), table 1 and 2). How it goes for 4 million weights shows
#   [train_small.py](../data/train_small.py).
