"""The command line: generate, chat, serve, batch, convert, quantize, perplexity, inspect, list, bench, ...

What a command produces goes to stdout, everything else to stderr, so that a pipe gets text alone. Exit
status: 0; 1 for a file or machine that won't do; 2 for bad arguments; 130 after Ctrl-C; 141 where the reader
of a pipe has gone; 143 where it was told to end, 129 where its terminal was closed.
"""

import atexit
import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from ..errors import TinyllamaError, printable
from ..machine.interrupts import interruptible
from ..machine.offline import offline
from ..machine.terminal import say
from .cli import ON_HUB, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status. Raises SystemExit for --help and bad arguments."""
    _open_closed_streams()
    if argv is None:  # in a process of our own Python needn't look for garbage as it ends, which takes 20 ms
        atexit.register(gc.freeze)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character gets a "?"
    args, flag, status = parse(sys.argv[1:] if argv is None else argv), None, 0
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        with (
            interruptible(signals=signals) as flag,
            warnings.catch_warnings(),
            offline(getattr(args, "offline", False)),
        ):
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's of NaN: we say it in one line
            warnings.showwarning = lambda message, *_: say(printable(f"warning: {message}"))
            from . import run  # here: --help and wrong options don't wait for NumPy

            getattr(run, args.command)(args)
            print(end="", flush=True)  # here, where a full disk or a closed pipe can still be told
    except KeyboardInterrupt:
        status = 128 + ((flag and flag.signal) or signal.SIGINT)
        from_hub = getattr(args, "name", "").startswith(ON_HUB)  # which keeps what has arrived, and says so
        if args.command in ("convert", "quantize", "download") and not from_hub:
            say("tinyllama: interrupted; no file was left half-written")
    except BrokenPipeError:
        status = 141
    except (TinyllamaError, OSError, MemoryError) as error:
        if os.environ.get("TINYLLAMA_DEBUG"):
            raise
        status = 1
        say(printable(f"tinyllama: {_text(error)}"))
    try:
        print(end="", flush=True)
    except OSError:  # stdout takes no more: don't let Python try again, and complain, when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _open_closed_streams() -> None:
    """Give stdin, stdout and stderr that somebody has closed a place: else the next file would get theirs."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  the lowest free number, which is its own


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"there is not enough memory: {str(error) or 'the system gave none'}"
    return str(error)
