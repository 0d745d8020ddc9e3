"""Runs of convert and quantize that are killed, or meet a full disk, a read error, each other."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import checkpoints
import pytest
from commander import KILLED, commander, seconds_of

from tinyllama.commands.convert import convert
from tinyllama.config import Config, hidden_dim_of
from tinyllama.errors import TinyllamaError
from tinyllama.formats import open_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and file locks of POSIX")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with commander(tmp_path_factory.mktemp("log") / "stderr") as made:
        yield made


def make_models(folder: Path, dim: int, n_layers: int) -> Path:
    """Folders with two models of one shape, each whole and cut in two, and a ggml file of each."""
    config = Config(dim, n_layers, 8, 400, hidden_dim_of(dim, 64), n_kv_heads=8, multiple_of=64)
    params = checkpoints.PARAMS | {"dim": dim, "n_layers": n_layers, "n_heads": 8, "multiple_of": 64}
    for seed, name in enumerate(("old", "new")):
        state = checkpoints.weights(config, seed=seed)
        for n_parts in (1, 2):
            made = checkpoints.write(folder / f"{name}{n_parts}", checkpoints.cut(state, n_parts), params)
            convert(made)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of 5 MB as f16, so that writing them takes a while."""
    return make_models(tmp_path_factory.mktemp("models"), 256, 3)


@pytest.fixture(scope="module")
def large_models(tmp_path_factory):
    """Of 51 MB."""
    return make_models(tmp_path_factory.mktemp("large_models"), 512, 8)


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts a small file system of its own, and unmounts it afterwards."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir(exist_ok=True)
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
        mounted.append(folder)
        return folder

    if sys.platform != "linux" or not shutil.which("mount"):
        pytest.skip("tmpfs is Linux's")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def one_line(status: int, command) -> str:
    """The line that a command failed with."""
    assert status == 1, command.said()
    said = command.said()
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("tinyllama: "))
    return line


# --- killed ---------------------------------------------------------------------------------------

#: What is run on the folder of a model ({n} parts), and the files that it writes.
WRITERS = {
    "convert": ("convert {model}1 --outfile {out}/m.bin", ["m.bin"]),
    "convert 2 parts": ("convert {model}2 --outfile {out}/m.bin", ["m.bin", "m.bin.1"]),
    "convert to GGUF": ("convert {model}2 --format gguf --outfile {out}/m.gguf", ["m.gguf"]),
    "quantize": ("quantize {model}1/ggml-model-f16.bin {out}/m.bin q4_0", ["m.bin"]),
    "quantize 2 parts": ("quantize {model}2/ggml-model-f16.bin {out}/m.bin q4_1", ["m.bin", "m.bin.1"]),
    "quantize GGUF": ("quantize {model}1/ggml-model-f16.gguf {out}/m.gguf q4_0", ["m.gguf"]),
}


class Writer:
    """A command that writes files, from an old model and from a new one."""

    def __init__(self, commands, models: Path, out: Path, line: str, files: list[str]):
        self.commands, self.models, self.out, self.line = commands, models, out, line
        self.paths = [out / name for name in files]
        out.mkdir()
        for model in ("old1", "new1") if ".gguf {" in line else ():
            convert(models / model, format="gguf")
        self.run("old")
        self.names = {path.name for path in out.iterdir()}
        self.old = self.read()
        self.seconds = self.run("new")
        self.new = self.read()
        assert self.old != self.new

    def argv(self, model: str) -> list[str]:
        return self.line.format(model=self.models / model, out=self.out).split()

    def start(self, model: str, before: str = ""):
        return self.commands.tinyllama(*self.argv(model), before=before)

    def run(self, model: str) -> float:
        return seconds_of(self.start(model))

    def read(self) -> list[bytes] | None:
        """What readers find: nothing without the first file."""
        return [path.read_bytes() for path in self.paths] if self.paths[0].exists() else None

    def restore(self) -> None:
        """Put the old files there again; what killed runs left stays."""
        for path, data in zip(self.paths, self.old, strict=True):
            path.write_bytes(data)

    def which(self) -> str:
        """Which model is there; anything else is a mixture, or half a file."""
        found = self.read()
        if found is None:
            with pytest.raises(TinyllamaError):
                self.open()
            return "none"
        self.open()
        return {tuple(self.old): "old", tuple(self.new): "new"}[tuple(found)]

    def open(self) -> None:
        open_checkpoint(self.out if self.paths[0].suffix == ".pth" else self.paths[0])


