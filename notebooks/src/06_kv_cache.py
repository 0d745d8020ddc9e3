# %% [markdown]
# # 06 The KV cache: why the next token is cheap
#
# To write the next word, every layer has to look at all words before it. Must it compute them all again, for
# each new word?
#
# Before this: [05 attention](05_attention.ipynb). After it: [07 SwiGLU](07_swiglu.ipynb). Paper: [Efficiently
# scaling Transformer inference](https://arxiv.org/abs/2211.05102), section 2.

# %%
import os

import numpy as np

import tinyllama
from tinyllama import ops
from tinyllama.config import PRESETS
from tinyllama.lab import plots
from tinyllama.lab.lessons import check, same

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
config = llama.config
llama

# %% [markdown]
# ## The slow way
#
# A model gives logits for the token after the last one. Take the likeliest, append it, run everything again:
# that writes text, and computes the first token of the prompt as often as there are words.

# %%
PROMPT = "Once upon a time, there was a"
tokens = llama.tokens(PROMPT)
slow, n_computed = list(tokens), 0
for _ in range(8):
    logits = llama.logits(slow)  # [n_tokens, vocab_size]
    n_computed += len(slow)
    slow.append(int(logits[-1].argmax()))

print(llama.tokenizer.decode(slow))
print(f"{n_computed} tokens computed to write 8")

# %% [markdown]
# ## What a longer text changes
#
# Let us compare what the layers computed for the prompt alone and for the prompt with more words behind it.

# %%
short = llama.trace(tokens)
long = llama.trace(slow)

for name in ["attention.k_rope", "attention.v", "residual"]:
    for layer in range(config.n_layers):
        before, after = short[f"layers.{layer}.{name}"], long[f"layers.{layer}.{name}"][: len(tokens)]
        assert same(after, before, llama, n_steps=10 * config.n_layers)
len(tokens), len(slow)

# %% [markdown]
# Nothing changes, in any layer. The [causal mask](05_attention.ipynb#The-causal-mask) lets a token see only
# what stands before it, so what comes later can't reach it. All that a layer knows about the old tokens could
# have been kept.
#
# ## What has to be kept
#
# Of the old tokens a new one needs only what attention reads: their **keys** (turned already) and their
# **values**. Queries are asked once, and the stream of an old token isn't needed by anybody else. That is the
# KV cache:

# %%
cache = llama.new_cache(n_ctx=len(slow))
logits = llama.forward(tokens, cache)  # the prompt, all at once: "prefill"
len(cache), len(cache.keys), cache.keys[0].shape  # n_past; n_layers; [n_kv_heads, room, head_dim]

# %% [markdown]
# The cache knows how many tokens it holds. It has an array of keys for each layer, and one of values just
# like it. Their room grows with the text, up to `n_ctx`.

# %%
keys = cache.keys[0][:, : len(cache)]  # of layer 0, [n_kv_heads, n_past, head_dim]
assert same(keys.swapaxes(0, 1), short["layers.0.attention.k_rope"], llama)

rows = [llama.tokenizer.piece(token) for token in tokens] + ["(free)"] * (cache.n_ctx - len(cache))
shown = np.zeros((cache.n_ctx, config.head_dim), np.float32)
shown[: len(cache)] = keys[0]
plots.matrix(shown, rows, "head_dim", "keys of layer 0, head 0: n_ctx by head_dim")

# %% [markdown]
# ## The fast way
#
# Now a new token goes through the model alone. Its position is the length of the cache; attention appends its
# key and value, then reads them all.

# %%
fast = list(tokens)
for _ in range(8):
    fast.append(int(logits[-1].argmax()))
    logits = llama.forward([fast[-1]], cache)  # [1, vocab_size]: "decode"

assert fast == slow == cache.ids
assert same(logits[-1], llama.logits(fast)[-1], llama, n_steps=10 * config.n_layers)
print(f"{len(tokens) + 8} tokens computed to write 8, and the same text")

# %% [markdown]
# ## One layer by hand
#
# What does attention do in such a step? One row of queries meets all keys. There is nothing to mask:
# everything in the cache lies in the past. We take the last token back and watch it once more.

