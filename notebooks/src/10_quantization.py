# %% [markdown]
# # 10 Quantization: a weight in four bits
#
# Meta's 7B has 16 bits a weight, 13.5 GB. In four and a half bits a weight it is 3.8 GB, and runs on a
# laptop. Which 16 numbers may a weight be then, who remembers them, and what does the model lose?
#
# Before this: [09 sampling](09_sampling.ipynb). After it: [11 conversion](11_conversion.ipynb). Paper: [the
# case for 4-bit precision](https://arxiv.org/abs/2212.09720).

# %%
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from ipywidgets import interact

import tinyllama
from tinyllama import quant
from tinyllama.lab import plots
from tinyllama.lab.lessons import check
from tinyllama.quant import TYPES
from tinyllama.tensor import Tensor
from tinyllama.texts.perplexity import perplexity

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
config = llama.config
llama


# %% [markdown]
# ## The question
#
# Here are 32 neighbours in a row of a real weight, and what comes back after four bits. With four bits there
# are 16 numbers to choose from: the grey lines. Every weight goes to the nearest one.


# %%
def before_and_after(before, after, levels, title):
    """Weights as circles, what comes back as dots, the numbers that can come back as grey lines."""
    picture = plots.Picture(3.4, title)
    axes = picture.subplots()
    axes.hlines(levels, -0.5, len(before) - 0.5, color=plots.GREY, alpha=0.4, linewidth=0.8)
    axes.vlines(range(len(before)), before, after, color=plots.RED, linewidth=1.5)
    axes.plot(before, "o", color=plots.BLUE, fillstyle="none", label="weight")
    axes.plot(after, "o", color=plots.ORANGE, markersize=3.5, label="what comes back")
    axes.set(title=title, xlabel="n_in", ylabel="weight")
    picture.legend(loc="outside right center", fontsize=8)
    return picture


w = llama.weight("layers.0.attention.wq")[:256]  # [n_out, n_in], or the first 256 rows of it
x = w[0, :32]
blocks = quant.quantize(x[None], "q4_0")
levels = np.arange(-8, 8) * np.float32(blocks["d"][0, 0])
before_and_after(x, quant.dequantize(blocks, "q4_0")[0], levels, "a block of 32 weights, to q4_0 and back")

# %% [markdown]
# The lines are evenly spaced, one step is called the **scale** `d`. So a **block** of 32 weights is stored
# as `d` and 32 small integers. The next block has its own scale. We now build the blocks, byte for byte.

# %% [markdown]
# ## q4_0 by hand
#
# $$d = \frac{\hat x}{-8} \qquad q_i = \left\lfloor \frac{x_i}{d} + 8.5 \right\rfloor$$
#
# $\hat x$ is the weight that is farthest from zero, with its sign. It becomes $q = 0$; a weight of zero
# becomes 8. The other side reaches only to 15, that is to $7d$, so `minimum` keeps it there.

# %%
largest = x[np.abs(x).argmax()]
d = largest / np.float32(-8)
q = np.minimum(x * (1 / d) + np.float32(8.5), 15).astype(np.uint8)
q

# %% [markdown]
# Two integers below 16 share a byte, as its low and its high four bits: its **nibbles**. Byte `j` holds
# weight `j` below and weight `j + 16` above. In front stands `d` as a float16. 18 bytes for 32 weights: 4.5
# bits a weight.

# %%
packed = q[:16] | q[16:] << 4
block = np.float16(d).tobytes() + packed.tobytes()

assert block == quant.quantize(x[None], "q4_0").tobytes()
print(f"{len(block)} bytes, {8 * len(block) / 32} bits a weight:", block.hex(" "))

# %% [markdown]
# The same 16 bytes, bit by bit. Dark is 1. Read four bits as a number, and it is the `q` that is written
# there.

