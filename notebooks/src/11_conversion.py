# %% [markdown]
# # 11 Conversion: from .pth to a file that runs
#
# At 7B, `consolidated.00.pth` is a zip archive with a pickle in it, 13.5 GB. `ggml-model-q4_0.bin` is 4.2 GB
# that a loop of ten lines can read. What lies between them, and what is in such a file, byte by byte?
#
# Before this: [10 quantization](10_quantization.ipynb). After it: [12 speed](12_speed.ipynb). Sources:
# [llama.cpp's converter of March
# 2023](https://github.com/ggml-org/llama.cpp/blob/26c084662/convert-pth-to-ggml.py), [the GGUF
# specification](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

# %%
import mmap
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np

import tinyllama
from tinyllama import quant
from tinyllama.commands.convert import convert, quantize
from tinyllama.formats import open_checkpoint, parts
from tinyllama.lab import plots
from tinyllama.lab.lessons import check, same
from tinyllama.tokenizer import token_texts

MODEL = os.environ.get("TINYLLAMA_MODEL", "small")  # or "smollm2", or the path of your own 7B
llama = tinyllama.load(MODEL)
llama

# %% [markdown]
# ## The question
#
# We walk the whole way, in a temporary folder: through the files of March 2023 (ggml) and again through
# today's (GGUF). It starts from the checkpoint that ships with tinyllama, unless yours is one of Meta's
# kind, too, and small.

# %%
plots.flow(
    {
        "checkpoint": "consolidated.00.pth\nzip, pickle, f16",
        "f16 file": "ggml-model-f16.bin\nor model-f16.gguf",
        "q4_0 file": "ggml-model-q4_0.bin\nor model-q4_0.gguf",
    },
    title="two steps",
    arrows=["convert", "quantize"],
)

# %%
takes_part = llama.checkpoint.format == "meta" and llama.n_params < 1e9
source = llama if takes_part else tinyllama.load("small")
config = source.config

folder = tempfile.TemporaryDirectory()  # is removed when the notebook is closed
here = Path(folder.name)
shutil.copy(source.checkpoint.path / "params.json", here)

(f16,) = convert(source.checkpoint.path, 1, here / "ggml-model-f16.bin")
(q4_0,) = quantize(f16, here / "ggml-model-q4_0.bin", "q4_0")
(f16_gguf,) = convert(source.checkpoint.path, 1, here / "model-f16.gguf", format="gguf")
(q4_0_gguf,) = quantize(f16_gguf, here / "model-q4_0.gguf", "q4_0")

for file in (source.checkpoint.files[0].path, f16, q4_0, f16_gguf, q4_0_gguf):
    with file.open("rb") as opened:
        print(f"{file.name:20} {file.stat().st_size:10,} bytes, it begins with {opened.read(4)}")

# %% [markdown]
# In a terminal that is `tinyllama convert models/7B/ 1` and `tinyllama quantize`; the first lines are what
# they say before they begin. Each file says in its first four bytes what it is. "PK" is a zip archive;
# [02](02_checkpoint.ipynb) took it apart. Now the other two.

# %% [markdown]
# ## The ggml header
#
# The file of March 2023 has to be read from front to back, and that is easy:

# %%
plots.flow(
    {
        "header": "8 integers",
        "vocabulary": "length, text,\nlength, text, ...",
        "record": "name, shape, type",
        "numbers": "row after row",
        "record ": "the next tensor",
        "...": "until the file ends",
    },
    title="a ggml file",
)

# %% [markdown]
# The eight integers have 32 bits each, the least significant byte first (**little-endian**). The magic number
# `0x67676d6c` spells "ggml", and so it reads "lmgg" in the file.

# %%
data = f16.read_bytes()
fields = ["magic", "n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype"]
header = dict(zip(fields, struct.unpack("<8i", data[:32]), strict=True))

shown = [data[at : at + 4].hex(" ") for at in range(0, 32, 4)]
values = [hex(value) if name == "magic" else value for name, value in header.items()]
below = [f"{name}\n{value}" for name, value in zip(fields, values, strict=True)]
plots.tokens({"": shown}, [below], "the first 32 bytes, and what they say")

# %% [markdown]
# Those are Meta's `params.json`, with ggml's names. `n_rot` is `head_dim`, and `ftype` 1 says f16.
# `hidden_dim` isn't there: it follows from `n_mult` ([02](02_checkpoint.ipynb)). And `norm_eps` isn't there
# either. llama.cpp had it as a constant; tinyllama looks for `params.json` beside the file.

# %%
expected = [0x67676D6C, config.vocab_size, config.dim, config.multiple_of]
expected += [config.n_heads, config.n_layers, config.head_dim, 1]
assert list(header.values()) == expected

