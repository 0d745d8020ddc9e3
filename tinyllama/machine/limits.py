"""What this computer has of memory, disk and cores, and the refusal where something needs more.

Linux says it in /proc and /sys. Elsewhere psutil is asked; in a browser, which has none, nothing is refused.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import require

try:
    import resource
except ImportError:  # there are no limits then
    resource = None

UNKNOWN = sys.maxsize  # bytes of memory where the system doesn't say: nothing is refused then
CGROUP, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MEMINFO, OWN_STATUS = Path("/proc/meminfo"), Path("/proc/self/status")


def human(n_bytes: float) -> str:
    """3_900_000_000 -> "3.9 GB", 2_500_000 -> "2.5 MB", 93_000_000 -> "93 MB" (decimal, as on disks)."""
    if n_bytes > 10**18:
        return "over a billion GB"
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.{1 if n_bytes < 9.95 and unit != 'B' else 0}f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def available_memory() -> int:
    """Bytes that this process can still get without swapping; UNKNOWN where the system doesn't say.

    The least of what the system has, what containers (Linux's cgroups) leave, and what `ulimit -v` leaves.
    """
    free = _kilobytes(MEMINFO, "MemAvailable")
    psutil = None if free else _psutil()
    left = [free or (psutil.virtual_memory().available if psutil else UNKNOWN), *_left_in_cgroups()]
    if used := _kilobytes(OWN_STATUS, "VmSize"):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        left += [limit - used] if limit != resource.RLIM_INFINITY else []
    return max(0, min(left))


def _left_in_cgroups() -> Iterator[int]:
    """Of the groups that this process is in, and of those around them, each limit less what is in use.

    What was read of files counts as used there, but gives way: the inactive part of it is free.
    """
    version_2 = (CGROUP, "memory.max", "memory.current", "inactive_file")
    version_1 = (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for line in _lines(OWN_CGROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, usage, inactive = version_1 if controllers else version_2
        own = root / path.strip("/")
        for folder in (around for around in (own, *own.parents) if around.is_relative_to(root)):
            most, used = _lines(folder / limit), _lines(folder / usage)
            if most and used and most[0].isdigit():
                stat = dict(row.split() for row in _lines(folder / "memory.stat"))
                yield int(most[0]) - int(used[0]) + int(stat.get(inactive, 0))


def used_memory() -> int:
    """Bytes that this process has in memory now; where the system doesn't say, the most that it has had."""
    used = _kilobytes(OWN_STATUS, "VmRSS")
    psutil = None if used else _psutil()
    return used or (psutil.Process().memory_info().rss if psutil else peak_memory())


def peak_memory() -> int:
    """The most bytes that this process has had in memory so far, 0 where the system doesn't say."""
    peak = _kilobytes(OWN_STATUS, "VmHWM")  # what Linux's getrusage says may be of the parent
    unit = 1 if sys.platform == "darwin" else 1024
    return peak or (unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0)


def require_memory(needed: int, what: str, free: int | None = None) -> None:
    """Raise TinyllamaError, with both figures, where `needed` bytes of memory, or of `free`, aren't there."""
    free = available_memory() if free is None else free
    require(needed <= free, f"{what} needs {human(needed)} of memory, and {human(free)} are free")


def require_disk(needed: int, folder: Path, what: str) -> None:
    """Raise TinyllamaError, with both figures, where `needed` bytes don't fit on the folder's disk."""
    require(needed <= shutil.disk_usage(folder).free, disk_needed(needed, folder, what))


def disk_needed(needed: int, folder: Path, what: str) -> str:
    """Both figures in a sentence."""
    free = shutil.disk_usage(folder).free
    return f"{what} needs {human(needed)} of disk in {folder}, and {human(free)} are free"


def keep_freed_memory() -> None:
    """Let Linux's C library keep up to 16 MB that were given back, for arrays of up to 4 MB.

    The system zeroes memory for each array anew otherwise, page by page, which takes longer than most
    operations on it.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(MMAP_THRESHOLD, 1 << 22)
        mallopt(TRIM_THRESHOLD, 1 << 24)


def _psutil():
    """The package, or None; imported where the system's own files don't say, since that takes 15 ms."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil


def _lines(path: Path) -> list[str]:
    """Of a file; none where it isn't there."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _kilobytes(path: Path, name: str) -> int:
    """The bytes that Linux gives in a line like "VmRSS:  1234 kB", 0 where there is none."""
    return next((1024 * int(line.split()[1]) for line in _lines(path) if line.startswith(f"{name}:")), 0)


def macos_number(name: str) -> int | None:
    """What macOS says of its computer under a name like "hw.physicalcpu" (man sysctl), None if nothing."""
    value, size = ctypes.c_uint64(), ctypes.c_size_t(8)  # of a number of 4 bytes the upper ones stay zero
    sysctlbyname = ctypes.CDLL(None).sysctlbyname
    failed = sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else value.value


def default_threads() -> int:
    """The cores that this process may use, less where a container gives it only a share of their time.

    Of a Mac's cores those that are slower by design don't count: the fast ones would wait for them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if sys.platform == "darwin":
        cores = macos_number("hw.perflevel0.physicalcpu") or macos_number("hw.physicalcpu") or cores
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2, version 1
        words = [word for name in names for line in _lines(CGROUP / name) for word in line.split()]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            cores = min(cores, int(words[0]) // int(words[1]))
    return max(1, cores)
