"""Fetches files from the Hugging Face hub: a script, run as a process that can be killed at any moment.

`hub.fetch` starts it with a repository, a revision and the cache's folder. They exchange lines of JSON:

    script  {"files": the names of all files, "licence": its name, "endpoint": the hub's URL}
    hub.py  the names of the files to fetch
    script  {"total": their bytes, "here": how many of these have arrived before}
    hub.py  a line: go
    script  {"bytes": how many are here now}, again and again; at the end {"folder": where the files are}

or {"error": what is wrong}. huggingface_hub (0.30 to 2.x) lists the files, finds the token, and lays out its
cache. Only the bytes of large files are fetched here, by its `http_get`, into a file that the next run
continues: since 2.0 `hf_hub_download` starts again.
"""

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

PORTION = 1 << 20  # bytes between two reports
LARGE = 1 << 20  # bytes of a file that is worth continuing
LARGEST = 50 * 10**9  # bytes that the hub sends as one answer; `hf_hub_download` may know how to get more
SHA256 = 64  # hexadecimal digits; an etag of another length isn't one
CLIENTS = ("requests", "urllib3", "httpx", "httpx2", "httpcore")  # whose exceptions mean "no answer"


def say(**message) -> None:
    """A line to the parent process."""
    print(json.dumps(message), flush=True)


def end_with(stdin) -> None:
    """End when the parent process does."""
    stdin.read()
    os._exit(1)


class Fetching:
    """The files of a repository on their way into the cache's folder for it, `here`."""

    def __init__(self, repository: str, revision: str, cache: str):
        from huggingface_hub import HfApi, constants

        constants.DOWNLOAD_CHUNK_SIZE = PORTION
        self.repository, self.revision, self.cache = repository, revision, Path(cache)
        self.here = self.cache / f"models--{repository.replace('/', '--')}"
        info = HfApi().model_info(repository, revision=revision)
        self.sha, self.arrived = plain(info.sha), {}
        licences = [tag.partition(":")[2] for tag in info.tags or () if tag.startswith("license:")]
        names = [file.rfilename for file in info.siblings]
        say(files=names, licence=licences[0] if licences else "", endpoint=constants.ENDPOINT)

    def run(self) -> None:
        """Fetch what is asked for."""
        found = {name: self.look_up(name) for name in json.loads(sys.stdin.readline())}
        say(total=sum(file.size or 0 for file in found.values()), here=sum(self.arrived.values()))
        if not sys.stdin.readline():
            return
        threading.Thread(target=end_with, args=(sys.stdin,), daemon=True).start()
        for name, file in found.items():
            self.fetch(name, file)
        ref = self.here / "refs" / self.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(self.sha)  # last: what it names is whole
        say(folder=str(self.here / "snapshots" / self.sha))

    def look_up(self, name: str):
        """A file's etag and size; notes how much of it has arrived before."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        found = get_hf_file_metadata(hf_hub_url(self.repository, name, revision=self.sha))
        blob = self.here / "blobs" / plain(found.etag)
        paths = [path for path in (blob, unfinished(blob)) if path.is_file()]
        self.arrived[name] = min(paths[0].stat().st_size, found.size or 0) if paths else 0
        return found

    def fetch(self, name: str, found) -> None:
        """A file into the cache, or as much of it as isn't there."""
        from huggingface_hub import hf_hub_download

        if LARGE <= (found.size or 0) <= LARGEST:
            self.fetch_large(name, found)
        hf_hub_download(self.repository, name, revision=self.sha, cache_dir=self.cache)
        self.report(name, found.size or 0)

    def fetch_large(self, name: str, found) -> None:
        """A file's bytes to where `hf_hub_download` finds them, under its lock."""
        from huggingface_hub.utils import WeakFileLock

        blob = self.here / "blobs" / found.etag
        lock = self.cache / ".locks" / self.here.name / f"{blob.name}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            while not blob.exists():
                begun = self.append(name, found, unfinished(blob))
                if is_right(unfinished(blob), found.etag):
                    os.replace(unfinished(blob), blob)
                else:
                    unfinished(blob).unlink()
                    damaged = "what arrived is damaged (its SHA-256 differs), and is removed: try again"
                    if not begun:  # else it may have been what was there before
                        raise ValueError(damaged)

    def append(self, name: str, found, path: Path) -> int:
        """The bytes that a file still lacks; returns how many were there before."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        with Reporting(path, lambda n_bytes: self.report(name, n_bytes)) as file:
            if file.tell() > found.size:
                file.truncate(0)
                file.seek(0)
            begun, url = file.tell(), hf_hub_url(self.repository, name, revision=self.sha)
            options = {"headers": build_hf_headers(), "expected_size": found.size}
            while (here := file.tell()) < found.size:
                try:
                    http_get(url, file, resume_size=here, **options)
                except Exception as error:  # retry a broken connection while bytes arrive
                    if not is_of_client(error) or file.tell() == here:
                        raise
        return begun

    def report(self, name: str, n_bytes: int) -> None:
        """So many bytes of a file are here."""
        self.arrived[name] = n_bytes
        say(bytes=sum(self.arrived.values()))


class Reporting:
    """A file to append to that tells how long it is."""

    def __init__(self, path: Path, report):
        self._file, self._report = path.open("ab", buffering=0), report

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        """All of the bytes, of which a file without a buffer may take a part at a time."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._report(self._file.tell())
        return len(data)


def plain(word: str) -> str:
    """A word that becomes a file's name. Raises ValueError where it could lead out of the folder."""
    if not word.replace("-", "").isalnum():
        raise ValueError(f"the hub calls a file or a revision {word!r:.80}")
    return word


def unfinished(blob: Path) -> Path:
    """Where a file's bytes arrive; earlier versions of huggingface_hub use the same name."""
    return blob.with_name(f"{blob.name}.incomplete")


def is_right(path: Path, etag: str) -> bool:
    """Whether a file's SHA-256 is its etag, if that is one."""
    if len(etag) != SHA256:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == etag


def is_of_client(error: Exception) -> bool:
    """Whether an error comes from the network."""
    return type(error).__module__.partition(".")[0] in CLIENTS


def cause(error: Exception, repository: str, revision: str) -> str:
    """What an error of huggingface_hub means, and what to do."""
    from huggingface_hub import constants, errors

    place, token = constants.ENDPOINT, f"a token of yours, from {constants.ENDPOINT}/settings/tokens"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its licence at {place}/{repository}, then set HF_TOKEN to {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{place} has no such repository; if it is private, set HF_TOKEN to {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {revision} of it"
    if status in (401, 403):
        return f"{place} refuses this ({status}): set HF_TOKEN to {token}"
    if status:
        return f"{place} answers {status}: try again later"
    if is_of_client(error):
        return f"{place} doesn't answer (is this machine online?): {error}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


if __name__ == "__main__":
    try:
        Fetching(*sys.argv[1:]).run()
    except Exception as error:
        say(error=cause(error, *sys.argv[1:3]))
