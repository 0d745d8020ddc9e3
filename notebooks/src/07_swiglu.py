# %% [markdown]
# # 07 SwiGLU: what a token makes of itself
#
# Attention carries things from token to token. Yet two thirds of a LLaMA's weights look at one token at a
# time and know nothing of the others: the feed-forward network. What is it for?
#
# Before this: [06 the KV cache](06_kv_cache.ipynb). After it: [08 the whole model](08_whole_model.ipynb).
# Paper: [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202).

# %%
import os
from pathlib import Path

import numpy as np

import tinyllama
from tinyllama import ops
from tinyllama.config import PRESETS, hidden_dim_of
from tinyllama.lab import plots
from tinyllama.lab.lessons import check, same

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
config = llama.config
llama


# %% [markdown]
# ## A switch that isn't sharp
#
# A network of matrices alone would be one big matrix. Something in it has to bend. LLaMA bends with **SiLU**,
# which lets large numbers pass and holds back negative ones:
#
# $$\mathrm{silu}(x) = \frac{x}{1 + e^{-x}}$$


# %%
def silu(x):
    return x / (1 + np.exp(-x))


x = np.linspace(-6, 6, 121)
curves = {"silu(x)": silu(x), "relu(x) = max(x, 0)": np.maximum(x, 0)}
plots.lines(curves, "x", "", "SiLU, and the sharp switch that came before it", x=x)

# %% [markdown]
# ## The formula
#
# $$\mathrm{FFN}(x) = W_2 \left( \mathrm{silu}(W_1 x) \odot W_3 x \right)$$
#
# $W_1, W_2, W_3$ are `w1`, `w2`, `w3`; $\odot$ multiplies number by number. `w1` and `w3` widen the `dim`
# numbers of a token to `hidden_dim`, `w2` makes them `dim` again.

# %%
PROMPT = "Lily had a cat named Tom. One day, Tom and"
tokens = llama.tokens(PROMPT)
pieces = [llama.tokenizer.piece(token) for token in tokens]
taps = llama.trace(PROMPT)

name = "layers.0.feed_forward"
w1, w2, w3 = (llama.weight(f"{name}.{w}") for w in ("w1", "w2", "w3"))
w1.shape, w3.shape, w2.shape

# %%
norm = taps[f"{name}.norm"]  # [n_tokens, dim]
gate, up = norm @ w1.T, norm @ w3.T  # [n_tokens, hidden_dim] each
hidden = silu(gate) * up
output = hidden @ w2.T  # [n_tokens, dim]

for step, mine in {"gate": gate, "up": up, "hidden": hidden, "output": output}.items():
    assert same(mine, taps[f"{name}.{step}"], llama, n_steps=4)
assert same(hidden, ops.swiglu(gate, up), llama)
hidden.shape, output.shape

# %% [markdown]
# That is all: three matrices and one curve. The older network had only two, `w2 @ relu(w1 @ x)`. Here the
# second reading of the token, `up`, is multiplied by the first, the `gate`: one says *whether*, the other
# *what*.
#
# ## Most gates are closed
#
# Each of the `hidden_dim` places is called a **neuron**. Here is how far each one's gate is open, over all
# tokens of the prompt, in the first and the last layer.

# %%
last = f"layers.{config.n_layers - 1}.feed_forward"
opened = {"layer 0": silu(taps[f"{name}.gate"]), f"layer {config.n_layers - 1}": silu(taps[f"{last}.gate"])}
plots.histogram(opened, "silu(gate)", "how far gates are open")

# %% [markdown]
# Mind the logarithmic scale: more than half of the small model's gates lie left of 0, where SiLU lets through
# no less than $-0.28$. They are nearly shut; a few others open ten times as far. So a token uses only some of
# the neurons; which ones?
#
# ## What a neuron fires on
#
# We let the model read some stories and keep `hidden` of layer 0 for every token. A neuron's energy is the
# sum of its squares. For each neuron: on which token does it spend most?

# %%
text = Path("../data/held_out.txt").read_text(encoding="utf-8")[:8000]
story = np.array(llama.tokens(text))
windows = [story[start : start + 250].tolist() for start in range(0, 1500, 250)]
fired = np.concatenate([llama.trace(window, f"{name}.hidden")[f"{name}.hidden"] for window in windows])
read = np.concatenate(windows)
fired.shape  # [n_tokens, hidden_dim]

# %%
frequent = [token for token in np.unique(read) if np.sum(read == token) >= 5]
energy = np.array([np.sum(fired[read == token] ** 2, axis=0) for token in frequent])
share = energy / np.sum(fired**2, axis=0)  # [frequent tokens, hidden_dim]
specialists = np.argsort(-share.max(axis=0))[:6]
for neuron in specialists:
    token = frequent[share[:, neuron].argmax()]
    print(f"neuron {neuron}: {share[:, neuron].max():.0%} on {llama.tokenizer.piece(int(token))!r}")

