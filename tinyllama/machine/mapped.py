"""Model files mapped into memory, and what if somebody changes one that is in use.

A mapped file is read when its pages are looked at, so a file that another program writes to changes the
weights of a running model, and one that is cut short takes away memory that is still to be read. `unchanged`
makes a TinyllamaError of both. A file that is replaced, as `mv` and tinyllama itself do it, stays what it was
for those who have mapped it.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import TinyllamaError

try:
    from .. import _native
except ImportError:
    _native = None  # a file that is cut short while it is being read then ends the process


class MappedFile(mmap.mmap):
    """An open file as bytes that are read only when they are looked at.

    Raises OSError where it can't be mapped, ValueError where it is empty.
    """

    def __new__(cls, path: Path, file: BinaryIO):
        self = super().__new__(cls, file.fileno(), 0, access=mmap.ACCESS_READ)
        self.path, self._fd = path, os.dup(file.fileno())
        self._stamp = self._look()
        self._number = _native.guard(self, os.fsencode(path)) if _native else -1
        return self

    def __init__(self, path: Path, file: BinaryIO):
        """Everything has been done: mmap wants it so."""

    def _look(self) -> tuple[int, int]:
        stat = os.fstat(self._fd)
        return stat.st_size, stat.st_mtime_ns

    def watch(self, change: int) -> None:
        """+1: somebody calls `check` before believing what is read from now on; -1: no longer."""
        if self._number >= 0:
            _native.watch(self._number, change)

    def check(self) -> None:
        """Raises TinyllamaError if this isn't any more what was mapped."""
        (size, modified), now = self._stamp, self._look()
        if now[0] < size:
            what = f"was cut short, from {size} to {now[0]} bytes,"
        elif now != (size, modified):
            what = "was changed"
        elif self._number >= 0 and _native.lost(self._number):
            what = "could not be read any more"
        else:
            return
        raise TinyllamaError(f"{self.path} {what} while it was in use: load it again")

    def __del__(self):
        if getattr(self, "_number", -1) >= 0:
            _native.unguard(self._number)
        if hasattr(self, "_fd"):
            os.close(self._fd)


def owner(array: np.ndarray):
    """The object whose memory an array shows part of: a MappedFile, another buffer, or the array itself."""
    while isinstance(array, np.ndarray | memoryview):
        below = array.base if isinstance(array, np.ndarray) else array.obj
        if below is None:
            break
        array = below
    return array


def mapped_files(arrays: Iterable[np.ndarray]) -> list[MappedFile]:
    """The mapped files in which some arrays lie."""
    owners = {id(found): found for found in map(owner, arrays)}
    return [found for found in owners.values() if isinstance(found, MappedFile)]


@contextmanager
def unchanged(files: list[MappedFile]) -> Iterator[None]:
    """What is computed from mapped files inside is what stood there when they were mapped.

    Raises TinyllamaError where one has been changed since, before it begins or when it is done.
    """
    _check(files)
    for file in files:
        file.watch(+1)
    try:
        yield
    except Exception:  # of numbers that were none
        _check(files)
        raise
    finally:
        for file in files:
            file.watch(-1)
    _check(files)


def _check(files: list[MappedFile]) -> None:
    for file in files:
        file.check()
