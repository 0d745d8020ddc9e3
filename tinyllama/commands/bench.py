"""How fast this computer runs a model, and how far that is from what the hardware allows.

Two limits hold. Every pass reads each weight once, so it is no faster than memory: the *read probe* reads
the same bytes and does nothing else. And a weight is multiplied by every token of a pass, so a long prompt is
no faster than arithmetic: the *multiply probe* multiplies registers. What is measured takes turns with the
probes, and with the other program if there is one: what disturbs one disturbs them all. Speeds are medians of
these rounds; shares and ratios are medians of each round's own.

A model needs no file: of a shape alone, weights are random, and as fast as real ones.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

from ..backends import get_backend
from ..config import PRESETS
from ..errors import naming, require
from ..formats import open_checkpoint
from ..machine.limits import human, require_disk, require_memory
from ..machine.places import find
from ..machine.terminal import say
from ..quant import TYPES
from .mixes import ALIASES, MIXES
from .printing import counted
from .programs import AsItComes, Elsewhere, Task, Tinyllama, find_other, opened
from .random_weights import RandomWeights

CONTEXT = 512  # tokens that the KV cache has room for, beyond the prompts
MOST, LEAST = 15, 3  # rounds of each number of tokens: at least so many,
ENOUGH, LONG = 3.0, 60.0  # and more until so many seconds have passed; fewer where even that takes so long
FIRST_TOKENS = 3  # rounds of fresh processes, after one that brings the file into the system's cache


@dataclass
class Result:
    """What one program, backend, level and number of threads reached: tokens a second, seconds and bytes."""

    model: str
    type: str
    backend: str  # or "llama.cpp"
    level: str | None
    threads: int
    mapped: bool = False  # the weights stayed in their file
    load: float = 0.0  # seconds to prepare the weights, reading a file included
    first_token: float = 0.0  # seconds until a short prompt's next token is known, loading included
    #: Bytes of weights and cache, beside a file that is mapped; of two programs, the most that each had.
    memory: int = 0
    #: Tokens a second by how many are computed at once: of 1, a text is written, of more, a prompt is read.
    speeds: dict[int, float] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)  # of what the two limits allow; none without C
    ratios: dict[int, float] = field(default_factory=dict)  # of another program: tinyllama's speed by its own
    read_bandwidth: float | None = None  # bytes a second, in which the read probe read the weights
    read_probe: float | None = None  # tokens a second that this allows, one by one; n at once, n times that
    multiply_probe: float | None = None  # tokens a second that multiplying alone would allow
    #: Tokens a second of so many texts that are written together, with all that `generate` does;
    texts: dict[int, float] = field(default_factory=dict)
    gains: dict[int, float] = field(default_factory=dict)  # and how many times those of one text they are

    @property
    def name(self) -> str:
        """What runs: "c avx2"."""
        return " ".join(filter(None, (self.backend, self.level)))


def bench(
    model: str | Path = "small",
    *,
    shape: str | None = None,
    type: str = "q4_0",
    backends: list[str] | None = None,
    levels: list[str] | None = None,
    threads: list[int] | None = None,
    mmap: bool = False,
    n_predict: int = 16,
    prefill: Sequence[int] = (32, 128, 512),
    tokens: Sequence[int] = (),
    texts: Sequence[int] = (),
    against: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Result]:
    """Measure a file, or random weights of a shape, on backends, levels of the C backend and thread counts.

    Args:
        model: as `load` takes it; not looked at where there is a `shape`: "7B", "13B", "30B" or "65B".
        type: of the random weights: a key of TYPES for all matrices, "q4_k", or of mixes.MIXES, "Q4_K_M".
        backends, levels, threads: None for the fastest that runs here, its best level, one a core.
        mmap: measure each a second time, running from the mapped file.
        n_predict: tokens to write.
        prefill, tokens: how many tokens to compute at once: lengths of prompts, and others.
        texts: how many texts to write together; the first is always one, which the others are held against.
        against: "llama.cpp": each is followed by what llama-cpp-python makes of the same file on as many
            threads. Each runs in a process of its own, in turns. Of a shape a file is written, and removed.
        progress: called with what is being measured, again and again.
    Raises:
        TinyllamaError: there is no such model, backend or level, or it doesn't fit into memory.
    """
    require(shape is None or shape in PRESETS, f"there is no shape {shape!r}: there are {', '.join(PRESETS)}")
    require(shape is None or not mmap or against, "a shape has no file that could be mapped")
    known = type in TYPES or str(type).upper() in {*MIXES, *ALIASES}
    require(known, f"there is no type {type!r}: there are {', '.join(TYPES)}, and {', '.join(MIXES)}")
    require(1 <= n_predict <= CONTEXT, f"n_predict must be from 1 to {CONTEXT}, not {n_predict}")
    other = find_other(against) if against else None
    lengths = sorted({1, *prefill, *tokens})
    sizes = {"n_ctx": lengths[-1] + CONTEXT, "at_once": lengths[-1]}
    tasks = []
    for name, n_threads in product(backends or [None], threads or [None]):
        backend = get_backend(name, n_threads)
        for level, mapped in product((backend.level and levels) or [None], sorted({False, mmap})):
            how = backend.name, level or backend.level, backend.threads, mapped
            tasks.append(Task(str(model), shape, type, *how, **sizes))
            opened(tasks[-1], backend)  # so that what doesn't fit is refused before anything takes long
    title = _title(model, shape, type, other)
    with _random_file(shape, type, progress) if shape and other else nullcontext() as file:
        for task in tasks:
            task = replace(task, model=file, shape=None) if file else task
            yield from _measure(task, title, lengths, texts, n_predict, other, progress)


def _title(model: str | Path, shape: str | None, type: str, other: type | None) -> tuple[str, str]:
    """What a model and its type are called."""
    if shape:
        return f"{shape}, random weights", type
    checkpoint = open_checkpoint(model)
    is_gguf = checkpoint.format == "gguf"
    lacks = f"{model}: no GGUF file, which is all that others open; `tinyllama convert` makes one"
    require(is_gguf or not other, lacks)
    mix = ALIASES.get(str(checkpoint.metadata.get("general.file_type"))) if is_gguf else None
    return str(model), mix or checkpoint.tensors["layers.0.attention.wq.weight"].type


@contextmanager
def _random_file(shape: str, type: str, progress: Callable[[str], None]) -> Iterator[str]:
    """Random weights in a file, which is removed at the end."""
    weights = RandomWeights(PRESETS[shape], type)
    with tempfile.TemporaryDirectory(prefix="tinyllama-bench-") as folder:
        path, size = Path(folder, f"{shape}-{type}.gguf"), sum(tensor.nbytes for tensor in weights.values())
        require_disk(size, path.parent, f"{shape}, random weights")
        say(f"{path}: {human(size)} of random weights; removed at the end")
        with naming(path):
            weights.write_gguf(path, shape, progress)
        yield str(path)


def _measure(
    task: Task,
    title: tuple[str, str],
    lengths: list[int],
    texts,
    n_predict: int,
    other: type | None,
    progress,
) -> list[Result]:
    """One backend, level and number of threads, and what another program makes of the same."""
    ours = Result(*title, task.backend, task.level, task.threads)
    results = [ours, Result(*title, other.name, None, task.threads)] if other else [ours]

    def show(what: str) -> None:
        progress(f"{ours.name}, {counted(task.threads, 'thread')}: {what}")

    as_users_do = [AsItComes, other] if other else [AsItComes]
    first_tokens = [] if task.shape else _first_tokens(task, as_users_do, show)
    with ExitStack() as within:
        show("load")
        first = Elsewhere(Tinyllama, task) if other else Tinyllama(task, show)
        programs = [within.enter_context(closing(first))]
        if other:
            require_memory(find(task.model).stat().st_size, f"{title[0]} in two programs at once")
            show(f"load into {other.name}")
            programs.append(within.enter_context(closing(Elsewhere(other, task))))
        probes = []  # of each number of tokens
        for number, n_tokens in enumerate(lengths, 1):
            what = f"{n_tokens} tokens at once" if n_tokens > 1 else "tokens one by one"
            step = partial("{}, {}, round {}".format, f"[{number}/{len(lengths)}]", what)
            turns = _take_turns(n_tokens, n_predict, programs, results, lambda i, step=step: show(step(i)))
            probes.append(turns)
        if texts:
            _write_texts(sorted({1, *texts}), first, ours, show)
        facts = [program.facts() for program in programs]
    for result, found in zip(results, facts, strict=True):
        result.load, result.first_token = found["load"], found["first_token"]
        result.memory = found["peak_memory" if other else "memory"]
    for result, seconds in zip(results, first_tokens, strict=False):
        result.first_token = seconds
    ours.mapped = facts[0]["mapped"]
    if probes[0]:  # where each limit counts: memory for one token, arithmetic for the most
        reading = median(reading for reading, _ in probes[0])
        ours.read_bandwidth, ours.read_probe = facts[0]["bytes_read"] / reading, 1 / reading
        ours.multiply_probe = 1 / median(multiplying for _, multiplying in probes[-1])
    return results


def _first_tokens(task: Task, programs: list[type], show: Callable[[str], None]) -> list[float]:
    """Seconds until each program's first token, in processes of their own."""
    took = [[] for _ in programs]
    rounds = FIRST_TOKENS if len(programs) > 1 else 1
    for number, (i, program) in product(range(1 + rounds), enumerate(programs)):
        if number or not i:
            show(f"first token of {program.name}, {number} of {rounds}")
            with closing(Elsewhere(program, task)) as running:
                took[i] += [running.facts()["first_token"]] * bool(number)
    return [median(seconds) for seconds in took]


