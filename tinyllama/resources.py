"""What this computer has of memory and disk, and the refusal where something needs more."""

import ctypes
import shutil
import sys
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
    if needed > shutil.disk_usage(folder).free:
        raise TinyllamaError(disk_needed(needed, folder, what))


def disk_needed(needed: int, folder: Path, what: str) -> str:
    """Both figures in a sentence."""
    free = shutil.disk_usage(folder).free
    return f"{what} needs {human(needed)} of disk in {folder}, and {human(free)} are free"
