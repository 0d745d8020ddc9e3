import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tinyllama.machine import files as writing
from tinyllama.errors import TinyllamaError
from tinyllama.machine.files import newest, scratch_folder, written_beside


@pytest.fixture
def model(tmp_path):
    """A file that holds "old"."""
    path = tmp_path / "model.bin"
    path.write_text("old")
    return path


@pytest.fixture
def parts(model):
    """Two that belong together, of which a shorter model's name is the beginning."""
    part = model.with_name("model.bin.1")
    part.write_text("old")
    return [model, part]


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


def write(*targets, text="new"):
    with written_beside(*targets) as unfinished:
        for path in unfinished:
            path.write_text(text)


def killed(targets, before_rename):
    """Write them in a process that kills itself before the so-manyth rename."""
    program = (
        "import os, sys; from pathlib import Path; from tinyllama.machine.files import written_beside\n"
        "renames, replace = iter(range(int(sys.argv[1]))), os.replace\n"
        "def rename(*names): os.kill(os.getpid(), 9) if next(renames, None) is None else replace(*names)\n"
        "os.replace = rename\n"
        "with written_beside(*map(Path, sys.argv[2:])) as unfinished:\n"
        "    for path in unfinished: path.write_text('new')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(before_rename), *map(str, targets)], timeout=60
    )
    assert ended.returncode == -9


# --- failures -------------------------------------------------------------------------------------


def test_what_is_not_written_to_the_end_leaves_what_was_there(parts):
    with pytest.raises(KeyboardInterrupt), written_beside(*parts) as unfinished:
        unfinished[0].write_text("half")
        raise KeyboardInterrupt
    assert names(parts[0]) == ["model.bin", "model.bin.1"]
    assert [part.read_text() for part in parts] == ["old", "old"]


def test_an_error_of_the_system_names_the_file_that_was_to_be_written(parts):
    for raised in (OSError(errno.EIO, "no"), FileNotFoundError(errno.ENOENT, "no")):
        with pytest.raises(OSError) as caught, written_beside(*parts):
            raise raised
        assert caught.value.filename == str(parts[0])
    with pytest.raises(OSError) as caught, written_beside(*parts) as unfinished:
        unfinished[1].unlink()
        unfinished[1].read_text()
    assert caught.value.filename == str(parts[1])


@pytest.mark.parametrize("folder", ["", "gone"])
def test_what_cannot_become_a_file_is_refused_at_once(tmp_path, folder):
    target = tmp_path / folder / "model.bin"
    if not folder:
        target.mkdir()
    with pytest.raises(OSError) as caught, written_beside(target):
        pytest.fail("it went on")
    assert caught.value.filename in (str(target), str(target.parent))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anything")
def test_a_read_only_file_is_not_replaced(model):
    model.chmod(0o444)
    with pytest.raises(PermissionError) as caught:
        write(model)
    assert caught.value.filename == str(model) and model.read_text() == "old"


def test_room_on_the_disk_is_had_at_once_where_the_system_can(tmp_path):
    with (tmp_path / "model.bin").open("wb") as file:
        writing.reserve(file, 1_000_000)
    stat = (tmp_path / "model.bin").stat()
    assert stat.st_size == 1_000_000
    if sys.platform == "linux" and stat.st_blocks == 0:
        pytest.skip("this file system reserves nothing")
    assert sys.platform != "linux" or stat.st_blocks * 512 >= 1_000_000


# --- killed ---------------------------------------------------------------------------------------


def test_what_a_killed_run_left_half_goes_with_the_next_that_writes_there(parts):
    for name in ("model.bin.01234567.tmp", "model.bin.1.01234567.tmp", "model.bin.2.01234567.tmp"):
        (parts[0].parent / name).write_text("half")
    scratch = parts[0].with_name("model.bin.01234567.scratch")
    scratch.mkdir()
    (scratch / "half.whl").write_text("half")
    others = {"model.bin.0123456.tmp", "model.bin.01234567.txt", "other.bin.01234567.tmp"}
    for name in others:
        (parts[0].parent / name).write_text("somebody's")
    write(parts[0])
    assert set(names(parts[0])) == {"model.bin", "model.bin.1"} | others
    assert [part.read_text() for part in parts] == ["new", "old"]


