"""Fixtures for files that a checkout may or may not have beside it, and signals as on a terminal."""

import signal
from pathlib import Path

import pytest

from tinyllama.machine import download, limits

ROOT = Path(__file__).parents[1]

# Who is started in the background by a script, or by nohup, ignores these, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`../shared/data` beside the checkout: texts, and LLaMA's own `tokenizer.model`."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The downloaded SmolLM2, a GGUF file of q4_1 blocks."""
    path = download.models_folder() / download.MODELS["smollm2"].filename
    if not path.is_file():
        pytest.skip("SmolLM2 is not here; `make demo` or `tinyllama download smollm2` fetches it")
    return path


@pytest.fixture(scope="module")
def client():
    """A Dask client of two workers on this computer, of one thread each."""
    pytest.importorskip("distributed")
    from tinyllama.cluster.connect import connected

    with connected(processes=2, threads=1) as client:
        yield client


@pytest.fixture
def free_memory(monkeypatch, tmp_path_factory):
    """A function: from then on the system says that it has so many bytes of memory left."""
    meminfo = tmp_path_factory.mktemp("proc") / "meminfo"

    def say(n_bytes: int) -> None:
        meminfo.write_text(f"MemAvailable: {n_bytes // 1024} kB\n")
        monkeypatch.setattr(limits, "MEMINFO", meminfo)

    return say
