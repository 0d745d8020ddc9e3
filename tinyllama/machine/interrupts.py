"""Ctrl-C as a flag: nothing raises between two steps, and everything that takes long looks at the flag."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import cancellable

PATIENCE = 2.0  # seconds after which a second signal no longer waits for somebody to look at the flag


class Interrupt:
    """A flag that a signal or somebody's own flag sets; `signal` is the number of the signal that came."""

    def __init__(self, cancel=None):
        self.signal: int | None = None
        self._cancel, self._since = cancel, 0.0

    def is_set(self) -> bool:
        """Whether to stop."""
        return self.signal is not None or (self._cancel is not None and self._cancel.is_set())

    def catch(self, number: int, *_: object) -> None:
        """Handle a signal: the first one sets the flag, a late second one raises KeyboardInterrupt."""
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() > self._since + PATIENCE:
            raise KeyboardInterrupt


@contextmanager
def interruptible(cancel=None, signals: tuple[int, ...] = (signal.SIGINT,)) -> Iterator[Interrupt]:
    """The door of a computation: inside, a signal sets the flag that this yields and `check_cancelled` sees.

    Only signals whose handling is still Python's default are taken, and only in the main thread. So of doors
    inside each other the outermost one takes them, and the inner ones only look at their `cancel`.

    Args:
        cancel: another flag that stops the computation; it then ends with Cancelled.
        signals: SIGINT first.
    Raises:
        KeyboardInterrupt: at the end, instead of whatever else was raised, where a signal came.
    """
    flag, default = Interrupt(cancel), {signal.SIGINT: signal.default_int_handler}
    in_main = threading.current_thread() is threading.main_thread()
    taken = [number for number in signals if signal.getsignal(number) == default.get(number, signal.SIG_DFL)]
    try:
        for number in taken if in_main else ():
            signal.signal(number, flag.catch)
        with cancellable(flag):
            yield flag
    finally:
        for number in reversed(taken) if in_main else ():  # SIGINT last: from then on it raises
            signal.signal(number, default.get(number, signal.SIG_DFL))
        if flag.signal is not None:
            raise KeyboardInterrupt from None


@contextmanager
def ours() -> Iterator[None]:
    """Inside, in the main thread, Ctrl-C raises KeyboardInterrupt, or stops what is behind a door of its own.

    For a command that goes on after it; other signals are still those of the outer door.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
