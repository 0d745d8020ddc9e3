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

from ..config import Config
from ..errors import TinyllamaError
from ..machine.opening import read_file
from ..machine.limits import require_disk
from ..vocabulary import Vocabulary
from ..machine.files import newest, written_beside
from . import Checkpoint
from .parts import Part, count_parts, cut, merge, split_axis
from .pth import read_part, write_part

LARGEST_JSON = 1 << 16  # bytes of params.json, or of checklist.chk; they have a hundred


def read(folder: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder: every part, params.json, and tokenizer.model there or one folder up.

    Raises TinyllamaError, naming the file, where one is missing or doesn't hold what a LLaMA needs.
    """
    folder = Path(folder)
    parts = [read_part(path) for path in part_paths(folder)]
    params = read_params(folder)
    config = _config(folder, params, parts[0])
    _check_count(folder, parts, config)
    model = find_tokenizer(folder)
    if model is None:
        raise TinyllamaError(f"{folder / 'tokenizer.model'} is missing, and it isn't one folder up either")
    vocabulary = Vocabulary("sentencepiece", model=model)
    files = [part.path for part in parts]
    return Checkpoint(folder, "meta", config, merge(parts, config), vocabulary, files, params)


# --- the files around the weights -----------------------------------------------------------------


def read_params(folder: Path) -> dict:
    """params.json of a folder."""
    path = folder / "params.json"
    if not path.exists():
        raise TinyllamaError(f"{path} is missing")
    try:
        params = json.loads(read_file(newest(path), LARGEST_JSON), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        twin = f": {error}" if isinstance(error, _TwinError) else ""
        raise TinyllamaError(f"{path} isn't JSON{twin}") from None
    if not isinstance(params, dict):
        raise TinyllamaError(f"{path} holds no hyper-parameters")
    return params


class _TwinError(ValueError):
    """A key that is there twice: readers would disagree on its value."""


def _without_twins(pairs: list[tuple[str, object]]) -> dict:
    found = {}
    for key, value in pairs:
        if key in found:
            raise _TwinError(f"the key {key} is there twice")
        found[key] = value
    return found


def find_tokenizer(folder: Path) -> Path | None:
    """tokenizer.model in a folder or, where Meta puts it, in its parent."""
    candidates = (folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model")
    return next((path for path in candidates if path.is_file()), None)


def read_checklist(folder: Path) -> dict[str, str]:
    """File name -> md5 in hex, from Meta's checklist.chk; empty where there is none."""
    path = folder / "checklist.chk"
    if not path.is_file():
        return {}
    lines = read_file(path, LARGEST_JSON).decode("ascii", errors="replace").splitlines()
    found = (re.fullmatch(r"([0-9a-fA-F]{32}) [ *]?(\S+)\s*", line) for line in lines)
    return {match[2]: match[1].lower() for match in found if match}


def _config(folder: Path, params: dict, part: Part) -> Config:
    path, name = folder / "params.json", "tok_embeddings.weight"
    if name not in part.entries:
        raise TinyllamaError(f"{part.path} lacks the tensor {name}: it holds no LLaMA")
    vocab_size = part.entries[name].shape[0]
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise TinyllamaError(f"{path}: vocab_size isn't the {vocab_size} that {part.path} embeds")
    try:
        config = Config.from_params(params, vocab_size)
    except TinyllamaError as error:
        raise TinyllamaError(f"{path}: {error}") from None
    if config.n_layers > len(part.entries):
        raise TinyllamaError(
            f"{path} speaks of {config.n_layers} layers; {part.path} doesn't hold as many tensors"
        )
    return config


def _check_count(folder: Path, parts: list[Part], config: Config) -> None:
    """Every part says by its shapes how many there must be."""
    n_parts = count_parts(parts[0], config)
    if len(parts) < n_parts:
        missing = folder / part_name(len(parts))
        raise TinyllamaError(f"{missing} is missing: this checkpoint is cut into {n_parts} parts")
    if len(parts) > n_parts:
        raise TinyllamaError(
            f"{parts[n_parts].path} is one part too many: {parts[0].path.name} is 1 of {n_parts}"
        )


# --- the parts ------------------------------------------------------------------------------------


def part_name(number: int) -> str:
    """consolidated.00.pth, consolidated.01.pth, ..."""
    return f"consolidated.{number:02d}.pth"


def part_paths(folder: Path) -> list[Path]:
    """Every consolidated.NN.pth of a folder, 00 first, without a hole."""
    if not folder.is_dir():
        raise TinyllamaError(f"{folder}: no such folder")
    found = {path.name for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", path.name)}
    paths = [folder / part_name(number) for number in range(max(len(found), 1))]
    for path in paths:
        if path.name not in found:
            raise TinyllamaError(f"{path} is missing")
    return [newest(path) for path in paths]


# --- cutting --------------------------------------------------------------------------------------


def split(folder: str | Path, out_folder: str | Path, n_parts: int) -> list[Path]:
    """Cut a checkpoint of one part into several, as Meta cut 13B and larger (needs torch to write them).

    Returns the new parts. params.json and tokenizer.model are copied beside them. Raises TinyllamaError
    where the tensors don't divide.
    """
    folder, out_folder = Path(folder), Path(out_folder)
    checkpoint = read(folder)
    if n_parts < 1 or len(checkpoint.files) > 1:
        raise TinyllamaError(f"{folder}: {len(checkpoint.files)} part(s) can't be cut into {n_parts}")
    if out_folder.resolve() == folder.resolve():
        raise TinyllamaError(f"{out_folder}: the parts would replace the checkpoint itself")
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2 and tensor.shape[split_axis(name)] % n_parts:
            raise TinyllamaError(f"{folder}: {name} {list(tensor.shape)} doesn't divide into {n_parts} parts")
    copied = [folder / "params.json", checkpoint.vocabulary.model]
    paths = [out_folder / part_name(number) for number in range(n_parts)]
    try:
        out_folder.mkdir(parents=True, exist_ok=True)
        require_disk(checkpoint.files[0].stat().st_size, out_folder, f"cutting {folder}")
        targets = [*paths, *(out_folder / original.name for original in copied)]
        with written_beside(*targets) as unfinished:
            for number, path in enumerate(unfinished[:n_parts]):
                write_part(
                    {name: cut(tensor, number, n_parts) for name, tensor in checkpoint.tensors.items()}, path
                )
            for original, path in zip(copied, unfinished[n_parts:], strict=True):
                path.write_bytes(original.read_bytes())
    except OSError as error:
        raise TinyllamaError(f"{error.filename}: {error.strerror}") from None
    return paths
