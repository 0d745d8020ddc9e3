"""What a model on several machines has here in place of a backend and of caches."""

import itertools
import weakref

from ..backends import Backend
from ..config import Config
from ..errors import TinyllamaError
from ..machine.limits import require_memory
from ..ops import KVCache
from .stage import Fork

NO_FILE = "a cache that lies on several machines can't be kept in a file"


class Far(Backend):
    """What can be known here of the tables of operations of all stages."""

    uses_blas = False

    def __init__(self, pipeline, options: dict):
        first = next(iter(pipeline.shares))
        super().__init__(first.threads)
        self.name, self.level, self.options, self._pipeline = first.backend, first.level, options, pipeline
        self.cache_type, self.depth = first.cache_type, len(pipeline.shares)
        self.is_piecewise = all(worker.backend == "c" for worker in pipeline.shares)

    @property
    def title(self) -> str:
        """As Backend's."""
        named = [
            (w.name if w.name != w.address else w.host, layers) for w, layers in self._pipeline.shares.items()
        ]
        shares = [f"{len(layers)} on {name}" for name, layers in named]
        return f"{super().title} each, layers: {', '.join(shares)}"

    def new_cache(self, config: Config, n_ctx: int, model=None) -> "FarCache":
        """As Backend's."""
        return FarCache(self._pipeline, n_ctx)

    def cache_room(self, config: Config, at_once: int) -> int:
        """As Backend's: where there is the least, for its layers."""
        rooms = self._pipeline.result(*self._pipeline.ask_all("cache_room", at_once))
        layers = map(len, self._pipeline.shares.values())
        return min(room * config.n_layers // n for room, n in zip(rooms, layers, strict=True))

    def require_run(self, config: Config, n_ctx: int, at_once: int = 0, n_bytes: int = 0, **computed) -> None:
        """As Backend's, by every stage; what is kept of the tokens is here."""
        require_memory(n_bytes, "what is kept of the tokens")
        self._pipeline.result(*self._pipeline.ask_all("require_run", n_ctx, {"at_once": at_once} | computed))


class FarCache(KVCache):
    """The ids of a cache; its keys and values lie on the stages.

    Attributes:
        number: by which the stages know it.
        pieces: runs of pieces of its prompt that nobody has waited for.
    """

    keys = values = ()

    def __init__(self, pipeline, n_ctx: int):
        self.ids, self.n_ctx, self.n_many, self._pipeline = [], n_ctx, 0, pipeline
        self.in_file = self.edited = False
        self.number, self.pieces = next(_numbers), []
        weakref.finalize(self, pipeline.forgotten.append, self.number)

    @property
    def nbytes(self) -> int:
        """As KVCache's, on all stages."""
        return self._pipeline.backend.cache_bytes(self._pipeline.config, len(self))

    def fork(self, n_tokens: int | None = None, n_ctx: int | None = None) -> "FarCache":
        """As KVCache's; the stages do it before the next pass."""
        other = FarCache(self._pipeline, n_ctx or self.n_ctx)
        other.ids = self.ids[:n_tokens]
        other.n_many, other.edited = min(self.n_many, len(other)), self.edited
        self._pipeline.forks.append(Fork(self.number, other.number, len(other), other.n_ctx))
        return other

    def save(self, path, n_tokens: int | None = None) -> None:
        """As KVCache's; not possible."""
        raise TinyllamaError(NO_FILE)


_numbers = itertools.count()