QUICK = ["convert 2 parts"]


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in WRITERS]
)
def writer(request, commands, models, tmp_path):
    return Writer(commands, models, tmp_path / "out", *WRITERS[request.param])


def test_killed_at_any_moment_the_output_is_the_old_one_the_new_one_or_none(writer):
    seen = Counter()
    for number in range(5):
        writer.restore()
        command = writer.start("new")
        time.sleep(writer.seconds * (number + 0.5) / 5)
        command.kill()
        assert command.wait() in (0, KILLED)
        seen[writer.which()] += 1
    assert seen["old"], seen
    writer.run("new")
    assert writer.which() == "new" and {path.name for path in writer.out.iterdir()} == writer.names


DIE_AT = """
import os
steps = iter(range({limit}))
def dies(function):
    def counted(*args, **options):
        if next(steps, None) is None: os.kill(os.getpid(), 9)
        return function(*args, **options)
    return counted
os.replace, os.unlink, os.fsync = dies(os.replace), dies(os.unlink), dies(os.fsync)
"""


def test_killed_before_any_of_the_last_steps_the_parts_are_of_one_model(writer):
    """Every file is synced, the old ones of several are removed, and each is renamed."""
    found, n_files = [], len(writer.names)
    for limit in range(3 * n_files + 1):
        writer.restore()
        status = writer.start("new", DIE_AT.format(limit=limit)).wait()
        found.append(writer.which())
        if status == 0:
            break
    n_none = 2 * n_files - 1 if n_files > 1 else 0
    assert found == ["old"] * (n_files + 1) + ["none"] * n_none + ["new"], found
    assert {path.name for path in writer.out.iterdir()} == writer.names


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_a_hundred_kills_of_real_processes(name, commands, large_models, tmp_path):
    """A fifth of them while it starts, the others from when it says what it writes until it has ended."""
    writer = Writer(commands, large_models, tmp_path / "out", *WRITERS[name])
    argv = [sys.executable, "-m", "tinyllama", *writer.argv("new")]

    def start() -> subprocess.Popen:
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    process, began = start(), time.perf_counter()
    assert b"writes" in process.stderr.readline()
    starting = time.perf_counter() - began
    assert process.wait() == 0
    writing_seconds, seen = time.perf_counter() - began - starting, Counter()
    for number in range(100):
        writer.restore()
        process = start()
        if number < 20:
            time.sleep(starting * number / 20)
        else:
            process.stderr.readline()
            time.sleep(writing_seconds * (number - 20) / 80)
        process.kill()
        seen["had ended"] += process.wait() == 0
        seen[writer.which()] += 1
        seen["something left"] += {path.name for path in writer.out.iterdir()} != writer.names
    writer.run("new")
    print(name, dict(seen))
    assert {path.name for path in writer.out.iterdir()} == writer.names
    assert writer.which() == "new"


# --- told to end ----------------------------------------------------------------------------------

