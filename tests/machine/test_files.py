"""Files: mapped, read up to a limit, and written so that a kill at any moment leaves whole ones."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest

import tinyllama
from tinyllama.backends import available
from tinyllama.errors import Cancelled, TinyllamaError, cancellable
from tinyllama.machine.download import small_folder
from tinyllama.machine.files import MappedFile, read_file, reserve, written

BACKENDS = [name for name, reason in available().items() if reason is None]
posix = pytest.mark.skipif(sys.platform == "win32", reason="locks, pipes and signals of POSIX")


@pytest.fixture
def model(tmp_path):
    """A file that holds "old"."""
    path = tmp_path / "model.bin"
    path.write_text("old")
    return path


@pytest.fixture
def parts(model):
    """Three that belong together."""
    more = [model.with_name("model.bin.1"), model.with_name("model.bin.2")]
    for part in more:
        part.write_text("old")
    return [model, *more]


def texts(paths):
    return [path.read_text() if path.exists() else None for path in paths]


def only(paths):
    """Nothing but these lies in their folder."""
    return sorted(paths[0].parent.iterdir()) == sorted(paths)


def write(*targets, text="new"):
    with written(*targets) as unfinished:
        for path in unfinished:
            path.write_text(text)


# --- read -----------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("read", [MappedFile, lambda path: read_file(path, 10)], ids=["map", "read"])
def test_what_is_no_file_is_refused_in_one_line_that_begins_with_its_name(tmp_path, read):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for path, cause in [
        (tmp_path, "is a folder"),
        (fifo, "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        (tmp_path / "gone", "No such file"),
        ("a\0b", "null"),
    ]:
        with pytest.raises(TinyllamaError) as refusal:
            read(path)
        line = str(refusal.value)
        assert line.startswith(str(path).replace("\0", r"\x00") + ": ") and cause in line and "\n" not in line


def test_an_empty_file_is_read_but_not_mapped(tmp_path):
    (tmp_path / "empty").touch()
    assert read_file(tmp_path / "empty", 0) == b""
    with pytest.raises(TinyllamaError, match=f"{tmp_path / 'empty'}: is empty"):
        MappedFile(tmp_path / "empty")


def test_a_file_is_read_up_to_its_limit_and_refused_beyond(model):
    assert read_file(model, 3) == b"old"
    with pytest.raises(TinyllamaError, match=r"model.bin: is too large: more than 2 bytes"):
        read_file(model, 2)


def test_a_mapped_file_has_its_bytes_its_path_and_a_descriptor(model):
    mapped = MappedFile(model)
    assert mapped[:] == b"old" and mapped.path == model and os.pread(mapped.fd, 2, 1) == b"ld"
    mapped.check()
    with pytest.raises(TypeError):
        mapped[0] = 1


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_mapped_file_that_is_replaced_or_removed_stays_what_it_was(model, how):
    mapped = MappedFile(model)
    write(model) if how == "replaced" else model.unlink()
    mapped.check()
    assert mapped[:] == b"old" and os.pread(mapped.fd, 3, 0) == b"old"


CHANGES = {
    "cut short": (lambda path: os.truncate(path, 1), "was cut short, from 3 to 1 bytes"),
    "longer": (lambda path: os.truncate(path, 9), "was changed"),
    "written": (lambda path: path.write_text("OLD"), "was changed"),
    "touched": (lambda path: os.utime(path, ns=(0, 0)), "was changed"),
}


@posix
@pytest.mark.parametrize(("change", "what"), CHANGES.values(), ids=CHANGES)
def test_a_mapped_file_that_changes_is_found_out(model, change, what):
    os.utime(model, ns=(1, 1))
    mapped = MappedFile(model)
    change(model)
    with pytest.raises(TinyllamaError, match=f"{model}: {what}"):
        mapped.check()


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux lists")
def test_a_mapped_file_gives_its_descriptors_back(model):
    before = len(os.listdir("/proc/self/fd"))
    mapped = MappedFile(model)
    assert len(os.listdir("/proc/self/fd")) > before
    del mapped
    assert len(os.listdir("/proc/self/fd")) == before


# --- a model in a file that changes ---------------------------------------------------------------

WEIGHTS = "consolidated.00.pth"
backends = pytest.mark.parametrize("backend", BACKENDS)
mapping = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "mlx"])  # which copies all


@pytest.fixture
def folder(tmp_path):
    """A copy of the small model, written long ago."""
    made = shutil.copytree(small_folder(), tmp_path / "small")
    os.utime(made / WEIGHTS, ns=(1, 1))
    return made


def overwrite(path):
    """Somebody else writes into a file."""
    with path.open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"something else" * 1000)


class Midway:
    """A flag that is looked at in every layer, and has the file changed after some of them."""

    def __init__(self, path):
        self.path, self.n = path, 0

    def is_set(self):
        self.n += 1
        if self.n == 40:
            overwrite(self.path)
        return False


@posix
@mapping
def test_a_mapped_model_whose_file_changes_says_so_and_nothing_else(folder, backend):
    pieces = []
    with tinyllama.load(folder, backend, 2, mmap=True) as llama:
        for _ in range(2):
            with pytest.raises(TinyllamaError, match=f"{folder / WEIGHTS}: was changed while it was in use"):
                for piece in llama.stream(
                    "Once upon a time", temp=0, n_predict=30, cancel=Midway(folder / WEIGHTS)
                ):
                    pieces.append(piece)
            assert 0 < len(pieces) < 30


@posix
@mapping
def test_a_mapped_model_whose_file_was_cut_short_is_not_run(folder, backend):
    with tinyllama.load(folder, backend, 2, mmap=True) as llama:
        llama.generate("Once", n_predict=2)
        os.truncate(folder / WEIGHTS, 300_000)
        with pytest.raises(TinyllamaError, match=f"{folder / WEIGHTS}: was cut short, from "):
            llama.generate("Once", n_predict=2)


@posix
@backends
@pytest.mark.parametrize("type", ["f32", "bf16"])
def test_a_loaded_model_does_without_its_file(folder, backend, type):
    if type == "f32":
        torch = pytest.importorskip("torch")
        state = torch.load(folder / WEIGHTS, weights_only=True)
        torch.save({name: tensor.float() for name, tensor in state.items()}, folder / WEIGHTS)
    with tinyllama.load(folder, backend, 2) as llama:
        before = llama.generate("Once upon a time", n_predict=8, temp=0)
        weight = llama.weight("norm")
        kept = weight.copy()
        (folder / WEIGHTS).write_bytes(b"\7" * (folder / WEIGHTS).stat().st_size)
        assert llama.generate("Once upon a time", n_predict=8, temp=0) == before
        np.testing.assert_array_equal(weight, kept)
        with pytest.raises(TinyllamaError, match="was changed while"):
            llama.weight("norm")  # is in the file alone


@posix
def test_a_file_that_changes_while_it_is_loaded_is_an_error(folder):
    def change(names):
        for number, name in enumerate(names):
            if number == 20:
                overwrite(folder / WEIGHTS)
            yield name

    with pytest.raises(TinyllamaError, match=f"{WEIGHTS}: was changed while"):
        tinyllama.load(folder, progress=change)
    tinyllama.load(folder).close()


@posix
def test_a_mapped_model_goes_on_when_its_file_is_replaced(folder):
    with tinyllama.load(folder, mmap=True) as llama:
        before = llama.generate("Once upon a time", n_predict=8, temp=0)
        write(folder / WEIGHTS)
        assert llama.generate("Once upon a time", n_predict=8, temp=0) == before


# --- written --------------------------------------------------------------------------------------


def test_files_appear_together_when_they_are_whole(parts):
    with written(*parts) as unfinished:
        assert [path.read_bytes() for path in unfinished] == [b""] * 3
        for path in unfinished:
            path.write_text("new")
        assert texts(parts) == ["old"] * 3
    assert texts(parts) == ["new"] * 3 and only(parts)


@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt(), TinyllamaError("no"), Cancelled("no"), ValueError("no")]
)
def test_what_is_not_written_to_the_end_leaves_what_was_there(parts, raised):
    with pytest.raises(type(raised)) as caught, written(*parts) as unfinished:
        unfinished[0].write_text("half")
        raise raised
    assert caught.value is raised
    assert texts(parts) == ["old"] * 3 and only(parts)


def test_an_error_of_the_system_names_the_file_that_was_to_be_written(parts):
    for raised in (OSError(errno.EIO, "broken"), FileNotFoundError(errno.ENOENT, "broken")):
        with pytest.raises(TinyllamaError, match=f"^{parts[0]}: broken$"), written(*parts):
            raise raised
    with pytest.raises(TinyllamaError, match=f"^{parts[1]}: No such file"), written(*parts) as unfinished:
        unfinished[1].unlink()
        unfinished[1].read_text()
    with pytest.raises(TinyllamaError, match=r"^another: broken$"), written(*parts):
        raise OSError(errno.EIO, "broken", "another")
    assert texts(parts) == ["old"] * 3 and only(parts)


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free(model):
    with pytest.raises(TinyllamaError) as refusal, written(model) as (unfinished,):
        os.truncate(unfinished, 2_000_000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(unfinished))
    line = str(refusal.value)
    assert line.startswith(
        f"{model}: No space left on device; it needs 2.0 MB of disk in {model.parent}, and "
    )
    assert line.endswith(" are free") and texts([model]) == ["old"] and only([model])


@posix
@pytest.mark.parametrize(
    ("target", "cause"),
    [("folder", "is a folder"), ("pipe", "a pipe or a device"), ("gone/model.bin", "there is no folder")],
)
def test_what_cannot_become_a_file_is_refused_before_anything_is_written(tmp_path, target, cause):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    with (
        pytest.raises(TinyllamaError, match=f"^{tmp_path / target}: .*{cause}"),
        written(tmp_path / "other", tmp_path / target),
    ):
        pytest.fail("it went on")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anything")
def test_a_read_only_file_or_folder_is_refused(model):
    model.chmod(0o444)
    with pytest.raises(TinyllamaError, match=f"^{model}: is read-only"):
        write(model)
    model.parent.chmod(0o555)
    try:
        with pytest.raises(TinyllamaError, match=f"^{model.with_name('b')}: Permission denied"):
            write(model.with_name("b"))
    finally:
        model.parent.chmod(0o755)
    assert texts([model]) == ["old"] and only([model])


@posix
def test_a_symbolic_link_stays_one_and_the_file_that_it_points_to_is_replaced(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(model)
    write(link)
    assert link.is_symlink() and link.read_text() == model.read_text() == "new"
    assert only([link])


def test_a_link_in_place_of_the_unfinished_file_is_refused_and_what_it_points_to_stays(model, tmp_path):
    """Somebody may have put it there for us to write through."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "model.bin.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(TinyllamaError, match=f"^{model}.tmp: is a folder, a link"):
        write(model)
    assert texts([model, tmp_path / "precious"]) == ["old", "precious"]


