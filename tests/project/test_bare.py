"""tinyllama runs where there is nothing but Python, NumPy, regex and tqdm."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinyllama

HARD = ("numpy", "numpy.libs", "regex", "tqdm")  # numpy.libs: the BLAS of NumPy's wheel for Linux
RUN = """
import sys
import tinyllama
text = tinyllama.generate("Once upon a time", sys.argv[1], n_predict=8, temp=0, backend=sys.argv[2])
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"sentencepiece", "tokenizers", "numexpr", "psutil", "threadpoolctl", "torch"}, loaded
print(text.ids)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with links to tinyllama and the packages that it can't do without."""
    folder = tmp_path_factory.mktemp("bare")
    for name in HARD:
        where = Path(importlib.util.find_spec(name.partition(".")[0]).origin).parent.parent / name
        if where.exists():
            (folder / name).symlink_to(where)
    (folder / "tinyllama").symlink_to(Path(tinyllama.__file__).parent)
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)}
    command = [sys.executable, "-S", *arguments]  # -S: without site-packages
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_the_small_model_writes_the_same_text_with_three_packages(bare, backend):
    usual = tinyllama.generate("Once upon a time", n_predict=8, temp=0, backend=backend)
    assert run(bare, "-c", RUN, "small", backend) == f"{usual.ids}\n"


def test_smollm2_writes_the_same_text_with_three_packages(bare, smollm2_file):
    usual = tinyllama.generate("Once upon a time", smollm2_file, n_predict=8, temp=0)
    assert run(bare, "-c", RUN, str(smollm2_file), "auto") == f"{usual.ids}\n"


def test_the_command_runs_with_three_packages(bare):
    out = run(bare, "-m", "tinyllama", "generate", "-p", "Once upon a time", "--temp", "0", "-n", "4")
    assert out.startswith("Once upon a time")
