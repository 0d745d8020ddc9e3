"""Runs of convert, quantize and split that are killed, or meet a full disk, a read error, each other."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import checkpoints
import pytest
from commander import KILLED, commander, seconds_of

from tinyllama.commands import streaming
from tinyllama.config import Config, hidden_dim_of
from tinyllama.commands.convert import convert, quantize
from tinyllama.formats import meta, open_checkpoint
from tinyllama.machine.files import newest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and file locks of POSIX")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with commander(tmp_path_factory.mktemp("log") / "stderr") as made:
        yield made


def make_models(folder: Path, dim: int, n_layers: int) -> Path:
    """Folders with two models of one shape, each whole and cut in two, and f16 files of each."""
    config = Config(dim, n_layers, 8, 400, hidden_dim_of(dim, 64), n_kv_heads=8, multiple_of=64)
    params = checkpoints.PARAMS | {"dim": dim, "n_layers": n_layers, "n_heads": 8, "multiple_of": 64}
    for seed, name in enumerate(("old", "new")):
        state = checkpoints.weights(config, seed=seed)
        for n_parts in (1, 2):
            made = checkpoints.write(folder / f"{name}{n_parts}", checkpoints.cut(state, n_parts), params)
            convert(made)
            convert(made, format="gguf")
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
    "split": ("split {model}1 {out}", ["consolidated.00.pth", "consolidated.01.pth", "params.json"]),
}


class Writer:
    """A command that writes files, from an old model and from a new one."""

    def __init__(self, commands, models: Path, out: Path, line: str, files: list[str]):
        self.commands, self.models, self.out, self.line = commands, models, out, line
        self.paths = [out / name for name in files]
        out.mkdir()
        self.run("old")
        self.names = {path.name for path in out.iterdir()}
        self.old = self.read()
        self.seconds = self.run("new")
        self.new = self.read()
        assert self.old != self.new

    def argv(self, model: str) -> list[str]:
        return self.line.format(model=self.models / model, out=self.out).split()

    def start(self, model: str, before: str = ""):
        verb, *rest = self.argv(model)
        if verb != "split":
            return self.commands.tinyllama(verb, *rest, before=before)
        return self.commands.start(f"{before}\nfrom tinyllama.formats.meta import split\nsplit(*{rest!r}, 2)")

    def run(self, model: str) -> float:
        return seconds_of(self.start(model))

    def read(self) -> list[bytes]:
        """What readers find."""
        return [newest(path).read_bytes() for path in self.paths]

    def restore(self) -> None:
        """Put the old files there again; what killed runs left stays.

        Unless they left whole files without their names: a run gives them those first, and reads no old ones.
        """
        if list(self.out.glob("*.whole")):
            self.run("old")
        for path, data in zip(self.paths, self.old, strict=True):
            path.write_bytes(data)

    def which(self) -> str:
        """Which of both models is there; anything else is a mixture, or half a file."""
        return {tuple(self.old): "old whole", tuple(self.new): "new whole"}[tuple(self.read())]


QUICK = ["convert 2 parts", "quantize GGUF", "split"]


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in WRITERS]
)
def writer(request, commands, models, tmp_path):
    return Writer(commands, models, tmp_path / "out", *WRITERS[request.param])


def test_killed_at_any_moment_the_old_output_is_whole_or_the_new_one(writer):
    seen = Counter()
    for number in range(10):
        writer.restore()
        command = writer.start("new")
        time.sleep(writer.seconds * (number + 0.5) / 10)
        command.kill()
        assert command.wait() in (0, KILLED)
        seen[writer.which()] += 1
    assert seen["old whole"] >= 2, seen
    writer.run("new")
    assert writer.which() == "new whole" and {path.name for path in writer.out.iterdir()} == writer.names


DIE_AT = """
import os
count, limit = 0, {limit}
def dies(function):
    def counted(*args, **options):
        global count
        count += 1
        if count > limit: os.kill(os.getpid(), 9)
        return function(*args, **options)
    return counted
