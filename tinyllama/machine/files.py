"""Files that appear when they are whole, whatever happens meanwhile.

A file to be written lies beside its place, under a name with the token of its run, until it is whole. Where
several belong together, like the parts of a model, so does each:

    model.bin.0123abcd.tmp      being written, by a run that holds a lock on it; without one it is left behind
    model.bin.1.0123abcd.tmp    another file of the same run
    model.bin.0123abcd.whole    the first, when all are whole: from this moment on the new files count

Then each gets its own name, the first one last. So a run that is killed before there is a `.whole` leaves the
old files. One that is killed between two renames leaves the new ones, some of them without their name yet:
readers find them by `newest`. Whoever writes there next gives them their names, and removes what isn't whole.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import TinyllamaError
from .threads import results_of

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what a killed run leaves behind stays
    fcntl = None

_BESIDE = re.compile(r"(?P<target>.+)\.(?P<token>[0-9a-f]{8})\.(tmp|whole|scratch)", re.DOTALL)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written_beside(*targets: Path) -> Iterator[list[Path]]:
    """The paths of empty files to write to; they become the targets together at the end, or vanish.

    A target that is a symbolic link stays one: the file that it points to is replaced. Raises TinyllamaError
    where another run is writing a target, and OSError, with the target as its filename.
    """
    targets = tuple(Path(os.path.realpath(target)) for target in targets)
    token = secrets.token_hex(4)
    paths = [target.with_name(f"{target.name}.{token}.tmp") for target in targets]
    whole = paths[0].with_suffix(".whole")
    try:
        with ExitStack() as locks:
            try:
                for target, path in zip(targets, paths, strict=True):
                    _claim(target, path, locks)
                yield paths
                for path in paths:
                    _to_disk(path)
                os.replace(paths[0], whole)
            finally:
                _settle([*paths, whole])
    except OSError as error:
        named = dict(zip(map(str, paths), targets, strict=True))
        error.filename = str(named.get(str(error.filename), error.filename or targets[0]))
        raise


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside a file of `written_beside`, for what is needed meanwhile."""
    folder = path.with_suffix(".scratch")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def newest(path: Path) -> Path:
    """Where the file lies that is to be read as `path`: after a kill between two renames, beside it."""
    place = Path(os.path.realpath(path))
    with suppress(OSError):
        for token, files in _runs(place).items():
            own = [file for file in files if _target_of(file) == place and not file.is_dir()]
            if own and any(place.parent.glob(f"*.{token}.whole")):
                return own[0]
    return path


def reserve(file: BinaryIO, size: int) -> None:
    """Make a file `size` zeros long, on Linux with all its room on the disk; elsewhere that grows."""
    file.truncate(size)
    # Not os.posix_fallocate: where the file system can't, that writes a byte into every block.
    if fallocate := getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None):
        lacks = fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size))
        if lacks and ctypes.get_errno() in NO_ROOM:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)


@contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Give every OSError the name of a file: reading and writing don't say which it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class Unchanged:
    """Files that nobody may change while they are read: which they were, how long, when last written to."""

    def __init__(self, paths: Iterable[Path]):
        self._seen = {path: self._look(path) for path in paths}

    def check(self) -> None:
        """Raises TinyllamaError for a file that isn't what it was when this was made."""
        for path, seen in self._seen.items():
            if self._look(path) != seen:
                raise TinyllamaError(
                    f"{path} was changed, replaced or removed while it was read: run this again"
                )

    @staticmethod
    def _look(path: Path) -> tuple[int, ...] | None:
        try:
            stat = path.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


# --- runs -----------------------------------------------------------------------------------------


def _runs(target: Path) -> dict[str, list[Path]]:
    """What runs have left or keep beside a target and its further parts, by their token."""
    runs = {}
    for path in target.parent.iterdir():
        name = _BESIDE.fullmatch(path.name)
        if name and re.fullmatch(re.escape(target.name) + r"(\.\d+)?", name["target"]):
            runs.setdefault(name["token"], []).append(path)
    return runs


def _target_of(path: Path) -> Path:
    return path.with_name(_BESIDE.fullmatch(path.name)["target"])


def _claim(target: Path, path: Path, locks: ExitStack) -> None:
    """Make and lock the file beside a target, where nobody else has; first tidy up what killed runs left."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "is read-only", str(target))
    with _alone_in(target.parent):
        for files in _runs(target).values():
            _tidy(target, files)
        path.touch(exist_ok=False)
        _lock(path, locks)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs from claiming anything in a folder, so that of two that begin at once one is first."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _tidy(target: Path, files: list[Path]) -> None:
    """End what a killed run began; raises TinyllamaError where the run lives and writes the same target."""
    with ExitStack() as locks:
        locked = {file: _lock(file, locks) for file in files if file.is_file()}
        if all(locked.values()):
            _settle(files)
        elif any(got is False and _target_of(file) == target for file, got in locked.items()):
            raise TinyllamaError(f"{target} is being written by another run: wait until that has ended")


def _lock(path: Path, locks: ExitStack) -> bool | None:
    """Have a file for this run alone until `locks` ends: False if another has it, None if none can say."""
    try:
        fcntl.flock(locks.enter_context(path.open("r+b")), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None
    return True


def _settle(files: list[Path]) -> None:
    """Give the files of a run their names, the `.whole` one last; without such a one remove them all."""
    files = sorted((file for file in files if file.exists()), key=lambda file: file.suffix == ".whole")
    all_whole = bool(files) and files[-1].suffix == ".whole"
    for file in files:
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        elif all_whole:
            os.replace(file, _target_of(file))
        else:
            with suppress(OSError):
                file.unlink()


def _to_disk(path: Path) -> None:
    """Wait until the disk has it: after a power cut there might else be the name of a whole file on zeros.

    In a thread, since no signal ends fsync: an interrupt empties the file, and little is left to wait for.
    """
    with blamed(path), path.open("r+b") as file:

        def empty() -> None:
            with suppress(OSError):
                file.truncate(0)

        list(results_of([map(os.fsync, [file.fileno()])], empty))