real = open_checkpoint(f16)
assert real.format == "ggml" and real.config == config

# %% [markdown]
# ## The vocabulary
#
# Then come all tokens: a length, so many bytes, the next length. It is what each token *decodes* to, no more.

# %%
at, texts = 32, []
for _ in range(header["n_vocab"]):
    (length,) = struct.unpack_from("<i", data, at)
    texts.append(data[at + 4 : at + 4 + length])
    at += 4 + length

header_size = at
assert texts == token_texts(source.checkpoint.vocabulary)
print(f"{header_size:,} bytes up to here")
print(texts[300:306], texts[131:134])

# %% [markdown]
# The last three are bytes that don't make a character alone. They decode to "�" (`ef bf bd`), and which byte
# it was is lost. Nor are the scores there, by which [01](01_tokens.ipynb) merges. But LLaMA's ids are in
# order: the bytes, then the pieces as they were learnt. So tinyllama
# [rebuilds](../tinyllama/formats/ggml.py) all of it:

# %%
TEXT = "Lily wanted 3 strawberries 🍓."
from_ggml = tinyllama.load(f16).tokenizer

assert from_ggml.encode(TEXT) == source.tokenizer.encode(TEXT)
[from_ggml.piece(token) for token in from_ggml.encode(TEXT)][:8]

# %% [markdown]
# ## The tensors
#
# From here to the end of the file: three integers (how many axes, how long is the name, which type), the axes
# **innermost first**, the name, the numbers. No table of contents, no alignment.

# %%
n_dims, name_length, ftype = struct.unpack_from("<3i", data, at)
axes = struct.unpack_from(f"<{n_dims}i", data, at + 12)
name = data[at + 12 + 4 * n_dims :][:name_length].decode()

shown = [data[at + 4 * i : at + 4 * i + 4].hex(" ") for i in range(3 + n_dims)] + [name]
below = ["n_dims", "len(name)", "ftype", *(["n_in", "n_out"][:n_dims]), "name"]
plots.tokens({"": shown}, [below], f"the first record: {n_dims} axes, {list(axes)}, type {ftype}")


# %%
KINDS = {0: "f32", 1: "f16", 2: "q4_0_2023", 3: "q4_1_2023"}  # of March 2023


def records(data, at):
    """Each tensor's name -> (shape [n_out, n_in], type, where its numbers begin)."""
    found = {}
    while at < len(data):
        n_dims, name_length, ftype = struct.unpack_from("<3i", data, at)
        shape = struct.unpack_from(f"<{n_dims}i", data, at + 12)[::-1]
        at += 12 + 4 * n_dims + name_length
        name = data[at - name_length : at].decode()
        found[name] = (shape, KINDS[ftype], at)
        at += quant.TYPES[KINDS[ftype]].nbytes(shape)
    return found


mine = records(data, header_size)
pieces = {name: tensor.pieces[0] for name, tensor in real.tensors.items()}  # where tinyllama finds them
assert mine == {name: (piece.shape, piece.type, piece.offset) for name, piece in pieces.items()}
len(mine), mine["layers.0.attention.wq.weight"], mine["layers.0.attention_norm.weight"]

# %% [markdown]
# Ten lines read the file. Matrices are f16, vectors f32: they are small, and everything is multiplied by
# them. The numbers are those of the checkpoint, so the model is the same:

# %%
PROMPT = "Once upon a time"
shape, _, start = mine["layers.0.attention.wq.weight"]
wq = np.frombuffer(data, "<f2", count=np.prod(shape), offset=start).reshape(shape)

assert np.array_equal(wq, source.weight("layers.0.attention.wq"))
assert np.array_equal(tinyllama.load(f16).logits(PROMPT), source.logits(PROMPT))


# %% [markdown]
# ## A converter by hand
#
# What can be read in ten lines can be written in a few more. `Tensor.dequantize` gives float32;
# `quant.quantize` knows the block formats of [10](10_quantization.ipynb).


# %%
def record(name, number, shape, blocks):
    """A tensor as a ggml file has it: what it is, then its numbers."""
    head = struct.pack(f"<{3 + len(shape)}i", len(shape), len(name), number, *shape[::-1])
    return head + name.encode() + blocks.tobytes()


assert record("layers.0.attention.wq.weight", 1, wq.shape, wq) in data


