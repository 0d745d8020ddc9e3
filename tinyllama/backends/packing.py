"""How the weights of a model come into memory: when it is loaded, never, or while it runs.

Packing a large model takes seconds. A backend whose products are the same to the bit whether a weight lies in
its file or in memory needn't wait for that: the first token is computed from the file, and from then on a
thread packs one weight after the other, and products become faster.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable

from ..errors import TinyllamaError
from ..tensor import Tensor
from .numpy import Backend

PATIENCE = 2.0  # seconds after which a model is packed that nobody has run yet
PAUSE = 0.2  # of the time that a weight took: products that wait for the cores get them


class Packing:
    """The weights of one model on their way into memory.

    Attributes:
        mapped: they stay in their file.
        trouble: why some stay there although they shouldn't; "" where nothing is wrong.
    """

    def __init__(self, backend: Backend, tensors: dict[str, Tensor], check: Callable[[], None], mmap: bool):
        """Args:
        check: raises TinyllamaError if the file isn't any more what it was.
        mmap: whether somebody wants the weights to stay there.
        """
        self.mapped = backend.keeps_in_file(tensors, mmap)
        self._later = not self.mapped and backend.begins_in_file(tensors)
        self._backend, self._check = backend, check
        self._left: dict = {}  # a weight -> its Tensor; the first is being packed
        self._pid, self._wanted = 0, threading.Event()
        self._n_packed, self._seconds, self.trouble = 0, 0.0, ""

    @property
    def state(self) -> tuple[float, int, int]:
        """Seconds that packing has taken so far, weights that it packed, and those that are left."""
        return self._seconds, self._n_packed, len(self._left)

    def prepare(self, tensor: Tensor):
        """As the backend's."""
        ready = self._backend.prepare(tensor, copy=not (self.mapped or self._later))
        if self._later and len(tensor.shape) > 1:
            self._left[ready] = tensor
        return ready

    def check(self) -> None:
        """Raise TinyllamaError if a file that weights lie in isn't any more what it was."""
        if self.mapped or self._left:
            self._check()

    def start(self, now: bool = True) -> None:
        """Have a thread pack what is left, now or soon. A forked process, which has no threads, gets one."""
        if not self._left:
            return
        if self._pid != os.getpid():
            self._pid, self._wanted = os.getpid(), threading.Event()
            told = weakref.ref(self), self._wanted  # the thread doesn't keep a model that is gone
            threading.Thread(target=_work, args=told, name="packing", daemon=True).start()
        if now:
            self._wanted.set()

    def stop(self) -> None:
        """Pack no more, and forget what is left."""
        self._left.clear()

    def pack_one(self) -> float:
        """Pack the first weight that is left. Returns the seconds that it took, 0 if that is all."""
        for weight, tensor in list(self._left.items())[:1]:
            started = time.perf_counter()
            try:
                self._backend.settle(weight, tensor)
                self._check()  # from now on nobody looks at its part of the file
            except (TinyllamaError, MemoryError) as error:
                self.trouble = str(error)
                break
            took = time.perf_counter() - started
            self._seconds, self._n_packed = self._seconds + took, self._n_packed + 1
            self._left.pop(weight, None)  # if nobody has stopped it meanwhile
            return took
        return 0.0


def _work(packing: "weakref.ref[Packing]", wanted: threading.Event) -> None:
    wanted.wait(PATIENCE)
    while took := _pack_one(packing()):
        time.sleep(PAUSE * took)


def _pack_one(packing: Packing | None) -> float:
    return packing.pack_one() if packing else 0.0
