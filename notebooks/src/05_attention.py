# %% [markdown]
# # 05 Attention: what a token takes from those before it
#
# *Lily had a cat named Tom. One day, Tom and* … who? To write the next word, the last token has to know a
# name that stands eleven tokens earlier. Nothing in a LLaMA moves anything from one token to another, except
# attention.
#
# Before this: [04 RoPE](04_rope.ipynb). After it: [06 the KV cache](06_kv_cache.ipynb). Paper: [Attention is
# all you need](https://arxiv.org/abs/1706.03762), section 3.2.

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
# ## The question
#
# We let the model read the sentence and keep every intermediate value: `trace` runs the real forward pass, on
# whichever backend is loaded, and returns what its taps showed. First, what does it expect to come next?

# %%
PROMPT = "Lily had a cat named Tom. One day, Tom and"
tokens = llama.tokens(PROMPT)
pieces = [llama.tokenizer.piece(token) for token in tokens]
taps = llama.trace(PROMPT)

probs = ops.softmax(taps["logits"][-1])
best = np.argsort(-probs)[:6]
plots.bars(probs[best], [llama.tokenizer.piece(int(token)) for token in best], "what comes next?")

# %% [markdown]
# The small model is rather sure. So somewhere the last token, *and*, has looked at *Lily*. We go looking for
# the place: among all heads of all layers, the one in which the last row puts most weight on that column.

# %%
lily = next(i for i, piece in enumerate(pieces) if "L" in piece)
looks = [taps[f"layers.{layer}.attention.weights"][:, -1, lily] for layer in range(config.n_layers)]
LAYER, HEAD = np.unravel_index(np.argmax(looks), (config.n_layers, config.n_heads))
weights = taps[f"layers.{LAYER}.attention.weights"]  # [n_heads, n_tokens, n_past]

plots.attention(weights[HEAD], pieces, f"layer {LAYER}, head {HEAD}")

# %% [markdown]
# Each row is a token that looks, and its weights sum to 1. Read the last row: from *and*, most of what this
# head takes comes from *Lily*. The grey corner is the future, which no token may see.
#
# The rest of this notebook builds exactly this picture by hand.

# %% [markdown]
# ## Queries, keys and values
#
# $$q = W_q\,x \qquad k = W_k\,x \qquad v = W_v\,x$$
#
# Each token asks a question (its **query**), says what it offers (its **key**), and holds what it would hand
# over (its **value**). All three are matrix products of the same input: `norm`, the residual stream after
# [RMSNorm](03_rmsnorm.ipynb).

# %%
name = f"layers.{LAYER}.attention"
norm = taps[f"{name}.norm"]  # [n_tokens, dim]
wq, wk, wv, wo = (llama.weight(f"{name}.{w}") for w in ("wq", "wk", "wv", "wo"))

q, k, v = norm @ wq.T, norm @ wk.T, norm @ wv.T
q.shape, k.shape, v.shape

# %% [markdown]
# ## Heads
#
# A head is a slice of `head_dim` numbers. Cutting `dim` into `n_heads` slices lets one layer ask several
# questions at once. Nothing is computed here, the numbers are only counted differently: `[n_tokens, dim]`
# becomes `[n_tokens, n_heads, head_dim]`.

# %%
q = q.reshape(len(tokens), config.n_heads, config.head_dim)
k = k.reshape(len(tokens), config.n_kv_heads, config.head_dim)
v = v.reshape(len(tokens), config.n_kv_heads, config.head_dim)

assert same(q, taps[f"{name}.q"], llama)
assert same(k, taps[f"{name}.k"], llama)
assert same(v, taps[f"{name}.v"], llama)
q.shape

# %% [markdown]
# `same` is this course's "equal": on NumPy the two may differ by the rounding of float32; the C backend,
# which keeps keys and values in half precision and multiplies 4-bit weights by 8-bit integers, gets [the room
# that this takes](../tinyllama/lab/lessons.py).
#
# Then [RoPE](04_rope.ipynb) turns `q` and `k` by their positions. Values aren't turned.

# %%
freqs = ops.rope_freqs(config, np.arange(len(tokens)))
q, k = ops.rope(q, freqs), ops.rope(k, freqs)
assert same(k, taps[f"{name}.k_rope"], llama)

# %% [markdown]
# ## Grouped-query attention
#
# In LLaMA each head of queries has its own head of keys and values. Later models let neighbours share one,
# which makes the [cache](06_kv_cache.ipynb) smaller ([GQA](https://arxiv.org/abs/2305.13245)). SmolLM2 has 9
# heads that share 3. To compute, each shared head is simply used again.

