"""What this computer has of memory and disk, the refusal where something needs more, and files that appear
when they are whole."""

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

import psutil

from .errors import TinyllamaError


def human(n_bytes: float) -> str:
    """3_900_000_000 -> "3.9 GB", 2_500_000 -> "2.5 MB", 93_000_000 -> "93 MB" (decimal, as on disks)."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 999.5:
            return f"{n_bytes:.{1 if n_bytes < 9.95 else 0}f} {unit}"
    return f"{n_bytes / 1000:.1f} GB"


def available_memory() -> int:
    """Bytes that a process can still get without swapping."""
    return psutil.virtual_memory().available


def macos_number(name: str) -> int | None:
    """What macOS says of its computer under a name like "hw.physicalcpu" (man sysctl), None if nothing."""
    value, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    sysctlbyname = ctypes.CDLL(None).sysctlbyname
    failed = sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else value.value


def used_memory() -> int:
    """Bytes that this process has in memory now."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """The most bytes that this process has had in memory so far, 0 where the system doesn't say."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def require_memory(needed: int, what: str) -> None:
    """Raises TinyllamaError, with both figures, where `needed` bytes of memory aren't there."""
    if needed > (free := available_memory()):
        raise TinyllamaError(f"{what} needs {human(needed)} of memory, and {human(free)} are free")


def require_disk(needed: int, folder: Path, what: str) -> None:
    """Raises TinyllamaError, with both figures, where `needed` bytes don't fit on the folder's disk."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise TinyllamaError(f"{what} needs {human(needed)} of disk in {folder}, and {human(free)} are free")


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """The path of an empty file to write to, which becomes `target` at the end, or vanishes at a failure.

    It is locked meanwhile: what a killed process left behind isn't, and goes when the same target is written
    again. A target that is a symbolic link stays one: the file that it points to is replaced.
    """
    target = target.resolve()
    _remove_left_behind(target)
    path = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    with path.open("xb") as file:
        try:
            _lock(file)
            yield path
            os.replace(path, target)
        finally:
            with suppress(OSError):
                path.unlink()


def _remove_left_behind(target: Path) -> None:
    known = f"{target.name}."
    for path in target.parent.iterdir():
        name = path.name
        if name.startswith(known) and name.endswith(".tmp") and len(name) == len(known) + len("01234567.tmp"):
            with suppress(OSError), path.open("r+b") as file:
                if _lock(file):
                    path.unlink()


def _lock(file: BufferedWriter) -> bool:
    """Whether this process has a file for itself now, until it closes it."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
