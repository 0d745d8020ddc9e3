"""Models of the Hugging Face hub: found in its cache, and fetched into it.

The cache, which transformers and llama.cpp share, has a folder `models--ORG--NAME` for each repository:
`snapshots/REVISION` holds its files by name, most of them links to `blobs`, and `refs/main` the revision that
was fetched last. What is there is found here; to fetch more takes the package huggingface_hub.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from select import select

from ..errors import Cancelled, TinyllamaError, check_cancelled, naming, require
from .files import read_file
from .interrupts import interruptible
from .limits import human, require_disk
from .terminal import bytes_bar, say

WORD = r"[\w-][\w.-]*"  # doesn't lead out of a folder
NAME = re.compile(rf"hf:(?P<name>{WORD}/{WORD})(?:@(?P<revision>{WORD}(?:/{WORD})*))?(?::(?P<quant>.+))?")
PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.(gguf|safetensors)$)")
#: What the name of a GGUF file says of its type: Q4_K_M, IQ4_XS, BF16, ...
QUANT = re.compile(r"(?<![a-z0-9])(i?q\d\w*|tq\d_\d|mxfp4\w*|b?f16|f32)(?=[-.])", re.IGNORECASE)
USUAL = ("Q4_K_M", "Q8_0", "Q4_0")  # the default among several files; the first two as in llama.cpp
NO_MODEL = re.compile(r"(.*/)?(mmproj|mtp-|eagle3-)|.*imatrix")  # GGUF files that go with another one
#: The files of a Hugging Face folder that are read, and those of Mistral's.
MEMBERS = re.compile(
    r"(config|params|generation_config|added_tokens|special_tokens_map|vocab)\.json|tokenizer.*|merges\.txt"
    r"|chat_template\.jinja|(?!adapter).*\.safetensors(\.index\.json)?"
)


@dataclass(frozen=True)
class Repository:
    """A model of the hub: "org/name", a revision, and a quantization or file name, "" for the usual one."""

    name: str
    revision: str = "main"
    quant: str = ""

    @property
    def folder(self) -> Path:
        """Where the cache keeps it."""
        return cache_folder() / f"models--{self.name.replace('/', '--')}"

    def __str__(self) -> str:
        return f"hf:{self.name}"


def cache_folder() -> Path:
    """Where huggingface_hub keeps models."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(folder)).expanduser()


def is_offline() -> bool:
    """Whether nothing may be fetched: HF_HUB_OFFLINE, which --offline sets."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def parse(model: str) -> Repository:
    """The repository that "hf:org/name", "hf:org/name:Q4_K_M" or "hf:org/name@revision" means."""
    found = NAME.fullmatch(model)
    require(found, f"{model}: a model of the Hugging Face hub is hf:org/name, or hf:org/name:Q4_K_M")
    return Repository(found["name"], found["revision"] or "main", found["quant"] or "")


def find(model: str) -> Path:
    """The GGUF file, or the folder, of a model: from the cache, else fetched into it.

    Raises TinyllamaError where it is neither here nor can be fetched.
    """
    repository = parse(model)
    if path := cached(repository):
        return path
    where = f"isn't in {cache_folder()}, or not whole"
    require(not is_offline(), f"{model}: {where}; offline (--offline, HF_HUB_OFFLINE) it can't be fetched")
    return fetch(repository)


def download(model: str) -> Path:
    """As `find`, and say so if it is here already."""
    if path := cached(parse(model)):
        say(f"{path} is here already.")
    return path or find(model)


# --- what is here ---------------------------------------------------------------------------------


def cached(repository: Repository) -> Path | None:
    """Where a model lies in the cache; None where it doesn't, or not all of it."""
    with naming(str(repository)):
        for snapshot in snapshots(repository):
            names = files_of(snapshot)
            chosen = choose(names, repository.quant)
            if chosen and {part for name in chosen for part in parts(name)} <= set(names):
                return opened(snapshot, chosen)
    return None


def models() -> Iterator[tuple[str, Path]]:
    """A name for `find`, and the file or folder, of everything in the cache that looks like a model."""
    folders = cache_folder().glob("models--*") if os.access(cache_folder(), os.R_OK | os.X_OK) else ()
    for folder in sorted(folders):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        found = {}  # of several revisions the first that has it
        for snapshot in snapshots(Repository(name)) if "/" in name else ():
            found = _named(snapshot) | found
        yield from ((f"hf:{name}{quant}", path) for quant, path in found.items())


def _named(snapshot: Path) -> dict[str, Path]:
    """What stands behind a repository's name, ":Q4_K_M", say, for each model of a revision."""
    names = files_of(snapshot)
    models = gguf_files(names)
    quants = {name: quant_of(name) for name in models}
    alone = {name: list(quants.values()).count(quant) == 1 for name, quant in quants.items()}
    if models or not choose(names, ""):
        return {f":{quants[name] if alone[name] else name}": snapshot / name for name in models}
    return {"": snapshot}


def snapshots(repository: Repository) -> list[Path]:
    """The folders of its revisions: the one asked for; of "main" then the others, the newest first."""
    folder = repository.folder
    try:
        revision = read_file(folder / "refs" / repository.revision, 100).decode().strip()
    except (TinyllamaError, UnicodeDecodeError):
        revision = repository.revision
    others = folder.glob("snapshots/*") if repository.revision == "main" else ()
    newest = sorted(others, key=lambda path: -path.stat().st_mtime)
    return [path for path in dict.fromkeys([folder / "snapshots" / revision, *newest]) if path.is_dir()]


def files_of(snapshot: Path) -> list[str]:
    """The names of its files, without links whose blob is gone."""
    return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]


