"""What a user sees while something takes long: lines and a bar on stderr, which may have been closed."""

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle

PATIENCE = 0.4  # seconds after which somebody who waits wants to know for what
CLEAR = "\r\x1b[K"  # the line that the cursor is in

_status_lines: list[object] = []  # that are on the terminal


def say(line: str) -> None:
    """A line to stderr."""
    with suppress(OSError, AttributeError, ValueError):
        sys.stderr.write(f"{CLEAR * bool(_status_lines)}{line}\n")
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
            sys.stderr.write(f"{CLEAR}{text[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()

    _status_lines.extend([show] * bool(shown))
    try:
        yield show if shown else lambda _: None
    finally:
        if shown:
            _status_lines.remove(show)
            show("")


@contextmanager
def spinner(doing: Callable[[], str]) -> Iterator[None]:
    """A status line that moves, with what is being done, where what happens inside takes long."""
    ended = threading.Event()

    def turn(show: Callable[[str], None]) -> None:
        wait = PATIENCE
        for frame in cycle("|/-\\"):
            if ended.wait(wait):
                return
            show(f"{frame} {doing()}")
            wait = 0.1

    with status_line() as show:
        turning = threading.Thread(target=turn, args=[show], daemon=True)
        turning.start()
        try:
            yield
        finally:
            ended.set()
            turning.join()


@contextmanager
def unechoed() -> Iterator[None]:
    """Inside, what is typed at a terminal isn't shown: it would stand in the middle of what is printed."""
    import termios

    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (OSError, ValueError, termios.error):
        before = None
    try:
        if before:
            quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, quiet)
        yield
    finally:
        if before:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)
