# %% [markdown]
# # 04 RoPE: where a token stands
#
# *The dog bit the man* and *the man bit the dog* are the same tokens. [Attention](05_attention.ipynb) makes
# two vectors of each: a **query**, what it looks for, and a **key**, by which it is found. The dot product of
# a query and a key, their **score**, says how well they fit, and knows nothing of where they stand. So LLaMA
# turns both: the further along, the further turned.
#
# Before this: [03 RMSNorm](03_rmsnorm.ipynb). After it: [05 attention](05_attention.ipynb). Paper:
# [RoFormer](https://arxiv.org/abs/2104.09864).

# %%
import os
from pathlib import Path

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
# ## Blind to order
#
# In layer 0 a query is made from the token's embedding alone. So both *Tom*s of this sentence ask exactly the
# same question, though they stand five tokens apart.

# %%
PROMPT = "Lily had a cat named Tom. One day, Tom and"
tokens = llama.tokens(PROMPT)
pieces = [llama.tokenizer.piece(token) for token in tokens]
taps = llama.trace(PROMPT)
here, there = (number for number, piece in enumerate(pieces) if piece.strip() == "Tom")

q, q_rope = taps["layers.0.attention.q"], taps["layers.0.attention.q_rope"]  # [n_tokens, n_heads, head_dim]
assert same(q[here], q[there], llama)
same(q_rope[here], q_rope[there], llama)


# %% [markdown]
# The queries `q` are equal; `q_rope`, what RoPE makes of them, no longer is (`False`). What has it done?
#
# ## Turning a pair
#
# Query and key are cut into **heads** of `head_dim` numbers, each with a score of its own. RoPE takes these
# numbers two by two, as points in a plane, and turns each point around the origin by an angle that grows with
# the position. Here is one pair at positions 0 to 5.


# %%
def turn(pair, angle):
    """[2] -> [2], counter-clockwise"""
    x, y = pair
    return np.array([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)])


pair = np.array([1.0, 0.3])
plots.arrows({f"position {pos}": turn(pair, 0.4 * pos) for pos in range(6)}, "one pair, 0.4 radians a token")

# %% [markdown]
# Turning keeps a vector's length, so nothing of what it says gets louder or softer. Only its direction now
# tells the position.
#
# ## Fast pairs and slow pairs
#
# Every pair $j$ has its own speed, in radians a token:
#
# $$f_j = \theta^{-2j/d} \qquad j = 0, 1, \ldots, d/2 - 1$$
#
# with $d$ = `head_dim` and $\theta$ = `rope_theta`. The first pair turns by 1 radian a token, the last hardly
# at all: a clock with many hands.

# %%
speeds = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)  # [head_dim / 2]
angles = np.outer(np.arange(64), speeds)  # [position, head_dim / 2]

names = [f"pair {j}" for j in range(len(speeds))]
plots.matrix(
    np.cos(angles).T, names if len(names) <= 32 else "pair", "position", "cosine of the angle", limit=1
)

# %% [markdown]
# The first pairs tell neighbours apart but repeat after a few tokens; the last tell the beginning of a text
# from its end. Together they are unique for every position, like the hands of a clock.
#
# ## By hand
#
# All pairs of all heads at once: the even places are the $x$, the odd ones the $y$ of a pair.

# %%
cos, sin = np.cos(angles)[: len(tokens), None], np.sin(angles)[: len(tokens), None]
x, y = q[..., 0::2], q[..., 1::2]
turned = np.stack([x * cos - y * sin, x * sin + y * cos], axis=-1).reshape(q.shape)

assert same(turned, taps["layers.0.attention.q_rope"], llama, n_steps=2)
turned.shape

# %% [markdown]
# ## The same with complex numbers
#
# A point in a plane is a complex number, and turning it by an angle $a$ is multiplying it by $e^{ia}$. Meta's
# code does so, and [`ops.rope`](../tinyllama/ops.py) too: it looks at a pair of float32 as one complex number
# and multiplies once.

# %%
freqs = np.exp(1j * angles[: len(tokens)])  # [n_tokens, head_dim / 2]
assert np.allclose(freqs, ops.rope_freqs(config, np.arange(len(tokens))), atol=1e-5)
assert same(ops.rope(q, freqs.astype(np.complex64)), turned, llama)
freqs.shape

# %% [markdown]
# ## Only the distance counts
#
# Turn a query by $m$ steps and a key by $n$: their dot product depends on $m - n$ alone, as only the angle
# *between* them matters. Take one query and one key and put them at every pair of positions:

