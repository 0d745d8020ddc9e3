"""What a user sees while something takes long: lines and a bar on stderr, which may have been closed."""

import sys
from contextlib import suppress


def say(line: str) -> None:
    """A line to stderr."""
    with suppress(OSError, AttributeError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def bytes_bar(what: str, total: int, done: int):
    """A progress bar of tqdm's, of bytes; into a file it writes rarely."""
    from tqdm.auto import tqdm  # here: it takes as long to import as a small model to load

    seconds = 0.1 if sys.stderr and sys.stderr.isatty() else 30
    unit = {"unit": "B", "unit_scale": True, "mininterval": seconds, "leave": False, "delay": 0.5}
    return tqdm(desc=what, total=total, initial=done, **unit)