@pytest.mark.parametrize("before_rename", range(3))
def test_killed_between_two_renames_all_old_files_are_read_or_all_new_ones(parts, before_rename):
    killed(parts, before_rename)
    expected = "new" if before_rename else "old"
    assert [newest(part).read_text() for part in parts] == [expected] * 2
    write(parts[0], text="newer")
    assert names(parts[0]) == ["model.bin", "model.bin.1"]
    assert [part.read_text() for part in parts] == ["newer", expected]


def test_killed_before_its_only_rename_a_file_is_as_it_was(model):
    killed([model], 1)
    assert model.read_text() == "old" and len(names(model)) == 2
    write(model, text="newer")
    assert names(model) == ["model.bin"] and model.read_text() == "newer"


def test_interrupted_between_two_renames_the_new_files_get_their_names(parts, monkeypatch):
    replace = os.replace

    def interrupted(path, target):
        replace(path, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(*parts)
    assert names(parts[0]) == ["model.bin", "model.bin.1"]
    assert [part.read_text() for part in parts] == ["new", "new"]


def test_the_newest_of_a_file_is_itself_as_a_rule(tmp_path, model):
    model.with_name("model.bin.01234567.tmp").write_text("half")
    assert newest(model) == model
    assert newest(tmp_path / "no folder" / "model.bin") == tmp_path / "no folder" / "model.bin"


def test_the_files_are_on_the_disk_before_they_get_their_names(parts, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: [fsync(file), done.append("on disk")])
    monkeypatch.setattr(os, "replace", lambda *names: [replace(*names), done.append("renamed")])
    write(*parts)
    assert done == ["on disk"] * 2 + ["renamed"] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_does_not_wait_until_the_disk_has_everything(parts, monkeypatch):
    emptied = []

    def slow_disk(file):
        time.sleep(0.5)  # until it is waited for
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        for _ in range(100):
            if not os.fstat(file).st_size:
                return emptied.append(True)
            time.sleep(0.1)

    monkeypatch.setattr(os, "fsync", slow_disk)
    with pytest.raises(KeyboardInterrupt):
        write(*parts)
    assert emptied == [True]
    assert names(parts[0]) == ["model.bin", "model.bin.1"]
    assert [part.read_text() for part in parts] == ["old", "old"]


# --- at once --------------------------------------------------------------------------------------


def test_what_a_living_run_writes_is_refused_to_others_and_stays(parts):
    with written_beside(*parts) as first:
        for targets in ([parts[0]], [parts[1]], parts, parts[::-1]):
            with pytest.raises(TinyllamaError, match=r"model.bin(.1)? is being written by another run"):
                write(*targets)
        assert all(path.exists() for path in first)
        write(parts[0].with_name("model"), text="another")
        for path in first:
            path.write_text("first")
    assert [part.read_text() for part in parts] == ["first", "first"]
    assert names(parts[0]) == ["model", "model.bin", "model.bin.1"]


def test_without_locks_everything_goes_on_and_what_others_left_or_write_stays(model, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if writing.fcntl:
        monkeypatch.setattr(writing.fcntl, "flock", no_locks)
    left = model.with_name("model.bin.01234567.tmp")
    left.write_text("half")
    write(model)
    assert model.read_text() == "new" and names(model) == [model.name, left.name]


def test_a_scratch_folder_lasts_as_long_as_it_is_needed(model):
    with written_beside(model) as (unfinished,), scratch_folder(unfinished) as folder:
        (folder / "download").write_text("something")
        unfinished.write_text("new")
    assert names(model) == ["model.bin"] and model.read_text() == "new"


# --- what is read ---------------------------------------------------------------------------------

CHANGES = {
    "written": lambda path: path.write_text("OLD"),
    "longer": lambda path: path.write_text("older"),
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: write(path, text="old"),
    "touched": lambda path: os.utime(path, ns=(0, 0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_it_is_read_is_found_out(model, change):
    unchanged = writing.Unchanged([model])
    unchanged.check()
    os.utime(model, ns=(1, 1))
    unchanged = writing.Unchanged([model])
    model.read_text()
    unchanged.check()
    change(model)
    with pytest.raises(TinyllamaError, match=r"model\.bin was changed, replaced or removed"):
        unchanged.check()