#: The disk takes its time, until the file is gone.
SLOW_DISK = """
import os, time
def slow(file):
    try:
        end = time.monotonic() + 120
        while os.fstat(file).st_nlink and not os.path.exists('{go}') and time.monotonic() < end:
            time.sleep(0.01)
    except OSError:
        pass
os.fsync = slow
"""


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} appeared"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("signals", "status"),
    [([signal.SIGINT], 130), ([signal.SIGINT] * 3, 130), ([signal.SIGTERM], 143), ([signal.SIGHUP], 129)],
    ids=["Ctrl-C", "Ctrl-C three times", "SIGTERM", "SIGHUP"],
)
def test_told_to_end_it_says_so_and_leaves_everything_as_it_was(commands, models, tmp_path, signals, status):
    out = tmp_path / "out"
    out.mkdir()
    (out / "m.bin").write_text("old")
    slow = SLOW_DISK.format(go=tmp_path / "go")
    command = commands.tinyllama("convert", models / "new1", "--outfile", out / "m.bin", before=slow)
    wait_for(out, "m.bin.tmp")
    for number in signals:
        os.kill(command.pid, number)
        time.sleep(0.002)
    assert command.wait() == status
    assert command.said().splitlines()[-1] == "tinyllama: interrupted; no file was left half-written"
    assert [path.name for path in out.iterdir()] == ["m.bin"]
    assert (out / "m.bin").read_text() == "old"


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_a_hundred_interrupts_leave_the_old_output_or_the_new_one(name, commands, large_models, tmp_path):
    writer, seen = Writer(commands, large_models, tmp_path / "out", *WRITERS[name]), Counter()
    for number in range(100):
        writer.restore()
        command = writer.start("new")
        time.sleep(writer.seconds * number / 100)
        with suppress(ProcessLookupError):
            os.kill(command.pid, signal.SIGINT)
        status, said = command.wait(), command.said()
        if status == -signal.SIGINT or ("writes" not in said and said.endswith("KeyboardInterrupt")):
            status = 130  # it was still starting: Python ends as ever
        else:
            assert "Traceback" not in said
        seen[status, writer.which()] += 1
        assert {path.name for path in writer.out.iterdir()} == writer.names
    print(name, dict(seen))
    assert set(seen) <= {(130, "old"), (130, "new"), (0, "new")}


# --- full disks -----------------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_with_what_is_needed_and_what_is_free(commands, models, tmpfs):
    disk = tmpfs("size=3m")
    (disk / "m.bin").write_text("old")
    command = commands.tinyllama("convert", models / "new1", "--outfile", disk / "m.bin")
    line = one_line(command.wait(), command)
    assert f"writing m.bin needs 5.2 MB of disk in {disk}, and 3.1 MB are free" in line
    assert [path.name for path in disk.iterdir()] == ["m.bin"] and (disk / "m.bin").read_text() == "old"


def test_what_a_killed_run_left_makes_room_before_the_disk_is_measured(commands, models, tmpfs):
    disk = tmpfs("size=8m")
    (disk / "m.bin.tmp").write_bytes(bytes(5_000_000))
    command = commands.tinyllama("convert", models / "new1", "--outfile", disk / "m.bin")
    assert command.wait() == 0, command.said()
    assert [path.name for path in disk.iterdir()] == ["m.bin"]


#: The room was there when it was looked for.
FULL_LATER = """
import shutil
from collections import namedtuple
shutil.disk_usage = lambda _: namedtuple("Usage", "total used free")(10**12, 0, 10**12)
"""
#: As on macOS, where a long file may have no room yet.
NOTHING_RESERVED = "import ctypes\nctypes.CDLL = lambda *_, **__: None"


@pytest.mark.parametrize("before", ["", NOTHING_RESERVED], ids=["reserved", "written"])
def test_a_disk_that_fills_meanwhile_gets_one_line_and_the_old_file_stays(commands, models, tmpfs, before):
    disk = tmpfs("size=3m")
    (disk / "m.bin").write_text("old")
    before = f"{FULL_LATER}\n{before}"
    command = commands.tinyllama("convert", models / "new1", "--outfile", disk / "m.bin", before=before)
    line = one_line(command.wait(), command)
    assert line.startswith(f"tinyllama: {disk / 'm.bin'}: No space left on device; it needs 5.2 MB of disk")
    assert [path.name for path in disk.iterdir()] == ["m.bin"] and (disk / "m.bin").read_text() == "old"