# %%
bits = np.unpackbits(packed[:, None], axis=1)  # [16 bytes, 8 bits], the highest first
picture = plots.Picture(2.9, "a block, bit by bit")
axes = picture.subplots()
axes.pcolormesh(bits.T, cmap=plots.AMOUNT, vmax=1.6, edgecolors="white", linewidth=1)
axes.axhline(4, color=plots.RED)
axes.set_xticks(np.arange(16) + 0.5, [f"{j}\nq={q[j]}" for j in range(16)], fontsize=7)
axes.set_yticks(np.arange(8) + 0.5, [8, 4, 2, 1] * 2, fontsize=7)
axes.set(ylabel="a bit's worth", xlabel="low nibble: the weights 0 to 15", ylim=(8, 0))
above = axes.secondary_xaxis("top")
above.set_xticks(np.arange(16) + 0.5, [f"{j}\nq={q[j]}" for j in range(16, 32)], fontsize=7)
above.set_xlabel("high nibble: the weights 16 to 31")
picture

# %% [markdown]
# Why halves, and not neighbours? A processor takes all 16 bytes at once. One AND with 15 gives it weights 0
# to 15 in order, one shift by 4 gives 16 to 31. And back? A subtraction and a product; no `quant` is needed
# to run a model:

# %%
qs = np.frombuffer(block, np.uint8, offset=2)
unpacked = np.concatenate([qs & 15, qs >> 4]).astype(np.float32)
mine = (unpacked - 8) * np.frombuffer(block, "<f2", count=1).astype(np.float32)

assert np.array_equal(mine, quant.dequantize(quant.quantize(x[None], "q4_0"), "q4_0")[0])
assert np.abs(mine - x).max() <= 1.01 * abs(d)  # the far end; elsewhere half a step
print(f"largest error: {np.abs(mine - x).max() / abs(d):.2f} d")

# %% [markdown]
# ## q4_1: a minimum beside the scale
#
# $$m = x_{min} \qquad d = \frac{x_{max} - x_{min}}{15} \qquad q_i = \left\lfloor \frac{x_i - m}{d} + 0.5
# \right\rfloor$$
#
# q4_0's lines are symmetric around zero whether or not the weights are. q4_1 spreads its 16 lines from the
# smallest to the largest weight. That takes a second float16, `m`: 20 bytes, 5 bits a weight.

# %%
m, d1 = x.min(), (x.max() - x.min()) / np.float32(15)
q1 = np.minimum((x - m) * (1 / d1) + np.float32(0.5), 15).astype(np.uint8)
block1 = np.array([d1, m], "<f2").tobytes() + (q1[:16] | q1[16:] << 4).tobytes()

assert block1 == quant.quantize(x[None], "q4_1").tobytes()
before_and_after(x, q1 * d1 + m, np.arange(16) * d1 + m, "the same block in q4_1: no line is wasted")

# %% [markdown]
# ## q8_0: a byte each
#
# $$d = \frac{\max |x|}{127} \qquad q_i = \mathrm{round}(x_i / d)$$
#
# 256 lines, 34 bytes, 8.5 bits a weight. The loss is next to nothing. tinyllama's C kernels also turn
# *activations* into such blocks, on the fly, because integers multiply faster than floats
# ([12](12_speed.ipynb)).

# %%
d8 = np.abs(x).max() / np.float32(127)
v = x * (1 / d8)
q8 = np.trunc(v + np.copysign(np.float32(0.5), v)).astype(np.int8)  # C's round: halves away from zero

assert np.float16(d8).tobytes() + q8.tobytes() == quant.quantize(x[None], "q8_0").tobytes()
q8

# %% [markdown]
# ## 2023's layout beside today's
#
# When LLaMA first ran on a MacBook, in March 2023, q4_0 was another thing under the same name: a float32
# scale, neighbours in one byte, and `d` from the largest *absolute* value over 7. That gives lines from
# $-7d$ to $7d$: 15 of the 16.

