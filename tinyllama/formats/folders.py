"""What readers of folders share: the folder, JSON, read with a limit, and the numbers in it."""

import json
from pathlib import Path

from ..errors import naming, require
from ..machine.files import read_file

LARGEST_JSON = 1 << 16  # bytes; params.json has a hundred, config.json a thousand


def folder_of(path: Path) -> Path:
    """A folder itself, or the one that a file lies in."""
    return path.parent if path.is_file() else path


def read_json(path: Path, at_most: int = LARGEST_JSON, unique: bool = True) -> dict:
    """The object in a JSON file of at most so many bytes. Raises TinyllamaError, naming the file.

    Args:
        unique: refuse a key that is there twice; else the last one counts.
    """
    data = read_file(path, at_most)
    with naming(path):
        return parse_json(data, unique)


def parse_json(data: bytes | str, unique: bool = True) -> dict:
    """An object. Raises TinyllamaError where it's none, or names a key twice."""
    with naming("isn't JSON", RecursionError):
        found = json.loads(data, object_pairs_hook=_each_once if unique else None)
    require(isinstance(found, dict), "isn't a JSON object")
    return found


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    require(len(found) == len(pairs), f"a key is there twice: {', '.join(key for key, _ in pairs)}")
    return found


def number(values: dict, name: str, kind: type, default: float | None = None):
    """A whole number, or any: JSON doesn't tell 1 from 1.0, and has numbers beyond a float's."""
    value = default if values.get(name) is None else values[name]
    require(value is not None, f"{name} is missing")
    fine = type(value) is int or (kind is float and type(value) is float)
    shown = repr(value)[:40] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    what = "whole number" if kind is int else "number"
    require(fine and abs(value) < 1e30, f"{name} must be a {what}, not {shown}")
    return kind(value)