# %%
one_q, one_k = (np.repeat(taps[f"layers.0.attention.{w}"][5:6, :1], 24, axis=0) for w in "qk")
freqs = ops.rope_freqs(config, np.arange(24))
scores = ops.rope(one_q, freqs)[:, 0] @ ops.rope(one_k, freqs)[:, 0].T  # [position of q, position of k]

assert np.allclose(scores[:-1, :-1], scores[1:, 1:], atol=1e-3 * np.abs(scores).max())
plots.matrix(scores, "position of the query", "position of the key", "one query, one key, everywhere")

# %% [markdown]
# Every diagonal has one colour. So what a head learns about a distance at the beginning of a text holds
# everywhere in it, though no weight knows any position.

# %% [markdown]
# ## How a head uses it
#
# [Notebook 05](05_attention.ipynb#Real-heads) finds a head that looks back by exactly one token. Its mean
# query and mean key, moved apart step by step, show how: whatever the words are, distance 1 scores best.

# %%
weights = [taps[f"layers.{layer}.attention.weights"] for layer in range(config.n_layers)]
steps = np.arange(2, len(tokens))
back_by_one = [w[:, steps, steps - 1].mean(axis=1) for w in weights]
LAYER, HEAD = np.unravel_index(np.argmax(back_by_one), (config.n_layers, config.n_heads))