# %%
taps = {}
watched = {  # a tap of a name is called with the value
    "layers.0.attention.q_rope": lambda array: taps.update(q_rope=array.copy()),
    "layers.0.attention.heads": lambda array: taps.update(heads=array.copy()),
}
cache.trim(len(cache) - 1)  # forgets the last token
llama.forward([fast[-1]], cache, taps=watched)

q = taps["q_rope"].swapaxes(0, 1)  # [n_heads, 1, head_dim]
shared = config.n_heads // config.n_kv_heads
keys, values = (
    np.repeat(array[0][:, : len(cache)].astype(np.float32), shared, axis=0)  # [n_heads, n_past, head_dim]
    for array in (cache.keys, cache.values)
)

weights = ops.softmax(q @ keys.swapaxes(1, 2) / np.sqrt(config.head_dim))  # [n_heads, 1, n_past]
heads = (weights @ values).reshape(1, config.dim)
assert same(heads, taps["heads"], llama, n_steps=3)
weights.shape

# %% [markdown]
# ## What it saves
#
# Multiply-adds to write 512 tokens after a prompt of 16 with the shape of 7B. Every weight of a layer meets
# every computed token once; beside that the scores are little.

# %%
big = PRESETS["7B"]
lengths = np.arange(16, 528)
per_token = big.n_params() - big.vocab_size * big.dim  # without the embedding, which is only looked up
without = np.cumsum(lengths) * per_token / 1e12
with_cache = (16 + np.arange(1, 513)) * per_token / 1e12

curves = {"every token again": without, "with the cache": with_cache}
plots.lines(curves, "tokens written", "10¹² multiply-adds", "7B: work to write a text", yscale="log")


# %% [markdown]
# The price is paid elsewhere. In *prefill* a weight that has been read from memory serves all tokens of the
# prompt; in *decode* it serves a single one. Reading becomes what takes the time: [12 speed](12_speed.ipynb).
#
# ## Its bytes
#
# Two vectors for each token, in each layer:
#
# $$\mathrm{bytes} = 2 \cdot L \cdot H \cdot d \cdot n \cdot b$$
#
# with $L$ = `n_layers`, $H$ = `n_kv_heads`, $d$ = `head_dim`, $n$ = `n_ctx` and $b$ bytes a number: 4 on
# NumPy, 2 (half precision) in C, as in llama.cpp.