# %%
def as_ggml(checkpoint, ftype):
    """A whole ggml file: all that `tinyllama convert` and `quantize` do, in one place and in memory."""
    c = checkpoint.config
    sizes = (c.vocab_size, c.dim, c.multiple_of, c.n_heads, c.n_layers, c.head_dim)
    pieces = [struct.pack("<8i", 0x67676D6C, *sizes, ftype)]
    pieces += [struct.pack("<i", len(text)) + text for text in texts]
    for name, tensor in checkpoint.tensors.items():
        number = ftype if len(tensor.shape) == 2 else 0
        blocks = quant.quantize(tensor.dequantize(), KINDS[number])
        pieces.append(record(name, number, tensor.shape, blocks))
    return b"".join(pieces)


assert as_ggml(source.checkpoint, 1) == data
assert as_ggml(source.checkpoint, 2) == q4_0.read_bytes()

# %% [markdown]
# Byte for byte, both. The real ones differ in one thing: they take a megabyte of rows at a time
# ([convert.py](../tinyllama/commands/convert.py)), so that 65B converts on a laptop.

# %% [markdown]
# ## What quantize changes
#
# One byte of the header, each matrix' type, and the numbers. A block of March 2023: float32 `d`, 16 bytes of
# nibbles.

# %%
small = q4_0.read_bytes()
assert [i for i in range(header_size) if small[i] != data[i]] == [28]  # that of ftype

shape, kind, start = records(small, header_size)["layers.0.attention.wq.weight"]
(d,) = struct.unpack_from("<f", small, start)
nibbles = np.frombuffer(small, np.uint8, count=16, offset=start + 4)
first = (np.stack([nibbles & 15, nibbles >> 4], axis=1).ravel().astype(np.float32) - 8) * np.float32(d)

assert np.array_equal(first, tinyllama.load(q4_0).weight("layers.0.attention.wq")[0, :32])
print(f"{kind} {list(shape)}, d = {d:.4f}")
print("first weights", first[:4].round(3), "from", wq[0, :4].round(3))

# %%
for file in (f16, q4_0):
    print(f"{file.name}: {PROMPT}{tinyllama.load(file).generate(PROMPT, n_predict=24, temp=0)}", end="\n\n")

# %% [markdown]
# ## Two parts
#
# Meta cut 13B into two `.pth` files, and the ggml files of 2023 keep the cut: `ggml-model-f16.bin` and
# `ggml-model-f16.bin.1`, each with the whole header and vocabulary and its share of *every* tensor. We cut
# ours alike.

# %%
halves = [here / "two-f16.bin", here / "two-f16.bin.1"]
for number, half in enumerate(halves):
    pieces = [data[:header_size]]
    for name, tensor in real.tensors.items():
        share = tensor.pieces[0].blocks()  # plain numbers still
        if share.ndim == 2:
            share = np.split(share, 2, axis=parts.axis_of(name))[number]
        pieces.append(record(name, share.ndim - 1, share.shape, share))  # type 0 is f32, 1 is f16
    half.write_bytes(b"".join(pieces))

for name in ("layers.0.attention.wq.weight", "layers.0.attention.wo.weight", "norm.weight"):
    print(f"{name:30}", [list(records(half.read_bytes(), header_size)[name][0]) for half in halves])

# %% [markdown]
# `wq` is cut between rows, `wo` between columns, a norm not at all ([why](02_checkpoint.ipynb)). No number
# in the file says "part 1 of 2": that the embedding has half of `n_embd` columns does. Whoever reads it puts
# the shares side by side; quantizing works on each part alone, as long as the cut falls between blocks.

# %%
quantized = quantize(halves[0], here / "two-q4_0.bin", "q4_0")
together, whole = open_checkpoint(quantized[0]), open_checkpoint(q4_0)

assert [file.name for file in quantized] == ["two-q4_0.bin", "two-q4_0.bin.1"]
for name, tensor in whole.tensors.items():
    assert np.array_equal(together.tensors[name].dequantize(), tensor.dequantize())
assert same(tinyllama.load(halves[0]).logits(PROMPT), source.logits(PROMPT), source)

# %% [markdown]
# Half a model can't be run, and half a model is easily copied:

# %%
halves[1].rename(here / "elsewhere")
try:
    open_checkpoint(halves[0])
except tinyllama.TinyllamaError as error:
    print(str(error).removeprefix(f"{here}/"))

# %% [markdown]
# ## GGUF
#
# The file of March 2023 had no room. Other models need `n_kv_heads`, `rope_theta`, other tokenizers; q4_0
# changed its layout twice in May ([1](https://github.com/ggml-org/llama.cpp/pull/1405),
# [2](https://github.com/ggml-org/llama.cpp/pull/1508)). In August came
# [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): named keys for whatever there is to say,
# a table of contents, aligned numbers.