# %%
def by_distance(layer, head, n=16):
    """Score of a head's mean query, 0 to n tokens behind its mean key."""
    q = taps[f"layers.{layer}.attention.q"][1:, head].mean(axis=0)
    k = taps[f"layers.{layer}.attention.k"][1:, head * config.n_kv_heads // config.n_heads].mean(axis=0)
    moved = ops.rope(np.tile(q, (n, 1, 1)), ops.rope_freqs(config, np.arange(n)))[:, 0]
    return moved @ k / np.sqrt(config.head_dim)


others = [head for head in range(config.n_heads) if head != HEAD][:3]
curves = {f"layer {LAYER}, head {head}": by_distance(LAYER, head) for head in [HEAD, *others]}
plots.lines(curves, "distance in tokens", "score", "mean query against mean key")


# %% [markdown]
# ## Two layouts
#
# Which numbers make a pair? Meta takes neighbours, $(0, 1), (2, 3), \ldots$ (**interleaved**). GPT-NeoX, and
# with it Hugging Face's transformers, takes the first half against the second, $(0, d/2), (1, d/2 + 1),
# \ldots$ (**half-split**). Both are RoPE; they only count the places of a head in another order.


# %%
def rope_half_split(x, freqs):
    """As ops.rope, for heads whose pairs are (j, j + head_dim / 2)."""
    left, right = np.split(x, 2, axis=-1)
    pairs = (left + 1j * right) * freqs[:, None, :]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


freqs = ops.rope_freqs(config, np.arange(len(tokens)))
order = np.concatenate([np.arange(0, config.head_dim, 2), np.arange(1, config.head_dim, 2)])
assert same(rope_half_split(q[..., order], freqs), ops.rope(q, freqs)[..., order], llama)
order[:4], order[-4:]


# %% [markdown]
# As queries and keys come out of `wq` and `wk`, a converter reorders the *rows* of these two matrices, once,
# and the dot products stay what they were. [transformers'
# converter](https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/convert_llama_weights_to_hf.py)
# does it from Meta's checkpoint; GGUF files of LLaMA keep Meta's order.
#
# ## The wrong layout
#
# And if a loader mixes them up? Nothing fails: all shapes fit. We turn the model's queries and keys in the
# wrong pairs (`edit` replaces values while the model runs) and look at how badly it predicts a story, one
# position after the other.


# %%
def wrong_layout(freqs):
    """An edit that turns every query and key in half-split pairs."""
    seen = {}

    def keep(array, at):
        seen[at.name] = array

    def turn(array, at):
        return rope_half_split(seen[at.name.removesuffix("_rope")], freqs)

    return {"layers.*.attention.[qk]": keep, "layers.*.attention.[qk]_rope": turn}


def losses(window, changes=()):
    """How surprised the model is by each next token, in nats: [n_tokens - 1]."""
    with llama.edit(dict(changes)):
        logits = llama.forward(window, llama.new_cache(len(window)))
    return -np.log(ops.softmax(logits[:-1])[np.arange(len(window) - 1), window[1:]])


# %%
text = Path("../data/held_out.txt").read_text(encoding="utf-8")[:12_000]
story = llama.tokens(text)
windows = [story[start : start + 145] for start in range(0, 12 * 144, 144)]
freqs = ops.rope_freqs(config, np.arange(len(windows[0])))

right = np.mean([losses(window) for window in windows], axis=0)
wrong = np.mean([losses(window, wrong_layout(freqs)) for window in windows], axis=0)
smooth = {"Meta's pairs": right, "the wrong pairs": wrong}
smooth = {name: curve.reshape(-1, 12).mean(axis=1) for name, curve in smooth.items()}
plots.lines(smooth, "position", "nats a token", "predicting a story", x=np.arange(6, 144, 12))

# %% [markdown]
# Among the first tokens the harm is small, so a glance at a short prompt shows little. Further on every pair
# has been turned by another one's speed and the heads look past their goals. Around position 100:

# %%
near = slice(90, 110)
here_right, here_wrong = right[near].mean(), wrong[near].mean()
assert here_wrong > here_right
print(f"Meta's pairs: {here_right:.1f} nats a token; the wrong pairs: {here_wrong:.1f}")
print(f"the token that really came is held {np.exp(here_wrong - here_right):.0f} times less likely")

# %% [markdown]
# What is worse, the wrong layout gains nothing from all that it has read: it predicts the hundredth token no
# better than the tenth.

# %% [markdown]
# ## At 7B
#
# The same formula, more pairs. The slowest pair needs this many tokens for one full turn:

# %%
big = tinyllama.config.PRESETS["7B"]
slowest = big.rope_theta ** ((big.head_dim - 2) / big.head_dim)
print(f"{big.head_dim // 2} pairs a head; the slowest turns once in {2 * np.pi * slowest:,.0f} tokens")
print(f"weights for positions: 0; trained on {big.max_seq_len} tokens")

# %% [markdown]
# No weight is learned for any position. Still a LLaMA can't read beyond the length it was trained on: the
# slow pairs reach angles it has never seen. Slowing all of them down helps: [position
# interpolation](https://arxiv.org/abs/2306.15595).

# %% [markdown]
# ## Exercises
#
# **1.** Turn one pair yourself: pair 1 (numbers 2 and 3) of head 0, of the token at position 5 in `q`. Mind
# its speed.

# %% tags=["exercise"]
a_pair = q[5, 0, 2:4]
turned_pair = ...  # [2]

check(
    turned_pair,
    expected=taps["layers.0.attention.q_rope"][5, 0, 2:4],
    mistakes={
        "That is the speed of pair 0; pair 1 is slower.": turn(a_pair, 5),
        "You have turned it the other way.": turn(a_pair, -5 * speeds[1]),
    },
    hint="The angle is the position times the speed of the pair.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# turned_pair = turn(a_pair, 5 * speeds[1])
# ```
#
# </details>

# %% [markdown]
# **2.** Here is `wk` of layer 0 as Hugging Face's layout has it: in every head, the rows in the order
# `order`. Bring it back to Meta's.

# %% tags=["exercise"]
wk = llama.weight("layers.0.attention.wk")
hf_wk = wk.reshape(config.n_kv_heads, config.head_dim, config.dim)[:, order].reshape(wk.shape)
meta_wk = ...  # [n_kv_heads * head_dim, dim], from hf_wk

check(
    meta_wk,
    expected=wk,
    axes="n_out, n_in",
    mistakes={
        "That is hf_wk itself.": hf_wk,
        "That is the same step again; the way back is another order.": hf_wk.reshape(
            config.n_kv_heads, config.head_dim, config.dim
        )[:, order].reshape(wk.shape),
    },
    hint="Cut the rows into heads first; inside each head, which order undoes `order`?",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# The order that undoes an order is its `argsort`. (For two halves that is: deal them out in turn.)
#
# ```python
# rows = hf_wk.reshape(config.n_kv_heads, config.head_dim, config.dim)
# meta_wk = rows[:, np.argsort(order)].reshape(hf_wk.shape)
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Why are the values not turned?* They are what is handed over; where from is settled by the weights.
# - *What came before?* A vector for each position, added to the embedding ([Attention is all you
#   need](https://arxiv.org/abs/1706.03762), section 3.5): it takes room in the stream, and knows distances
#   only indirectly.
# - *Is a turned key kept in the cache?* Yes, turned once at its own position: [06 the KV
#   cache](06_kv_cache.ipynb).
# - *What are the `rope_freqs` in some files?* Llama 3.1 divides the speeds by factors for longer texts:
#   `factors` of `ops.rope_freqs`.
