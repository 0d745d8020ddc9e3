# %% [markdown]
# # 02 The checkpoint: what is in 13 GB
#
# Meta's LLaMA 7B is one file, `consolidated.00.pth`, of 13 GB. What is in it, how is it found again, and is
# it safe to open? We take apart the file that ships with tinyllama, which is made the same way.
#
# Before this: [01 tokens](01_tokens.ipynb). After it: [03 RMSNorm](03_rmsnorm.ipynb). Paper:
# [LLaMA](https://arxiv.org/abs/2302.13971), table 2.

# %%
import os
import pickle
import pickletools
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np

import tinyllama
from tinyllama.formats import open_checkpoint, parts, pth
from tinyllama.lab import plots
from tinyllama.lab.lessons import check, same
from tinyllama.tensor import Tensor

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
config = llama.config
llama

# %% [markdown]
# ## The question
#
# A model is a dictionary: names and matrices of numbers, nothing else. No code, no layers, no order of
# execution. Those are in [model.py](../tinyllama/model.py). These are the names, with the number of the layer
# left out:

# %%
shapes = {}
for name, tensor in llama.checkpoint.tensors.items():
    kind = ".".join("{}" if part.isdigit() else part for part in name.split("."))
    shapes.setdefault(kind, []).append(tensor.shape)

for kind, of_kind in shapes.items():
    print(f"{len(of_kind):3} x {kind:36} {list(of_kind[0])}")

# %% [markdown]
# Every matrix is `[n_out, n_in]` and computes `x @ weight.T`. The rest of the course is about what each of
# them is for. First: where do the weights go?

# %%
sizes = {kind: sum(np.prod(shape) for shape in of_kind) for kind, of_kind in shapes.items()}
names = [kind.removesuffix(".weight") for kind in sizes]
plots.bars(np.array(list(sizes.values())) / 1e6, names, "weights of each kind", "million weights")

# %% [markdown]
# ## Counting 7B
#
# Six hyper-parameters say all shapes. Let us count LLaMA 7B one matrix after the other, and see whether "7B"
# is true.

# %%
big = tinyllama.config.PRESETS["7B"]

attention = 4 * big.dim * big.dim  # wq, wk, wv, wo
feed_forward = 3 * big.dim * big.hidden_dim  # w1, w2, w3
norms = 2 * big.dim  # attention_norm, ffn_norm
ends = 2 * big.vocab_size * big.dim  # tok_embeddings, output

total = big.n_layers * (attention + feed_forward + norms) + ends + big.dim  # the last one is norm
assert total == big.n_params()
print(f"{total:,} weights, in 16 bits {2 * total / 1e9:.2f} GB")

# %% [markdown]
# Two thirds are feed-forward, one third is attention. The larger sizes have more of everything, and the share
# of the two ends shrinks:

# %%
shares = {}
for name, size in tinyllama.config.PRESETS.items():
    n_params = size.n_params()
    of_ends = 2 * size.vocab_size * size.dim / n_params
    of_attention = size.n_layers * 4 * size.dim**2 / n_params
    shares[name] = [of_ends, of_attention, 1 - of_ends - of_attention]
    print(f"{name:>3}: {n_params:,} weights, {2 * n_params / 1e9:.0f} GB in 16 bits")

ends, attention, feed_forward = zip(*shares.values(), strict=True)
plots.lines(
    {"feed-forward": feed_forward, "attention": attention, "both ends": ends},
    "",
    "share of the weights",
    "where the weights are, in Meta's four sizes",
    xticks=list(shares),
)

# %% [markdown]
# ## A .pth file is a zip archive
#
# Now to the bytes. (If your model is a GGUF file, this and the next sections open the checkpoint that ships
# with tinyllama: `.pth` is what Meta published.) `torch.save` writes a zip archive that isn't compressed:

# %%
is_meta = llama.checkpoint.format == "meta"
checkpoint = llama.checkpoint if is_meta else open_checkpoint("small")
path = checkpoint.files[0].path

with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
for member in members[:6]:
    print(f"{member.filename:36} {member.file_size:9,} bytes from {member.header_offset:,} on")
print(f"... and {len(members) - 6} more")

# %% [markdown]
# `data.pkl` holds the names; each `data/N` holds one matrix and nothing else: float16 numbers, row after row.
# As nothing is compressed, the operating system can **map** the file: tinyllama opens 13 GB without reading
# them.

# %% [markdown]
# ## A pickle is a program
#
# `data.pkl` isn't a table. It is a program for a little machine that Python brings along, and running it
# builds the dictionary. `pickletools` shows it without running it. Which functions does ours want to call?

