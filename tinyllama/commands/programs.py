"""The programs that `bench` measures, tinyllama and llama.cpp, and the process that each can have to itself.

Every program computes so many tokens at once behind so many others, and says how long that took; and it
tells what it took to get there (`facts`). llama.cpp is llama-cpp-python, which has to be built for this
computer, or it isn't a fair comparison, and by clang: what GCC 12 makes of its AMX kernels crashes (it keeps
only the first 8 bytes of the tile configuration). That takes a quarter of an hour:

    export CC=clang CXX=clang++ CMAKE_ARGS=-DGGML_NATIVE=ON
    pip install --no-binary llama-cpp-python llama-cpp-python
"""

import math
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..backends import Backend, get_backend
from ..config import PRESETS, Config
from ..errors import TinyllamaError, check_cancelled, require
from ..formats import open_checkpoint
from ..generation import Generation
from ..llama import load
from ..machine.limits import peak_memory
from ..machine.places import find
from ..model import build, forward, forward_texts
from ..settings import Settings
from ..tensor import Piece, Tensor
from ..texts.schedule import Schedule
from .random_weights import RandomWeights

SHORT_PROMPT = 5  # tokens


@dataclass(frozen=True)
class Task:
    """What a program is to run, and how."""

    model: str  # as `load` takes it
    shape: str | None  # a key of PRESETS: random weights of this shape instead
    type: str  # of these
    backend: str
    level: str | None  # of the backend; None: it has none, or the best
    threads: int
    mmap: bool
    n_ctx: int  # tokens that the KV cache has room for
    at_once: int  # tokens, the most that will be computed together


def opened(task: Task, backend: Backend) -> tuple[Config, dict[str, Tensor], bool]:
    """A task's model, and whether its weights are copied. Raises TinyllamaError where it doesn't fit."""
    if task.shape:
        name, config = f"{task.shape}, random weights", PRESETS[task.shape]
        tensors = RandomWeights(config, task.type)
    else:
        checkpoint = open_checkpoint(task.model)
        name, config, tensors = task.model, checkpoint.config, checkpoint.tensors
    copy = not backend.keeps_in_file(tensors, task.mmap)
    backend.require_run(config, task.n_ctx, task.at_once)
    needed = backend.memory(config, tensors, task.n_ctx, task.at_once, task.mmap)
    backend.require_load(Path(name), needed, not (copy or task.shape))
    return config, tensors, copy


