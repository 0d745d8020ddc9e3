"""A file of requests, in OpenAI's format for batches, and the file of their answers.

A request is a line, {"custom_id", "method": "POST", "url", "body"}, and so is an answer, {"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}. What can't be answered gets an answer of status
400 that says why, and the others go on.

An answer is appended as soon as it is there: whatever ends the run, what has been computed is in the file
and the same command goes on from there. At the end the file is put into the order of the requests, whole or
not at all. Requests are read when there is room for them: a file may be longer than memory.
"""

import json
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from select import select
from typing import NamedTuple

from ..errors import Cancelled, TinyllamaError, check_cancelled, naming, require
from ..generation import Generation
from ..llama import Llama
from ..machine.files import written
from ..machine.terminal import say
from ..texts.answers import answer, chosen, scored_ids
from ..texts.jobs import Jobs
from ..texts.openai import CHAT, LARGEST, Refused, Request, parse, read_object
from ..texts.schedule import AT_ONCE
from ..texts.templates import NEEDED, available
from .printing import counted

CHUNK = 1 << 20  # bytes that are read at once
OFTEN = 0.1  # seconds between two lines of progress
MANY = 1000  # names of models that are told apart
REFUSED = 400  # HTTP's status
BEGINNING = b'{"id": "batch_req_'  # of each answer
ELSEWHERE = "name another file, or remove it"


class Lines(AbstractContextManager):
    """The lines of a file, or for "-" of stdin, which others may still be writing. To be closed."""

    def __init__(self, path: str):
        self.name, self._n_read = "stdin" if path == "-" else path, 0
        self._ready: deque[bytes] = deque()
        self._rest: bytes | None = b""  # of a line that isn't whole; None at the end of the file
        with naming(self.name):
            require(path != "-" or sys.stdin, "is closed")
            where = sys.stdin.fileno() if path == "-" else path
            self.file = open(where, "rb", buffering=0, closefd=path != "-")  # noqa: SIM115

    def __exit__(self, *_) -> None:
        self.file.close()

    @property
    def ended(self) -> bool:
        """Whether all have been read."""
        return self._rest is None and not self._ready

    def count(self) -> int | None:
        """How many lines there are that aren't empty; None where they can be read only once."""
        if not self.file.seekable():
            return None
        with naming(self.name):
            start, number = self.file.tell(), 0
            with open(self.file.fileno(), "rb", closefd=False) as file:
                for line in file:
                    check_cancelled()
                    number += bool(line.strip())
            self.file.seek(start)
        return number

    def next(self, wait: bool) -> tuple[int, bytes] | None:
        """The next line and its number, or None where there is none yet, or none any more."""
        while not self._ready and self._rest is not None:
            check_cancelled()
            if select([self.file], [], [], 0.1 if wait else 0)[0]:
                self._read()
            elif not wait:
                break
        if not self._ready:
            return None
        self._n_read += 1
        return self._n_read, self._ready.popleft()

    def _read(self) -> None:
        with naming(self.name):
            data = self.file.read(CHUNK)
        *lines, rest = (self._rest + data).split(b"\n")
        self._ready.extend(lines)
        self._rest = rest[: LARGEST + 1]
        if not data:
            self._ready.extend([rest] * bool(rest))
            self._rest = None


@dataclass(frozen=True, eq=False)
class Line:
    """A request that is being answered."""

    custom_id: str
    request: Request


