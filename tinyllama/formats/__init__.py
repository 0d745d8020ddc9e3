"""Model files: a registry, and what is read from a file whatever its format.

A format is a module with three functions, and is listed in FOLDERS or FILES:

    recognizes(source)  whether this is such a folder (its path), or such a file (mapped, and only once)
    read(source)        -> Checkpoint: every count in it is checked, no weight is read
    stamp(path)         the files that `read` looks at: a model is loaded anew when one of them changes

Each opens with its byte layout as prose: gguf (today's), ggml (March 2023), huggingface and meta (folders).
"""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..config import Config
from ..errors import TinyllamaError, naming, require
from ..machine.files import MappedFile, kind_of
from ..machine.places import default_model as default_model  # for `load`
from ..machine.places import find
from ..tensor import Tensor
from ..tokenizer import Vocabulary

FOLDERS, FILES = ("huggingface", "meta"), ("gguf", "ggml")
MEMBERS = (".pth", ".json", ".safetensors")  # of files that stand for the folder they lie in


@dataclass
class Checkpoint:
    """What a model file holds, whatever its format: no weight has been read into memory yet."""

    path: Path  # the file, or the folder
    format: str  # "huggingface", "meta", "gguf" or "ggml"
    config: Config
    tensors: dict[str, Tensor]  # by Meta's names
    vocabulary: Vocabulary
    files: list[MappedFile]  # all that hold weights, in the order of the parts
    #: GGUF's key-values but for the vocabulary; config.json; params.json
    metadata: dict = field(default_factory=dict)
    template: str = ""  # of a chat, in Jinja

    def check_unchanged(self) -> None:
        """Raises TinyllamaError if somebody has changed a file since it was mapped."""
        for file in self.files:
            file.check()


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model: a path, or a name that `machine.places` knows.

    Raises TinyllamaError, naming the file, where there is none or it doesn't hold what it says.
    """
    path = find(model)
    with naming(path):
        module, source = format_of(path)
        return module.read(source)


def stamp(model: str | Path) -> tuple:
    """Changes when a file that `open_checkpoint` would look at does."""
    path = find(model).absolute()  # a link keeps its name: others may lie beside it
    with naming(path):
        files = [(file.resolve(), file.stat()) for file in format_of(path)[0].stamp(path)]
        return str(path.resolve()), *((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in files)


def format_of(path: Path) -> tuple[ModuleType, Path | MappedFile]:
    """The module of a model's format, and what its `read` takes."""
    in_folder = path.is_dir() or path.suffix in MEMBERS
    source = path if in_folder else MappedFile(path)
    for name in FOLDERS if in_folder else FILES:
        module = import_module(f".{name}", __name__)
        if module.recognizes(source):
            return module, source
    require(not path.is_dir(), "no model but a folder without config.json or consolidated.00.pth")
    raise TinyllamaError(f"no model file (ggml or GGUF) but {kind_of(MappedFile(path))}")