def test_a_read_only_disk_is_named(commands, models, tmpfs):
    disk = tmpfs("size=8m")
    (disk / "m.bin").write_text("old")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    command = commands.tinyllama("convert", models / "new1", "--outfile", disk / "m.bin")
    assert one_line(command.wait(), command) == f"tinyllama: {disk / 'm.bin'}: Read-only file system"


def test_a_link_to_another_disk_is_written_there(commands, models, tmpfs, tmp_path):
    disk, link = tmpfs("size=16m"), tmp_path / "m.bin"
    link.symlink_to(disk / "there.bin")
    command = commands.tinyllama("convert", models / "new1", "--outfile", link)
    assert command.wait() == 0, command.said()
    assert link.is_symlink() and [path.name for path in disk.iterdir()] == ["there.bin"]


# --- what is read fails, or changes ---------------------------------------------------------------

READ_ERROR = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
static int is_bad(int file, off_t offset)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    if (strstr(path, getenv("BAD_FILE")) && offset / 1000000 == 2) {
        errno = EIO;
        return 1;
    }
    return 0;
}
#define WRAP(name, parameters, types, arguments, offset)   \
    ssize_t name parameters                               \
    {                                                     \
        ssize_t(*real) types = dlsym(RTLD_NEXT, #name);   \
        return is_bad(file, offset) ? -1 : real arguments; \
    }
typedef const struct iovec *parts;
WRAP(read, (int file, void *to, size_t n), (int, void *, size_t), (file, to, n), lseek(file, 0, SEEK_CUR))
WRAP(pread, (int file, void *to, size_t n, off_t at), (int, void *, size_t, off_t), (file, to, n, at), at)
WRAP(pread64, (int file, void *to, size_t n, off_t at), (int, void *, size_t, off_t), (file, to, n, at), at)
WRAP(preadv, (int file, parts to, int n, off_t at), (int, parts, int, off_t), (file, to, n, at), at)
WRAP(preadv64, (int file, parts to, int n, off_t at), (int, parts, int, off_t), (file, to, n, at), at)
WRAP(preadv2, (int file, parts to, int n, off_t at, int f), (int, parts, int, off_t, int),
     (file, to, n, at, f), at)
WRAP(preadv64v2, (int file, parts to, int n, off_t at, int f), (int, parts, int, off_t, int),
     (file, to, n, at, f), at)
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
@pytest.mark.parametrize("checklist", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_read_error_names_the_file_that_could_not_be_read(models, tmp_path, checklist):
    (tmp_path / "read.c").write_text(READ_ERROR)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "read.so", tmp_path / "read.c"], check=True)
    folder = shutil.copytree(models / "new1", tmp_path / "model")
    if checklist:
        (folder / "checklist.chk").write_text(f"{'0' * 32}  consolidated.00.pth\n")
    out = folder / "ggml-model-f16.bin"
    old = out.read_bytes()
    environment = os.environ | {"LD_PRELOAD": str(tmp_path / "read.so"), "BAD_FILE": "consolidated.00.pth"}
    command = [sys.executable, "-m", "tinyllama", "convert", folder]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = ended.stderr.replace("\r", "\n").splitlines()
    assert ended.returncode == 1
    assert lines[-1].startswith(f"tinyllama: {folder / 'consolidated.00.pth'}: ")
    assert lines[-1].endswith(": Input/output error")
    assert out.read_bytes() == old and not list(folder.glob("*.tmp"))


#: Run as the output is claimed, when the source has been opened.
MEANWHILE = """
import fcntl, os, shutil
lock, source = fcntl.flock, {source!r}
def change(*arguments):
    {change}
    fcntl.flock = lock
    return lock(*arguments)
fcntl.flock = change
"""
WRITTEN_TO = "open(source, 'r+b').write(b'something else' * 100)"
CUT_SHORT = "os.truncate(source, 3_000_000)"
REMOVED = "os.unlink(source)"
REPLACED = "shutil.copy(source + '.other', source + '.copy'); os.replace(source + '.copy', source)"