def choose(names: list[str], quant: str) -> list[str]:
    """The files of a repository that make the model, the one to open first; none if there is no model.

    Args:
        quant: "Q4_K_M", say, in any case, or a file's name; "": of several GGUF files the usual one.
    """
    models = gguf_files(names)
    if quant or models:
        wanted = [name for word in ([quant] if quant else USUAL) for name in models if has_quant(name, word)]
        wanted += [] if quant else models
        return parts(wanted[0]) if wanted else []
    members = [name for name in names if MEMBERS.fullmatch(name) and "/" not in name]
    if any(name.startswith("model") and name.endswith(".safetensors") for name in members):
        members = [name for name in members if not name.startswith(("consolidated", "params"))]
    wanted = ("config.json|params.json", "tokenizer.*|vocab.json", r".*\.safetensors")
    is_model = all(any(re.fullmatch(kind, name) for name in members) for kind in wanted)
    return sorted(members) if is_model else []


def gguf_files(names: list[str]) -> list[str]:
    """The GGUF files that are models, of a split one the first part; short names first."""
    models = [name for name in names if name.endswith(".gguf") and not NO_MODEL.match(name.lower())]
    return sorted((name for name in models if name == parts(name)[0]), key=lambda name: (len(name), name))


def quant_of(name: str) -> str:
    """What a file's name says of its type, "Q4_K_M", say; the name itself where it says nothing."""
    found = QUANT.search(name)
    return found[0] if found else name


def has_quant(name: str, quant: str) -> bool:
    """Whether a file's name has a quantization as a word of its own, or is what was asked for."""
    word = re.search(rf"(?<![a-z0-9]){re.escape(quant)}(?=[-.])", name, re.IGNORECASE)
    return quant in (name, name.rpartition("/")[2]) or word is not None


def parts(name: str) -> list[str]:
    """The names of all parts of a file that is in several, given one; of a whole file, its own."""
    found = PART.search(name)
    count = min(int(found[2]), 999) if found else 0
    return [PART.sub(f"-{number + 1:05}-of-{count:05}", name) for number in range(count)] or [name]


def opened(snapshot: Path, chosen: list[str]) -> Path:
    """What to open of a model's files: a GGUF file, or their folder."""
    return snapshot / chosen[0] if chosen[0].endswith(".gguf") else snapshot


# --- fetching -------------------------------------------------------------------------------------


def fetch(repository: Repository) -> Path:
    """Fetch a model into the cache, or what isn't there of it, and return what to open.

    Raises TinyllamaError, with what to do, where that isn't possible; KeyboardInterrupt after Ctrl-C.
    """
    can = importlib.util.find_spec("huggingface_hub")
    require(can, f"{repository}: to fetch it takes huggingface_hub: pip install huggingface_hub")
    try:
        with interruptible(), naming(str(repository)):
            cache = cache_folder()
            cache.mkdir(parents=True, exist_ok=True)
            script = Path(__file__).with_name("hub_process.py")
            command = [sys.executable, "-P", script, repository.name, repository.revision, cache]
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            with subprocess.Popen(command, **streams) as process:
                try:
                    return _fetch(repository, process)
                finally:
                    process.kill()
    except (Cancelled, KeyboardInterrupt):
        say(f"{repository}: interrupted; the next time it goes on from here")
        raise


def _fetch(repository: Repository, process: subprocess.Popen) -> Path:
    """Tell the process which files to fetch, and show its progress."""
    messages = _messages(process)
    there = next(messages)
    chosen = _choose(there["files"], repository.quant)
    _tell(process, chosen)
    total, here = next(messages).values()
    require_disk(total - here, cache_folder(), str(repository))
    what = chosen[0] if len(chosen) == 1 else f"{len(chosen)} files ({', '.join(chosen):.80}...)"
    licence = f", licence {there['licence']}" if there["licence"] else ""
    rest = f"; {human(here)} of it are here already" if here else ""
    say(f"{repository}: fetching {what}, {human(total)}, from {there['endpoint']}{licence}{rest}")
    _tell(process, True)
    with bytes_bar("fetch", total, here) as bar:
        while "folder" not in (message := next(messages)):
            bar.update(message["bytes"] - bar.n)
    path = opened(Path(message["folder"]), chosen)
    say(f"Wrote {path} ({human(total)}).")
    return path


def _messages(process: subprocess.Popen) -> Iterator[dict]:
    """What the process writes; Ctrl-C is heard in between. Raises TinyllamaError when it fails or ends."""
    said = b""
    while True:
        check_cancelled()
        if select([process.stdout], [], [], 0.1)[0]:
            more = os.read(process.stdout.fileno(), 1 << 16)
            *lines, said = (said + more).split(b"\n")
            for message in (json.loads(line) for line in lines if line.startswith(b"{")):
                require("error" not in message, message.get("error", ""))
                yield message
            if not more:
                raise TinyllamaError(f"huggingface_hub ended with status {process.wait()}")


def _tell(process: subprocess.Popen, what: object) -> None:
    process.stdin.write(f"{json.dumps(what)}\n".encode())
    process.stdin.flush()


def _choose(names: list[str], quant: str) -> list[str]:
    """As `choose`. Raises TinyllamaError, with what there is, where nothing fits or a part is missing."""
    chosen = choose(names, quant)
    offers = ", ".join(dict.fromkeys(map(quant_of, gguf_files(names))))
    offers = f"its GGUF files are {offers}" if offers else "it has no GGUF files"
    require(chosen or not quant, f"there is no {quant} in it: {offers}")
    require(chosen, "no model: it has neither GGUF files nor config.json, tokenizer and safetensors")
    missing = [part for name in chosen for part in parts(name) if part not in names]
    require(not missing, f"{missing[:1]} isn't in it")
    return chosen