# %%
plots.flow(
    {
        "header": "magic, version,\nhow many of both",
        "key-values": "hyper-parameters,\nvocabulary",
        "tensor infos": "name, shape, type,\noffset of each",
        "padding": "to 32 bytes",
        "numbers": "of all tensors,\neach padded",
    },
    title="a GGUF file",
)

# %% [markdown]
# If your model is a GGUF file, we read that one, else what we have just written. Its first 96 bytes:

# %%
path = llama.checkpoint.path if llama.checkpoint.format == "gguf" else q4_0_gguf
with path.open("rb") as file:
    raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

for at in range(0, 96, 16):
    line = raw[at : at + 16]
    print(f"{at:3}  {line.hex(' ')}  {''.join(chr(byte) if 32 <= byte < 127 else '.' for byte in line)}")

# %%
magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", raw, 0)
assert magic == b"GGUF"
magic, version, n_tensors, n_keys

# %% [markdown]
# Then `n_keys` times: a key (a length in 64 bits, then UTF-8), the number of its value's type, the value.
# Numbers take as many bytes as they have; 8 is a string, 9 an array: its elements' type, how many, and the
# elements.


# %%
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read(kind, at):
    """A value of a type -> (the value, where the next thing begins)."""
    if kind == 8:
        (length,) = struct.unpack_from("<Q", raw, at)
        return raw[at + 8 : at + 8 + length].decode(), at + 8 + length
    if kind == 9:
        kind, count = struct.unpack_from("<IQ", raw, at)
        values, at = [], at + 12
        for _ in range(count):
            value, at = read(kind, at)
            values.append(value)
        return values, at
    code = "<" + NUMBERS[kind]
    return struct.unpack_from(code, raw, at)[0], at + struct.calcsize(code)


# %%
at, metadata = 24, {}
for _ in range(n_keys):
    key, at = read(8, at)
    (kind,) = struct.unpack_from("<I", raw, at)
    metadata[key], at = read(kind, at + 4)

for key, value in metadata.items():
    print(f"{key:40}", f"{len(value)} of them" if isinstance(value, list) else f"{value!r:.50}")

# %% [markdown]
# The first group says what the file is, the second is our `Config`, the third the whole vocabulary with its
# scores (or merges). Nothing is guessed any more.

# %%
checkpoint = open_checkpoint(path)
assert all(metadata[key] == value for key, value in checkpoint.metadata.items())
assert tuple(metadata["tokenizer.ggml.tokens"]) == checkpoint.vocabulary.pieces
assert metadata["llama.embedding_length"] == checkpoint.config.dim

# %% [markdown]
# The table of tensors: name, number of axes, the axes innermost first, type, and where its numbers begin.
# That is counted from the end of the table, rounded up to 32 bytes, so that in a mapped file each begins at
# an aligned address.

# %%
type_of = {kind.gguf_id: kind.name for kind in quant.TYPES.values() if kind.gguf_id is not None}
infos = {}
for _ in range(n_tensors):
    name, at = read(8, at)
    (n_axes,) = struct.unpack_from("<I", raw, at)
    *axes, kind, offset = struct.unpack_from(f"<{n_axes}QIQ", raw, at + 4)
    infos[name], at = (tuple(axes[::-1]), type_of[kind], offset), at + 16 + 8 * n_axes

