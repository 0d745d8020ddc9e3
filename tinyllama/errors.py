"""The one exception for what a user can cause, `naming`, which turns others into it, and how to stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

LONGEST = 1000  # characters of a message; a name in somebody's file may have millions


class TinyllamaError(Exception):
    """One line that names the file or setting, what is wrong with it and what to do."""

    def __init__(self, message: object = ""):
        text = printable(str(message))
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 3 // 4]} … {text[-LONGEST // 5 :]}"
        super().__init__(text)


class Cancelled(TinyllamaError):
    """A computation was told to stop."""


def require(ok: object, message: str) -> None:
    """Raise TinyllamaError unless something holds."""
    if not ok:
        raise TinyllamaError(message)


@contextmanager
def naming(path: str | Path, *others: type[Exception]) -> Iterator[None]:
    """Errors inside become one line that begins with a file's name, unless they name one already.

    Args:
        others: exceptions beside OSError, ValueError and TinyllamaError that mean "this file is damaged".
    """
    try:
        yield
    except Cancelled:
        raise
    except OSError as error:
        raise TinyllamaError(f"{error.filename or path}: {error.strerror or error}") from None
    except (TinyllamaError, ValueError, *others) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        named = cause.startswith(printable(str(path)))
        raise TinyllamaError(cause if named else f"{path}: {cause}") from None


def printable(text: str) -> str:
    r"""Text from a file as one line that does nothing to a terminal: a newline becomes \n, Escape \x1b.

    Backslashes stay as they are, so that doing it twice changes nothing.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# --- stopping -------------------------------------------------------------------------------------


_flags: ContextVar[tuple] = ContextVar("flags", default=())


@contextmanager
def cancellable(flag) -> Iterator[None]:
    """Inside, in this thread, `check_cancelled` looks at this flag too: a threading.Event, say."""
    token = _flags.set((*_flags.get(), flag))
    try:
        yield
    finally:
        _flags.reset(token)


def check_cancelled() -> None:
    """Raise Cancelled if a flag is set. Whatever takes long calls this now and then: once a layer, say."""
    if any(flag.is_set() for flag in _flags.get()):
        raise Cancelled("cancelled")
