"""A file of requests, in OpenAI's format for batches, and the file of their answers.

A request is a line, {"custom_id", "method": "POST", "url", "body"}, and so is an answer, {"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}. What can't be answered gets an answer of status
400 that says why, and the others go on.

An answer is appended as soon as it is there: whatever ends the run, what has been computed is in the file
and the same command goes on from there. At the end the file is put into the order of the requests, whole or
not at all. Requests are read when there is room for them: a file may be longer than memory.
"""

import argparse
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from select import select
from typing import NamedTuple

from ..errors import Cancelled, check_cancelled, naming, require
from ..machine.files import written
from ..machine.terminal import say, status_line
from ..texts.openai import LARGEST, Refused, read_object
from .answer_file import ANSWERED, AnswerFile
from .lines import print_speed
from .printing import counted

CHUNK = 1 << 20  # bytes that are read at once
OFTEN = 0.1  # seconds between two lines of progress
MANY = 1000  # names of models that are told apart
REFUSED = 400  # HTTP's status


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


class Line(NamedTuple):
    """A request that is being answered."""

    number: int  # in the file, from 1
    custom_id: str


class Batch:
    """A run over a file of requests.

    Attributes:
        n_requests: how many have been read; of them
        n_kept: had been answered before, and
        refused: of those that can't be answered, the number, and what is wrong with the first.
        others: models that requests name.
    """

    def __init__(self, answering, name: str, seed: int):
        """Args:
        answering: a `texts.answering.Answering`, or what has a cluster behind it.
        name: of the model.
        seed: of the first line, where its request has none; every line has the next one.
        """
        self._answering, self._name, self._seed = answering, name, seed
        self.n_requests, self.n_kept, self.refused, self.others = 0, 0, (0, ""), set()
        self._started = time.perf_counter()

    def run(self, lines: Lines, target: Path, progress: Callable[[str], None]) -> None:
        """Answer all requests. Raises TinyllamaError, naming the file, where one can't be read or written.

        Args:
            progress: called with what has been reached, again and again.
        """
        total, shown, answering = lines.count(), 0.0, self._answering
        with written(target) as [ordered], AnswerFile(target) as file:  # whose lock keeps other runs away
            if file.n_kept:
                say(f"{target}: keeps the {counted(file.n_kept, 'answer')} that it has")
            while not lines.ended or answering:
                self._begin_next(lines, file)
                for line, outcome in answering.turn():
                    self._end(line, outcome, file)
                if time.perf_counter() > shown + OFTEN:
                    shown = time.perf_counter()
                    progress(self._reached(total))
            require(self.n_requests, f"{lines.name}: there are no requests in it")
            progress("putting the answers in the order of the requests")
            if file.n_others:
                say(f"{target}: {counted(file.n_others, 'answer')} of other requests are kept at its end")
            with open(ordered, "r+b") as copy:
                copy.writelines(file.in_order())

    @property
    def n_done(self) -> int:
        """Requests that have their answer."""
        return self.n_requests - len(self._answering)

    def _reached(self, total: int | None) -> str:
        """A line for those who wait."""
        answering = self._answering
        line = f"{self.n_done}/{total}" if total else f"{self.n_done} answered"
        speed = answering.n_tokens / max(answering.seconds, 1e-9)
        line += f", {answering.n_running} being written{answering.where}"
        line += f", {speed:.1f} tokens/s of all together"
        half = answering.n_running / 2  # of what is being written
        n_own = self.n_done - self.n_kept + half
        if total and n_own:
            left = (time.perf_counter() - self._started) / n_own * (total - self.n_done - half)
            line += f", {left // 60:.0f}:{left % 60:02.0f} min left"
        return line

    def _begin_next(self, lines: Lines, file: AnswerFile) -> None:
        """Begin requests as long as there is room for them and they come."""
        while self._answering.room and (found := lines.next(wait=not self._answering)):
            number, data = found
            if not data.strip():
                continue
            self.n_requests += 1
            entry, custom_id, refusal = {}, None, None
            try:
                entry = read_object(data, "invalid_json_line")
                custom_id = _custom_id(entry, file)
            except Refused as error:
                refusal = error
            custom_id = _free(f"line-{number}", file) if custom_id is None else custom_id
            line = Line(number, custom_id)
            if file.expect(custom_id, number):
                self.n_kept += 1
            elif refusal:
                self._end(line, refusal, file)
            else:
                self._answering.add(line, self._seeded(entry, number))

    def _seeded(self, entry: dict, number: int) -> dict:
        """A request with the seed of its line, if it has none."""
        body = entry.get("body")
        if not isinstance(body, dict):
            return entry
        if isinstance(model := body.get("model"), str) and len(self.others) < MANY:
            self.others |= {model} - {self._name}
        seed = self._seed + number - 1 if body.get("seed") is None else body["seed"]
        return entry | {"body": body | {"seed": seed}}

    def _end(self, line: Line, outcome: dict | Refused, file: AnswerFile) -> None:
        """Write what became of a request."""
        if isinstance(outcome, Refused):
            self.refused = self.refused[0] + 1, self.refused[1] or f"line {line.number}: {outcome}"
            file.append(line.custom_id, REFUSED, outcome.body())
        else:
            file.append(line.custom_id, ANSWERED, outcome)


def _custom_id(entry: dict, file: AnswerFile) -> str | None:
    """A request's name, which is nobody else's. Raises Refused."""
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str | None):
        raise Refused(f"custom_id must be a text, not {custom_id!r:.40}", "custom_id")
    if custom_id is not None and (line := file.line_of(custom_id)):
        used = f"the custom_id {custom_id!r:.80} is that of line {line}"
        raise Refused(used, "custom_id", "duplicate_custom_id")
    return custom_id


def _free(name: str, file: AnswerFile) -> str:
    """A name, longer where it is taken."""
    return _free(f"{name}+", file) if file.line_of(name) else name


# --- the command ----------------------------------------------------------------------------------


def batch(args: argparse.Namespace, name: str, answering: Callable[[], AbstractContextManager]) -> None:
    """Answer a file of requests.

    Args:
        args: of the command: source, output, seed.
        name: of the model.
        answering: makes what answers, once it is known that the files will do.
    """
    target, seed = Path(args.output), random.getrandbits(31) if args.seed is None else args.seed
    with Lines(args.source) as lines:
        same = target.exists() and os.path.samestat(os.fstat(lines.file.fileno()), target.stat())
        require(not same, f"{target}: has the requests; name another file for the answers")
        with answering() as behind:
            say(f"seed {seed}")
            run = Batch(behind, name, seed)
            try:
                with status_line() as progress:
                    run.run(lines, target, progress)
            except (Cancelled, KeyboardInterrupt):
                same = f"the same command{f' with --seed {seed}' * (args.seed is None)}"
                say(f"interrupted after {counted(run.n_done, 'answer')}; {same} goes on from there")
                raise
    if run.others:
        say(f"warning: requests name {', '.join(sorted(run.others))[:200]}; all are answered by {name}")
    n_refused, first = run.refused
    kept = f" ({run.n_kept} of them before)" * bool(run.n_kept)
    refused = f", {n_refused} refused; the first is {first}" * bool(n_refused)
    say(f"{target}: {run.n_requests - n_refused} of {run.n_requests} requests answered{kept}{refused}")
    print_speed(behind.load_seconds, behind)
