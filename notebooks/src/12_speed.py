# %% [markdown]
# # 12 Speed: the same answer, a thousand times faster
#
# The NumPy model that we took apart is right, and slow. The C backend gives the same answers many times
# faster, on the same computer. What does it do differently, and what stops it from being faster still?
#
# Before this: [11 conversion](11_conversion.ipynb). After it: [13 seven billion](13_seven_billion.ipynb).
# Source: [Roofline](https://doi.org/10.1145/1498765.1498785), Williams, Waterman and Patterson.

# %%
import os
import time
from contextlib import nullcontext
from statistics import median

import numpy as np

import tinyllama
from tinyllama import quant
from tinyllama.backends import available, get_backend
from tinyllama.commands import bench
from tinyllama.lab import plots
from tinyllama.lab.lessons import check, same
from tinyllama.machine.limits import default_threads
from tinyllama.quant import TYPES

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
config = llama.config
llama

# %% [markdown]
# ## The question
#
# Nearly all the time goes into one operation: a matrix times a vector. Each of a model's weights is
# multiplied by one number and added up, once for every token. How many are that?

# %%
multiplied = sum(np.prod(shape) for shape in config.tensor_shapes().values() if len(shape) == 2)
multiplied -= config.vocab_size * config.dim  # tok_embeddings: one row is looked up
print(f"{multiplied:,} multiplications and additions a token")


# %% [markdown]
# ## The ground floor: Python
#
# One row of a matrix with one vector, as a loop. We take the time of one row and reckon how long a token
# would take.


# %%
def seconds(function, repeats=5):
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return median(times)


# %%
w1 = llama.weight("layers.0.feed_forward.w1")  # [hidden_dim, dim]
x = llama.trace("Once upon a time")["layers.0.feed_forward.norm"][-1]  # [dim]


def in_python(row):
    total = 0.0
    for weight, number in zip(row, x, strict=True):
        total += float(weight) * float(number)
    return total


assert np.isclose(in_python(w1[0]), w1[0] @ x, rtol=1e-3, atol=1e-5)

# %% tags=["machine"]
python_speed = config.dim / seconds(lambda: in_python(w1[0]))
numpy_speed = w1.size / seconds(lambda: w1 @ x)

print(f"Python: {python_speed / 1e6:8,.1f} million multiply-adds a second")
print(f"NumPy:  {numpy_speed / 1e6:8,.1f}, {numpy_speed / python_speed:,.0f} times as many")

# %% [markdown]
# Python looks up types, allocates objects and counts references for each of these numbers. NumPy does the
# same loop in compiled code. That is the first rung, and the largest.

# %% [markdown]
# ## What SIMD does
#
# A processor has registers of 128 to 512 bits and instructions that work on all their lanes at once: 4, 8 or
# 16 floats, or four times as many bytes. So small numbers are fast numbers. With 4-bit weights, the C
# backend turns the input into 8-bit integers, too, in blocks of 32 that share a scale:

# %%
blocks = x.reshape(-1, 32)  # [dim / 32, 32]
scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
x_int8 = np.rint(blocks / scale).astype(np.int8)

back = (x_int8 * scale).reshape(config.dim)
error = np.mean((back - x) ** 2) / np.mean(x**2)
assert error < 1e-4
off = 100 * (back - x)
plots.lines({"x": x[:64], "100 × error": off[:64]}, "dim", "value", "an input, and what 8 bits lose of it")

# %% [markdown]
# Then a block's product is one of integers, exact in any order, on any computer:
#
# $$\sum_j w_j x_j \approx d\,s \sum_j (q_j - 8)\,a_j$$
#
# $q$ are the nibbles of `q4_0` and $d$ their scale ([10](10_quantization.ipynb)), $a$ is `x_int8` and $s$ its
# `scale`. One instruction multiplies 64 such bytes and adds them up.

# %%
q4_0 = quant.quantize(w1, "q4_0")  # a structured array, [hidden_dim, dim / 32]
low, high = q4_0["qs"] & 15, q4_0["qs"] >> 4  # today's layout: 16 bytes hold elements j and j + 16
nibbles = np.concatenate([low, high], axis=-1).astype(np.int32) - 8  # [hidden_dim, dim / 32, 32]

sums = (nibbles * x_int8.astype(np.int32)).sum(axis=-1)  # integers
mine = (q4_0["d"].astype(np.float32) * scale[:, 0] * sums).sum(axis=-1)  # [hidden_dim]