alignment = metadata.get("general.alignment", 32)
start = -(-at // alignment) * alignment
for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output_norm.weight"):
    print(f"{name:24} {infos[name]}")

# %% [markdown]
# These are GGUF's names. [One table](../tinyllama/config.py) maps them to Meta's, which all of tinyllama
# uses. The bytes are where we say:

# %%
for meta_name, gguf_name, _ in tinyllama.config.tensor_names(checkpoint.config.n_layers):
    if gguf_name in infos:  # a model without output.weight uses its embedding twice
        shape, kind, offset = infos[gguf_name]
        tensor = checkpoint.tensors[meta_name]
        assert (shape, kind) == (tensor.shape, tensor.type)
        view = quant.TYPES[kind].view(raw, shape, start + offset)
        assert np.array_equal(view[:8], tensor.pieces[0].blocks(0, 8))  # some rows
len(infos)

# %% [markdown]
# ## What each file costs
#
# Where do the bytes go? Everything that isn't weights, of our four files and yours:

# %%
for file in dict.fromkeys([f16, q4_0, f16_gguf, q4_0_gguf, path]):
    tensors = open_checkpoint(file).tensors.values()
    weights = sum(tensor.nbytes for tensor in tensors)
    size, n_params = file.stat().st_size, sum(np.prod(tensor.shape) for tensor in tensors)
    print(f"{file.name[:22]:22} {size:11,} bytes, {size - weights:9,} beside the weights,", end=" ")
    print(f"{size / n_params:.3f} a weight")

# %% [markdown]
# Two bytes a weight in f16, 0.625 in 2023's q4_0, 0.5625 in today's, and more on average: today's quantizers
# keep the output matrix finer, in q6_k. The rest is nearly all vocabulary, which is next to nothing in a
# large model.

# %% [markdown]
# ## At 7B
#
# The sizes follow from the shapes alone: a matrix in blocks, a vector in f32.


# %%
def gigabytes(size, kind):
    """The weights of a published size in a type, in GB."""
    shapes = tinyllama.config.PRESETS[size].tensor_shapes().values()
    return sum(quant.TYPES[kind if len(shape) == 2 else "f32"].nbytes(shape) for shape in shapes) / 1e9


files = {"ggml f16, like the .pth": "f16", "ggml q4_1": "q4_1_2023", "ggml q4_0": "q4_0_2023"}
files |= {"GGUF q8_0": "q8_0", "GGUF q4_1": "q4_1", "GGUF q4_0": "q4_0"}
for name, kind in files.items():
    print(f"{name:24}", *(f"{size}: {gigabytes(size, kind):5.1f}" for size in tinyllama.config.PRESETS), "GB")

plots.bars([gigabytes("7B", kind) for kind in files.values()], list(files), "LLaMA 7B as a file", "GB")

# %% [markdown]
# All of a file is mapped, not read, when tinyllama opens it; that takes milliseconds. How fast it computes
# is a question of [how fast memory hands over](12_speed.ipynb) those gigabytes, once a token.

# %% [markdown]
# ## Exercises
#
# **1.** Read `norm.weight` out of `data`, `[dim]`. `mine` says where it begins.

# %% tags=["exercise"]
norm = ...  # np.frombuffer(data, ...)

_, _, begins = records(data, header_size)["norm.weight"]
check(
    norm,
    expected=source.weight("norm"),
    axes="dim",
    mistakes={"Vectors are float32: 4 bytes a number.": np.frombuffer(data, "<f2", config.dim, begins)},
    hint="np.frombuffer(data, dtype, count=..., offset=...); which type does `mine` name?",
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# (dim,), kind, begins = mine["norm.weight"]  # kind is "f32"
# norm = np.frombuffer(data, "<f4", count=dim, offset=begins)
# ```
#
# </details>

# %% [markdown]
# **2.** How many bytes of weights do the two q4_0 files of 13B hold together, in March 2023's layout? Every
# matrix is cut, and every vector is in both. (A block of 32 weights takes 20 bytes, a number of a vector 4.)

# %% tags=["exercise"]
n_bytes = ...  # a number

shapes = tinyllama.config.PRESETS["13B"].tensor_shapes()
shares = [
    (parts.share(name, shape, 2), "f32" if len(shape) == 1 else KINDS[2]) for name, shape in shapes.items()
]
check(
    n_bytes,
    expected=2 * sum(quant.TYPES[kind].nbytes(shape) for shape, kind in shares),
    mistakes={
        "The vectors are in both files.": sum(
            quant.TYPES["f32" if len(shape) == 1 else KINDS[2]].nbytes(shape) for shape in shapes.values()
        ),
        "That is today's q4_0, of 18 bytes a block.": 2
        * sum(quant.TYPES[kind.removesuffix("_2023")].nbytes(shape) for shape, kind in shares),
    },
)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# n_bytes = 0
# for shape in tinyllama.config.PRESETS["13B"].tensor_shapes().values():
#     if len(shape) == 2:
#         n_bytes += shape[0] * shape[1] // 32 * 20
#     else:
#         n_bytes += 2 * shape[0] * 4
# ```
#
# </details>

# %% [markdown]
# ## What a learner asks next
#
# - *What came between ggml and GGUF?* ggmf with scores, ggjt with alignment, both in March 2023; tinyllama
#   says so and asks for a new conversion.
# - *Can a q4_0 file become q8_0 again?* What was rounded stays rounded; `tinyllama quantize` refuses. Keep
#   the f16 file.
# - *Are Hugging Face's weights the same numbers?* Yes, with the rows of `wq` and `wk` in another order:
#   [04 RoPE](04_rope.ipynb).
# - *Does llama.cpp open what tinyllama writes?* Today's opens the GGUF; that of 12 March 2023 opens the
#   ggml, which is byte for byte what its own tools wrote.
# - *What is in my file?* `tinyllama inspect FILE`, without reading a weight. With `--check` it reads them all
#   and says which tensors hold NaN or infinity: those of a damaged file.
