"""One job at a time, in a thread that can be told to stop and that never outlives its process."""

import threading
import time
from collections.abc import Callable

from ...config import Config
from ...errors import Cancelled, TinyllamaError

#: Seconds between two looks at what a job has done: more often than that nobody sees.
INTERVAL = 0.05

#: The part of the time that telling may take: of a long text there is much to tell.
TELLING = 0.1

#: Multiply-adds of a layer that a flag can wait for, and the fewest tokens that go through it at once.
LAYER_WORK, FEWEST = 2**34, 16


def batch_size(config: Config) -> int:
    """Tokens of a prompt that go through a model at once, few enough that it can be stopped at any time.

    A flag is looked at before every operation; benchmarks/stop.py measures how long that takes.
    """
    weights = config.dim * (config.dim * 2 + config.kv_dim * 2 + config.hidden_dim * 3)
    tokens = max(FEWEST, min(512, LAYER_WORK // weights))
    return 1 << (tokens.bit_length() - 1)


class Worker:
    """Runs jobs in a daemon thread, and is the cancel flag that a job hands to the library.

    Attributes:
        error: why the last job failed, in one line; "" if it didn't.
    """

    def __init__(self, changed: Callable[[], None]):
        self.error = ""
        self._changed, self._next, self._stop = changed, 0.0, threading.Event()
        self._thread: threading.Thread | None = None
        self._lock, self._following = threading.Lock(), None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None

    def start(self, job: Callable[[], None], instead: bool = False) -> bool:
        """Start a job; says whether it will be done.

        Args:
            instead: stop the one that is running and do this one then. Otherwise it is refused.
        """
        with self._lock:
            if self.busy and instead:
                self._following = job
                self._stop.set()
            elif not self.busy:
                self.error = ""
                self._stop.clear()
                self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
                self._thread.start()
                return True
            return instead

    def stop(self) -> None:
        """Tell the job to stop. It does so before its next operation."""
        with self._lock:
            self._following = None
            self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the job's end; says whether it has ended."""
        if thread := self._thread:
            thread.join(seconds)
        return not self.busy

    def is_set(self) -> bool:
        """Whether the job has been told to stop; asked often, so time to say how far it has got."""
        self.tell()
        return self._stop.is_set()

    def tell(self) -> None:
        """Say that something has changed, but not so often that the job would suffer from it."""
        if (started := time.perf_counter()) >= self._next:
            self._changed()
            took = time.perf_counter() - started
            self._next = started + max(INTERVAL, took / TELLING)

    def _run(self, job: Callable[[], None] | None) -> None:
        while job is not None:
            self.error = _error_of(job)
            with self._lock:
                job, self._following = self._following, None
                if job is None:
                    self._thread = None
                else:
                    self._stop.clear()
        self._changed()


def _error_of(job: Callable[[], None]) -> str:
    """Do a job: "" if all went well or it was stopped, otherwise what went wrong."""
    try:
        job()
    except Cancelled:
        return ""
    except Exception as error:
        return in_plain_words(error)
    return ""


def in_plain_words(error: Exception) -> str:
    """One line that says what went wrong."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for this: try a smaller model or a shorter context"
    line = " ".join(str(error).split())
    return line if isinstance(error, TinyllamaError) else f"{type(error).__name__}: {line}"
