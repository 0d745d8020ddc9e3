"""What this computer has of memory and disk, and the refusal where something needs more."""

import ctypes
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..errors import TinyllamaError

CGROUP, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def human(n_bytes: float) -> str:
    """3_900_000_000 -> "3.9 GB", 2_500_000 -> "2.5 MB", 93_000_000 -> "93 MB" (decimal, as on disks)."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    if n_bytes >= 10**18:
        return "over a billion GB"
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 999.5:
            return f"{n_bytes:.{1 if n_bytes < 9.95 else 0}f} {unit}"
    return f"{n_bytes / 1000:.1f} GB"


def available_memory() -> int:
    """Bytes that this process can still get without swapping.

    The least of what the system has, what a container's limit (Linux's cgroup) leaves, and what `ulimit -v`
    leaves.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_cgroups(), *_left_of_addresses()]))


def _left_in_cgroups() -> Iterator[int]:
    """Of the groups that this process is in, and of those around them, each limit less what is in use.

    What was read of files counts as used there, but gives way: the inactive part of it is free.
    """
    kinds = {  # version 2, version 1
        "": (CGROUP, "memory.max", "memory.current", "inactive_file"),
        "memory": (
            CGROUP / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    }
    for line in _lines(OWN_CGROUPS):
        _, controllers, path = line.split(":", 2)
        for kind in set(controllers.split(",")) & kinds.keys():
            root, limit, usage, inactive = kinds[kind]
            own = root / path.strip("/")
            for folder in {root, *(around for around in (own, *own.parents) if root in around.parents)}:
                most, used = _lines(folder / limit), _lines(folder / usage)
                if most and used and most[0].isdigit():
                    stat = dict(row.split() for row in _lines(folder / "memory.stat"))
                    yield int(most[0]) - int(used[0]) + int(stat.get(inactive, 0))


def _lines(path: Path) -> list[str]:
    """Of a file; none where it isn't there."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _left_of_addresses() -> Iterator[int]:
    """The limit of the process's address space, if there is one, less what is in use."""
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - psutil.Process().memory_info().vms


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
    for line in _lines(Path("/proc/self/status")):  # what Linux's getrusage says may be of the parent
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
