"""What an importance matrix tells `quantize`: how much errors count, and what the new file says about it."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import EMBEDDING, OUTPUT
from ..errors import naming, require
from ..formats import Checkpoint
from ..formats.headers import gguf_names
from ..formats.imatrix import ImportanceMatrix, read
from .printing import counted

LONGEST = 127  # bytes of a text among the key-values, as llama-quantize cuts it
#: The largest mean square that weights are quantized with: of inputs of a million, and 16-bit ones end at
#: 65,504. The searches square and add up what errors count, which leaves float32 some way above.
LARGEST = 2.0**40


@dataclass(frozen=True)
class Importance:
    """What an importance matrix says about a model."""

    means: dict[str, np.ndarray] = field(default_factory=dict)  # by Meta's names of matrices: float32 [n_in]
    keys: dict[str, str | int] = field(default_factory=dict)  # key-values of the file to be written


NO_IMPORTANCE = Importance()


def importance_of(
    imatrix: str | Path | ImportanceMatrix | dict[str, np.ndarray], checkpoint: Checkpoint
) -> Importance:
    """What a file, its contents, or mean squares by GGUF's names of matrices say about a model.

    Warns of matrices that are missing (but for the embedding and the output matrix, which llama-imatrix
    leaves out), and of what isn't in the model.

    Raises TinyllamaError where it is of another model, or holds what can't be mean squares.
    """
    path = imatrix if isinstance(imatrix, (str, Path)) else None
    is_one = path is not None or isinstance(imatrix, (ImportanceMatrix, Mapping))
    require(is_one, f"imatrix is a file, an ImportanceMatrix or a dict, not {imatrix!r:.60}")
    found = imatrix if path is None else read(path)
    means = found.means() if isinstance(found, ImportanceMatrix) else found
    known, names = {}, {gguf: meta for meta, gguf in gguf_names(checkpoint.config).items()}
    matrices = {name: tensor for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2}
    source = path or "the importance matrix"
    with naming(source):
        for name, mean in ((names[name], means[name]) for name in means if names.get(name) in matrices):
            n_cols, mean = matrices[name].shape[1], np.ascontiguousarray(mean, np.float32).ravel()
            other = f"is of another model: it has {mean.size} inputs of {name}, not {n_cols}"
            require(mean.size == n_cols or name == EMBEDDING, other)
            fine = np.isfinite(mean).all() and mean.min() >= 0
            require(fine, f"its numbers of {name} can't be mean squares: NaN, infinity or below 0")
            largest = mean.max()
            too_large = f"its mean squares of {name} go up to {largest:.1e}, and {LARGEST:.1e} is the largest"
            require(largest <= LARGEST, f"{too_large} that weights can be quantized with")
            if mean.size == n_cols:  # else it is of the ids that an embedding is looked up with
                known[name] = mean
        require(known, f"is of another model: it has no matrix of {checkpoint.path.name}")
    missing, surplus = matrices.keys() - known.keys() - {EMBEDDING, OUTPUT}, means.keys() - names.keys()
    _warn(source, missing, "missing: quantized as without an importance matrix")
    _warn(source, surplus, "not in the model: ignored")
    return Importance(known, _keys(path, found, len(means)))


def _warn(source: object, names: Iterable[str], what: str) -> None:
    if names := sorted(names):
        more = f" and {counted(len(names) - 1, 'other')}" if len(names) > 1 else ""
        warnings.warn(f"{source}: {names[0]}{more} {what}", stacklevel=4)


def _keys(path: str | Path | None, found: object, n_entries: int) -> dict[str, str | int]:
    """What llama-quantize notes, in its order."""
    datasets, n_chunks = getattr(found, "datasets", ()), getattr(found, "n_chunks", 0)
    texts = {"file": str(path or ""), "dataset": datasets[0] if datasets else ""}
    cut = {key: text.encode()[:LONGEST].decode(errors="ignore") for key, text in texts.items()}
    values = cut | {"entries_count": n_entries, "chunks_count": n_chunks}
    return {f"quantize.imatrix.{key}": value for key, value in values.items() if value}