# %%
shared = config.n_heads // config.n_kv_heads  # 1 in LLaMA: nothing happens
keys = np.repeat(k, shared, axis=1)  # [n_past, n_heads, head_dim]
values = np.repeat(v, shared, axis=1)
keys.shape

# %% [markdown]
# ## Scores
#
# $$S = \frac{Q K^\top}{\sqrt{d}}$$
#
# How well does a question fit an offer? Their dot product says so: $Q$ and $K$ are one head's `q` and `keys`.
# The longer the vectors ($d$ is `head_dim`), the larger it gets by mere chance. Divided by $\sqrt{d}$ it
# stays of a size at which the softmax below sees more than the largest.

# %%
scores = q[:, HEAD] @ keys[:, HEAD].T / np.sqrt(config.head_dim)  # [n_tokens, n_past]
plots.matrix(scores, pieces, pieces, f"scores of layer {LAYER}, head {HEAD}: n_tokens by n_past")

# %% [markdown]
# ## The causal mask
#
# Half of these numbers are scores of tokens that come later. While a text is being written they don't exist
# yet, and in training they would give the answer away. So the upper triangle becomes $-\infty$, whose
# exponential is 0.

# %%
future = np.arange(len(tokens)) > np.arange(len(tokens))[:, None]  # column > row
scores[future] = -np.inf

assert same(scores, taps[f"{name}.scores"][HEAD], llama, n_steps=3)
plots.matrix(scores, pieces, pieces, "the same scores, without the future")

# %% [markdown]
# ## Softmax
#
# $$A_{ij} = \frac{e^{S_{ij}}}{\sum_j e^{S_{ij}}}$$
#
# Every row $i$ of the weights $A$ becomes shares that sum to 1. A score that is higher by 1 gets $e \approx
# 2.7$ times the weight. Subtracting a row's largest score first changes nothing but keeps $e^x$ from
# overflowing.

# %%
exps = np.exp(scores - scores.max(axis=-1, keepdims=True))
mine = exps / exps.sum(axis=-1, keepdims=True)

assert np.allclose(mine.sum(axis=-1), 1)
assert same(mine, weights[HEAD], llama, n_steps=3)
plots.bars(mine[-1], pieces, f"the last row: what “{pieces[-1].strip()}” looks at", "weight")

# %% [markdown]
# ## What the head takes along
#
# Each token takes the mean of all values, weighted by its row. With all heads side by side that is `heads`,
# `[n_tokens, dim]` again; `wo` mixes them into the vector that is added to the residual stream.

# %%
every_head = weights @ values.transpose(1, 0, 2)  # [n_heads, n_tokens, head_dim]
heads = every_head.transpose(1, 0, 2).reshape(len(tokens), config.dim)
output = heads @ wo.T

assert same(heads, taps[f"{name}.heads"], llama, n_steps=3)
assert same(output, taps[f"{name}.output"], llama, n_steps=3)
output.shape

# %% [markdown]
# That is all of attention: four matrices, a mask and a softmax. In the code it is
# [`ops.attention`](../tinyllama/ops.py), ten lines that do the same for all heads at once.

# %%
plots.flow(
    {
        "norm": "RMSNorm",
        "q, k, v": "wq, wk, wv",
        "q, k turned": "RoPE",
        "scores": "q · k / √d",
        "weights": "mask, softmax",
        "heads": "weights · v",
        "output": "wo",
    },
    title="attention in one layer",
)

# %% [markdown]
# ## Real heads
#
# Nobody told a head what to look for; training did. Here are all heads of the layer where we found ours. Some
# rest on the first token: softmax must give its weight away, and a head that finds nothing parks it there
# ([attention sinks](https://arxiv.org/abs/2309.17453)).

# %%
plots.attention_heads(weights, pieces, f"layer {LAYER}: weights of all {config.n_heads} heads")

# %% [markdown]
# Two kinds turn up in every language model. We search all layers: which head looks back by exactly one token,
# and which rests on the first one?

# %%
maps = np.concatenate([taps[f"layers.{layer}.attention.weights"] for layer in range(config.n_layers)])
back_by_one = maps[:, np.arange(2, len(tokens)), np.arange(1, len(tokens) - 1)].mean(axis=1)
to_first = maps[:, 2:, 0].mean(axis=1)