# %% [markdown]
# Some neurons belong to a single token, nearly. Which one belongs to the last token of our prompt? Its value
# along the prompt:

# %%
row = frequent.index(tokens[-1]) if tokens[-1] in frequent else 0
NEURON = int(share[row].argmax())
plots.bars(taps[f"{name}.hidden"][:, NEURON], pieces, f"layer 0, neuron {NEURON}", "hidden")


# %% [markdown]
# ## What a neuron says
#
# When a neuron fires, it adds its column of `w2` to the residual stream. The [output
# matrix](08_whole_model.ipynb) turns any vector of the stream into scores for tokens, so we can ask a column
# which tokens it makes likelier. (This skips what later layers do with it: [feed-forward layers are key-value
# memories](https://arxiv.org/abs/2012.14913).)


# %%
def says(neuron, n=6):
    """The tokens that a neuron of layer 0 makes likelier, in the direction in which it fires most."""
    loudest = np.sign(fired[np.abs(fired[:, neuron]).argmax(), neuron])
    scores = llama.weight("output") @ (loudest * w2[:, neuron] * llama.weight("norm"))
    return [llama.tokenizer.piece(int(token)) for token in np.argsort(-scores)[:n]]


for neuron in dict.fromkeys([NEURON, *specialists.tolist()]):
    print(f"{llama.tokenizer.piece(int(frequent[share[:, neuron].argmax()]))!r:6} -> {says(neuron)}")

# %% [markdown]
# In the small model this reads like a phrase book: after *and* comes *then*, *said* or *went*; after a comma
# *and*, *but* or *because*; after a line break a capital letter. Layer 0 knows word pairs: not much has come
# in from other tokens yet. Higher layers see what attention has gathered, and are harder to read, in large
# models above all: there, a neuron takes part in many things
# ([superposition](https://arxiv.org/abs/2209.10652)).

# %% [markdown]
# ## How wide?
#
# The older network widened to `4 * dim`. With three matrices in place of two, `hidden_dim` is two thirds of
# that, which keeps the number of weights, rounded up to a multiple that suits the hardware.

# %%
big = PRESETS["7B"]
assert hidden_dim_of(big.dim, big.multiple_of) == big.hidden_dim
feed_forward = big.n_layers * 3 * big.dim * big.hidden_dim
print(f"7B: 2/3 of {4 * big.dim} is {2 * 4 * big.dim / 3:.1f}; hidden_dim is {big.hidden_dim}")
print(f"{feed_forward:,} weights in feed-forward networks, {feed_forward / big.n_params():.0%} of all")

# %% [markdown]
# In decode all of them are read for every token, though most neurons are shut. What one would save by knowing
# beforehand which is a field of research ([Deja Vu](https://arxiv.org/abs/2310.17157)); LLaMA simply computes
# all.

# %% [markdown]
# ## Exercises
#
# **1.** What is `hidden_dim` of 13B? Its `dim` is 5120, and Meta rounds up to a multiple of 256.

# %% tags=["exercise"]
hidden_dim = ...

wide = PRESETS["13B"]
check(
    hidden_dim,
    expected=wide.hidden_dim,
    mistakes={
        "That is four times dim; take two thirds of it, as there is a third matrix.": 4 * wide.dim,
        "Nearly: it still has to be rounded up to a multiple of 256.": int(2 * 4 * wide.dim / 3),
        "That is rounded down.": wide.hidden_dim - wide.multiple_of,
    },
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# hidden_dim = -(-(2 * 4 * 5120 // 3) // 256) * 256  # -(-a // b) rounds up
# ```
#
# </details>

# %% [markdown]
# **2.** Finish the layer: from the residual stream behind attention, `stream`, to `layers.0.residual`, with
# everything that lies between.

# %% tags=["exercise"]
stream = taps["embedding"] + taps["layers.0.attention.output"]
finished = ...  # [n_tokens, dim]

check(
    finished,
    expected=taps["layers.0.residual"],
    axes="n_tokens, dim",
    mistakes={"The output is added to the stream, it doesn't replace it.": taps[f"{name}.output"]},
    hint="Is it ffn_norm that normalizes? Does w1 go through silu, and w3 not?",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# seen = ops.rms_norm(stream, llama.weight("layers.0.ffn_norm"), config.norm_eps)
# finished = stream + (silu(seen @ w1.T) * (seen @ w3.T)) @ w2.T
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Why does gating help?* The paper ends: "We offer no explanation as to why these architectures seem to
#   work; we attribute their success, as all else, to divine benevolence." It was tried, and it was better.
# - *Why do the weights have no biases?* LLaMA follows [PaLM](https://arxiv.org/abs/2204.02311), which found
#   training to be more stable without.
# - *Where is it in the code?* `_feed_forward` in [model.py](../tinyllama/model.py), `swiglu` in
#   [ops.py](../tinyllama/ops.py).
# - *What does 4-bit quantization do to these matrices?* [10 quantization](10_quantization.ipynb).