# %%
def cache_bytes(config, n_ctx, bytes_a_number=2):
    """What keys and values of n_ctx tokens take."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * n_ctx * bytes_a_number


assert cache_bytes(config, len(slow), cache.keys[0].itemsize) == cache.nbytes  # it is full
for name in ["7B", "13B"]:
    full = cache_bytes(PRESETS[name], PRESETS[name].max_seq_len)
    print(f"{name}: {cache_bytes(PRESETS[name], 1):,} bytes a token, {full / 1e9:.2f} GB for a full context")

# %%
n_ctx = np.arange(0, 2049, 128)
sizes = {name: cache_bytes(PRESETS[name], n_ctx) / 1e9 for name in ["65B", "30B", "13B", "7B"]}
plots.lines(sizes, "n_ctx", "GB in half precision", "the KV cache of LLaMA's four sizes", x=n_ctx)

# %% [markdown]
# Half a megabyte for each token of 7B, about as much as a novel's whole text takes. That is why later models
# share keys and values among heads: with 8 key/value heads in place of 64, [Llama 2
# 70B](https://arxiv.org/abs/2307.09288) keeps an eighth.

# %% [markdown]
# ## Going back
#
# What lies behind the end of the cache is never read, so going back costs nothing: `trim` only makes it
# shorter, and another text overwrites the rest. That is how several continuations of one prompt share its
# cache.

# %%
cache.trim(0)
after_prompt = llama.forward(tokens, cache)[-1]
texts = []
for token in np.argsort(-after_prompt)[:3].tolist():  # the three likeliest
    cache.trim(len(tokens))
    again = llama.forward([token], cache)[-1]
    assert same(again, llama.logits([*tokens, token])[-1], llama, n_steps=10 * config.n_layers)
    texts.append(llama.tokenizer.decode([*tokens, token, int(again.argmax())]))
texts

# %% [markdown]
# ## Two endings of one beginning
#
# `trim` gives up one continuation for the next. `fork` copies keys and values instead, and each copy goes on
# by itself. The beginning is read once; copying moves its bytes and multiplies nothing.

# %%
cache.trim(len(tokens))
endings = [llama.tokens(PROMPT + ending) for ending in [" dog named", " girl named"]]
forks = [cache.fork(n_ctx=len(ids) + 8) for ids in endings]
last = [llama.forward(ids[len(tokens) :], fork)[-1] for ids, fork in zip(endings, forks, strict=True)]

for ids, fork, logits in zip(endings, forks, last, strict=True):
    assert ids[: len(tokens)] == tokens and fork.ids == ids
    assert same(logits, llama.logits(ids)[-1], llama, n_steps=10 * config.n_layers)
assert cache.ids == tokens  # what both began with is as it was

n_read = len(tokens) + sum(len(ids) - len(tokens) for ids in endings)
print(f"{n_read} tokens computed instead of {sum(map(len, endings))}")

# %% [markdown]
# Now they take turns. Is each text what it would be alone, read anew from its first token?

# %%
for _ in range(8):
    for number, fork in enumerate(forks):
        last[number] = llama.forward([int(last[number].argmax())], fork)[-1]

for ids, fork in zip(endings, forks, strict=True):
    assert fork.ids[len(ids) :] == llama.generate(ids, temp=0, n_predict=8, remember=False).ids
[llama.tokenizer.decode(fork.ids) for fork in forks]

# %% [markdown]
# ## Exercises
#
# **1.** How many bytes does one token more take in the cache of 13B, in half precision? Work it out before
# you let the computer.

# %% tags=["exercise"]
answer = ...

one_token = ops.KVCache(PRESETS["13B"], n_ctx=1, dtype=np.float16)
for layer in range(PRESETS["13B"].n_layers):
    one_token.room(layer, 1)
check(
    answer,
    expected=one_token.nbytes,
    mistakes={
        "Keys and values are both kept.": one_token.nbytes // 2,
        "That is in float32; half precision takes half.": one_token.nbytes * 2,
        "That is one layer's; each layer has its own.": one_token.nbytes // PRESETS["13B"].n_layers,
    },
)


# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# Keys and values, 40 layers, 5120 numbers each, 2 bytes a number.
#
# ```python
# answer = 2 * 40 * 5120 * 2
# ```
#
# </details>

# %% [markdown]
# **2.** Write `greedy(prompt, n_predict)`: the ids of the likeliest continuation, with a cache, each token
# computed once.


# %% tags=["exercise"]
def greedy(prompt, n_predict):
    """Ids, [n_predict]."""
    return ...  # your lines


check(
    greedy("The little dog", 12),
    expected=llama.generate("The little dog", temp=0, n_predict=12).ids,
    axes="n_tokens",
    hint="The first id follows the prompt; the cache grows by one with each token.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def greedy(prompt, n_predict):
#     tokens = llama.tokens(prompt)
#     cache = llama.new_cache(len(tokens) + n_predict)
#     logits, ids = llama.forward(tokens, cache), []
#     for _ in range(n_predict):
#         ids.append(int(logits[-1].argmax()))
#         logits = llama.forward(ids[-1:], cache)
#     return ids
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *What if the cache is full?* Then the text ends: `stop_reason` is "context". Other programs drop old
#   tokens; see [attention sinks](https://arxiv.org/abs/2309.17453) for why that needs care.
# - *Can a cache outlive the program?* `cache.save(path)` and `llama.load_cache(path)`; and
#   [prompts are remembered](../docs/texts.md) without that, too.
# - *Where is it in the code?* `KVCache` in [ops.py](../tinyllama/ops.py); the loop is `Generation` in
#   [generation.py](../tinyllama/generation.py).
# - *Does the C backend get the same?* Up to half precision; [12 speed](12_speed.ipynb) asserts it.
# - *What else has to be in memory?* The weights, and little more: [13 seven billion](13_seven_billion.ipynb).
