"""How fast this computer runs a model, and how far that is from what the hardware allows.

Two limits hold. To write a token every weight is read once, so decoding is no faster than memory: the
*read probe* reads the same bytes and does nothing else. To read a prompt each weight is used for many
tokens, so prefill is no faster than arithmetic: the *multiply probe* multiplies registers. Speeds are given
as a share of them. The read probe runs in turn with the tokens, so that both see the same computer.

A model needs no file: of a shape alone, weights are random, and as fast as real ones.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np

from ..backends import Backend, get_backend
from ..config import PRESETS, Config
from ..errors import require
from ..formats import open_checkpoint
from ..machine.limits import human
from ..model import build, forward
from ..quant import TYPES, quantize
from ..tensor import Piece, Tensor
from .printing import columns

REPEATS = 3  # of each prompt; the median counts
SHORT_PROMPT = 5  # tokens
CONTEXT = 512  # tokens that the KV cache has room for, beyond the prompts


@dataclass
class Result:
    """What one backend, level and number of threads reached: tokens a second, seconds and bytes."""

    model: str
    type: str
    backend: str
    level: str | None
    threads: int
    decode: float = 0.0  # tokens a second, one at a time
    read_probe: float | None = None  # those that reading the weights alone would allow; None without C
    read_bandwidth: float | None = None  # bytes a second, in which it read them
    prefill: dict[int, float] = field(default_factory=dict)  # tokens a second by length of the prompt
    multiply_probe: float | None = None  # those that multiplying alone would allow; None without C
    load: float = 0.0  # seconds to prepare the weights, reading a file included
    first_token: float = 0.0  # seconds until a short prompt's next token is known, loading included
    memory: int = 0  # bytes that weights and cache take, beside a file that is mapped
    mapped: bool = False  # the weights stayed in their file


class RandomWeights(dict):
    """Weights of a shape by Meta's names. `values()` know their sizes alone; `[name]` makes numbers, anew."""

    def __init__(self, config: Config, type: str):
        for name, shape in config.tensor_shapes().items():
            self[name] = Tensor(name, shape, (Piece(b"", 0, type if len(shape) == 2 else "f32", shape),))

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        if len(tensor.shape) == 1:
            return Tensor.from_array(name, np.ones(tensor.shape, np.float32))
        n_rows, n_cols = tensor.shape
        noise = np.random.default_rng(0).standard_normal((min(n_rows, 32), n_cols), dtype=np.float32)
        rows = quantize(noise * np.float32(n_cols**-0.5), tensor.type)
        blocks = np.resize(rows, (n_rows, *rows.shape[1:]))  # a few rows over and over: as fast as any
        return Tensor.from_blocks(name, tensor.shape, tensor.type, blocks)


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
) -> Iterator[Result]:
    """Measure a file, or random weights of a shape, on backends, levels of the C backend and thread counts.

    Args:
        model: as `load` takes it; not looked at where there is a `shape`: "7B", "13B", "30B" or "65B".
        type: of the random weights.
        backends, levels, threads: None for the fastest that runs here, its best level, one a core.
        mmap: measure each a second time, running from the mapped file.
        n_predict, prefill: tokens to write, and lengths of prompts to read.
    Raises:
        TinyllamaError: there is no such model, backend or level, or it doesn't fit into memory.
    """
    require(shape is None or shape in PRESETS, f"there is no shape {shape!r}: there are {', '.join(PRESETS)}")
    require(shape is None or not mmap, "a shape has no file that could be mapped")
    require(type in TYPES, f"there is no type {type!r}: there are {', '.join(TYPES)}")
    require(1 <= n_predict <= CONTEXT, f"n_predict must be from 1 to {CONTEXT}, not {n_predict}")
    for name, n_threads in product(backends or [None], threads or [None]):
        backend = get_backend(name, n_threads)
        for level, mapped in product((backend.level and levels) or [None], sorted({False, mmap})):
            with backend.at_level(level) if level else nullcontext(), backend.running():
                result = _measure(backend, model, shape, type, mapped, n_predict, prefill)
            yield result