def test_room_on_the_disk_is_had_at_once_where_the_system_can(tmp_path):
    with (tmp_path / "model.bin").open("wb") as file:
        reserve(file, 1_000_000)
    stat = (tmp_path / "model.bin").stat()
    assert stat.st_size == 1_000_000
    if sys.platform == "linux" and stat.st_blocks == 0:
        pytest.skip("this file system reserves nothing")
    assert sys.platform != "linux" or stat.st_blocks * 512 >= 1_000_000


def test_the_files_are_on_the_disk_before_they_get_their_names_and_the_first_comes_last(parts, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: [fsync(file), done.append("on disk")])
    monkeypatch.setattr(os, "replace", lambda *names: [replace(*names), done.append(names[1].name)])
    write(*parts)
    assert done == ["on disk"] * 3 + ["model.bin.2", "model.bin.1", "model.bin"]


def test_cancelled_while_the_disk_is_slow_it_does_not_wait(parts, monkeypatch):
    flag, emptied = threading.Event(), threading.Event()

    def slow_disk(file):
        flag.set()
        with suppress(OSError):  # it has been closed
            while os.fstat(file).st_size:
                time.sleep(0.01)
        emptied.set()

    monkeypatch.setattr(os, "fsync", slow_disk)
    with pytest.raises(Cancelled), cancellable(flag):
        write(*parts)
    assert emptied.wait(60)
    assert texts(parts) == ["old"] * 3 and only(parts)