os.replace, os.fsync = dies(os.replace), dies(os.fsync)
"""


def test_killed_before_any_of_the_last_steps_the_parts_are_of_one_model(writer):
    """Every file is synced and renamed, the first one twice: from the first time on the new ones count."""
    found, n_files = [], len(writer.names)
    for limit in range(2 * n_files + 2):
        writer.run("old")
        status = writer.start("new", DIE_AT.format(limit=limit)).wait()
        found.append(writer.which())
        if status == KILLED:  # a reader sees it so too
            open_checkpoint(writer.out if writer.paths[0].suffix == ".pth" else writer.paths[0])
    assert status == 0
    assert found == ["old whole"] * (n_files + 1) + ["new whole"] * (n_files + 1), found
    assert {path.name for path in writer.out.iterdir()} == writer.names


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_a_hundred_kills_of_real_processes(name, commands, large_models, tmp_path):
    """A fifth of them while it starts, the others from when it says what it writes until it has ended."""
    writer = Writer(commands, large_models, tmp_path / "out", *WRITERS[name])
    verb, *arguments = writer.argv("new")
    argv = [sys.executable, "-m", "tinyllama", verb, *arguments]
    if verb == "split":
        code = f"print('split: writes', file=sys.stderr)\nsplit(*{arguments!r}, 2)"
        argv = [sys.executable, "-c", f"import sys, torch\nfrom tinyllama.formats.meta import split\n{code}"]

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
    assert writer.which() == "new whole"


# --- told to end ----------------------------------------------------------------------------------

SLOW = """
import time
from tinyllama import streaming
move = streaming._move
streaming._move = lambda *work: (time.sleep(0.05), move(*work))[1]
"""


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 30
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} appeared"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("signals", "status"),
    [([signal.SIGINT], 130), ([signal.SIGINT] * 3, 130), ([signal.SIGTERM], 143), ([signal.SIGHUP], 129)],
    ids=["Ctrl-C", "Ctrl-C three times", "SIGTERM", "SIGHUP"],
)
def test_told_to_end_it_says_so_and_leaves_everything_as_it_was(commands, models, tmp_path, signals, status):
    (tmp_path / "m.bin").write_text("old")
    command = commands.tinyllama("convert", models / "new1", "--outfile", tmp_path / "m.bin", before=SLOW)
    wait_for(tmp_path, "m.bin.*.tmp")
    for number in signals:
        os.kill(command.pid, number)
        time.sleep(0.002)
    assert command.wait() == status
    assert command.said().splitlines()[-1] == "tinyllama: interrupted; no file was left half-written"
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"]
    assert (tmp_path / "m.bin").read_text() == "old"


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
    (disk / "m.bin.01234567.tmp").write_bytes(bytes(5_000_000))
    command = commands.tinyllama("convert", models / "new1", "--outfile", disk / "m.bin")
    assert command.wait() == 0, command.said()
    assert [path.name for path in disk.iterdir()] == ["m.bin"]


FILL = """
from pathlib import Path
from tinyllama import streaming, writing
check, write, disk, reserves = streaming.require_disk, streaming._write, Path({disk!r}), {reserves}
def fill():
    with open(disk / 'other', 'ab', 0) as file:
        try:
            while True: file.write(bytes(100_000))
        except OSError: pass
def full_after_the_check(*figures):
    check(*figures)
    if reserves: fill()
def full_meanwhile(*chunk):
    fill()
    write(*chunk)
streaming.require_disk = full_after_the_check
if not reserves:
    writing.ctypes.CDLL = lambda *_, **__: None  # as on macOS, where a long file may have no room yet
    streaming._write = full_meanwhile
