"""Meta's checkpoint: a folder with

    consolidated.00.pth    the weights, or one part of them: pth.py has its byte layout
    consolidated.01.pth    the next part, as parts.py says, and so on
    params.json            hyper-parameters
    checklist.chk          md5 sums
    tokenizer.model        here or one folder up: SentencePiece's, since Llama 3 tiktoken's

Before Llama 3 vocab_size is -1 in params.json: Meta took it from the tokenizer, we take it from the weights.
Mistral's own folders are alike: consolidated.safetensors, and hidden_dim and head_dim in params.json.
"""

import re
from dataclasses import replace
from pathlib import Path

from ..config import EMBEDDING, LARGEST, Config, RopeScaling, hidden_dim_of
from ..errors import naming, require
from ..machine.files import read_file
from . import Checkpoint
from .folders import LARGEST_JSON, folder_of, number, read_json
from .parts import QUERIES, Part, count_parts, merge
from .pth import read_part
from .safetensors import read_shards, shard_paths
from .vocabulary import find_vocabulary, vocabulary_files

SAFETENSORS = "consolidated.safetensors"  # Mistral's: one file, or several and an index
HIDDEN = "layers.0.feed_forward.w1.weight"

#: Keys of params.json that say that a model is computed in another way, and in which.
UNSUPPORTED = {
    "moe": "a mixture of experts",
    "vision_encoder": "a model of pictures and text",
    "vision_chunk_size": "a model of pictures and text",
    "quantization": "quantized weights",
    "quantization_args": "quantized weights",
    "lora": "weights of a LoRA adapter",
    "lora_args": "weights of a LoRA adapter",
    "yarn": "other frequencies of RoPE",
    "llama_4_scaling": "attention that is scaled by position",
}

#: How many tokens a model was trained on, by what params.json shows of it; the first row that applies.
CONTEXTS = (
    (lambda params: params.get("use_scaled_rope"), 131072),  # Llama 3.1, 3.2, 3.3
    (lambda params: "hidden_dim" in params and params.get("vocab_size") == 131072, 131072),  # Mistral Nemo
    (lambda params: "hidden_dim" in params, 32768),  # Mistral 7B
    (lambda params: params.get("rope_theta") == 5e5, 8192),  # Llama 3
    (lambda params: params.get("rope_theta") == 1e6, 16384),  # Code Llama
    (lambda params: params.get("dim") == 8192 and not params.get("n_kv_heads"), 2048),  # LLaMA 65B
    (lambda params: params.get("norm_eps") == 1e-5, 4096),  # Llama 2
    (lambda params: True, 2048),  # LLaMA
)


def recognizes(path: Path) -> bool:
    """Whether a path is a folder of Meta's, or in one its params.json or a file of weights."""
    named = path.is_dir() or path.suffix in (".pth", ".json", ".safetensors")
    names = ("params.json", part_name(0), SAFETENSORS, f"{SAFETENSORS}.index.json")
    return named and any((folder_of(path) / name).exists() for name in names)


