"""Meta's checkpoint: a folder with

    consolidated.00.pth    the weights, or one part of them: pth.py has its byte layout
    consolidated.01.pth    the next part, as parts.py says, and so on
    params.json            hyper-parameters
    checklist.chk          md5 sums
    tokenizer.model        here or one folder up

vocab_size is -1 in params.json: Meta took it from the tokenizer, we take it from the embedding.
"""

import json
import re
from pathlib import Path

from ..config import LARGEST, Config, hidden_dim_of
from ..errors import naming, require
from ..machine.files import read_file
from . import Checkpoint
from .parts import EMBEDDING, count_parts, merge
from .pth import read_part
from .tokenizer_model import vocabulary_from_model

LARGEST_JSON = 1 << 16  # bytes of params.json, or of checklist.chk; they have a hundred


def recognizes(path: Path) -> bool:
    """Whether a path is a folder of Meta's, or in one its params.json or a .pth file."""
    folder = _folder(path)
    named = path.is_dir() or path.suffix in (".pth", ".json")
    return named and any((folder / name).exists() for name in (part_name(0), "params.json"))


def read(path: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder: every part, params.json, and tokenizer.model there or one folder up.

    Raises TinyllamaError, naming the file, where one is missing or doesn't hold what a LLaMA needs.
    """
    folder = _folder(Path(path))
    paths, params = part_paths(folder), read_params(folder)
    first = read_part(paths[0])
    with naming(paths[0]):
        require(EMBEDDING in first, f"the tensor {EMBEDDING} is missing: this is no LLaMA")
        vocab_size = first[EMBEDDING].shape[0]
    with naming(folder / "params.json"):
        right = params.get("vocab_size", -1) in (-1, vocab_size)
        require(right, f"vocab_size isn't the {vocab_size} that {paths[0].name} embeds")
        config = config_of(params, vocab_size)
    with naming(paths[0]):
        n_parts = count_parts(first, config)
    missing = f"{folder / part_name(len(paths))}: is missing; this checkpoint is cut into {n_parts} parts"
    require(len(paths) >= n_parts, missing)
    require(len(paths) <= n_parts, f"{paths[-1]}: one part too many; {paths[0].name} is 1 of {n_parts}")
    parts = [first, *map(read_part, paths[1:])]
    model = find_tokenizer(folder)
    require(model, f"{folder / 'tokenizer.model'}: is missing, and it isn't one folder up either")
    files = [next(iter(part.values())).data for part in parts]
    tensors, vocabulary = merge(parts, config), vocabulary_from_model(model)
    return Checkpoint(folder, "meta", config, tensors, vocabulary, files, params)


def stamp(path: Path) -> list[Path]:
    """The files that `read` looks at."""
    folder = _folder(path)
    around = [folder / "params.json", *_tokenizers(folder)]
    return [path for path in (*part_paths(folder), *around) if path.exists()]


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def part_name(number: int) -> str:
    """consolidated.00.pth, consolidated.01.pth, ..."""
    return f"consolidated.{number:02d}.pth"


def part_paths(folder: Path) -> list[Path]:
    """Every consolidated.NN.pth of a folder, 00 first; raises TinyllamaError where one is missing."""
    require(folder.is_dir(), f"{folder}: no such folder")
    found = list(folder.glob("consolidated.[0-9][0-9].pth"))
    paths = [folder / part_name(number) for number in range(max(len(found), 1))]
    for path in paths:
        require(path in found, f"{path}: is missing")
    return paths


def read_params(folder: Path) -> dict:
    """params.json of a folder."""
    path = folder / "params.json"
    data = read_file(path, LARGEST_JSON)
    with naming(path):
        with naming("isn't JSON", RecursionError):
            params = json.loads(data, object_pairs_hook=_each_once)
        require(isinstance(params, dict), "holds no hyper-parameters")
    return params


def config_of(params: dict, vocab_size: int) -> Config:
    """What params.json says. Its own vocab_size is -1: the embedding's is passed in.

    Raises TinyllamaError, naming the key, where a value is missing or of another kind.
    """
    dim, multiple_of = _number(params, "dim", int), _number(params, "multiple_of", int, 256)
    n_heads, multiplier = _number(params, "n_heads", int), _number(params, "ffn_dim_multiplier", float, 1.0)
    require(0 < dim <= LARGEST["dim"], f"dim can't be {dim}")
    require(0 < multiple_of <= LARGEST["hidden_dim"], f"multiple_of can't be {multiple_of}")
    require(0 < multiplier <= LARGEST["hidden_dim"], f"ffn_dim_multiplier can't be {multiplier}")
    scaled = params.get("use_scaled_rope")  # Llama 3.1's
    require(not scaled, "use_scaled_rope, other frequencies of RoPE, isn't supported")
    return Config(
        dim=dim,
        n_layers=_number(params, "n_layers", int),
        n_heads=n_heads,
        vocab_size=vocab_size,
        hidden_dim=hidden_dim_of(dim, multiple_of, multiplier),
        n_kv_heads=_number(params, "n_kv_heads", int, n_heads),
        multiple_of=multiple_of,
        norm_eps=_number(params, "norm_eps", float, 1e-6),
        rope_theta=_number(params, "rope_theta", float, 10000.0),
    )


def _number(params: dict, name: str, kind: type, default: float | None = None):
    """A whole number, or any: JSON doesn't tell 1 from 1.0, and has numbers beyond a float's."""
    value = default if params.get(name) is None else params[name]
    require(value is not None, f"{name} is missing")
    fine = type(value) is int or (kind is float and type(value) is float)
    shown = repr(value)[:40] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    what = "whole number" if kind is int else "number"
    require(fine and abs(value) < 1e30, f"{name} must be a {what}, not {shown}")
    return kind(value)


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    require(len(found) == len(pairs), f"a key is there twice: {', '.join(key for key, _ in pairs)}")
    return found


def find_tokenizer(folder: Path) -> Path | None:
    """tokenizer.model in a folder or, where Meta puts it, in its parent."""
    return next((path for path in _tokenizers(folder) if path.is_file()), None)


def _tokenizers(folder: Path) -> tuple[Path, Path]:
    return folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model"


def read_checklist(folder: Path) -> dict[str, str]:
    """File name -> md5 in hex, from Meta's checklist.chk; empty where there is none."""
    path = folder / "checklist.chk"
    if not path.is_file():
        return {}
    lines = read_file(path, LARGEST_JSON).decode("ascii", errors="replace").splitlines()
    found = (re.fullmatch(r"([0-9a-fA-F]{32}) [ *]?(\S+)\s*", line) for line in lines)
    return {match[2]: match[1].lower() for match in found if match}
