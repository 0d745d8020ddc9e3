"""What the targets go by: the contract notices what breaks it, and others read the files that they build."""

import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz import contract, targets
from fuzz.bundle import bundle, unbundle
from fuzz.damage import Number, pack
from tinyllama.errors import TinyllamaError

PATH = Path("some.file")


def allocate():
    return np.ones(300 << 20, np.uint8)


def compute():
    for _ in range(contract.STEPS):
        len(())


@pytest.mark.parametrize(
    "do", [allocate, compute, lambda: warnings.warn("odd", RuntimeWarning, stacklevel=1)]
)
def test_memory_steps_and_warnings_break_the_contract(do):
    with pytest.raises((contract.Broken, RuntimeWarning)), contract.limits():
        do()


@pytest.mark.parametrize("error", [ValueError("some.file"), TinyllamaError("another.file"), MemoryError()])
def test_another_error_or_one_without_the_files_name_breaks_the_contract(error):
    def read(path):
        raise error

    with pytest.raises((contract.Broken, type(error))):
        contract.opened(read, PATH)


@pytest.mark.parametrize("message", ["some.file\nis odd", "some.file \x1b[2J", "some.file" * 200])
def test_a_message_that_a_terminal_cant_show_breaks_the_contract(message):
    error = TinyllamaError()
    error.args = (message,)
    with pytest.raises(contract.Broken):
        contract.is_refused(error, PATH)


def test_a_refusal_in_one_line_that_names_the_file_is_as_it_should():
    def read(path):
        raise TinyllamaError(f"{path}: is odd")

    assert contract.opened(read, PATH) is None


def test_the_seeds_of_pth_and_gguf_are_files_that_torch_and_the_gguf_package_read():
    for seed in targets.load("pth").seeds().values():
        with contract.folder({"seed": seed}) as folder:
            found = torch.load(folder / "seed", weights_only=True)
            assert found.get("model", found)["norm.weight"].ndim == 1
    for seed in targets.load("gguf").seeds().values():
        with contract.folder({"seed": seed}) as folder:
            assert gguf.GGUFReader(folder / "seed").tensors


NAMES = st.sampled_from(["params.json", "consolidated.00.pth", "m.bin.1"])


@given(st.dictionaries(NAMES, st.binary().filter(lambda data: b"=== " not in data)))
def test_a_bundle_is_the_files_in_it(files):
    assert unbundle(bundle(files)) == files


def test_numbers_wrap_around_as_in_c():
    assert pack([Number("B", 257), Number("i", -1), b"x", Number("H", 1 << 40)]) == b"\1\xff\xff\xff\xffx\0\0"