class Batch:
    """A run over a file of requests.

    Attributes:
        jobs: what is being written.
        n_requests: how many have been read; of them
        n_kept: had been answered before, and
        refused: of those that can't be answered, the number, and what is wrong with the first.
        others: models that requests name.
    """

    def __init__(self, llama: Llama, name: str, ctx_size: int | None, batch_size: int):
        """Args:
        name: of the model, for the answers.
        ctx_size, batch_size: of every text; see Settings.
        """
        self._llama, self._name = llama, name
        self._settings = {"ctx_size": ctx_size, "batch_size": batch_size}
        self._order: dict[str, int] = {}  # the requests' custom_ids, and their lines
        self._answered: set[str] = set()  # in the file before
        self.jobs, self.others = Jobs(llama, batch_size), set()
        self.n_requests, self.n_kept, self.refused = 0, 0, (0, "")
        self._started = time.perf_counter()

    def run(self, lines: Lines, target: Path, progress: Callable[[str], None]) -> None:
        """Answer all requests. Raises TinyllamaError, naming the file, where one can't be read or written.

        Args:
            progress: called with what has been reached, again and again.
        """
        total, shown = lines.count(), 0.0
        with written(target) as [ordered]:  # whose lock keeps other runs away from the target, too
            self._answered = {name for name, place in _answers(target).items() if place.is_good}
            if self._answered:
                say(f"{target}: keeps the {counted(len(self._answered), 'answer')} that it has")
            with open(target, "ab", buffering=0) as self._file:
                while not lines.ended or self.jobs:
                    self._begin_next(lines)
                    for line, texts in self.jobs.turn() if self.jobs else ():
                        self._append(line.custom_id, 200, self._answer(line.request, texts))
                    if time.perf_counter() > shown + OFTEN:
                        shown = time.perf_counter()
                        progress(self._reached(total))
            require(self.n_requests, f"{lines.name}: there are no requests in it")
            progress("putting the answers in the order of the requests")
            _put_in_order(target, ordered, self._order)

    @property
    def n_done(self) -> int:
        """Requests that have their answer."""
        return self.n_requests - len(self.jobs)

    def _reached(self, total: int | None) -> str:
        """A line for those who wait."""
        line = f"{self.n_done}/{total}" if total else f"{self.n_done} answered"
        line += f", {self.jobs.n_tokens / max(self.jobs.seconds, 1e-9):.1f} tokens/s of all together"
        half = min(len(self.jobs), AT_ONCE) / 2  # of what is being written
        n_own = self.n_done - self.n_kept + half
        if total and n_own:
            left = (time.perf_counter() - self._started) / n_own * (total - self.n_done - half)
            line += f", {left // 60:.0f}:{left % 60:02.0f} min left"
        return line

    def _begin_next(self, lines: Lines) -> None:
        """Begin requests as long as there is room for them and they come."""
        while self.jobs.room and (found := lines.next(wait=not self.jobs)):
            number, data = found
            if not data.strip():
                continue
            self.n_requests += 1
            entry, custom_id, refusal = {}, None, None
            try:
                entry = read_object(data, "invalid_json_line")
                custom_id = _custom_id(entry, self._order)
            except Refused as error:
                refusal = error
            custom_id = _free(f"line-{number}", self._order) if custom_id is None else custom_id
            self._order[custom_id] = number
            if custom_id in self._answered:
                self.n_kept += 1
            elif refusal := refusal or self._begin(custom_id, entry):
                self.refused = self.refused[0] + 1, self.refused[1] or f"line {number}: {refusal}"
                self._append(custom_id, REFUSED, refusal.body())

    def _begin(self, custom_id: str, entry: dict) -> Refused | None:
        """Begin a request, or say why not."""
        needs_jinja = entry.get("url") == CHAT and self._llama.checkpoint.template
        require(available() or not needs_jinja, NEEDED)  # not of each line: who installs it wants them all
        try:
            if entry.get("method") != "POST":
                raise Refused(f"method must be POST, not {entry.get('method')!r:.40}", "method")
            request = parse(entry.get("url"), entry.get("body"), self._chat, **self._settings)
            self.others |= {request.model} - {None, self._name} if len(self.others) < MANY else set()
            if request.stream:
                raise Refused("stream can only be False here", "stream", "unsupported_value")
            self.jobs.add(Line(custom_id, request), request.texts(), request.bias)
        except Cancelled:
            raise
        except TinyllamaError as error:
            return error if isinstance(error, Refused) else Refused(error, "prompt")
        return None

    def _answer(self, request: Request, texts: list[Generation]) -> dict:
        """The body of an answer."""
        echoed = chosen(request, texts) if request.scores else []
        scored = [self._llama.score(scored_ids(text)) for text in echoed]
        return answer(request, texts, self._name, scored)

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a chat."""
        template = self._llama.template()
        require(template, "the model has no chat template: it is for continuing texts (/v1/completions)")
        return template.encode(messages)

    def _append(self, custom_id: str, status: int, body: dict) -> None:
        """Write an answer, of which no part stays where it can't be written whole."""
        response = {"status_code": status, "request_id": secrets.token_hex(12), "body": body}
        about = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id}
        data, size = json.dumps(about | {"response": response, "error": None}).encode() + b"\n", 0
        before = os.fstat(self._file.fileno()).st_size
        try:
            while size < len(data):
                size += self._file.write(data[size:])
        except OSError:
            self._file.truncate(before)
            raise


# --- requests -------------------------------------------------------------------------------------


def _custom_id(entry: dict, taken: dict[str, int]) -> str | None:
    """A request's name, which is nobody else's. Raises Refused."""
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str | None):
        raise Refused(f"custom_id must be a text, not {custom_id!r:.40}", "custom_id")
    if custom_id in taken:
        used = f"the custom_id {custom_id!r:.80} is that of line {taken[custom_id]}"
        raise Refused(used, "custom_id", "duplicate_custom_id")
    return custom_id


def _free(name: str, taken: dict[str, int]) -> str:
    """A name, longer where it is taken."""
    return _free(f"{name}+", taken) if name in taken else name


# --- answers --------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an answer stands in its file."""

    start: int
    size: int
    is_good: bool  # of status 200: the others are tried again


def _answers(path: Path) -> dict[str, Place]:
    """The answers in a file, by custom_id: of two of one request the later. Removes half a line at its end.

    Raises TinyllamaError where it holds something else.
    """
    known: dict[str, Place] = {}
    if not path.exists():
        return known
    with naming(path), open(path, "r+b") as file:
        head, at = file.read(len(BEGINNING)), 0
        file.seek(0)
        require(BEGINNING.startswith(head), f"isn't a file of answers; {ELSEWHERE}")
        for number, data in enumerate(file, 1):
            check_cancelled()
            if not data.endswith(b"\n"):
                file.truncate(at)
                break
            try:
                found = json.loads(data)
                status = found["response"]["status_code"]
                known[found["custom_id"]] = Place(at, len(data), status == 200)
            except (ValueError, LookupError, TypeError, RecursionError):
                raise TinyllamaError(f"line {number} isn't an answer; {ELSEWHERE}") from None
            at += len(data)
    return known


def _put_in_order(path: Path, ordered: Path, order: dict[str, int]) -> None:
    """Write the answers to requests in their order, and then those to requests of other files."""
    known = _answers(path)
    others = [custom_id for custom_id in known if custom_id not in order]
    if others:
        say(f"{path}: {counted(len(others), 'answer')} of other requests are kept at its end")
    with open(path, "rb") as source, open(ordered, "r+b") as target:
        for custom_id in chain(order, others):
            check_cancelled()
            source.seek(known[custom_id].start)
            target.write(source.read(known[custom_id].size))