@pytest.fixture(params=["convert", "quantize"])
def work(request, commands, models, tmp_path):
    """Runs a command whose source changes meanwhile. -> the source, the output, and the ended command."""
    folder = shutil.copytree(models / "new1", tmp_path / "model")
    name = "consolidated.00.pth" if request.param == "convert" else "ggml-model-f16.bin"
    source, out = folder / name, folder / "out.bin"
    shutil.copy(models / "old1" / name, f"{source}.other")
    arguments = [folder, "--outfile", out] if request.param == "convert" else [source, out, "q4_0"]

    def run(change: str):
        command = commands.tinyllama(
            request.param, *arguments, before=MEANWHILE.format(source=str(source), change=change)
        )
        return command, command.wait()

    return source, out, run


@pytest.mark.parametrize("change", [WRITTEN_TO, CUT_SHORT], ids=["written to", "cut short"])
def test_a_source_that_changes_meanwhile_is_found_out(work, change):
    source, out, run = work
    out.write_text("old")
    command, status = run(change)
    if change == WRITTEN_TO or status != -signal.SIGBUS:  # which ends who reads what is no more
        assert str(source) in one_line(status, command)
    assert out.read_text() == "old"


@pytest.mark.parametrize("change", [REMOVED, REPLACED], ids=["removed", "replaced"])
def test_a_source_that_is_removed_or_replaced_meanwhile_is_read_as_it_was(work, change):
    _, out, run = work
    assert run("pass")[1] == 0
    expected = out.read_bytes()
    out.unlink()
    command, status = run(change)
    assert status == 0, command.said()
    assert out.read_bytes() == expected


def test_a_folder_that_goes_meanwhile_is_named(models, tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.setattr(os, "fsync", lambda _: shutil.rmtree(folder, ignore_errors=True))
    checkpoints.refused(
        lambda: convert(models / "new1", 1, folder / "m.bin"), f"{folder / 'm.bin'}: No such file"
    )
    assert not folder.exists()


# --- two at once ----------------------------------------------------------------------------------


def test_of_two_that_write_the_same_file_one_is_refused(commands, models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    slow = SLOW_DISK.format(go=tmp_path / "go")
    command = commands.tinyllama("convert", models / "old2", "--outfile", out / "m.bin", before=slow)
    wait_for(out, "m.bin.1.tmp")
    checkpoints.refused(
        lambda: convert(models / "new2", 1, out / "m.bin"),
        f"{out / 'm.bin'}: is being written by another run",
    )
    (tmp_path / "go").touch()
    assert command.wait() == 0, command.said()
    assert {path.name for path in out.iterdir()} == {"m.bin", "m.bin.1"}
    for name in ("", ".1"):
        made = (models / "old2" / f"ggml-model-f16.bin{name}").read_bytes()
        assert (out / f"m.bin{name}").read_bytes() == made


@pytest.mark.long
def test_of_two_that_begin_at_once_both_end_well_or_one_is_refused(models, tmp_path):
    seen = Counter()
    for _ in range(30):
        argv = [sys.executable, "-m", "tinyllama", "convert", "--outfile", str(tmp_path / "m.bin")]
        runs = [
            subprocess.Popen(
                [*argv, models / name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for name in ("old2", "new2")
        ]
        said = [run.communicate(timeout=60)[1] for run in runs]
        statuses = tuple(run.returncode for run in runs)
        assert 0 in statuses and not any("Traceback" in text for text in said), said
        seen[statuses] += 1
        made = [(tmp_path / f"m.bin{part}").read_bytes() for part in ("", ".1")]
        expected = [
            [(models / name / f"ggml-model-f16.bin{part}").read_bytes() for part in ("", ".1")]
            for name, status in zip(("old2", "new2"), statuses, strict=True)
            if status == 0
        ]
        assert made in expected
        assert {path.name for path in tmp_path.iterdir()} == {"m.bin", "m.bin.1"}
    print(dict(seen))
