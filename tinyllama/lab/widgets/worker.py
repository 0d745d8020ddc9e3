"""One job at a time, in a daemon thread that can be told to stop."""

import threading
import time
from collections.abc import Callable, Iterator

from ...errors import Cancelled, TinyllamaError, cancellable, check_cancelled
from ...llama import Llama, load

INTERVAL = 0.05  # seconds between two updates of what is shown: nobody sees more of them
SHARE = 0.1  # of the time, that updates may take: a long text is much to show


class Worker:
    """Runs jobs in a thread, one at a time, and is the flag by which the library is told to stop.

    Attributes:
        busy: whether a job is running.
        doing: what it is doing, in words; "" where the job itself shows that.
        error: why the last job failed, in one line; "" if it didn't.
    """

    def __init__(self, changed: Callable[[], None]):
        self.busy, self.doing, self.error = False, "", ""
        self._changed, self._next = changed, 0.0
        self._stop, self._thread, self._starting = threading.Event(), None, threading.Lock()

    def start(self, job: Callable[[], None], instead: bool = False) -> bool:
        """Start a job unless one is running, or `instead` of that one; says whether it was started."""
        while True:
            with self._starting:
                if not self.busy:
                    self.busy, self.error = True, ""
                    self._stop.clear()
                    self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
                    self._thread.start()
                    return True
                running = self._thread
            if not instead:
                return False
            self.stop()
            running.join()

    def stop(self) -> None:
        """Tell the job to stop; it does so at its next look at the flag."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end of the job, and of one that `changed` has started then; says whether all ended."""
        ended = None
        while (thread := self._current()) is not ended:
            thread.join(seconds)
            ended = thread
        return not self.busy

    def _current(self) -> threading.Thread | None:
        """The last thread, once it runs."""
        with self._starting:
            return self._thread

    def is_set(self) -> bool:
        """Whether the job has been told to stop. It asks often, so its progress is shown here."""
        self.tell()
        return self._stop.is_set()

    def tell(self) -> None:
        """Say that something has changed, unless that was said a moment ago."""
        if (started := time.perf_counter()) >= self._next:
            self._changed()
            took = time.perf_counter() - started
            self._next = started + max(INTERVAL, took / SHARE)

    def load(self, model: str, backend: str | None = None, threads: int | None = None) -> Llama:
        """For a job: load a model, and show how far that has got."""
        doing, self.doing = self.doing, "Loading the model"
        llama = load(model, backend, threads, progress=self._progress)
        self.doing = doing
        return llama

    def _progress(self, names: list[str]) -> Iterator[str]:
        for number, name in enumerate(names):
            self.doing = f"Loading the model: {100 * number // len(names)} %"
            check_cancelled()
            yield name

    def _run(self, job: Callable[[], None]) -> None:
        try:
            with cancellable(self):
                job()
        except Cancelled:
            pass
        except TinyllamaError as error:
            self.error = str(error)
        except MemoryError:
            self.error = "there is not enough memory for this: try a smaller model or a shorter context"
        except Exception as error:
            self.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.busy, self.doing = False, ""
        self._changed()