exact = quant.dequantize(q4_0, "q4_0") @ x
assert np.mean((mine - exact) ** 2) / np.mean(exact**2) < 1e-3
sums.shape, mine.shape

# %% [markdown]
# ## The ladder
#
# Now the whole model, rung by rung: NumPy, numexpr, the C backend's plain reference, each set of SIMD
# instructions that this computer has, and all its cores. Where MLX is installed it is the last rung, on the
# GPU if there is one. First of all: is the answer the same on every rung?

# %%
PROMPT = "The king said to the"
rungs = [("numpy", None, 1), ("numexpr", None, 1)]
if available()["c"] is None:
    from tinyllama import _native

    levels = _native.levels()  # the best one first
    rungs += [("c", level, 1) for level in reversed(levels)]
    rungs += [("c", levels[0], default_threads())]
if available()["mlx"] is None:
    rungs += [("mlx", None, default_threads())]

expected = tinyllama.load(MODEL, backend="numpy").logits(PROMPT)
for backend, level, threads in rungs:
    on_rung = tinyllama.load(MODEL, backend=backend, threads=threads)
    with on_rung.backend.at_level(level) if level else nullcontext():
        assert same(on_rung.logits(PROMPT), expected, on_rung, n_steps=8 * config.n_layers)

# %% [markdown]
# It is, within what the arithmetic explains. Then the speeds. (`bench` is what `tinyllama bench` prints.)

# %% tags=["machine"]
N_PREDICT = 16 if config.n_params() < 1e8 else 8  # tokens
results = []
for backend, level, threads in rungs:
    settings = {"backends": [backend], "levels": [level] if level else None, "threads": [threads]}
    results += bench.bench(MODEL, **settings, n_predict=N_PREDICT, prefill=(64,))

titles = [f"{r.backend} {r.level}" if r.level else r.backend for r in results]
counts = [f"{r.threads} thread{'s' * (r.threads > 1)}" for r in results]
names = [f"{title}, {count}" for title, count in zip(titles, counts, strict=True)]
if rungs[-1][0] == "mlx":
    names[-1] = "mlx"
    print(get_backend("mlx").title)  # with its device
plots.bars([r.speeds[1] for r in results], names, "writing, one token after the other", "tokens a second")

# %% tags=["machine"]
plots.bars([r.speeds[64] for r in results], names, "reading 64 tokens at once", "tokens a second")

# %% [markdown]
# In writing, the plain C reference is slower than NumPy, which has SIMD of its own: it is there to be read,
# and to test the others against. Reading is much faster than writing: 64 tokens share each weight that is
# fetched. On a model as small as ours a second thread may not pay; at 7B it does.
#
# MLX is made for GPUs. On a CPU it is slow, and only there to be tried: [docs/gpu.md](../docs/gpu.md).
#
# numexpr fuses element-wise steps, but these are a few percent of the work. That is worth a lesson, too:
# first find what takes the time.

# %% tags=["machine"]
comparison = tinyllama.compare_backends(MODEL, PROMPT, backends=("numpy", results[-1].backend))
kinds = {}
for step in comparison.steps:
    kinds.setdefault(step.name.split(".", 2)[-1], []).append(step.milliseconds[0])

largest = sorted(kinds, key=lambda kind: -sum(kinds[kind]))[:10]
plots.bars(
    [sum(kinds[kind]) for kind in largest], largest, "where NumPy's time goes", "milliseconds, all layers"
)


# %% [markdown]
# ## What stops it: the roofline
#
# Two limits hold for every program. To write a token, each weight has to come out of memory once: bytes
# divided by **bandwidth**. And each has to be multiplied for each token: multiply-adds divided by
# **arithmetic**. The lower limit counts; it depends on how many tokens are computed together.


# %%
def roof(tokens_together, bandwidth, multiply_adds, bytes_per_weight, n_weights):
    """The most tokens a second that any program can reach."""
    by_memory = tokens_together * bandwidth / (n_weights * bytes_per_weight)
    by_arithmetic = multiply_adds / n_weights
    return np.minimum(by_memory, by_arithmetic)


big = tinyllama.config.PRESETS["7B"]
n_weights = big.n_params() - big.vocab_size * big.dim
together = np.linspace(1, 40, 400)
bits = {name: TYPES[name].bits_per_weight for name in ("f16", "q8_0", "q4_0")}
plots.lines(
    {name: roof(together, 100e9, 1e12, bits[name] / 8, n_weights) for name in bits},
    "tokens computed together",
    "tokens a second, at most",
    "7B with 100 GB/s and 1000 billion multiply-adds a second",
    x=together,
)