def _rounds(n_tokens: int, n_predict: int) -> Iterator[int]:
    """Numbers of rounds, as many as the constants above say; of single tokens n_predict."""
    started = time.perf_counter()
    for number in range(MOST if n_tokens > 1 else n_predict):
        yield number
        took = time.perf_counter() - started
        if n_tokens > 1 and (took > LONG or (took > ENOUGH and number + 1 >= LEAST)):
            return


def _take_turns(n_tokens: int, n_predict: int, programs: list, results: list[Result], show) -> list[tuple]:
    """Rounds of so many tokens in each program, and of the probes, which are returned; results get speeds."""
    took, probes = [], []
    for number in _rounds(n_tokens, n_predict):
        show(number + 1)
        n_past = number if n_tokens == 1 else 0
        took.append([program.seconds(n_tokens, n_past) for program in programs])
        probes += [probe] if (probe := programs[0].probe()) else []
    for i, result in enumerate(results):
        result.speeds[n_tokens] = n_tokens / median(seconds[i] for seconds in took)
        if i:
            result.ratios[n_tokens] = median(seconds[i] / seconds[0] for seconds in took)
    if probes:
        least = [max(reading, n_tokens * multiplying) for reading, multiplying in probes]
        shares = [limit / seconds[0] for limit, seconds in zip(least, took, strict=True)]
        results[0].shares[n_tokens] = median(shares)
    return probes


def _write_texts(numbers: list[int], program, result: Result, show: Callable[[str], None]) -> None:
    """Rounds, each a token of every text, of so many texts written together as of so many others."""
    for n_texts in numbers:
        program.begin_texts(n_texts, MOST)
    speeds: dict[int, list[float]] = {n_texts: [] for n_texts in numbers}
    for round in _rounds(numbers[-1] + 1, 1):
        for n_texts in numbers:
            show(f"{counted(n_texts, 'text')} together, round {round + 1}")
            n_tokens, seconds = program.turn(n_texts)
            speeds[n_texts].append(n_tokens / seconds)
    for n_texts in numbers:
        result.texts[n_texts] = median(speeds[n_texts])
        pairs = zip(speeds[n_texts], speeds[1], strict=True)
        result.gains[n_texts] = median(speed / single for speed, single in pairs)
