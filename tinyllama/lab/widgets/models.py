"""The models that can be chosen: by name, and every model file in the folders where models lie."""

from glob import escape
from pathlib import Path

from ...machine.download import MODELS, models_folder, small_folder
from ...machine.limits import human


def folders() -> list[Path]:
    """Where model files are looked for: `data/models` and `models` of the checkout and of this folder."""
    checkout, here = models_folder().parents[1], Path.cwd()
    places = [models_folder(), checkout / "models", here / "data" / "models", here / "models"]
    return list(dict.fromkeys(place.resolve() for place in places))


def choices(places: list[Path] | None = None) -> list[tuple[str, str]]:
    """(label, what `load` takes): the models by name, then the files in these folders and one level below."""
    places = folders() if places is None else places
    named = {"small": small_folder()}
    named |= {name: models_folder() / model.filename for name, model in MODELS.items()}
    options = [(f"{name} ({_size(path)})", name) for name, path in named.items()]
    known = {path.resolve() for path in named.values()}
    paths = dict.fromkeys(path for place in places for path in _model_files(place))
    for path in (path for path in paths if path.resolve() not in known):
        # A ggml file has the same name for every model, so its folder says which one it is.
        name = path.name if path.suffix == ".gguf" else f"{path.parent.name}/{path.name}"
        options.append((f"{name} ({_size(path)})", str(path)))
    return options


def _model_files(folder: Path) -> list[Path]:
    """GGUF files, first parts of ggml files, folders with a checkpoint of Meta's."""
    paths = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.exists()]
    return [p for p in paths if p.suffix in (".gguf", ".bin") or (p / "consolidated.00.pth").is_file()]


def _size(path: Path) -> str:
    """The size of all parts together; the other parts of a file end in .1, .2 and so on."""
    if not path.exists():
        return "not downloaded yet"
    others = path.parent.glob(f"{escape(path.name)}.[0-9]*")
    parts = path.glob("consolidated.*.pth") if path.is_dir() else [path, *others]
    return human(sum(part.stat().st_size for part in parts))
