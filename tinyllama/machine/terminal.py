"""What a user sees while something takes long: lines and a bar on stderr, which may have been closed."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


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


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """What shows a text in place of the one before; at the end none is left. Nothing but on a terminal."""
    shown = sys.stderr and sys.stderr.isatty()

    def show(text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()

    try:
        yield show if shown else lambda _: None
    finally:
        if shown:
            show("")
