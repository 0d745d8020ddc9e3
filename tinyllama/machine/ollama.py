"""Models of Ollama's store, which keeps them as GGUF files under the names of their SHA-256.

`manifests/HOST/USER/NAME/TAG` is JSON: its layer of the media type `application/vnd.ollama.image.model` names
the file in `blobs`. By default the host is registry.ollama.ai and the user library.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import TinyllamaError, naming, require
from .files import read_file

MODEL, ADAPTER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"
DEFAULTS = ("registry.ollama.ai", "library")
LARGEST_MANIFEST = 1 << 20  # bytes; one has less than a thousand


def folders() -> list[Path]:
    """Where its stores may be: the user's, and that of its service on Linux."""
    if folder := os.environ.get("OLLAMA_MODELS"):
        return [Path(folder)]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def find(model: str) -> Path:
    """The GGUF file of "ollama:name", "ollama:name:tag" or "ollama:user/name:tag".

    Raises TinyllamaError where it isn't here, or the store is damaged.
    """
    name, _, tag = model.removeprefix("ollama:").partition(":")
    words = [*DEFAULTS[: max(0, 2 - name.count("/"))], *name.split("/"), tag or "latest"]
    fine = all(re.fullmatch(r"\w[\w.-]*", word) for word in words)
    require(fine and len(words) == 4, f"{model}: a model of Ollama's is ollama:name, or ollama:name:tag")
    for folder in folders():
        if os.path.isfile(manifest := folder.joinpath("manifests", *words)):
            return read_manifest(folder, manifest)
    places, pull = " or ".join(map(str, folders())), f"`ollama pull {model.removeprefix('ollama:')}`"
    raise TinyllamaError(f"{model}: isn't in Ollama's store, {places}; {pull} fetches it")


def read_manifest(folder: Path, manifest: Path) -> Path:
    """The GGUF file that a manifest names."""
    with naming(manifest):
        try:
            layers = json.loads(read_file(manifest, LARGEST_MANIFEST))["layers"]
            digests = {layer["mediaType"]: str(layer["digest"]) for layer in reversed(layers)}
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            raise TinyllamaError("is damaged: pull the model again") from None
        require(MODEL in digests, "names no model")
        require(ADAPTER not in digests, "has an adapter (LoRA) beside the model, which isn't supported")
        fine = re.fullmatch("sha256:[0-9a-f]{64}", digests[MODEL])
        require(fine, f"is damaged: it names the model {digests[MODEL]!r:.80}; pull it again")
        path = folder / "blobs" / digests[MODEL].replace(":", "-")
        require(path.is_file(), f"names {path.name}, which isn't in {path.parent}: pull the model again")
        return path


def models() -> Iterator[str]:
    """What `find` takes, of everything in the stores."""
    for folder in folders():
        if not os.access(folder / "manifests", os.R_OK | os.X_OK):  # the service's may be closed to others
            continue
        for manifest in sorted((folder / "manifests").glob("*/*/*/*")):
            *words, tag = manifest.relative_to(folder / "manifests").parts
            for default in DEFAULTS:
                words = words[1:] if words[0] == default else words
            yield f"ollama:{'/'.join(words)}" + (f":{tag}" if tag != "latest" else "")