# %%
d0 = np.abs(x).max() / np.float32(7)
v = x * (1 / d0)
q0 = (np.trunc(v + np.copysign(np.float32(0.5), v)) + 8).astype(np.uint8)  # 1 to 15, never 0
block0 = np.float32(d0).tobytes() + (q0[0::2] | q0[1::2] << 4).tobytes()

assert block0 == quant.quantize(x[None], "q4_0_2023").tobytes()
plots.tokens(
    {
        "2023": ["d"] * 4 + [f"{2 * j} {2 * j + 1}" for j in range(16)],
        "today": ["d"] * 2 + [f"{j} {j + 16}" for j in range(16)],
    },
    title="whose nibbles are in which byte: 20 bytes then, 18 today",
)


# %% [markdown]
# Both are read by tinyllama; in its code 2023's is [`q4_0_2023`](../tinyllama/quant.py). Today's costs half
# a bit less and [uses its 16th line](https://github.com/ggml-org/llama.cpp/pull/729). What does it buy? The
# error, as a share of the weights' own size (root mean square):


# %%
def rms(a):
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


for kind in ("q4_0_2023", "q4_0", "q4_1", "q5_0", "q8_0"):
    error = rms(quant.dequantize(quant.quantize(w, kind), kind) - w) / rms(w)
    assert np.isclose(error, quant.error(w, kind), rtol=1e-4)
    print(f"{kind:10} {TYPES[kind].bits_per_weight:4} bits a weight, error {error:6.2%}")

# %% [markdown]
# (SmolLM2's file is in q4_1 already, so q4_1 costs it nothing more. What its first rounding lost, only its
# maker can say.)
#
# ## Error per tensor and per layer
#
# Are some matrices harder than others? All seven of every layer, 64 rows of each:

# %%
kinds = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
kinds += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
rows = {
    (kind, layer): llama.checkpoint.tensors[f"layers.{layer}.{kind}.weight"].dequantize(0, 64)
    for kind in kinds
    for layer in range(config.n_layers)
}
errors = {
    kind: [100 * quant.error(rows[kind, layer], "q4_0") for layer in range(config.n_layers)] for kind in kinds
}
layers = [str(layer) for layer in range(config.n_layers)]
picture = plots.lines(errors, "layer", "error in %", "q4_0: all matrices lose about the same", xticks=layers)

normal = 100 * quant.error(np.random.default_rng(0).normal(size=(256, 1024)), "q4_0")
picture.axes[0].axhline(normal, color=plots.GREY, linestyle=":")
picture.axes[0].set_ylim(bottom=0)
picture

# %% [markdown]
# Hardly. The dotted line is the error of random numbers from a normal distribution: in blocks of 32, trained
# weights look much like them. What lies above that line has **outliers**.

# %% [markdown]
# ## Outliers, and why blocks
#
# The largest weight sets the step for all that share its scale. Where is the most extreme one, as a multiple
# of its matrix' root mean square?

# %%
extreme = {where: np.abs(matrix).max() / rms(matrix) for where, matrix in rows.items()}
(kind, layer), reach = max(extreme.items(), key=lambda item: item[1])
odd = rows[kind, layer]  # [64, n_in]
series = {
    f"{kind}, layer {layer}": odd / rms(odd),
    "random numbers": np.random.default_rng(0).normal(size=odd.size),
}
plots.histogram(series, "weight / rms", f"the largest weight is {reach:.1f} times the rms")


# %% [markdown]
# With one scale for the whole matrix, that one weight would coarsen all others. Blocks keep the damage among
# 32. To see it we need q4_0's rule for any number of bits and any size of block. It's the code from above,
# for many blocks:


# %%
def rounded(x, n_bits=4, block=32):
    """Weights as they come back: q4_0's rule with `n_bits` for one and a float16 scale for every `block`."""
    shape, zero = x.shape, np.float32(2 ** (n_bits - 1))
    x = x.reshape(-1, block)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = largest / -zero  # [n_blocks, 1]
    inverse = np.divide(1, d, out=np.zeros_like(d), where=d != 0)
    q = np.minimum(np.floor(x * inverse + zero + np.float32(0.5)), 2 * zero - 1)
    return ((q - zero) * np.float16(d).astype(np.float32)).reshape(shape)


assert np.array_equal(rounded(w), quant.dequantize(quant.quantize(w, "q4_0"), "q4_0"))
assert np.array_equal(rounded(w, 5), quant.dequantize(quant.quantize(w, "q5_0"), "q5_0"))

# %%
sizes = [8, 16, 32, 64, odd.shape[1], odd.size]
errors = [100 * rms(rounded(odd, 4, size) - odd) / rms(odd) for size in sizes]
names = [f"{size}: {4 + 16 / size:.2f} bits a weight" for size in sizes[:-2]]
names += ["a row: 4.0 bits", "the whole matrix: 4.0 bits"]

assert errors == sorted(errors)  # the more weights share a scale, the worse
plots.bars(errors, names, f"weights that share a scale, {kind} of layer {layer}", "error in %")

# %% [markdown]
# 32 is a bargain: half a bit a weight for the scale. Smaller blocks lose less, but a bit is better spent on
# the integers: one more of those halves the error.

# %%
finer = {"4 bits, blocks of 8: 6.0 bits a weight": (4, 8), "5 bits, blocks of 32: 5.5": (5, 32)}
errors = [100 * rms(rounded(odd, *knob) - odd) / rms(odd) for knob in finer.values()]
assert errors[1] < errors[0]
plots.bars(errors, list(finer), "two ways to spend bits", "error in %")


# %% [markdown]
# ## Turn the knobs
#
# Bits, block size, and an outlier: weight 20 grows. Watch the grey lines, which are the numbers of the block
# that holds it, and what becomes of its neighbours. (In JupyterLab there are sliders here; GitHub shows the
# two pictures below.)


# %%
def knobs(n_bits=4, block=32, outlier=1.0):
    """64 weights, one of them `outlier` times the largest, before and after rounding."""
    before = w[0, :64].copy()
    before[20] = outlier * np.abs(before).max()
    after = rounded(before, n_bits, block)
    start = 20 // block * block
    mates = before[start : start + block]
    d = mates[np.abs(mates).argmax()] / -(2 ** (n_bits - 1))
    levels = np.arange(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1)) * d
    others = np.arange(64) != 20
    error = rms((after - before)[others]) / rms(before[others])
    size = f"{n_bits} bits, blocks of {block}: {n_bits + 16 / block:.2f} bits a weight"
    return before_and_after(before, after, levels, f"{size}; error of the others {error:.0%}")


_ = interact(knobs, n_bits=(2, 8), block=[8, 16, 32, 64], outlier=(1.0, 10.0))

# %%
knobs(outlier=6.0)

# %% [markdown]
# One outlier, and many of its neighbours fall on zero. In blocks of 8 fewer of them share its fate:

# %%
knobs(block=8, outlier=6.0)

# %% [markdown]
# ## What it does to text
#
# An error of 9% sounds terrible. But it is noise of both signs, and a product sums hundreds of weights. What
# counts is **perplexity**, $e$ to the mean surprise (in nats) at text that the model has never seen: among
# how many tokens it hesitates, so to say.
#
# From here on always the small model. Its weights were never rounded to less than 16 bits, and it takes
# seconds.

# %%
original = tinyllama.load("small")
text = Path("../data/held_out.txt").read_text(encoding="utf-8")[:12_000]


def smaller(change):
    """The small model with every matrix changed; vectors stay as they are, in files too."""
    tensors = {
        name: change(tensor) if len(tensor.shape) == 2 else tensor
        for name, tensor in original.checkpoint.tensors.items()
    }
    return tinyllama.Llama(replace(original.checkpoint, tensors=tensors), original.backend, "small")


