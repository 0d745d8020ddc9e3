# %% [markdown]
# # 00 The map
#
# In March 2023 a language model of seven billion weights began to [run on a
# MacBook](https://github.com/ggml-org/llama.cpp). These notebooks take such a model apart, down to single
# multiplications, and put it together again. A weekend later you could write it from a blank page.
#
# You need Python and a little linear algebra: what a matrix product is. Run a cell with Shift+Enter.

# %%
import os

import numpy as np

import tinyllama
from tinyllama.config import PRESETS
from tinyllama.lab import plots
from tinyllama.lab.lessons import check

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
config = llama.config
llama

# %% [markdown]
# ## A prompt, completed
#
# That line loaded a real, if tiny, LLaMA: four million weights, trained on children's stories, with all the
# parts that 7B has. It goes on with what you write:

# %%
text = llama.generate("Once upon a time", n_predict=60, seed=1)
print("Once upon a time" + text)

# %% [markdown]
# It has never seen a grammar. All it does, all that *any* such model does, is to say how likely each token of
# its vocabulary is to come next. One of them is drawn, appended, and the question put again:

# %%
logits = llama.logits("Once upon a time")[-1]  # [vocab_size]
probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = np.argsort(-probs)[:8]

assert np.isclose(probs.sum(), 1, atol=1e-5)
plots.bars(probs[best], [llama.tokenizer.piece(int(token)) for token in best], "what comes next?")

# %% [markdown]
# The same seed draws the same tokens, so a text can be written again:

# %%
again = tinyllama.generate(**text.settings)
assert again == text
text.ids[:10], [round(prob, 2) for prob in text.probs[:10]]

# %% [markdown]
# ## The whole machine
#
# Between the prompt and these probabilities there is this, and nothing else. A text becomes tokens, each
# token a vector. The vectors run along one line through all layers; in each, attention brings in something
# from earlier tokens and a feed-forward network works on it.

# %%
plots.machine(config, f"{MODEL}; grey numbers are the notebooks that take a part apart")

# %% [markdown]
# And this is LLaMA 7B. Nothing has been added; it is only wider and higher.

# %%
plots.machine(PRESETS["7B"], f"LLaMA 7B: {PRESETS['7B'].n_params():,} weights")

# %% [markdown]
# ## The notebooks
#
# | | Question |
# |---|---|
# | [01 tokens](01_tokens.ipynb) | What does a model read, if not letters and not words? |
# | [02 checkpoint](02_checkpoint.ipynb) | What is in the files that Meta gave away? |
# | [03 RMSNorm](03_rmsnorm.ipynb) | What is a token, once it is a vector? |
# | [04 RoPE](04_rope.ipynb) | How does it know where it stands? |
# | [05 attention](05_attention.ipynb) | How does it learn what came before? |
# | [06 KV cache](06_kv_cache.ipynb) | Why is the next token cheap? |
# | [07 SwiGLU](07_swiglu.ipynb) | What do two thirds of all weights do? |
# | [08 whole model](08_whole_model.ipynb) | Do the parts, stacked, give what the model gives? |
# | [09 sampling](09_sampling.ipynb) | How is a token drawn? |
# | [10 quantization](10_quantization.ipynb) | How does a weight fit into four bits? |
# | [11 conversion](11_conversion.ipynb) | How does a checkpoint become a file for a laptop? |
# | [12 speed](12_speed.ipynb) | Where does the time go? |
# | [13 seven billion](13_seven_billion.ipynb) | What do 7B and 13B need, on this computer? |
#
# [The table](README.md) says where every single concept is taught.

# %% [markdown]
# ## How they work
#
# Everything that a notebook builds by hand is compared with the real model: an `assert` stands below it. What
# the model computed on the way can be looked at by name; `trace` returns it:

# %%
taps = llama.trace("Once upon a time", "embedding", "layers.0.*", "logits")
{name: array.shape for name, array in taps.items()}

# %% [markdown]
# These names, and those of the axes (`n_tokens`, `dim`, `n_heads`, ...), are the same in the notebooks, in
# [the code](../tinyllama/model.py) and, as far as there are any, in Meta's.
# [config.py](../tinyllama/config.py) has the legend.

# %% [markdown]
# ## Your own weights
#
# Every cell of every notebook runs on another model too. Change `MODEL` at the top to
#
# - `"smollm2"`, a real small model that writes sensible English (`tinyllama download smollm2` fetches 93 MB),
# - the path of a GGUF file, of a ggml file of 2023, or of the folder with Meta's checkpoint, such as
#   `"/home/me/models/7B/ggml-model-q4_0.bin"`.
#
# Or set it for all of them: `TINYLLAMA_MODEL=smollm2 make lab`. The numbers and pictures that you see on
# GitHub are those of the small model.

# %% [markdown]
# ## How exercises work
#
# Each notebook ends with one or two. Write your answer where the `...` stands and run the cell: `check` says
# whether it is right and, as well as it can, what is wrong. The solution is folded below. Try it, wrong
# answers too:
#
# **1.** How many different tokens can this model write?

# %% tags=["exercise"]
answer = ...

check(
    answer,
    expected=config.vocab_size,
    mistakes={"That is the width of a token's vector, dim.": config.dim},
    hint="Look for it in `config`, or at the picture of the machine.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# One logit for each token of the vocabulary:
#
# ```python
# answer = len(logits)  # or config.vocab_size
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Does this need a GPU, or the internet?* Neither. Every cell runs on a laptop's processor, offline, in
#   seconds.
# - *Is it the same code that is fast?* Yes: there is one [forward pass](../tinyllama/model.py); NumPy or C do
#   its operations. `TINYLLAMA_BACKEND=numpy make lab` shows everything in plain NumPy.
# - *What has been trained here, on what?* [data/README.md](../data/README.md).
# - *Can I play with prompts?* `tinyllama.playground()` in a cell: text as it is made, and for every token
#   what else it might have been. `tinyllama.stepper("Once upon a time")` goes through the forward pass step
#   by step.
# - On to [01 tokens](01_tokens.ipynb).
