"""The models that can be chosen: by name, and every model file in the folders where models lie."""

import re
from dataclasses import dataclass
from pathlib import Path

from ...machine.download import MODELS, models_folder, small_folder
from ...machine.limits import human


@dataclass(frozen=True)
class Choice:
    """A model to choose: what the tool shows, and what `load` takes."""

    label: str
    model: str


def folders() -> list[Path]:
    """Where model files are looked for: `data/models` and `models` of the checkout and of this folder."""
    checkout, here = models_folder().parents[1], Path.cwd()
    places = [models_folder(), checkout / "models", here / "data" / "models", here / "models"]
    return [place for place in dict.fromkeys(place.resolve() for place in places) if place.is_dir()]


def choices(places: list[Path] | None = None) -> list[Choice]:
    """The models by name, then the files found in these folders and those just below."""
    named = [Choice(f"small ({_size(small_folder())})", "small"), *map(_named, MODELS)]
    known = {(models_folder() / model.filename).resolve() for model in MODELS.values()}
    places = folders() if places is None else places
    found = dict.fromkeys(path for place in places for path in _model_files(place))
    return named + [
        Choice(f"{_short(path)} ({_size(path)})", str(path)) for path in found if path.resolve() not in known
    ]


def _named(name: str) -> Choice:
    path = models_folder() / MODELS[name].filename
    return Choice(f"{name} ({_size(path) if path.exists() else 'not downloaded yet'})", name)


def _model_files(folder: Path) -> list[Path]:
    """GGUF files, first parts of ggml files, folders with a checkpoint of Meta's."""
    paths = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern))]
    return [path for path in paths if path.suffix in (".gguf", ".bin") or _is_checkpoint(path)]


def _is_checkpoint(path: Path) -> bool:
    return (path / "consolidated.00.pth").is_file()


def _size(path: Path) -> str:
    """Of all parts together: a file's others end in .1, .2 and so on."""
    folder, pattern = (
        (path, r"consolidated\.\d+\.pth")
        if path.is_dir()
        else (path.parent, rf"{re.escape(path.name)}(\.\d+)?")
    )
    parts = [part for part in folder.iterdir() if re.fullmatch(pattern, part.name) and part.exists()]
    return human(sum(part.stat().st_size for part in parts))


def _short(path: Path) -> str:
    """A ggml file is called the same for every model, so its folder tells which it is."""
    return path.name if path.suffix == ".gguf" else f"{path.parent.name}/{path.name}"
