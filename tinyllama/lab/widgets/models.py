"""The models that can be chosen: those by name, then all others on this computer."""

from glob import escape
from pathlib import Path

from ...machine import hub, places
from ...machine.download import MODELS
from ...machine.limits import human


def choices() -> list[tuple[str, str]]:
    """(label, what `load` takes), of the models by name, and of all that `places.everything` finds."""
    found = dict.fromkeys(["small", *MODELS]) | dict(places.everything())
    return [(_label(name, path), name) for name, path in found.items()]


def _label(name: str, path: Path | None) -> str:
    if path is None:
        return f"{name} (not downloaded yet)" if name in MODELS else name  # Ollama's, whose size isn't known
    if Path(name).exists():
        # A ggml file has the same name for every model, so its folder says which one it is.
        name = path.name if path.suffix == ".gguf" else f"{path.parent.name}/{path.name}"
    return f"{name} ({_size(path)})"


def _size(path: Path) -> str:
    """The size of all parts together; the other parts of a ggml file end in .1, .2 and so on."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in (".pth", ".safetensors")]
    else:
        files = [path.with_name(part) for part in hub.parts(path.name)]
        files += path.parent.glob(f"{escape(path.name)}.[0-9]*")
    return human(sum(file.stat().st_size for file in files if file.exists()))