def in_type(kind):
    return lambda tensor: Tensor.from_array(tensor.name, tensor.dequantize(), kind)


def in_bits(n_bits):
    return lambda tensor: Tensor.from_array(tensor.name, rounded(tensor.dequantize(), n_bits))


# %%
files = ["q8_0", "q5_0", "q4_1", "q4_0", "q4_0_2023"]
models = {"f16": (16, original)}
models |= {kind: (TYPES[kind].bits_per_weight, smaller(in_type(kind))) for kind in files}
models |= {f"{n_bits} bits by hand": (n_bits + 0.5, smaller(in_bits(n_bits))) for n_bits in (3, 2)}

scores = {name: perplexity(model, text, ctx_size=256, progress=False) for name, (_, model) in models.items()}
for name, (n_bits, _) in models.items():
    print(f"{name:14} {n_bits:4} bits a weight, perplexity {scores[name].perplexity:.1f}")

# %% [markdown]
# These are few windows. The differences can be trusted more than the figures, since all read the same text;
# [data/README.md](../data/README.md) has the figures of whole files on the whole text. Drawn over the bits:

# %%
picture = plots.Picture(3.4, "perplexity against bits per weight")
everything, closer = picture.subplots(1, 2)
for number, (name, (n_bits, _)) in enumerate(models.items()):
    for axes in (everything, closer):
        axes.plot(n_bits, scores[name].perplexity, "os^DvP*X"[number], label=name)
lossless = scores["f16"].perplexity
for axes in (everything, closer):
    axes.axhline(lossless, color=plots.GREY, linewidth=0.8, linestyle=":")
everything.set(title=picture.title, xlabel="bits per weight", ylabel="perplexity", ylim=(0, None))
closer.set(
    title="the same, closer", xlabel="bits per weight", xlim=(3, 9), ylim=(0.98 * lossless, 1.12 * lossless)
)
picture.legend(*closer.get_legend_handles_labels(), loc="outside right center", fontsize=8)

assert scores["q8_0"].perplexity < 1.005 * lossless
assert lossless < scores["q4_0"].perplexity < scores["3 bits by hand"].perplexity
picture

# %% [markdown]
# Eight bits cost nothing, four a few percent, three begin to hurt, and at two the model falls apart. That
# bend is why the world settled on four. Where in the model does the error arise? The residual stream after
# each layer, q4_0 against the original:

# %%
PROMPT = "Lily had a cat named Tom. One day, Tom and"
streams = [f"layers.{layer}.residual" for layer in range(original.config.n_layers)]
right = original.trace(PROMPT, *streams)
off = {}
for name in ("q8_0", "q4_1", "q4_0", "3 bits by hand"):
    wrong = models[name][1].trace(PROMPT, *streams)
    off[name] = [100 * rms(wrong[stream] - right[stream]) / rms(right[stream]) for stream in streams]

layers = [str(layer) for layer in range(original.config.n_layers)]
plots.lines(off, "layer", "error in %", "the residual stream, layer after layer", xticks=layers, yscale="log")

# %% [markdown]
# It starts with the rounded embedding and grows slowly, not like compound interest: each layer adds its own
# noise to a stream that carries everything else past it unchanged.

# %% [markdown]
# ## At 7B
#
# Matrices become blocks, vectors stay float32. llama.cpp has [published the
# perplexities](https://github.com/ggml-org/llama.cpp/commit/2d5db48371052087a83974abda3767d1aedec598) of its
# types in 2023, which are today's: 7B has 5.91 in f16 and q8_0, 6.09 in q4_1, 6.16 in q4_0. 13B minds it
# less: 5.25 becomes 5.39. And the sizes:

# %%
print(" " * 10, *(f"{name:>6}" for name in tinyllama.config.PRESETS))
for kind in ("f16", "q8_0", "q4_1", "q4_0_2023", "q4_0"):
    sizes = []
    for preset in tinyllama.config.PRESETS.values():
        shapes = preset.tensor_shapes().values()
        n_bytes = sum(TYPES[kind if len(shape) == 2 else "f32"].nbytes(shape) for shape in shapes)
        sizes.append(f"{n_bytes / 1e9:6.1f}")
    print(f"{kind:10}", *sizes, "GB")

# %% [markdown]
# Half the bytes are also half the time: to write a token, every weight has to be read once
# ([12 speed](12_speed.ipynb)).

# %% [markdown]
# ## Exercises
#
# **1.** A file holds these q4_1 blocks, as bytes: float16 `d`, float16 `m`, 16 bytes of nibbles, then the
# next block. Get the weights of `w`'s first row back, `[n_in]`, with nothing but NumPy.

# %% tags=["exercise"]
data = quant.quantize(w[:1], "q4_1").tobytes()
row = ...  # np.frombuffer(data, ...)

expected = quant.dequantize(quant.quantize(w[:1], "q4_1"), "q4_1")[0]
neighbours = expected.reshape(-1, 2, 16).swapaxes(1, 2).ravel()
check(
    row,
    expected=expected,
    axes="n_in",
    mistakes={"The nibbles of a byte aren't neighbours: j and j + 16.": neighbours},
    hint="x = q * d + m; a block has 20 bytes: reshape the bytes to [n_blocks, 20] first.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# raw = np.frombuffer(data, np.uint8).reshape(-1, 20)
# scales = raw[:, :4].copy().view("<f2").astype(np.float32)  # [n_blocks, 2]
# nibbles = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
# row = (nibbles * scales[:, :1] + scales[:, 1:]).ravel()
# ```
#
# </details>

# %% [markdown]
# **2.** Outliers set the scale; so keep them out of it. Set the largest weight of each block of `w` aside in
# full precision, round the other 31, and put it back. What is the error of `w` now, as a share of its rms?
# (Newer methods do [something like that](https://arxiv.org/abs/2306.03078).)

# %% tags=["exercise"]
error = ...  # a number

without = w.reshape(-1, 32).copy()
without[np.arange(len(without)), np.abs(without).argmax(axis=1)] = 0
check(
    error,
    expected=quant.error(without, "q4_0") * rms(without) / rms(w),
    mistakes={
        "That is q4_0 as it was: is the largest weight out when the scale is made?": quant.error(w, "q4_0"),
        "Relative to the rms of the whole of w.": quant.error(without, "q4_0"),
    },
    hint="Put 0 in the place of each block's largest, round with `rounded`, put the largest back.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# A zero in its place doesn't change the scale of the others.
#
# ```python
# is_largest = np.abs(w.reshape(-1, 32)).argmax(axis=1)[:, None] == np.arange(32)
# is_largest = is_largest.reshape(w.shape)
# back = np.where(is_largest, w, rounded(np.where(is_largest, 0, w)))
# error = rms(back - w) / rms(w)
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Why not train in four bits?* A training step changes weights by far less than one step of `d`; nothing
#   would move.
# - *Are there better ways to round?* Yes: [GPTQ](https://arxiv.org/abs/2210.17323) rounds each weight so
#   that it makes up for those before; ggml's K-quants search for the scale and share scales of scales (q6_k
#   in [quant.py](../tinyllama/quant.py)).
# - *Are activations rounded, too?* In the C backend for the length of a product, to 8 bits. They have [larger
#   outliers](https://arxiv.org/abs/2208.07339) than weights.
# - *How do I quantize a file?* `tinyllama quantize`, and what it writes: [11](11_conversion.ipynb).
# - *A small model in 8 bits or a larger in 4, if both are 7 GB?* The larger, nearly always: [the case for
#   4-bit](https://arxiv.org/abs/2212.09720).
