"""f16 models of many shapes, on which mixes of types differ; the same bytes on every computer."""

import gguf
import numpy as np

#: What differs from `write`'s defaults.
CASES = {
    "own keys": {},
    "grouped": {"n_kv_heads": 2, "n_layers": 17},
    "80 layers, own keys": {"n_layers": 80},
    "80 layers, grouped": {"n_layers": 80, "n_kv_heads": 4},
    "tied": {"n_layers": 9, "tied": True},
    "rows of 288 and 512": {"dim": 288, "hidden_dim": 512, "n_heads": 6, "n_kv_heads": 6, "tied": True},
    "rows of 64 and 172": {"dim": 64, "hidden_dim": 172, "n_kv_heads": 4, "n_layers": 5},
    "rows of 172": {"dim": 172, "hidden_dim": 256, "n_heads": 2, "n_kv_heads": 1},
    "qwen2": {"family": "qwen2", "n_layers": 24, "n_kv_heads": 2, "tied": True},
    "qwen2, 80 layers": {"family": "qwen2", "n_layers": 80},
    "qwen3, 80 layers": {"family": "qwen3", "n_layers": 80, "n_kv_heads": 2},
}
#: Of these the data are compared.
WHOLE = {
    "grouped": {"n_layers": 2},
    "rows of 288 and 512": {"n_layers": 1},
    "rows of 172": {"n_layers": 1},
    "qwen2": {"n_layers": 1},
}
VOCAB_SIZE = 40


def write(
    path,
    family="llama",
    dim=256,
    hidden_dim=256,
    n_layers=4,
    n_heads=8,
    n_kv_heads=8,
    tied=False,
    empty=False,
    split=0,
):
    """A GGUF file.

    Args:
        empty: of zeros, where types alone matter.
        split: into files of so many tensors, NAME-00001-of-00003.gguf, ...
    """
    out, head_dim = gguf.GGUFWriter(path, family, split_max_tensors=split), dim // n_heads
    out.add_context_length(128)
    out.add_embedding_length(dim)
    out.add_block_count(n_layers)
    out.add_feed_forward_length(hidden_dim)
    out.add_head_count(n_heads)
    out.add_head_count_kv(n_kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(head_dim)
    out.add_file_type(1)
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list(["<unk>", "<s>", "</s>", *(f"▁{i}" for i in range(3, VOCAB_SIZE))])
    out.add_token_scores([0.0] * VOCAB_SIZE)
    out.add_token_types([2, 3, 3] + [1] * (VOCAB_SIZE - 3))
    shapes = {"token_embd.weight": (VOCAB_SIZE, dim), "output_norm.weight": (dim,)}
    shapes |= {} if tied else {"output.weight": (VOCAB_SIZE, dim)}
    kv_dim = head_dim * n_kv_heads
    layer = {
        "attn_q": (dim, dim),
        "attn_k": (kv_dim, dim),
        "attn_v": (kv_dim, dim),
        "attn_output": (dim, dim),
    }
    layer |= {"ffn_gate": (hidden_dim, dim), "ffn_up": (hidden_dim, dim), "ffn_down": (dim, hidden_dim)}
    norms = {"attn_norm": dim, "ffn_norm": dim}
    norms |= {"attn_q_norm": head_dim, "attn_k_norm": head_dim} if family == "qwen3" else {}
    biases = {"attn_q": dim, "attn_k": kv_dim, "attn_v": kv_dim} if family == "qwen2" else {}
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"blk.{i}.{name}.weight": (width,) for name, width in norms.items()}
        shapes |= {f"blk.{i}.{name}.bias": (width,) for name, width in biases.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        # Sums of whole numbers: nearly normal, with some large ones, and exact in float16.
        x = np.zeros(shape) if empty else random.integers(-170, 171, (3, *shape)).sum(0) / 2048
        out.add_tensor(name, x.astype(np.float16 if len(shape) == 2 else np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def importance(path):
    """Mean squares of the inputs of each matrix in a layer, by its name; some are 0, some are large."""
    found, random = {}, np.random.default_rng(1)
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2 and tensor.name.startswith("blk."):
            x = random.integers(0, 1000, int(tensor.shape[0])) ** 2 / 1024
            found[tensor.name] = x.astype(np.float32)
    return found
