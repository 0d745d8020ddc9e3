"""The file of a batch's answers, which is whole at any moment, and what is known of requests and answers.

That is kept by SQLite, in memory as long as it is little and then in a temporary file: there may be millions.
"""

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from ..errors import TinyllamaError, check_cancelled, naming, require

BEGINNING = b'{"id": "batch_req_'  # of each answer
ELSEWHERE = "name another file, or remove it"
ANSWERED = 200  # HTTP's status: what has another one is tried again

TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -32000; -- kB
CREATE TABLE requests (custom_id BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID;
CREATE TABLE answers (custom_id BLOB PRIMARY KEY, start INTEGER, size INTEGER, is_good INTEGER) WITHOUT ROWID;
BEGIN; -- and never commit: that would write all changed pages of the cache to the file, for each row
"""
IN_ORDER = """
SELECT start, size FROM answers LEFT JOIN requests USING (custom_id) ORDER BY line IS NULL, line, start
"""
N_OTHERS = "SELECT count(*) FROM answers WHERE custom_id NOT IN (SELECT custom_id FROM requests)"


class AnswerFile(AbstractContextManager):
    """The answers in a file, to which others are appended. To be closed.

    Raises TinyllamaError, naming the file, where it holds something else.

    Attributes:
        n_kept: answers of status 200 that it had.
    """

    def __init__(self, path: Path):
        self._known = sqlite3.connect("", isolation_level=None)
        self._known.executescript(TABLES)
        with naming(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            try:
                self._read()
            except BaseException:
                self.__exit__()
                raise
        (self.n_kept,) = self._one("SELECT count(*) FROM answers WHERE is_good")

    def __exit__(self, *_) -> None:
        self._file.close()
        self._known.close()

    def _one(self, query: str, *values: object) -> tuple | None:
        with naming("SQLite's temporary file", sqlite3.Error):
            return self._known.execute(query, values).fetchone()

    def line_of(self, custom_id: str) -> int | None:
        """The line of a request that has been told of."""
        found = self._one("SELECT line FROM requests WHERE custom_id = ?", _bytes(custom_id))
        return found and found[0]

    def expect(self, custom_id: str, line: int) -> bool:
        """Tell of a request, and hear whether its answer is there."""
        self._one("INSERT INTO requests VALUES (?, ?)", _bytes(custom_id), line)
        found = self._one("SELECT is_good FROM answers WHERE custom_id = ?", _bytes(custom_id))
        return found == (True,)

    def append(self, custom_id: str, status: int, body: dict) -> None:
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
        self._note(custom_id, before, size, status == ANSWERED)

    def _note(self, custom_id: str, start: int, size: int, is_good: bool) -> None:
        """Where an answer stands: of two to one request the later counts."""
        self._one("REPLACE INTO answers VALUES (?, ?, ?, ?)", _bytes(custom_id), start, size, is_good)

    def _read(self) -> None:
        """What the file has. Removes half a line at its end."""
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            require(BEGINNING.startswith(file.read(len(BEGINNING))), f"isn't a file of answers; {ELSEWHERE}")
            at = file.seek(0)
            for number, data in enumerate(file, 1):
                check_cancelled()
                if not data.endswith(b"\n"):
                    self._file.truncate(at)
                    break
                try:
                    found = json.loads(data)
                    status = found["response"]["status_code"]
                    self._note(found["custom_id"], at, len(data), status == ANSWERED)
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    raise TinyllamaError(f"line {number} isn't an answer; {ELSEWHERE}") from None
                at += len(data)

    @property
    def n_others(self) -> int:
        """Answers to requests that have not been told of."""
        return self._one(N_OTHERS)[0]

    def in_order(self) -> Iterator[bytes]:
        """The answers in the order of their requests, and then those to other requests."""
        for start, size in self._known.execute(IN_ORDER):
            check_cancelled()
            yield os.pread(self._file.fileno(), size, start)


def _bytes(custom_id: str) -> bytes:
    r"""JSON may say "\ud800", which is no text that SQLite takes."""
    return custom_id.encode("utf-8", "surrogatepass")
