"""Files from strangers: opened if they are files, read if they aren't too large, or refused in one line."""

import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import TinyllamaError


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading. A pipe would wait for a writer, and a device may never end.

    Raises TinyllamaError, naming it, where it can't be read or is a folder, a pipe or a device.
    """
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise TinyllamaError(f"{path} is a pipe or a device, not a file")
        return open(path, "rb")
    except OSError as error:
        raise TinyllamaError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a NUL in its name
        raise TinyllamaError(f"{path}: {error}") from None


def read_file(path: str | Path, at_most: int) -> bytes:
    """All of a file. Raises TinyllamaError as `open_file` does, and for more bytes than `at_most`."""
    with open_file(path) as file:
        try:
            data = file.read(at_most + 1)
        except OSError as error:
            raise TinyllamaError(f"{path}: {error.strerror}") from None
    if len(data) > at_most:
        raise TinyllamaError(f"{path} is too large: more than {at_most:,} bytes")
    return data