def _measure(backend: Backend, model, shape, type, mmap, n_predict, prefill) -> Result:
    if shape:
        name, config = f"{shape}, random weights", PRESETS[shape]
        tensors = RandomWeights(config, type)
    else:
        checkpoint = open_checkpoint(model)
        name, config, tensors = str(model), checkpoint.config, checkpoint.tensors
        type = tensors["layers.0.attention.wq.weight"].type
    copy = not (mmap or backend.keeps_in_file(tensors))
    mapped = not (copy or shape)
    n_ctx, at_once = max(prefill, default=0) + CONTEXT, max(prefill, default=1)
    backend.require_run(config, n_ctx, at_once)
    backend.require_load(Path(name), backend.memory(config, tensors, n_ctx, at_once, mmap), mapped)
    result = Result(name, type, backend.name, backend.level, backend.threads, mapped=mapped)

    def prepare(tensor: Tensor):  # in which making random numbers doesn't count
        started = time.perf_counter()
        ready = backend.prepare(tensor, copy)
        result.load += time.perf_counter() - started
        return ready

    loaded, cache = build(config, tensors, prepare), backend.new_cache(config, n_ctx)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, at_once)

    def seconds(n_tokens: int, n_past: int = 0) -> float:
        cache.trim(n_past)
        started = time.perf_counter()
        forward(loaded, backend, tokens[:n_tokens], cache, last=True)
        return time.perf_counter() - started

    result.first_token = result.load + seconds(SHORT_PROMPT)
    for n_tokens in prefill:
        result.prefill[n_tokens] = n_tokens / median(seconds(n_tokens) for _ in range(REPEATS))
    matrices = [w for layer in loaded.layers for w in layer.values() if len(w.shape) == 2] + [loaded.output]
    seconds(1)  # wakes the threads
    decode, reads = [], []
    for n_past in range(1, n_predict + 1):  # in turns: what disturbs one disturbs the other
        decode.append(seconds(1, n_past))
        if backend.level:
            reads.append(backend.read_speed(matrices))
    result.decode = 1 / median(decode)
    if backend.level:
        result.read_bandwidth = median(reads)
        result.read_probe = result.read_bandwidth / sum(matrix.bytes_read for matrix in matrices)
        # A token multiplies every weight of the layers once; the output layer runs for the last token alone.
        per_token = config.n_params() - 2 * config.vocab_size * config.dim
        result.multiply_probe = backend.multiply_speed() / per_token
    result.memory = cache.nbytes + (0 if mapped else sum(matrix.nbytes for matrix in matrices))
    return result


def table(results: list[Result]) -> str:
    """Results as a table: speeds in tokens a second, with the share of their limit."""
    lengths = sorted({length for result in results for length in result.prefill})
    reads = (f"read {length}" for length in lengths)
    rows = [["backend", "threads", "write", *reads, "load", "first token", "memory"]]
    for result in results:
        write = _share(result.decode, result.read_probe)
        reads = (_share(result.prefill[length], result.multiply_probe) for length in lengths)
        took = (f"{result.load:.2f} s", f"{result.first_token:.2f} s")
        rows.append([_name(result), result.threads, write, *reads, *took, human(result.memory)])
    what = "tokens a second, and the share of what memory or arithmetic allow"
    title = f"{results[0].model}, {results[0].type}: {what}"
    lines = [title, "", *columns(rows, ">" * len(rows[0]), indent="")]
    if probed := [result for result in results if result.read_bandwidth]:
        best = max(probed, key=lambda result: result.read_bandwidth)
        lines += ["", f"Memory was read at {best.read_bandwidth / 1e9:.1f} GB/s with {best.threads} threads."]
    return "\n".join(lines)


def _name(result: Result) -> str:
    return " ".join(filter(None, (result.backend, result.level))) + ", mapped" * result.mapped


def _share(speed: float, limit: float | None) -> str:
    number = f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"
    return f"{number} ({speed / limit:.0%})" if limit else number


def plot(results: list[Result], path: str | Path) -> None:
    """Save a roofline: speed over the tokens that are computed together, below its two limits."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    for result in results:
        speeds, name = {1: result.decode, **result.prefill}, f"{_name(result)}, {result.threads} threads"
        (line,) = axes.plot(list(speeds), list(speeds.values()), marker="o", label=name)
        if result.read_probe:
            together = np.geomspace(1, max(speeds), 50)
            roof = np.minimum(together * result.read_probe, result.multiply_probe)
            axes.plot(together, roof, "--", color=line.get_color(), label=f"limit of {name}")
    axes.set(xscale="log", yscale="log", xlabel="tokens computed together", ylabel="tokens a second")
    axes.set_title(f"{results[0].model}, {results[0].type}")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path)
