"""Memory, disk and cores: what Linux, containers and macOS say of them, with psutil and without."""

import os
import subprocess
import sys
from types import MappingProxyType, SimpleNamespace

import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.machine import limits

linux = pytest.mark.skipif(sys.platform != "linux", reason="what Linux says")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (2_294_144, "2.3 MB"),
        (9_960_000, "10 MB"),
        (93_000_000, "93 MB"),
        (999_900_000, "1.0 GB"),
        (13_476_838_400, "13.5 GB"),
        (10**30, "over a billion GB"),
    ],
)
def test_sizes_read_as_on_a_disk(n_bytes, text):
    assert limits.human(n_bytes) == text


# --- memory and disk ------------------------------------------------------------------------------


def test_more_memory_or_disk_than_there_is_is_refused_with_both_figures(tmp_path):
    with pytest.raises(TinyllamaError, match=r"a dream needs 1000000.0 GB of memory, and .* are free"):
        limits.require_memory(10**15, "a dream")
    with pytest.raises(TinyllamaError, match=r"a dream needs .* of disk in .* are free"):
        limits.require_disk(10**18, tmp_path, "a dream")
    limits.require_memory(1, "a byte")
    limits.require_disk(1, tmp_path, "a byte")


@linux
def test_free_memory_is_what_psutil_says_without_psutil(monkeypatch):
    psutil = pytest.importorskip("psutil")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "psutil", None)
        without.setattr(limits, "CGROUP", limits.Path("/none"))
        free, used = limits.available_memory(), limits.used_memory()
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert used == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def elsewhere(monkeypatch, psutil=None, numbers=MappingProxyType({})):
    """A system without /proc: a Mac, of which these numbers are known, or a browser."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "psutil", psutil)  # None: it isn't installed
    monkeypatch.setattr(limits, "macos_number", numbers.get)
    for name in ("MEMINFO", "OWN_STATUS", "CGROUP", "OWN_CGROUPS"):
        monkeypatch.setattr(limits, name, limits.Path("/none"))


def test_where_there_is_no_proc_psutil_is_asked(monkeypatch):
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=7))
    memory = SimpleNamespace(available=6_400_000_000)
    elsewhere(monkeypatch, SimpleNamespace(virtual_memory=lambda: memory, Process=lambda: process))
    assert limits.available_memory() == 6_400_000_000
    assert limits.used_memory() == 7


def test_where_nothing_is_known_of_memory_nothing_is_refused(monkeypatch):
    elsewhere(monkeypatch)
    assert limits.available_memory() == limits.UNKNOWN
    limits.require_memory(10**15, "a dream")
    assert limits.used_memory() == limits.peak_memory() > 0


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_getrusage_counts_bytes_on_macos_and_kilobytes_elsewhere(platform, unit, monkeypatch):
    elsewhere(monkeypatch)
    monkeypatch.setattr(sys, "platform", platform)
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setattr(limits, "resource", usage)
    assert limits.peak_memory() == 7 * unit
    monkeypatch.setattr(limits, "resource", None)
    assert limits.peak_memory() == 0


@pytest.mark.parametrize(("found", "number"), [(0, 8), (-1, None)])
def test_macos_is_asked_for_a_number_by_its_name(found, number, monkeypatch):
    def sysctlbyname(name, value, size, *rest):
        assert name == b"hw.physicalcpu" and size._obj.value == 8
        value._obj.value = 8
        return found

    monkeypatch.setattr(limits.ctypes, "CDLL", lambda _: SimpleNamespace(sysctlbyname=sysctlbyname))
    assert limits.macos_number("hw.physicalcpu") == number


@pytest.mark.parametrize(
    ("line", "files", "left"),
    [
        ("0::/", {"memory.max": "1000", "memory.current": "300"}, 700),
        (
            "0::/a",
            {
                "memory.max": "1000",
                "memory.current": "300",
                "memory.stat": "anon 1\ninactive_file 50\n",
                "a/memory.max": "900",
                "a/memory.current": "100",
            },
            750,
        ),
        ("0::/a/b", {"a/memory.max": "500", "a/memory.current": "100", "a/b/memory.max": "max"}, 400),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "0"}, 700),
        ("4:memory:/x", {"memory/memory.limit_in_bytes": "70", "memory/memory.usage_in_bytes": "80"}, 0),
    ],
)
def test_a_container_s_limit_counts_less_what_is_in_use(line, files, left, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(f"7:cpu:/\n{line}\n")
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    monkeypatch.setattr(limits, "OWN_CGROUPS", tmp_path / "own")
    assert limits.available_memory() == left


@linux
def test_the_memory_of_freed_arrays_is_used_again():
    code = (
        "import resource, numpy as np\n"
        "from tinyllama.machine.limits import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "use = lambda: [np.ones(2**18) for _ in range(3)]\n"  # of 2 MB each, together in memory
        "use()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(50): use()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512  # pages that the system gave anew: fewer than one of the 150 arrays has


@linux
def test_a_limit_of_the_address_space_counts():
    code = (
        "import resource\n"
        "from tinyllama.machine.limits import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        "print(available_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 * 10**8 < int(done.stdout) < 10**9


def test_peak_memory_grows_with_what_is_used():
    code = (
        "from tinyllama.machine.limits import peak_memory, used_memory\n"
        "before = peak_memory(); taken = b'x' * 50_000_000\n"
        "print(before, used_memory(), peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, used, peak = map(int, done.stdout.split())
    assert before + 40_000_000 < peak < before + 100_000_000
    assert 50_000_000 < used <= peak


# --- cores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_a_container_s_share_of_the_cores_is_respected(files, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert limits.default_threads() == cores


@pytest.mark.parametrize(
    ("known", "cores"),
    [({"hw.perflevel0.physicalcpu": 4, "hw.physicalcpu": 8}, 4), ({"hw.physicalcpu": 6}, 6), ({}, 8)],
)
def test_a_mac_computes_on_its_fast_cores(known, cores, monkeypatch):
    elsewhere(monkeypatch, numbers=known)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert limits.default_threads() == cores
