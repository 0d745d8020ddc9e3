"""Where models lie: at a path, under a name, in the Hugging Face hub's cache, in Ollama's store.

And where the history of `chat` does.
"""

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..errors import naming, require
from .download import MODELS, cache_folder, models_folder, small_folder

#: The stores of other programs by the prefix of a name: modules beside this one, imported when they are
#: asked. Each has `find(name)` and `models()`.
STORES = {"hf:": "hub", "ollama:": "ollama"}
DEEPEST = 3  # folders below one of `folders`: models/7B/ggml-model-q4_0.bin, models/org/name/model.gguf
GGML = (b"lmgg", b"fmgg", b"tjgg")  # the first bytes of files of 2023


def default_model() -> str:
    """The model that is meant where nobody names one."""
    return os.environ.get("TINYLLAMA_MODEL") or "small"


def find(model: str | Path | None) -> Path:
    """The file or folder of a model, given its path or its name; a path wins over a name.

    Args:
        model: a path, "small", "smollm2", "hf:org/name", "hf:org/name:Q4_K_M", "ollama:name" or
            "ollama:name:tag". What isn't in the hub's cache is fetched, unless HF_HUB_OFFLINE is set.
    Raises:
        TinyllamaError: it isn't there, and what to do.
    """
    model = default_model() if model is None else model
    require(isinstance(model, str | Path) and model != "", f"a model is a path or a name, not {model!r}")
    with naming(model):
        if Path(model).exists():
            return Path(model)
    if model == "small":
        return small_folder()
    for prefix, store in STORES.items():
        if str(model).startswith(prefix):
            return _store(store).find(str(model))
    names = ", ".join(["small", *MODELS, "hf:org/name", "ollama:name"])
    require(model in MODELS, f"{model}: there is no such file, nor a model of this name ({names})")
    path = models_folder() / MODELS[model].filename
    require(path.exists(), f"{model}: isn't here yet; `tinyllama download {model}` fetches it")
    return path


def everything() -> Iterator[tuple[str, Path | None]]:
    """A name that `find` takes, and the file or folder, of all that looks like a model on this computer.

    First the models with a name of their own, then what lies in `folders`, in the Hugging Face hub's cache,
    and in Ollama's store, where the path is None: `find` says it, or what is wrong with the store.
    """
    known = {"small": small_folder()} | {name: models_folder() / MODELS[name].filename for name in MODELS}
    known = {name: path for name, path in known.items() if path.exists()}
    yield from known.items()
    seen = {path.resolve() for path in known.values()}
    for path in (path for folder in folders() for path in in_folder(folder.absolute(), DEEPEST)):
        if path.resolve() not in seen:
            seen.add(path.resolve())
            is_below = path.is_relative_to(Path.cwd())
            yield str(path.relative_to(Path.cwd()) if is_below else path), path
    yield from _store("hub").models()
    yield from ((name, None) for name in _store("ollama").models())


def _store(name: str) -> ModuleType:
    return import_module(f".{name}", __package__)


def folders() -> list[Path]:
    """Where models lie that have no name but their path."""
    checkout = models_folder().parents[1]
    others = [checkout / "models", Path("models"), Path("data/models")]
    return [models_folder(), cache_folder() / "models", *others]


def state_folder() -> Path:
    """Where tinyllama keeps what a user typed."""
    usual = "Library/Application Support" if sys.platform == "darwin" else ".local/state"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / usual) / "tinyllama"


def in_folder(folder: Path, deepest: int) -> Iterator[Path]:
    """GGUF and ggml files, of those in parts the first, and folders of Meta's and of Hugging Face's."""
    first_part = _store("hub").parts
    is_open = os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)
    paths = sorted(folder.iterdir()) if is_open else []
    suffixes, names = {path.suffix for path in paths}, {path.name for path in paths}
    if {"params.json", "config.json"} & names and {".pth", ".safetensors"} & suffixes:
        yield folder
    for path in paths:
        if deepest and os.path.isdir(path) and not path.name.startswith("."):
            yield from in_folder(path, deepest - 1)
        elif os.path.isfile(path) and path.name == first_part(path.name)[0] and _is_model(path):
            yield path


def _is_model(path: Path) -> bool:
    """Whether a file is called .gguf, or .bin and begins as one of ggml's: there are other .bin files."""
    if path.suffix != ".bin" or not os.access(path, os.R_OK):
        return path.suffix == ".gguf"
    with path.open("rb") as file:
        return file.read(4) in GGML