kinds = {"looks back by one": int(back_by_one.argmax()), "rests on the first": int(to_first.argmax())}
names = [f"{what}: layer {n // config.n_heads}, head {n % config.n_heads}" for what, n in kinds.items()]
plots.attention_heads(maps[list(kinds.values())], pieces, names=names)


# %% [markdown]
# ## Does it matter?
#
# A picture of weights shows where a head looks, not that anything depends on it. So we switch heads off, one
# at a time: inside of `edit`, what `ablate` names is 0 whenever the model computes it.


# %%
def prob_of_best(*switched_off):
    """How likely the likeliest continuation is when some heads of LAYER take nothing along."""
    with llama.edit(tinyllama.ablate(f"layers.{LAYER}.attention.weights", heads=switched_off)):
        logits = llama.forward(tokens, llama.new_cache(len(tokens)), last=True)
    return float(ops.softmax(logits[0])[best[0]])


without = [prob_of_best(head) for head in range(config.n_heads)]
round(prob_of_best(), 2), round(without[HEAD], 2)

# %%
change = np.array(without) - prob_of_best()
names = [f"without head {head}" for head in range(config.n_heads)]
plots.bars(change, names, f"layer {LAYER}: what each head does for the answer", "change of the probability")

# %% [markdown]
# In the small model head 3 is worth about a fifth of the probability, and head 5 as much; without head 0 the
# model would even be surer. A head that looks at the right place and a head that matters aren't always the
# same one.

# %% [markdown]
# ## At 7B
#
# The same lines, larger axes. Every layer computes `n_heads` maps of `n_tokens × n_past` weights; their
# number grows with the square of the text, while everything else in the model grows in step with it.

# %%
big = tinyllama.config.PRESETS["7B"]
n_tokens = big.max_seq_len
maps_bytes = 4 * big.n_layers * big.n_heads * n_tokens**2
print(f"{big.n_layers * big.n_heads} heads of {big.head_dim} numbers")
print(f"all maps of {n_tokens} tokens: {maps_bytes / 1e9:.1f} GB in float32, so no layer's are kept")

# %% [markdown]
# ## Exercises
#
# **1.** Write attention for one head, from `q`, `k` and `v` of this notebook (they are turned already) to
# what the head takes along, `[n_tokens, head_dim]`. Choose another head than above: number 0.

# %% tags=["exercise"]
taken = ...  # your lines

check(
    taken,
    expected=taps[f"{name}.heads"][:, : config.head_dim],
    axes="n_tokens, head_dim",
    mistakes={"That is the head that we built above; take head 0.": every_head[HEAD]},
    hint="Are the scores divided, is the future masked, does every row of the weights sum to 1?",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# fit = q[:, 0] @ keys[:, 0].T / np.sqrt(config.head_dim)
# fit[future] = -np.inf
# taken = ops.softmax(fit) @ values[:, 0]
# ```
#
# </details>

# %% [markdown]
# **2.** `wo` mixes the heads, but as it is linear, each head's share in the output can be told apart. Compute
# what each head alone adds to the residual stream of the last token, `[n_heads, dim]`. (Their sum is
# `output[-1]`.)

# %% tags=["exercise"]
parts = ...  # [n_heads, dim]; every_head is [n_heads, n_tokens, head_dim], wo is [dim, dim]

head_of = np.arange(config.dim) // config.head_dim  # which head each of the dim numbers belongs to
check(
    parts,
    expected=[np.where(head_of == head, heads[-1], 0) @ wo.T for head in range(config.n_heads)],
    axes="n_heads, dim",
    hint="wo is [n_out, n_in]: a head's numbers come in, so a slice of its columns belongs to each head.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# A head's numbers meet the `head_dim` columns of `wo` that stand where they stand.
#
# ```python
# slices = np.split(wo, config.n_heads, axis=1)  # n_heads times [dim, head_dim]
# parts = np.array([every_head[head, -1] @ slices[head].T for head in range(config.n_heads)])
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Why is there no matrix for the mask in the file?* It follows from the positions alone.
# - *Where do the positions come in?* Only in the turn of `q` and `k`: [04 RoPE](04_rope.ipynb).
# - *Must all keys be computed again for the next token?* No: [06 the KV cache](06_kv_cache.ipynb).
# - *Why does a head look where it looks?* What single heads do is a field of its own: start with [induction
#   heads](https://arxiv.org/abs/2209.11895).
# - *How is this made fast?* [12 speed](12_speed.ipynb), and `attention` in [ext/](../ext/README.md).
