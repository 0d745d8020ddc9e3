"""What holds for every input: it is read whole or refused in one line, in few steps and little memory.

A target's `check` breaks off with Broken, or with whatever exception it met, where that isn't so.
"""

import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path

import numpy as np

from tinyllama.config import Config
from tinyllama.errors import TinyllamaError
from tinyllama.formats.gguf import ROPE_FREQS
from tinyllama.formats.parts import Part
from tinyllama.tensor import Tensor

STEPS = 5_000_000  # calls of functions and returns from them: a busy computer doesn't change their number
MEMORY = 200 << 20
ADDRESS_SPACE = 4 << 30  # beyond it allocations fail, so that a finding doesn't take the computer down
LONGEST_MESSAGE = 1000

SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


class Broken(AssertionError):
    """Something doesn't hold that should hold for every input: what, and about which part of it."""


def must(holds: bool, what: str, about: object = "") -> None:
    """Raises Broken unless it holds."""
    if not holds:
        raise Broken(what, str(about)[:500])


@contextmanager
def folder(files: dict[str, bytes]) -> Iterator[Path]:
    """A folder of its own with these files."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SCRATCH) as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        yield Path(name)


@contextmanager
def limits() -> Iterator[None]:
    """What happens inside must take less than STEPS and MEMORY, and NumPy has nothing to warn of."""
    rss, peak_before = _memory(reset=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    _limit_address_space(ADDRESS_SPACE, soft, hard)
    steps = count()
    sys.setprofile(lambda *_: next(steps))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UserWarning)  # of values that are ignored
            yield
    finally:
        sys.setprofile(None)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        must(next(steps) < STEPS, "took too many steps")
        _, peak = _memory()
        must(peak <= max(peak_before, rss + MEMORY), "took too much memory", f"{(peak - rss) >> 20} MB")


def opened(read: Callable, path: Path, named: Path | None = None):
    """What `read` makes of a file, or None where it refuses it as it should.

    `named` is what the message must name, such as the folder where the error may be in another file.
    """
    try:
        with limits():
            return read(path)
    except TinyllamaError as error:
        is_refused(error, named or path)
        return None


def is_refused(error: TinyllamaError, path: Path) -> None:
    """An error must be one line that a terminal can show, and name the file."""
    message = str(error)
    must(message.isprintable(), "a message of several lines or with control characters", repr(message))
    must(len(message) <= LONGEST_MESSAGE, "a long message", message)
    must(message.startswith(str(path)), "a message that doesn't begin with the file's name", message)


def is_whole(tensors: dict[str, Tensor], config: Config, n_bytes: int) -> None:
    """Every tensor that the config asks for is there, in its shape, within the file, and can be read."""
    shapes = config.tensor_shapes()
    missing = shapes.keys() - tensors.keys() - {"output.weight"}
    must(not missing, "accepted with tensors missing", missing)
    with limits():
        read = {name: tensor.dequantize() for name, tensor in tensors.items() if tensor.nbytes <= n_bytes}
    for name, tensor in tensors.items():
        expected = (config.head_dim // 2,) if name == ROPE_FREQS else shapes.get(name)
        must(tensor.shape == expected, "a wrong shape", f"{name} is {tensor.shape}, not {expected}")
        must(name in read, "a tensor larger than its file", name)
        weights = read[name]
        must(weights.shape == expected and weights.dtype == np.float32, "read in another shape", name)


def are_inside(part: Part, n_bytes: int) -> None:
    """Every tensor lies in a file of so many bytes, and can be read."""
    for name, piece in part.items():
        must(0 <= piece.offset <= n_bytes - piece.nbytes, "a tensor outside of the file", name)
        with limits():
            piece.kind.dequantize(piece.blocks())


def are_apart(tensors: dict[str, Tensor]) -> None:
    """No two tensors share a byte of a file."""
    pieces = [piece for tensor in tensors.values() for piece in tensor.pieces]
    spans = sorted((str(piece.data.path), piece.offset, piece.nbytes) for piece in pieces)
    for (path, start, n_bytes), (other_path, following, _) in pairwise(spans):
        must(path != other_path or start + n_bytes <= following, "tensors that share bytes")


def _limit_address_space(n_bytes: int, soft: int, hard: int) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + n_bytes
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (OSError, ValueError):
        pass  # macOS has no such file, and doesn't hold to the limit either


def _memory(reset: bool = False) -> tuple[int, int]:
    """Resident memory in bytes, now and at its peak: since the last reset on Linux, else ever."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
        return peak, peak