class Endless:
    """Stands for a tokenizer, which random weights haven't got: no token ends a text."""

    stop_ids, unused_ids, prefix = frozenset(), (), b""

    def piece(self, token_id: int) -> str:
        """A token's text."""
        return str(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """As bytes."""
        return b"a"


class Tinyllama:
    """tinyllama, with all weights prepared before anything is computed. Raises what `load` does."""

    name = "tinyllama"

    def __init__(self, task: Task, progress: Callable[[str], None] = lambda _: None):
        self._within = ExitStack()
        self._backend = backend = get_backend(task.backend, task.threads)
        if task.level:
            self._within.enter_context(backend.at_level(task.level))
        try:
            self._within.enter_context(backend.running())
            self._open(task, progress)
        except BaseException:
            self.close()
            raise

    def _open(self, task: Task, progress: Callable[[str], None]) -> None:
        backend, (config, tensors, copy) = self._backend, opened(task, self._backend)
        self._config, self._together = config, {}
        self._mapped = not (copy or task.shape)
        self._load, n_done = 0.0, 0

        def prepare(tensor: Tensor):  # in which making random numbers doesn't count
            nonlocal n_done
            n_done += 1
            progress(f"load {n_done / len(tensors):.0%}")
            tensor = tensor if copy or not task.shape else _alone(tensor)
            started = time.perf_counter()
            ready = backend.prepare(tensor, copy)
            self._load += time.perf_counter() - started
            return ready

        self._model, self._cache = build(config, tensors, prepare), backend.new_cache(config, task.n_ctx)
        self._ids = np.random.default_rng(0).integers(0, config.vocab_size, task.at_once)
        layers = [weight for layer in self._model.layers for weight in layer.values()]
        self._matrices = [weight for weight in (*layers, self._model.output) if len(weight.shape) == 2]
        # A token multiplies every weight of the layers once; the output layer runs for the last token alone.
        self._products = config.n_params() - 2 * config.vocab_size * config.dim
        self._first_token = self._load + self.seconds(SHORT_PROMPT, 0)

    def seconds(self, n_tokens: int, n_past: int) -> float:
        """That computing so many tokens at once takes, behind so many of those computed last."""
        self._cache.trim(n_past)
        started = time.perf_counter()
        forward(self._model, self._backend, self._ids[:n_tokens], self._cache, last=True)
        return time.perf_counter() - started

    def begin_texts(self, n_texts: int, n_tokens: int) -> None:
        """Begin so many texts, of so many tokens at least: read their prompts and choose their first."""
        n_ctx, run = SHORT_PROMPT + n_tokens + 1, partial(forward_texts, self._model, self._backend)
        texts, schedule = [], Schedule(run, math.inf)
        for seed in range(n_texts):
            ids = np.random.default_rng(seed).integers(0, self._config.vocab_size, SHORT_PROMPT).tolist()
            cache, wanted = self._backend.new_cache(self._config, n_ctx), Settings(n_predict=-1, seed=seed)
            texts.append(Generation(run, Endless(), cache, ids, wanted))
            schedule.add(texts[-1], 0)
        schedule.turn()
        self._together[n_texts] = texts, schedule

    def turn(self, n_texts: int) -> tuple[int, float]:
        """A token of each of so many texts: how many tokens that were, and the seconds they took."""
        texts, schedule = self._together[n_texts]
        before, started = sum(len(text.tokens) for text in texts), time.perf_counter()
        schedule.turn()
        took = time.perf_counter() - started
        return sum(len(text.tokens) for text in texts) - before, took

    def probe(self) -> tuple[float, float] | None:
        """The least seconds that a pass over all weights can take, of memory, and a token, of arithmetic.

        What reading all weights and nothing else takes now, and multiplying registers as often as a token
        multiplies weights. None without C.
        """
        if not self._backend.level:
            return None
        reading = self._bytes_read() / self._backend.read_speed(self._matrices)
        return reading, self._products / self._backend.multiply_speed()

    def _bytes_read(self) -> int:
        return sum(matrix.bytes_read for matrix in self._matrices) if self._backend.level else 0

    def facts(self) -> dict[str, object]:
        """What it took until now, in seconds and bytes, and what runs."""
        in_memory = 0 if self._mapped else sum(matrix.nbytes for matrix in self._matrices)
        return {
            "level": self._backend.level,
            "mapped": self._mapped,
            "load": self._load,
            "first_token": self._first_token,
            "bytes_read": self._bytes_read(),
            "memory": self._cache.nbytes + in_memory,
            "peak_memory": peak_memory(),
        }

    def close(self) -> None:
        """Give everything back."""
        self._model = self._cache = self._matrices = self._together = None
        self._within.close()


def _alone(tensor: Tensor) -> Tensor:
    """In memory of its own: random weights share theirs, which would lie in a cache if they stayed there."""
    pieces = (replace(piece, data=np.array(piece.data)) for piece in tensor.pieces)
    return replace(tensor, pieces=tuple[Piece, ...](pieces))


class AsItComes:
    """tinyllama as `generate` runs it: what a user waits for."""

    name = "tinyllama"

    def __init__(self, task: Task):
        with ExitStack() as within:
            backend = get_backend(task.backend, task.threads)
            if task.level:
                within.enter_context(backend.at_level(task.level))
            started = time.perf_counter()
            llama = load(task.model, task.backend, task.threads, mmap=task.mmap, progress=iter)
            ids = np.random.default_rng(0).integers(0, llama.config.vocab_size, SHORT_PROMPT)
            llama.forward(ids.tolist(), llama.new_cache(task.n_ctx), last=True)
            self._first_token = time.perf_counter() - started

    def facts(self) -> dict[str, object]:
        """As Tinyllama's."""
        return {"first_token": self._first_token}


class LlamaCpp:
    """llama-cpp-python with its own settings, except that nothing goes to a GPU."""

    name = "llama.cpp"

    def __init__(self, task: Task):
        import llama_cpp

        started = time.perf_counter()
        threads = {"n_threads": task.threads, "n_threads_batch": task.threads}
        path = str(find(task.model))
        self._llama = llama_cpp.Llama(path, n_ctx=task.n_ctx, **threads, n_gpu_layers=0, verbose=False)
        self._load = time.perf_counter() - started
        n_vocab = self._llama.n_vocab()
        self._ids = np.random.default_rng(0).integers(0, n_vocab, task.at_once).tolist()
        self._first_token = self._load + self.seconds(SHORT_PROMPT, 0)

    def seconds(self, n_tokens: int, n_past: int) -> float:
        """As Tinyllama's."""
        self._llama.n_tokens = n_past
        started = time.perf_counter()
        self._llama.eval(self._ids[:n_tokens])
        return time.perf_counter() - started

    def facts(self) -> dict[str, object]:
        """As Tinyllama's."""
        memory = peak_memory()
        return {"load": self._load, "first_token": self._first_token, "peak_memory": memory}


#: Programs to hold ours against, by name: a class, the module that it needs, and what to install for it.
OTHERS = {
    "llama.cpp": (
        LlamaCpp,
        "llama_cpp",
        "llama-cpp-python, built for this computer: "
        "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python",
    )
}


def find_other(name: str) -> type:
    """The class of another program. Raises TinyllamaError, with what to do, where it isn't installed."""
    require(name in OTHERS, f"there is no program {name!r} to compare with: there is {', '.join(OTHERS)}")
    program, module, needed = OTHERS[name]
    require(find_spec(module), f"{name} can't run here: it takes {needed}")
    return program


class Elsewhere:
    """A program in a process of its own, to which calls of its methods are sent; Ctrl-C ends it at once.

    Raises TinyllamaError for what the program raises, and where its process ends.
    """

    def __init__(self, program: type, task: Task):
        context = multiprocessing.get_context("spawn")
        self.name = program.name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, program, task), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __getattr__(self, method: str) -> Callable:
        return partial(self._call, method)

    def _call(self, method: str, *arguments):
        with suppress(OSError):  # it has ended, which shows when its answer is read
            self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self):
        while not self._pipe.poll(0.1):
            check_cancelled()
        try:
            error, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            ended = f"{self.name} ended with status {self._process.exitcode}"
            raise TinyllamaError(f"{ended} (-4: built for another CPU; -9: out of memory)") from None
        require(not error, error)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe, program: type, task: Task) -> None:
    """Make a program and do what comes through the pipe, until that is closed."""
    # Ctrl-C reaches all processes of a terminal, and all would warn: the parent does it, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    try:
        running = program(task)
        pipe.send(("", None))
        while True:
            method, arguments = pipe.recv()
            pipe.send(("", getattr(running, method)(*arguments)))
    except EOFError:
        return
    except TinyllamaError as error:
        pipe.send((str(error), None))
    except Exception as error:  # of another's: whatever it is, the parent is to hear of it
        pipe.send((f"{program.name}: {error or type(error).__name__}", None))
