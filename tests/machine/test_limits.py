from types import SimpleNamespace

import numpy as np
import pytest

from tinyllama.machine import limits as resources
from tinyllama.errors import TinyllamaError


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
    ],
)
def test_sizes_read_as_on_a_disk(n_bytes, text):
    assert resources.human(n_bytes) == text


def test_more_memory_or_disk_than_there_is_is_refused_with_both_figures(tmp_path):
    with pytest.raises(TinyllamaError, match=r"a dream needs 1000000.0 GB of memory, and .* are free"):
        resources.require_memory(10**15, "a dream")
    with pytest.raises(TinyllamaError, match=r"a dream needs .* of disk in .* are free"):
        resources.require_disk(10**18, tmp_path, "a dream")
    resources.require_memory(1, "a byte")
    resources.require_disk(1, tmp_path, "a byte")


@pytest.mark.parametrize("found, number", [(0, 8), (-1, None)])
def test_macos_is_asked_for_a_number_by_its_name(found, number, monkeypatch):
    def sysctlbyname(name, value, size, *rest):
        assert name == b"hw.physicalcpu" and size._obj.value == 4
        value._obj.value = 8
        return found

    monkeypatch.setattr(resources.ctypes, "CDLL", lambda _: SimpleNamespace(sysctlbyname=sysctlbyname))
    assert resources.macos_number("hw.physicalcpu") == number


def test_peak_memory_grows_with_what_is_used():
    before = resources.peak_memory()
    np.ones(30_000_000 + before // 8).sum()
    assert resources.peak_memory() > before
