"""Jobs, each of one or several texts, that come one by one and are written together.

Only so many are begun that there always is a text to go on with: a list of jobs may be longer than memory.
"""

import time
from collections.abc import Iterator

from ..errors import Cancelled
from ..generation import Generation
from ..settings import Settings
from .schedule import AT_ONCE, Together

AHEAD = 2 * AT_ONCE  # texts that are begun and haven't ended: those that are written, and the next ones


class Jobs:
    """What is being written. `add` a job while there is `room`, `turn` until none is left.

    Attributes:
        n_tokens: tokens that have been written, of all texts.
        seconds: how long they have been computed.
    """

    def __init__(self, llama, batch_size: int = Settings.batch_size):
        self._door, self._together = llama.backend.running, Together(llama, batch_size)
        self._open: dict[object, list[Generation]] = {}  # jobs that haven't ended
        self._n_ended, self.seconds = 0, 0.0

    def __len__(self) -> int:
        """Jobs that haven't ended."""
        return len(self._open)

    @property
    def n_running(self) -> int:
        """Jobs that are being written now, about."""
        return min(len(self), AT_ONCE)

    @property
    def room(self) -> bool:
        """Whether another job should be added now."""
        return sum(map(len, self._open.values())) < AHEAD

    @property
    def n_tokens(self) -> int:
        """See above."""
        return self._n_ended + sum(len(text.tokens) for texts in self._open.values() for text in texts)

    def add(self, job: object, wanted: list[tuple], bias: dict[int, float] | None = None) -> list[Generation]:
        """Begin a job: each of its prompts is continued with its settings; bias: as of `Together.begin`.

        Raises TinyllamaError where a prompt is empty or too long; then none of the job's is continued.
        """
        texts: list[Generation] = []
        try:
            for prompt, settings in wanted:
                texts.append(self._together.begin(prompt, settings, bias))
        except BaseException:
            for text in texts:
                text.end("cancelled")
            raise
        self._open[job] = texts
        return texts

    def turn(self) -> Iterator[tuple[object, list[Generation]]]:
        """Compute a step of every text that is being written, and give the jobs that have ended.

        Raises Cancelled after Ctrl-C, behind the jobs that have ended before.
        """
        started, stopped = time.perf_counter(), None
        try:
            with self._door():
                self._together.turn()
        except Cancelled as error:
            stopped = error
        self.seconds += time.perf_counter() - started
        self._together.pieces.clear()
        for job in [job for job, texts in self._open.items() if all(text.stop_reason for text in texts)]:
            texts = self._open.pop(job)
            self._n_ended += sum(len(text.tokens) for text in texts)
            yield job, texts
        if stopped:
            raise stopped