def read(path: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder: every part, params.json, and the tokenizer there or one folder up.

    Raises TinyllamaError, naming the file, where one is missing or doesn't hold what a LLaMA needs.
    """
    folder = folder_of(Path(path))
    paths, params = part_paths(folder), read_json(folder / "params.json")
    first = _read(paths[0])
    with naming(paths[0]):
        require(EMBEDDING in first, f"the tensor {EMBEDDING} is missing: this is no LLaMA")
        n_rows, *n_cols = first[EMBEDDING].shape
    with naming(folder / "params.json"):
        config = config_of(params, n_rows, first)
    with naming(paths[0]):
        n_parts = count_parts(first, config)
    missing = f"{folder / part_name(len(paths))}: is missing; this checkpoint is cut into {n_parts} parts"
    require(len(paths) >= n_parts, missing)
    require(len(paths) <= n_parts, f"{paths[-1]}: one part too many; {paths[0].name} is 1 of {n_parts}")
    with naming(folder / "params.json"):
        vocab_size = n_rows * n_cols[0] * n_parts // config.dim  # cut by columns, or by rows
        right = params.get("vocab_size", -1) in (-1, vocab_size)
        require(right, f"vocab_size isn't the {vocab_size} that {paths[0].name} embeds")
        config = replace(config, vocab_size=vocab_size)
    parts = [first, *map(_read, paths[1:])]
    tensors, vocabulary = merge(parts, config), find_vocabulary(folder, vocab_size)
    files = list(dict.fromkeys(piece.data for part in parts for piece in part.values()))
    return Checkpoint(folder, "meta", config, tensors, vocabulary, files, params)


def _read(path: Path) -> Part:
    return read_part(path) if path.suffix == ".pth" else read_shards(path.parent, path.name)


def stamp(path: Path) -> list[Path]:
    """The files that `read` looks at."""
    folder = folder_of(path)
    weights = [file for part in part_paths(folder) for file in shard_paths(folder, part.name)]
    around = [folder / "params.json", *vocabulary_files(folder)]
    return [path for path in (*weights, *around) if path.exists()]


def part_name(number: int) -> str:
    """consolidated.00.pth, consolidated.01.pth, ..."""
    return f"consolidated.{number:02d}.pth"


def part_paths(folder: Path) -> list[Path]:
    """Every consolidated.NN.pth of a folder, 00 first, or the one file of safetensors, which may be an index.

    Raises TinyllamaError where one is missing.
    """
    require(folder.is_dir(), f"{folder}: no such folder")
    found = list(folder.glob("consolidated.[0-9][0-9].pth"))
    if not found and any(path.exists() for path in shard_paths(folder, SAFETENSORS)):
        return [folder / SAFETENSORS]
    paths = [folder / part_name(number) for number in range(max(len(found), 1))]
    for path in paths:
        require(path in found, f"{path}: is missing")
    return paths


def config_of(params: dict, vocab_size: int, part: Part | None = None) -> Config:
    """What params.json says. Its own vocab_size may be -1: the embedding's is passed in.

    Args:
        part: whose shapes say what params.json doesn't.
    Raises TinyllamaError, naming the key, where a value is missing, of another kind or not supported.
    """
    for key, what in UNSUPPORTED.items():
        none = params.get(key) in (None, False, 0, -1)
        require(none, f"{key} stands for {what}, which isn't supported")
    dim, n_heads = number(params, "dim", int), number(params, "n_heads", int)
    return Config(
        dim=dim,
        n_layers=number(params, "n_layers", int),
        n_heads=n_heads,
        vocab_size=vocab_size,
        hidden_dim=_hidden_dim(params, dim, part),
        n_kv_heads=number(params, "n_kv_heads", int, n_heads),
        multiple_of=number(params, "multiple_of", int, 256),
        norm_eps=number(params, "norm_eps", float, 1e-6),
        rope_theta=number(params, "rope_theta", float, 10000.0),
        max_seq_len=_context(params),
        head_dim=number(params, "head_dim", int, 0) or _head_dim(params, dim, n_heads, part),
        sliding_window=number(params, "sliding_window", int, 0),
        rope_scaling=_scaling(params, dim),
    )


def _hidden_dim(params: dict, dim: int, part: Part | None) -> int:
    """As Mistral's params.json says it, by Meta's rule, or of the weights."""
    if own := number(params, "hidden_dim", int, 0):
        return own
    if part and HIDDEN in part and "multiple_of" not in params:
        return part[HIDDEN].shape[0]
    multiple_of = number(params, "multiple_of", int, 256)
    multiplier = number(params, "ffn_dim_multiplier", float, 1.0)
    require(0 < dim <= LARGEST["dim"], f"dim can't be {dim}")
    require(0 < multiple_of <= LARGEST["hidden_dim"], f"multiple_of can't be {multiple_of}")
    require(0 < multiplier <= LARGEST["hidden_dim"], f"ffn_dim_multiplier can't be {multiplier}")
    return hidden_dim_of(dim, multiple_of, multiplier)


def _head_dim(params: dict, dim: int, n_heads: int, part: Part | None) -> int:
    """Of the weights, if they are certainly whole; otherwise 0, the usual."""
    whole = part and part[EMBEDDING].shape == (params.get("vocab_size"), dim) and QUERIES in part
    return part[QUERIES].shape[0] // max(n_heads, 1) if whole else 0


def _context(params: dict) -> int:
    """How many tokens a model was trained on: as params.json says it, or such models were."""
    usual = next(length for applies, length in CONTEXTS if applies(params))
    named = number(params, "max_position_embeddings", int, usual)
    return number(params, "max_seq_len", int, named)


def _scaling(params: dict, dim: int) -> RopeScaling | None:
    """Llama 3.1's, whose factor params.json doesn't say: it is 8, but 32 in the small ones of 3.2."""
    if not params.get("use_scaled_rope"):
        return None
    factor = number(params, "rope_scaling_factor", float, 32.0 if dim in (2048, 3072) else 8.0)
    high = number(params, "rope_high_freq_factor", float, 4.0)
    return RopeScaling("llama3", factor, original_context=8192, high_freq_factor=high)


def read_checklist(folder: Path) -> dict[str, str]:
    """File name -> md5 in hex, from Meta's checklist.chk; empty where there is none."""
    path = folder / "checklist.chk"
    if not path.is_file():
        return {}
    lines = read_file(path, LARGEST_JSON).decode("ascii", errors="replace").splitlines()
    found = (re.fullmatch(r"([0-9a-fA-F]{32}) [ *]?(\S+)\s*", line) for line in lines)
    return {match[2]: match[1].lower() for match in found if match}
