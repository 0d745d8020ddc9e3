"""Model files that somebody changes while they are in use; what may end a process runs in one of its own."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyllama
from tinyllama.backends import available
from tinyllama.machine.download import small_folder
from tinyllama.errors import TinyllamaError
from tinyllama.formats.parts import map_file
from tinyllama.machine.mapped import mapped_files, unchanged

BACKENDS = [name for name, reason in available().items() if reason is None]
WEIGHTS = "consolidated.00.pth"

needs_guard = pytest.mark.skipif(available()["c"] is not None, reason="the guard is part of the C extension")
needs_unix = pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody change a mapped file")
pytestmark = needs_unix


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(small_folder(), tmp_path / "small")


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 400)
    return file


def python(code: str, *arguments) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def overwrite(file: Path, offset: int = 50_000) -> None:
    """Somebody else writes into a file, a good while after it was opened."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(b"something else")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


# --- a file ---------------------------------------------------------------------------------------


def test_a_file_that_nobody_touches_stays_good(path):
    with unchanged([mapped := map_file(path)]):
        assert mapped[:256] == bytes(range(256))


def test_what_was_computed_from_a_file_that_changed_meanwhile_is_not_returned(path):
    with pytest.raises(TinyllamaError, match=f"{path} was changed while"), unchanged([map_file(path)]):
        overwrite(path)


def test_a_file_that_was_changed_before_is_not_looked_at(path):
    mapped = map_file(path)
    overwrite(path)
    with pytest.raises(TinyllamaError, match="was changed while"), unchanged([mapped]):
        pytest.fail("it was")


def test_a_failure_that_a_changed_file_caused_names_the_file(path):
    with pytest.raises(TinyllamaError, match="was changed while"), unchanged([map_file(path)]):
        overwrite(path)
        raise ValueError("of nonsense")


def test_another_failure_stays_what_it_is(path):
    with pytest.raises(ValueError, match="of its own"), unchanged([map_file(path)]):
        raise ValueError("of its own")


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_that_is_replaced_or_removed_stays_what_it_was(path, how):
    with unchanged([mapped := map_file(path)]):
        if how == "replaced":
            other = path.with_name("other")
            other.write_bytes(b"other")
            os.replace(other, path)
        else:
            path.unlink()
        assert mapped[:256] == bytes(range(256))


def test_arrays_know_the_file_they_lie_in(path):
    mapped = map_file(path)
    array = np.frombuffer(mapped, np.uint8)
    parts = [array[5:].reshape(-1, 5)[1:], memoryview(array)[3:], np.zeros(3), array]
    assert mapped_files(parts) == [mapped]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux lists")
def test_a_mapped_file_gives_its_descriptors_back(path):
    before = len(os.listdir("/proc/self/fd"))
    array = np.frombuffer(map_file(path), np.uint8)[3:]
    assert len(os.listdir("/proc/self/fd")) > before
    del array
    assert len(os.listdir("/proc/self/fd")) == before


@needs_guard
def test_more_files_than_can_be_guarded_can_still_be_read(path):
    many = [map_file(path) for _ in range(400)] + [map_file(path) for _ in range(800)]
    assert all(mapped[1] == 1 for mapped in many)


# --- cut short while it is read -------------------------------------------------------------------

CUT_SHORT = """
import os, sys
from pathlib import Path
from tinyllama.formats.parts import map_file
from tinyllama.machine.mapped import unchanged
path = Path(sys.argv[1])
mapped = map_file(path)
"""


@needs_guard
def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(path):
    code = """
try:
    with unchanged([mapped]):
        os.truncate(path, 5000)
        print(mapped[60000], mapped[100:103])  # a page that is no more: zeros, from here on everywhere
except Exception as error:
    print(type(error).__name__, error)
print(map_file(path)[4999], "still here")
"""
    done = python(CUT_SHORT + code, path)
    assert done.stdout.splitlines() == [
        "0 b'\\x00\\x00\\x00'",
        f"TinyllamaError {path} was cut short, from 102400 to 5000 bytes, while it was in use: load it again",
        "135 still here",
    ]
    assert not done.stderr and done.returncode == 0


@needs_guard
def test_where_nobody_would_notice_the_process_ends_with_a_line_that_names_the_file(path):
    done = python(CUT_SHORT + "os.truncate(path, 5000); print('so far'); print(mapped[60000])", path)
    assert done.returncode == -signal.SIGBUS
    assert done.stderr == f"tinyllama: {path} was cut short or can't be read any more\n"


