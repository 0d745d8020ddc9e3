"""Model files, one module a format:

    parts          a checkpoint cut into parts, and what its formats share
    unpickle       the pickle inside a .pth file, without running it
    pth            the bytes of a .pth file
    meta           Meta's checkpoint: a folder of them
    ggml           March 2023's file
    gguf_metadata  the bytes of a GGUF's key-values
    gguf           today's file

`meta`, `ggml` and `gguf` have `read(path) -> Checkpoint`, which maps the file and checks every count in
it but reads no weight. Each module opens with its byte layout as prose. `open_checkpoint` looks at what
is there and calls the right one.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config
from ..quant import Tensor
from ..vocabulary import Vocabulary


@dataclass
class Checkpoint:
    """What a model file holds, whatever its format: nothing here has been read into memory yet.

    Attributes:
        path: the file, or the folder of a Meta checkpoint.
        format: "meta", "ggml" or "gguf".
        config: its hyper-parameters.
        tensors: by Meta's names; the parts of a cut checkpoint are already one Tensor.
        vocabulary: what its tokenizer is made from.
        files: every file that holds weights, in the order of the parts.
        metadata: GGUF's key-value pairs, without the vocabulary; of other formats, what there is.
    """

    path: Path
    format: str
    config: Config
    tensors: dict[str, Tensor]
    vocabulary: Vocabulary
    files: list[Path]
    metadata: dict = field(default_factory=dict)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file, a ggml file (its other parts are found beside it) or a folder with Meta's checkpoint.

    Raises TinyllamaError, naming the file, where it is none of these or doesn't hold what it says.
    """
    path = Path(path)
    if path.is_dir() or path.suffix in (".pth", ".json"):
        from . import meta

        return meta.read(path if path.is_dir() else path.parent)
    from . import gguf

    if gguf.is_gguf(path):
        return gguf.read(path)
    from . import ggml

    return ggml.read(path)
