"""Files: mapped, read with a limit, and written so that they appear when they are whole, whatever happens.

A file is written under the name NAME.tmp beside its place, with a lock on it, and renamed when the disk has
it. Several files that belong together are one set: the old set is removed before the new one gets its names,
and its first file, without which nobody reads the others, is the first to go and the last to come.
"""

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import TinyllamaError, check_cancelled, naming, require
from .limits import disk_needed, human

try:
    import fcntl
except ImportError:  # a system without locks on files
    fcntl = None

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _open(path: str | Path) -> BinaryIO:
    """For reading, to its end: what pipes and devices may not have."""
    mode = os.stat(path).st_mode
    require(not stat.S_ISDIR(mode), "is a folder, not a file")
    require(stat.S_ISREG(mode), "is a pipe or a device, not a file")
    return open(path, "rb")


def read_file(path: str | Path, at_most: int) -> bytes:
    """All of a file. Raises TinyllamaError where it can't be read, or has more bytes than `at_most`."""
    with naming(path), _open(path) as file:
        data = file.read(at_most + 1)
        require(len(data) <= at_most, f"is too large: more than {at_most:,} bytes")
        return data


def kind_of(file: bytes | mmap.mmap) -> str:
    """For messages: what a file seems to be that isn't what was expected, from its first bytes."""
    head = file[:512]
    if head[:256].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, probably an error message of the site it came from"
    if not head.strip(b"\0"):
        return "nothing but zeros: its download was never finished"
    known = {
        b"version https://git-lfs": "a git-lfs pointer, not the file that it points to (git lfs pull)",
        b"PK": "a zip archive",
        b"GGUF": "a GGUF file",
        b"lmgg": "a ggml file",
        b"\x80": "a Python pickle",
    }
    return next((what for magic, what in known.items() if head.startswith(magic)), "something else")


class MappedFile(mmap.mmap):
    """A file as bytes that are read when they are looked at; of one that is mapped already, that one.

    A file that somebody replaces stays what it was for those who have mapped it; one that is written to
    changes, which `check` notices; one that is cut short ends the process that reads what is gone.

    Attributes:
        path: of the file.
        fd: its descriptor, for os.pread; open as long as this exists.
    """

    def __new__(cls, path: "str | Path | MappedFile"):
        """Raises TinyllamaError, naming the file, where it can't be read."""
        if isinstance(path, cls):
            return path
        with naming(path), _open(path) as file:
            require(os.fstat(file.fileno()).st_size, "is empty")
            try:
                self = super().__new__(cls, file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                size = human(os.fstat(file.fileno()).st_size)
                no_room = f"there is no address space to map its {size}: `ulimit -v` must allow more"
                require(error.errno != errno.ENOMEM, no_room)
                raise
            self.path, self.fd = Path(path), os.dup(file.fileno())
        self._opened = os.fstat(self.fd)
        return self

    def check(self) -> None:
        """Raise TinyllamaError if the file isn't any more what was opened."""
        was, now = self._opened, os.fstat(self.fd)
        shorter = f"was cut short, from {was.st_size} to {now.st_size} bytes,"
        how = shorter if now.st_size < was.st_size else "was changed"
        same = (now.st_size, now.st_mtime_ns) == (was.st_size, was.st_mtime_ns)
        require(same, f"{self.path}: {how} while it was in use; load it again")

    def __del__(self, close=os.close):  # as Python ends, modules go before what uses them
        if hasattr(self, "fd"):
            close(self.fd)


@contextmanager
def written(*targets: str | Path) -> Iterator[list[Path]]:
    """The paths of empty files to write to; at the end they become the targets, or none of them does.

    A killed run leaves the old targets, none, or the new ones, and perhaps a .tmp file, which the next run
    takes over. A target that is a symbolic link stays one: the file that it points to is replaced.

    Raises TinyllamaError, naming the target, where it can't be written, another run is writing it, or an
    OSError was raised inside; of a full disk it says how much room the files need.
    """
    targets = [Path(os.path.realpath(target)) for target in targets]
    paths, files = [target.with_name(f"{target.name}.tmp") for target in targets], []
    try:
        for target, path in zip(targets, paths, strict=True):
            files.append(_claim(target, path))
        for target in targets:  # not before: the run that had the lock may have been replacing them
            require(not target.exists() or os.access(target, os.W_OK), f"{target}: is read-only")
        yield paths
        _sync(files)
        for target in targets if len(targets) > 1 else ():
            target.unlink(missing_ok=True)
        for path, target in reversed(list(zip(paths, targets, strict=True))):
            os.replace(path, target)
    except BaseException as error:
        size = sum(os.fstat(file.fileno()).st_size for file in files)
        for file, path in zip(files, paths, strict=False):
            with suppress(OSError):
                if os.path.samefile(file.fileno(), path):  # unless it has been renamed
                    path.unlink()
                    file.truncate(0)  # gives its room back at once
        if not isinstance(error, OSError):
            raise
        name = str(error.filename or targets[0]).removesuffix(".tmp")
        needs = f"; {disk_needed(size, targets[0].parent, 'it')}" if error.errno in NO_ROOM else ""
        raise TinyllamaError(f"{name}: {error.strerror or error}{needs}") from None
    finally:
        for file in files:
            file.close()


def require_place(target: Path, name: str | Path | None = None) -> None:
    """Raise TinyllamaError where no file can be; `name` is what the user called it."""
    name, folder = name or target, target.parent
    require(folder.is_dir(), f"{name}: there is no folder {Path(name).parent}")
    if not os.access(folder, os.W_OK):
        is_frozen = os.statvfs(folder).f_flag & os.ST_RDONLY
        cause = f"nothing can be written to the folder {Path(name).parent}"
        raise TinyllamaError(f"{name}: {os.strerror(errno.EROFS) if is_frozen else cause}")
    with suppress(FileNotFoundError):
        is_file = stat.S_ISREG(os.lstat(target).st_mode)
        require(is_file, f"{name}: is a folder, a link, a pipe or a device; name another file to write")


def reserve(file: BinaryIO, size: int) -> None:
    """Make a file `size` zeros long, on Linux with all its room on the disk; elsewhere that grows."""
    file.truncate(size)
    # Not os.posix_fallocate: where the file system can't, that writes a byte into every block.
    if fallocate := getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None):
        lacks = fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size))
        if lacks and ctypes.get_errno() in NO_ROOM:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)


def _claim(target: Path, path: Path) -> BinaryIO:
    """The unfinished file of a target, empty and locked."""
    require_place(target)
    require_place(path)
    file = path.open("ab")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samefile(file.fileno(), path)  # the run that had the lock may have just renamed it
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    except OSError:
        is_ours = True  # a file system without locks
    if not is_ours:
        file.close()
        raise TinyllamaError(f"{target}: is being written by another run; wait until it has ended")
    file.truncate(0)
    return file


def _sync(files: list[BinaryIO]) -> None:
    """Wait until the disk has the files: after a power cut there might else be the right name on zeros.

    In a thread, since no signal ends fsync; when the files are removed meanwhile it ends soon.
    """
    from concurrent.futures import ThreadPoolExecutor, wait  # here: who only reads does without

    pool = ThreadPoolExecutor(1)
    syncing = [pool.submit(os.fsync, file.fileno()) for file in files]
    pool.shutdown(wait=False)
    while wait(syncing, 0.1).not_done:
        check_cancelled()
    for done in syncing:
        done.result()