@needs_guard
def test_whoever_handled_the_signal_before_is_told(path):
    code = "import faulthandler; faulthandler.enable()" + CUT_SHORT + "os.truncate(path, 5000); mapped[60000]"
    done = python(code, path)
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.startswith(f"tinyllama: {path} was cut short") and "Fatal Python error" in done.stderr


@needs_guard
def test_a_handler_that_comes_later_and_calls_the_former_one_ends_too(path):
    code = CUT_SHORT + "import faulthandler; faulthandler.enable(); os.truncate(path, 5000); mapped[60000]"
    assert python(code, path).returncode == -signal.SIGBUS


@needs_guard
def test_a_signal_that_another_process_sends_ends_this_one_as_ever(path):
    done = python(CUT_SHORT + "import signal; os.kill(os.getpid(), signal.SIGBUS); print('no')", path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGBUS, "", "")


# --- a model --------------------------------------------------------------------------------------

MIDWAY = """
import os, sys
import tinyllama
folder, backend, change = sys.argv[1:]
llama = tinyllama.load(folder, backend, 2, mmap=True)
file = folder + "/consolidated.00.pth"

class Midway:
    '''Asked before every operation: within a token, the file is changed.'''
    n = 0
    def is_set(self):
        self.n += 1
        if self.n == 150:
            if change == "cut":
                os.truncate(file, 300_000)
            else:
                with open(file, "r+b") as opened:
                    opened.seek(2_000_000)
                    opened.write(b"something else" * 1000)
        return False

pieces = []
for _ in range(2):
    try:
        for piece in llama.stream("Once upon a time", temp=0, n_predict=20, cancel=Midway()):
            pieces.append(piece)
    except tinyllama.TinyllamaError as error:
        print(0 < len(pieces) < 20, error)
"""


@needs_guard
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change, what", [("cut", "was cut short"), ("write", "was changed")])
def test_a_mapped_model_whose_file_changes_says_so_and_nothing_else(folder, backend, change, what):
    file = folder / WEIGHTS
    os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9))
    done = python(MIDWAY, folder, backend, change)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and not done.returncode, done.stderr
    assert all(line.startswith(f"True {file} {what}") for line in lines)


@needs_guard
def test_the_command_ends_with_one_line(folder):
    code = """
import os, sys
from tinyllama import Llama, cli
forward = Llama.forward
def cut(self, *arguments, **options):
    os.truncate(sys.argv[1] + "/consolidated.00.pth", 300_000)
    return forward(self, *arguments, **options)
Llama.forward = cut
sys.exit(cli.main(["generate", "-m", sys.argv[1], "--mmap", "-p", "Once upon a time"]))
"""
    done = python(code, folder)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith(f"tinyllama: {folder / WEIGHTS} was cut short, from ")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("type", ["f32", "bf16"])
def test_a_loaded_model_does_without_its_file(folder, backend, type):
    if type == "f32":
        import torch

        state = torch.load(folder / WEIGHTS, weights_only=True)
        torch.save({name: tensor.float() for name, tensor in state.items()}, folder / WEIGHTS)
    with tinyllama.load(folder, backend, 2) as llama:
        before = llama.generate("Once upon a time", n_predict=8, temp=0)
        weight = llama.weight("norm")
        kept = weight.copy()
        file = folder / WEIGHTS
        data = np.fromfile(file, np.uint8)
        data[:] = 7
        file.write_bytes(data)
        assert llama.generate("Once upon a time", n_predict=8, temp=0) == before
        np.testing.assert_array_equal(weight, kept)
        with pytest.raises(TinyllamaError, match="was changed while"):
            llama.weight("norm")  # is in the file alone


def test_a_file_that_changes_while_it_is_loaded_is_an_error(folder):
    def change(names):
        for number, name in enumerate(names):
            if number == 20:
                overwrite(folder / WEIGHTS)
            yield name

    with pytest.raises(TinyllamaError, match=f"{WEIGHTS} was changed while"):
        tinyllama.load(folder, progress=change)
    tinyllama.load(folder)


def test_a_mapped_model_goes_on_when_its_file_is_replaced(folder):
    with tinyllama.load(folder, mmap=True) as llama:
        before = llama.generate("Once upon a time", n_predict=8, temp=0)
        other = folder / "other"
        other.write_bytes(b"other")
        os.replace(other, folder / WEIGHTS)
        assert llama.generate("Once upon a time", n_predict=8, temp=0) == before