# %% [markdown]
# On the left every line rises: **decoding is bound by memory**, and fewer bits are faster in the same
# measure. On the right all are flat: **reading a prompt is bound by arithmetic**, and the bits don't matter.
# Your computer:

# %% tags=["machine"]
measured = [result for result in results if result.backend != "mlx"][-1]
if measured.read_bandwidth:
    print(f"memory: {measured.read_bandwidth / 1e9:.0f} GB/s (a small model may fit into the cache)")
    print(f"writing takes {measured.speeds[1] / measured.read_probe:.0%} of what memory allows")
    reading = measured.speeds[64] / measured.multiply_probe
    print(f"reading 64 tokens takes {reading:.0%} of what arithmetic allows")

# %% [markdown]
# (Four million weights are computed so soon that Python's steps between the products take most of the time;
# `tinyllama bench --shape 7B` shows the shares at 7B.)
#
# How the C backend comes close to the first limit: it reads each weight once, in the order in which it lies,
# asks for it early, and keeps all cores busy. How it comes close to the second: integers, wide registers, and
# each weight used for several tokens while it is in one. [ext/README.md](../ext/README.md) draws it.

# %% [markdown]
# ## At 7B
#
# So a computer's memory says how fast it can write. These are limits from
# published bandwidths (of [M1](https://en.wikipedia.org/wiki/Apple_M1),
# [M2](https://en.wikipedia.org/wiki/Apple_M2) and [M3](https://en.wikipedia.org/wiki/Apple_M3)), not
# measurements:

# %%
n_bytes = n_weights * bits["q4_0"] / 8
bandwidths = {
    "laptop, DDR4-3200, two channels": 51.2,
    "M1": 68.25,
    "M2, M3": 100,
    "M1 Pro, M2 Pro": 200,
    "M1 Max": 400,
}
limits = [1e9 * bandwidth / n_bytes for bandwidth in bandwidths.values()]
plots.bars(limits, list(bandwidths), "7B in 4 bits: the most that memory allows", "tokens a second")

# %% [markdown]
# ## Exercises
#
# **1.** A computer reads 100 GB/s and does $10^{12}$ multiply-adds a second. From how many tokens together
# on is `q4_0` bound by arithmetic?

# %% tags=["exercise"]
crossing = ...  # a number

dense = np.linspace(1, 20, 19001)
speeds = roof(dense, 100e9, 1e12, bits["q4_0"] / 8, n_weights)
check(
    crossing,
    expected=dense[np.argmax(speeds >= speeds[-1] * (1 - 1e-12))],
    hint="Where both limits are equal, the number of weights cancels out.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# crossing = 1e12 * (bits["q4_0"] / 8) / 100e9
# ```
#
# </details>

# %% [markdown]
# **2.** Multiply row 3 of `w1` by `x` with integers alone, as above: which integer does each block give,
# `[dim / 32]`?

# %% tags=["exercise"]
integers = ...  # from nibbles and x_int8

check(
    integers,
    expected=sums[3],
    axes="n_blocks",
    mistakes={
        "An overflow: make the bytes int32 before you multiply.": (nibbles[3].astype(np.int8) * x_int8).sum(
            axis=-1, dtype=np.int32
        ),
        "The 8 has been taken off already.": ((nibbles[3] - 8) * x_int8.astype(np.int32)).sum(axis=-1),
    },
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# integers = np.einsum("bj,bj->b", nibbles[3], x_int8.astype(np.int32))
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Why not a GPU?* The same two limits hold there, ten times higher. A MacBook's GPU shares the CPU's
#   memory, so it writes little faster than the CPU can; it reads prompts much faster. The rung `mlx` is a GPU
#   where there is one: [docs/gpu.md](../docs/gpu.md).
# - *Do more threads always help?* Until memory is busy. Two or three fast cores often do that.
# - *Can decoding beat the limit?* Yes, with several texts at once, or by letting a small model guess words
#   that the large one only checks ([speculative decoding](https://arxiv.org/abs/2211.17192)).
# - *How fast is my computer at 7B?* `tinyllama bench --shape 7B`, without any file; and
#   [13](13_seven_billion.ipynb).
