# %% [markdown]
# # 13 Seven billion: LLaMA 7B and 13B on this computer
#
# Everything so far ran on a model that fits into a letter. What changes at seven or thirteen billion
# weights? Nothing in the code; everything in the bytes. Will it fit, how fast will it be, and can we still
# look inside?
#
# Before this: [12 speed](12_speed.ipynb). Back to [the map](00_map.ipynb). Paper:
# [LLaMA](https://arxiv.org/abs/2302.13971).

# %%
import os
import time
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np

import tinyllama
from tinyllama import ops, quant
from tinyllama.backends import get_backend
from tinyllama.commands import bench
from tinyllama.lab import plots
from tinyllama.lab.lessons import check, same
from tinyllama.machine.limits import available_memory, human
from tinyllama.model import build, forward

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
sizes = tinyllama.config.PRESETS
{name: f"{size.n_params():,}" for name, size in sizes.items()}

# %% [markdown]
# ## The question: does it fit?
#
# Two things take memory: the weights, and the KV cache, which grows with the context
# ([06](06_kv_cache.ipynb)). The rest is small change. In 16 bits, and in 4:

# %%
N_CTX = 512


def memory(size, type, n_ctx=N_CTX):
    """Bytes of the weights and of a 16-bit cache."""
    weights = size.n_params() * quant.TYPES[type].bits_per_weight / 8
    return weights, 2 * 2 * size.n_layers * n_ctx * size.kv_dim


needs = {f"{name} {type}": memory(size, type) for name, size in sizes.items() for type in ("f16", "q4_0")}
plots.bars(
    [sum(need) / 1e9 for need in needs.values()], list(needs), f"memory with a context of {N_CTX}", "GB"
)

# %% [markdown]
# That picture is why 4 bits were a revelation in March 2023: 7B in 16 bits fits no laptop with 8 GB; in 4
# bits it does, and 13B fits 16 GB. This computer:

# %% tags=["machine"]
free = available_memory()
print(f"{human(free)} are free here")
for name, need in needs.items():
    print(f"{name:9} needs {sum(need) / 1e9:6.1f} GB: {'fits' if sum(need) < free else 'too large'}")

# %% [markdown]
# tinyllama makes the same sum before it allocates anything (`Backend.memory` in
# [backends](../tinyllama/backends/__init__.py)), and says so in one line where a model is too large.

# %% [markdown]
# ## Predicting the speed
#
# A 7B model is 32 times the same layer. So we don't need 32 to know what they will do. We make one and then
# three layers of the true shape, with random weights (their values don't matter for speed), time a token
# through each, and continue the line.

# %%
table = get_backend("auto")  # the fastest that runs here


def token_time(size, n_layers):
    """The median seconds of a token through the first layers of a model of this size."""
    config = replace(size, n_layers=n_layers)
    model = build(config, bench.RandomWeights(config, "q4_0"), partial(table.prepare, copy=True))
    cache, times = table.new_cache(config, 64), []
    for _ in range(20):
        started = time.perf_counter()
        logits = forward(model, table, [1], cache, last=True)
        times.append(time.perf_counter() - started)
    assert logits.shape == (1, config.vocab_size)
    return median(times)


# %% tags=["machine"]
one, three = (token_time(sizes["7B"], n_layers) for n_layers in (1, 3))
per_layer = (three - one) / 2
predicted = {
    "7B": one + (sizes["7B"].n_layers - 1) * per_layer,
    "13B": (one + (sizes["7B"].n_layers - 1) * per_layer) * sizes["13B"].n_params() / sizes["7B"].n_params(),
}
for name, seconds in predicted.items():
    print(f"{name}: about {1 / seconds:.1f} tokens a second on backend {table.name}, {table.threads} threads")

# %% [markdown]
# The line goes on because a token's time is that of reading the weights, once each ([12](12_speed.ipynb)).
# Is the prediction true? That takes 4 GB of memory and half a minute, so it waits for you to say yes. (It is
# what `tinyllama bench --shape 7B` does. The figures on GitHub are those of a computer with two cores.)

# %% tags=["machine"]
MEASURE = "TINYLLAMA_MEASURE" in os.environ  # or True: all layers of 7B, measured

if MEASURE:
    (measured,) = bench.bench(shape="7B", n_predict=16, prefill=(128,))
    print(f"writing: {measured.speeds[1]:.1f} tokens a second, predicted {1 / predicted['7B']:.1f}")
    print(f"reading a prompt of 128 tokens: {measured.speeds[128]:.0f} tokens a second")
    print(f"memory was read at {measured.read_bandwidth / 1e9:.0f} GB/s")

# %% [markdown]
# ## What a longer text costs
#
# Each token also reads the cache of all those before it. How much is that beside the weights?

# %%
positions = np.array([0, 512, 1024, 2048])
share = {}
for name in ("7B", "13B"):
    weights, cache_512 = memory(sizes[name], "q4_0")
    share[name] = cache_512 / N_CTX * positions / weights

plots.lines(
    share,
    "n_past",
    "cache bytes / weight bytes",
    "what the cache adds to a token",
    x=positions,
)

# %% [markdown]
# At the end of LLaMA's context of 2048 a 7B token reads a quarter more than at its beginning. Grouped-query
# attention ([05](05_attention.ipynb)) exists for that.