# %%
with zipfile.ZipFile(path) as archive:
    pickled = archive.read(next(m for m in members if m.filename.endswith("data.pkl")))

operations = list(pickletools.genops(pickled))
wanted = {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
len(operations), sorted(wanted)


# %% [markdown]
# Harmless. But a pickle may name *any* function. Here is one that a stranger could have sent. It only prints;
# it could as well have deleted your files:


# %%
class Trap:
    def __reduce__(self):
        return print, ("I ran, and nobody asked me to.",)


pickle.loads(pickle.dumps({"norm.weight": Trap()}))

# %% [markdown]
# So tinyllama never runs a checkpoint's pickle on Python's machine. [Its
# own](../tinyllama/formats/unpickle.py) knows the few names above, calls none of them, only notes what they
# are given, and refuses all others:

# %%
with tempfile.TemporaryDirectory() as folder:
    trap = Path(folder) / "trap.pth"
    with zipfile.ZipFile(trap, "w") as archive:
        archive.writestr("trap/data.pkl", pickle.dumps({"norm.weight": Trap()}, protocol=2))
    try:
        pth.read_part(trap)
    except tinyllama.TinyllamaError as error:
        message = str(error).removeprefix(f"{folder}/")

assert "wants to run" in message
print(message)

# %% [markdown]
# ## One matrix by hand
#
# What the notes say about a tensor: in which member it lies, its shape and type. Everything else is counting
# bytes. A member begins with 30 bytes of header, which end with the lengths of its name and of an extra
# field; then comes the matrix.

# %%
piece = pth.read_part(path)["norm.weight"]
data = checkpoint.files[0]  # the file, mapped: nothing is read yet

member = max((m for m in members if m.header_offset < piece.offset), key=lambda m: m.header_offset)
name_length, extra_length = struct.unpack("<HH", data[member.header_offset + 26 : member.header_offset + 30])
start = member.header_offset + 30 + name_length + extra_length
assert start == piece.offset
member.filename, piece.type, piece.shape, start

# %%
mine = np.frombuffer(data, dtype="<f2", count=piece.shape[0], offset=start)

assert np.array_equal(mine, checkpoint.tensors["norm.weight"].dequantize())
mine[:6]

# %% [markdown]
# ## Why 13B is two files
#
# Meta ran the larger models on several GPUs at once, and cut them beforehand: 13B for two, 30B for four, 65B
# for eight. Each part holds its share of *every* matrix. Some are cut between rows, some between columns:

# %%
cut_names = ["attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2"]
picture = plots.Picture(2.6, "shares of two parts")
for axes, name in zip(picture.subplots(1, 4), cut_names, strict=True):
    shape = [n // 32 for n in checkpoint.tensors[f"layers.0.{name}.weight"].shape]  # a pixel for 32 weights
    axis = parts.axis_of(f"layers.0.{name}.weight")
    part_of = np.indices(shape)[axis] * 2 // shape[axis]  # [n_out / 32, n_in / 32]
    axes.imshow(part_of, cmap=plots.AMOUNT, vmin=-0.5, vmax=2)
    axes.set(title=name, ylabel="n_out", xlabel="n_in", xticks=[], yticks=[])
picture

# %% [markdown]
# Light is part 0, dark is part 1. The pattern has a reason. `w1` and `w3` cut by rows give each GPU one half
# of `hidden`; `w2` cut by columns needs just that half. So a GPU computes through the whole feed-forward
# layer on its own, and only the results are added ([Megatron-LM](https://arxiv.org/abs/1909.08053), section
# 3).

# %%
norm = llama.trace("Once upon a time")["layers.0.feed_forward.norm"]  # [n_tokens, dim]
w1, w2, w3 = (llama.weight(f"layers.0.feed_forward.{w}") for w in ("w1", "w2", "w3"))


def share_of(part, n_parts=2):
    """What one GPU computes: [n_tokens, dim], to be added up."""
    rows1, rows3 = np.split(w1, n_parts)[part], np.split(w3, n_parts)[part]
    columns2 = np.split(w2, n_parts, axis=1)[part]
    gate, up = norm @ rows1.T, norm @ rows3.T
    return (gate / (1 + np.exp(-gate)) * up) @ columns2.T


output = llama.trace("Once upon a time")["layers.0.feed_forward.output"]
assert same(share_of(0) + share_of(1), output, llama, n_steps=3)

# %% [markdown]
# To run such a model on one computer, the shares are put together again: rows under rows, columns beside
# columns. For tinyllama a weight is a [`Tensor`](../tinyllama/tensor.py) of one or more pieces, each where it
# lies in its file; nothing is copied. We cut one and put it together:

# %%
whole = checkpoint.tensors["layers.0.feed_forward.w2.weight"]
halves = np.split(whole.dequantize(), 2, axis=parts.axis_of(whole.name))  # two times [dim, hidden_dim / 2]
pieces = [Tensor.from_array(whole.name, half, whole.type).pieces[0] for half in halves]
together = Tensor(whole.name, whole.shape, tuple(pieces), axis=parts.axis_of(whole.name))

assert np.array_equal(together.dequantize(), whole.dequantize())
pieces[0].shape, pieces[1].shape, together.shape

# %% [markdown]
# `tinyllama convert` takes a folder with any number of parts. Forgetting one gives an error that names it,
# and so does a file that is cut short: every offset is checked against the file's size first.

# %% [markdown]
# ## At 7B
#
# | File | Holds |
# |---|---|
# | `consolidated.00.pth` | the weights, or a share of them |
# | `params.json` | `dim`, `multiple_of`, `n_heads`, `n_layers`, `norm_eps`, and a `vocab_size` of -1 |
# | `checklist.chk` | md5 sums, which `tinyllama convert` checks |
# | `tokenizer.model` | the vocabulary of [01](01_tokens.ipynb), one folder up |
#
# `hidden_dim` isn't there. It follows by Meta's rule: two thirds of `4 * dim`, rounded up to `multiple_of`.

# %%
hidden_dim = -(-(2 * 4 * big.dim // 3) // big.multiple_of) * big.multiple_of
assert hidden_dim == big.hidden_dim
hidden_dim

# %% [markdown]
# ## Exercises
#
# **1.** How many weights has LLaMA 2 70B? Its `dim` is 8192, `hidden_dim` 28672, with 80 layers and 64 heads
# of queries that share 8 heads of keys and values ([table 1](https://arxiv.org/abs/2307.09288)); the
# vocabulary is LLaMA's. (`wk` and `wv` have fewer rows then.)

# %% tags=["exercise"]
n_params = ...  # a number

dims = {"dim": 8192, "n_layers": 80, "n_heads": 64, "vocab_size": 32000, "hidden_dim": 28672}
llama2_70b = tinyllama.config.Config(**dims, n_kv_heads=8)
without_sharing = tinyllama.config.Config(**dims, n_kv_heads=64)
check(
    n_params,
    expected=llama2_70b.n_params(),
    mistakes={"8 heads of keys and values: wk and wv are smaller.": without_sharing.n_params()},
    hint="The two ends, 80 layers of seven matrices and two norms, one norm at the end.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# dim, hidden_dim, n_layers, vocab_size = 8192, 28672, 80, 32000
# kv_dim = 8 * dim // 64
# one_layer = 2 * dim * dim + 2 * kv_dim * dim + 3 * hidden_dim * dim + 2 * dim
# n_params = 2 * vocab_size * dim + n_layers * one_layer + dim
# ```
#
# </details>

# %% [markdown]
# **2.** Read row 5 of `tok_embeddings.weight` out of `data`, `[dim]`. `pth.read_part(path)` knows where each
# matrix starts; a row of float16 takes two bytes a number.

# %% tags=["exercise"]
row = ...  # np.frombuffer(data, ...)

embedding = pth.read_part(path)["tok_embeddings.weight"].blocks()
check(
    row,
    expected=embedding[5],
    axes="dim",
    mistakes={"That is row 0: five rows come before row 5.": embedding[0]},
    hint="A row has as many numbers as the shape's second axis, and each takes 2 bytes.",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# piece = pth.read_part(path)["tok_embeddings.weight"]
# dim = piece.shape[1]
# row = np.frombuffer(data, dtype="<f2", count=dim, offset=piece.offset + 5 * dim * 2)
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *Why 16 bits?* They were trained in them. How few bits will do: [10 quantization](10_quantization.ipynb).
# - *What are safetensors?* A [later format](https://github.com/huggingface/safetensors) with a table in place
#   of the program, so that nothing can run.
# - *What becomes of the .pth?* A ggml or GGUF file: [11 conversion](11_conversion.ipynb).
# - *What is the first matrix for?* [03 RMSNorm](03_rmsnorm.ipynb) begins with it.
# - *Why are the shapes what they are?* dim, heads and layers were [chosen by
#   experience](https://arxiv.org/abs/2001.08361); within wide limits the number of weights matters most.