"""


@pytest.mark.parametrize("reserves", [True, False])
def test_a_disk_that_somebody_fills_meanwhile_gets_one_line_and_the_old_file_stays(
    commands, models, tmpfs, reserves
):
    disk = tmpfs("size=8m")
    (disk / "m.bin").write_text("old")
    fill = FILL.format(disk=str(disk), reserves=reserves)
    command = commands.tinyllama("convert", models / "new1", "--outfile", disk / "m.bin", before=fill)
    line = one_line(command.wait(), command)
    assert line.startswith(
        f"tinyllama: {disk / 'm.bin'}: No space left on device; writing m.bin needs 5.2 MB"
    )
    assert {path.name for path in disk.iterdir()} == {"m.bin", "other"}
    assert (disk / "m.bin").read_text() == "old"


def test_split_on_a_full_disk_names_it_and_leaves_nothing(commands, models, tmpfs):
    disk = tmpfs("size=3m")
    checkpoints.refused(
        lambda: meta.split(models / "new1", disk / "cut", 2), "needs 5.2 MB of disk", "3.1 MB"
    )
    assert not list((disk / "cut").iterdir())


def test_a_read_only_disk_is_named(commands, models, tmpfs):
    disk = tmpfs("size=8m")
    (disk / "m.bin").write_text("old")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    command = commands.tinyllama("convert", models / "new1", "--outfile", disk / "m.bin")
    assert one_line(command.wait(), command) == f"tinyllama: {disk / 'm.bin'}: is read-only"
    command = commands.tinyllama("convert", models / "new1", "--outfile", disk / "other.bin")
    assert one_line(command.wait(), command) == f"tinyllama: {disk / 'other.bin'}: Read-only file system"


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
#include <unistd.h>
ssize_t read(int file, void *data, size_t size)
{
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    long megabyte = lseek(file, 0, SEEK_CUR) / 1000000;
    if (strstr(path, getenv("BAD_FILE")) && megabyte == atol(getenv("BAD_MEGABYTE"))) {
        errno = EIO;
        return -1;
    }
    return real(file, data, size);
}
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
@pytest.mark.parametrize(("megabyte", "checklist"), [(2, False), (2, True), (5, False)])
def test_a_read_error_names_the_file_that_could_not_be_read(models, tmp_path, megabyte, checklist):
    (tmp_path / "read.c").write_text(READ_ERROR)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "read.so", tmp_path / "read.c"], check=True)
    folder = shutil.copytree(models / "new1", tmp_path / "model")
    if checklist:
        (folder / "checklist.chk").write_text(f"{'0' * 32}  consolidated.00.pth\n")
    out = folder / "ggml-model-f16.bin"
    old = out.read_bytes()
    environment = os.environ | {"LD_PRELOAD": str(tmp_path / "read.so"), "BAD_FILE": "consolidated.00.pth"}
    environment["BAD_MEGABYTE"] = str(megabyte)  # of the weights, or of what stands at the end of the file
    command = [sys.executable, "-m", "tinyllama", "convert", folder]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = ended.stderr.replace("\r", "\n").splitlines()
    assert ended.returncode == 1
    assert lines[-1] == f"tinyllama: {folder / 'consolidated.00.pth'}: Input/output error"
    assert out.read_bytes() == old and not list(folder.glob("*.tmp"))


CHANGES = {
    "written to": lambda path: path.write_bytes(path.read_bytes()),
    "cut short": lambda path: os.truncate(path, 3_000_000),
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: os.replace(shutil.copy(path, path.with_suffix(".copy")), path),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_a_source_that_changes_meanwhile_is_found_out(models, tmp_path, monkeypatch, verb, change):
    folder = shutil.copytree(models / "new1", tmp_path / "model")
    source = folder / ("consolidated.00.pth" if verb == "convert" else "ggml-model-f16.bin")
    out = folder / "out.bin"
    out.write_text("old")
    headers = streaming._write_headers

    def changed(path, output):
        change(source)
        return headers(path, output)

    monkeypatch.setattr(streaming, "_write_headers", changed)
    run = {"convert": lambda: convert(folder, 1, out), "quantize": lambda: quantize(source, out, "q4_0")}[
        verb
    ]
    checkpoints.refused(run, str(source))
    assert out.read_text() == "old" and not list(folder.glob("*.tmp"))


def test_a_folder_that_goes_meanwhile_is_named(models, tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    headers = streaming._write_headers

    def removed(path, output):
        headers(path, output)
        shutil.rmtree(folder)
        return 0

    monkeypatch.setattr(streaming, "_write_headers", removed)
    checkpoints.refused(
        lambda: convert(models / "new1", 1, folder / "m.bin"), f"{folder / 'm.bin'}: No such file"
    )
    assert not folder.exists()


# --- two at once ----------------------------------------------------------------------------------


def test_of_two_that_write_the_same_file_one_is_refused(commands, models, tmp_path):
    command = commands.tinyllama("convert", models / "old2", "--outfile", tmp_path / "m.bin", before=SLOW)
    wait_for(tmp_path, "m.bin.1.*.tmp")
    checkpoints.refused(
        lambda: convert(models / "new2", 1, tmp_path / "m.bin"),
        f"{tmp_path / 'm.bin'} is being written by another",
    )
    assert command.wait() == 0, command.said()
    assert {path.name for path in tmp_path.iterdir()} == {"m.bin", "m.bin.1"}
    for name in ("", ".1"):
        made = (models / "old2" / f"ggml-model-f16.bin{name}").read_bytes()
        assert (tmp_path / f"m.bin{name}").read_bytes() == made


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