# %% [markdown]
# ## Looking inside the fast one
#
# Speed doesn't close the lid. A **tap** shows any intermediate value while the C backend runs. Where the fast
# kernel never writes a value down (attention's weights, say), this one call uses NumPy's definition for that
# step, on the fast one's inputs. Here are both backends, and the same value from each:

# %%
PROMPT = "Lily had a cat named Tom. One day, Tom and"
llama = tinyllama.load(MODEL, backend="auto")
slow = tinyllama.load(MODEL, backend="numpy")
config = llama.config

LAYER = config.n_layers // 2
name = f"layers.{LAYER}.attention.weights"
weights = llama.trace(PROMPT, name)[name]  # [n_heads, n_tokens, n_past]

assert same(weights, slow.trace(PROMPT, name)[name], llama, n_steps=8 * config.n_layers)
weights.shape

# %%
pieces = [llama.tokenizer.piece(token) for token in llama.tokens(PROMPT)]
plots.attention_heads(weights[:8], pieces, f"layer {LAYER}, its first heads")

# %% [markdown]
# ## A logit lens on any size
#
# What would the model say if it stopped after a layer ([08](08_whole_model.ipynb))? At 7B the answer forms
# slowly, over dozens of layers, in the small model within four. These lines run on both: the taps keep only
# what their pattern names.

# %%
residuals = llama.trace(PROMPT, "embedding", "layers.*.residual")  # name -> [n_tokens, dim]
shown = list(residuals)[:: max(1, config.n_layers // 8)]  # at most nine rows

probs = [ops.softmax(llama.unembed(residuals[name])) for name in shown]  # each [n_tokens, vocab_size]
top = [p.argmax(axis=-1) for p in probs]
said = [[llama.tokenizer.piece(int(token)) for token in row] for row in top]
chance = np.array([p.max(axis=-1) for p in probs])  # [n_layers, n_tokens]
plots.logit_lens(said, chance, pieces, "what it would say after each layer")

# %% [markdown]
# Read a column from below: first the token itself or a guess, then words that could follow, last what follows
# best. The last residual is what the real output is made of:

# %%
last = f"layers.{config.n_layers - 1}.residual"
assert same(llama.unembed(residuals[last]), llama.logits(PROMPT), llama, n_steps=2)

# %% [markdown]
# ## Running the real thing
#
# With Meta's files in `models/7B` the whole course runs on them:
# `TINYLLAMA_MODEL=models/7B/ggml-model-q4_0.bin make lab`. From the first command to the first word:
#
# | Step | Command | Becomes |
# |---|---|---|
# | convert | `tinyllama convert models/7B/ 1` | `ggml-model-f16.bin` |
# | quantize | `tinyllama quantize models/7B/ggml-model-f16.bin models/7B/ggml-model-q4_0.bin 2` | a third |
# | ask | `tinyllama generate -m models/7B/ggml-model-q4_0.bin -p "The first man on the moon was"` | a text |
#
# 13B comes in two parts; the same three commands do. `--mmap` starts at once and leaves the weights in the
# file, for computers where memory is tight.

# %%
for name in ("7B", "13B"):
    f16, q4_0 = (
        sizes[name].n_params() * quant.TYPES[type].bits_per_weight / 8 for type in ("f16", "q4_0_2023")
    )
    print(f"{name:>3}: {f16 / 2**30:4.1f} GiB in 16 bits, {q4_0 / 2**30:.1f} GiB in the 4 bits of March 2023")

# %% [markdown]
# ## Exercises
#
# **1.** From how many tokens of context on does the cache of 7B take more memory than its `q4_0` weights?

# %% tags=["exercise"]
n_tokens = ...  # a number

bytes_7b, per_token_7b = memory(sizes["7B"], "q4_0", n_ctx=1)
check(
    n_tokens,
    expected=bytes_7b / per_token_7b,
    mistakes={"Keys and values: two of each size.": 2 * bytes_7b / per_token_7b},
    hint="Of each token every layer keeps kv_dim keys and kv_dim values, 2 bytes each.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# seven = sizes["7B"]
# weight_bytes = seven.n_params() * 4.5 / 8
# n_tokens = weight_bytes / (2 * seven.n_layers * seven.kv_dim * 2)
# ```
#
# </details>

# %% [markdown]
# **2.** A laptop has 16 GB, of which 12 are free. How many tokens of context can 13B in `q4_0` have there?
# (LLaMA was trained for 2048; memory is the question here.)

# %% tags=["exercise"]
n_ctx = ...  # a number

bytes_13b, per_token_13b = memory(sizes["13B"], "q4_0", n_ctx=1)
check(
    n_ctx,
    expected=(12e9 - bytes_13b) / per_token_13b,
    mistakes={"That leaves no room for the weights.": 12e9 / per_token_13b},
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# bytes_13b, per_token_13b = memory(sizes["13B"], "q4_0", n_ctx=1)
# n_ctx = (12e9 - bytes_13b) / per_token_13b
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *And 65B?* The same code; 37 GB in 4 bits. It needs the memory, and writes a tenth as fast as 7B.
# - *Is a larger model always better?* A 13B in 4 bits beats a 7B in 16, at half its size
#   ([perplexities](https://github.com/ggml-org/llama.cpp/pull/1684)).
# - *Can I see it step by step?* [The stepper](stepper.ipynb) runs on any model that is loaded.
# - *Where do I go from here?* Change something: another sampling stage, another block format, a kernel.
#   [CONTRIBUTING](../CONTRIBUTING.md) says how.