# --- two at once, and what is left ----------------------------------------------------------------


@posix
def test_what_a_living_run_writes_is_refused_to_others_and_stays(parts):
    with written(*parts) as first:
        for targets in ([parts[0]], [parts[1]], parts, parts[::-1]):
            with pytest.raises(TinyllamaError, match=r"model.bin(.\d)?: is being written by another run"):
                write(*targets)
        other = parts[0].with_name("model")
        write(other, text="another")
        for path in first:
            path.write_text("first")
    assert texts(parts) == ["first"] * 3 and only([*parts, other])


def test_what_a_killed_run_left_is_taken_over(model):
    left = model.with_name("model.bin.tmp")
    left.write_text("half of something long")
    with written(model) as (unfinished,):
        assert unfinished == left and unfinished.read_text() == ""
        unfinished.write_text("new")
    assert texts([model]) == ["new"] and only([model])


@posix
def test_without_locks_everything_goes_on(model, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write(model)
    assert texts([model]) == ["new"] and only([model])


# --- killed ---------------------------------------------------------------------------------------

KILLED_BEFORE = """
import os, sys
from tinyllama.machine.files import written
steps = iter(range(int(sys.argv[1])))
def counted(function):
    def step(*args, **options):
        if next(steps, None) is None:
            os.kill(os.getpid(), 9)
        return function(*args, **options)
    return step
os.replace, os.unlink, os.fsync = counted(os.replace), counted(os.unlink), counted(os.fsync)
with written(*sys.argv[2:]) as unfinished:
    for path in unfinished:
        path.write_text("new")
"""


def killed(targets, n_steps: int) -> bool:
    """Write them in a process that kills itself before a step too many."""
    command = [sys.executable, "-c", KILLED_BEFORE, str(n_steps), *map(str, targets)]
    status = subprocess.run(command, timeout=300).returncode
    assert status in (0, -signal.SIGKILL)
    return status != 0


def state(parts) -> str:
    """Without its first part, a set isn't one."""
    found = texts(parts)
    if found[0] is None:
        return "none"
    assert len(set(found)) == 1, f"a mixture: {found}"
    return found[0]


@posix
def test_killed_before_any_step_there_is_the_old_set_none_or_the_new_one(parts):
    found = []
    for n_steps in range(100):
        write(*parts, text="old")
        died = killed(parts, n_steps)
        found.append(state(parts))
        if not died:
            break
    assert found == ["old"] * 4 + ["none"] * 5 + ["new"] and only(parts)


@posix
def test_killed_before_any_step_a_single_file_is_old_or_new(model):
    found = []
    for n_steps in range(3):
        write(model, text="old")
        killed([model], n_steps)
        found.append(state([model]))
    assert found == ["old", "old", "new"] and only([model])


REPEATED = """
import sys
from tinyllama.errors import TinyllamaError
from tinyllama.machine.files import written
for number in range(int(sys.argv[1])):
    try:
        with written(*sys.argv[2:]) as unfinished:
            for path in unfinished:
                path.write_text(str(number) * 1000)
            print(number, flush=True)
    except TinyllamaError as error:
        assert "is being written by another run" in str(error), error
"""


def repeating(paths, times: int) -> subprocess.Popen:
    command = [sys.executable, "-c", REPEATED, str(times), *map(str, paths)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@posix
@pytest.mark.parametrize("n_kills", [4, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_any_moment_there_is_one_whole_set_or_none(parts, n_kills):
    chance, seen = random.Random(n_kills), Counter()
    for _ in range(n_kills):
        write(*parts, text="old")
        process = repeating(parts, 10**9)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
        seen[state(parts)] += 1
    assert sum(seen.values()) == n_kills
    write(*parts)
    assert state(parts) == "new" and only(parts)


@posix
@pytest.mark.parametrize("times", [30, pytest.param(1000, marks=pytest.mark.long)])
def test_of_several_that_write_all_the_time_nobody_makes_a_mixture(parts, times):
    """Each is refused now and then, and says so; whatever is there at the end is one of theirs."""
    runs = [repeating(parts, times) for _ in range(3)]
    assert [run.communicate(timeout=300) and run.returncode for run in runs] == [0, 0, 0]
    assert state(parts) != "none" and only(parts)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit of address space")
def test_a_file_that_ulimit_leaves_no_room_for_is_refused_in_one_line(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(10**12)  # without taking room on the disk
    script = (
        "import resource, tinyllama.machine.files as files, tinyllama.errors\n"
        "resource.setrlimit(resource.RLIMIT_AS, (10**11, 10**11))\n"
        "try:\n    files.MappedFile(%r)\nexcept tinyllama.errors.TinyllamaError as error:\n    print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script % str(path)], capture_output=True, text=True, check=True
    )
    assert found.stdout == (
        f"{path}: there is no address space to map its 1000.0 GB: `ulimit -v` must allow more\n"
    )
