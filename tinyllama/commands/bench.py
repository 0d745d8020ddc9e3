"""How fast this computer runs a model, and how far that is from what the hardware allows.

Two limits hold. To write a token every weight is read once, so decoding is no faster than memory: the
*read probe* reads the same bytes and does nothing else. To read a prompt each weight is used for many
tokens, so prefill is no faster than arithmetic: the *multiply probe* multiplies registers. Speeds are given
as a share of them. The read probe runs in turn with the tokens, so that both see the same computer.

A model needs no file: of a shape alone, weights are random, and as fast as real ones.
"""

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from ..machine import limits as resources
from ..backends import get_backend
from ..blocks import TYPES
from ..config import PRESETS, Config
from ..machine.download import find
from ..errors import TinyllamaError
from ..formats import open_checkpoint
from ..memory import check_run
from ..model import build, forward
from ..quant import Tensor, bits_per_weight, quantize

PREFILL = (32, 128, 512)  # tokens of a prompt
REPEATS = 3  # of each prompt; the median counts
SHORT_PROMPT = 5  # tokens
CONTEXT = 512  # tokens that the KV cache has room for, beyond the prompts


@dataclass
class Result:
    """One backend, level and number of threads.

    Attributes:
        decode: tokens a second, one at a time.
        read_probe: the tokens a second that reading the weights alone would allow, None without C.
        prefill: tokens a second by length of the prompt.
        multiply_probe: the tokens a second that multiplying alone would allow, None as above.
        load: seconds to prepare the weights, reading a file included.
        first_token: seconds until a short prompt's next token is known, loading included.
        memory: bytes that weights and cache take, beside a file that is mapped.
        mapped: the C backend ran from the mapped file.
    """

    model: str
    type: str
    backend: str
    level: str | None
    threads: int
    decode: float = 0.0
    read_probe: float | None = None
    read_bandwidth: float | None = None
    prefill: dict[int, float] = field(default_factory=dict)
    multiply_probe: float | None = None
    load: float = 0.0
    first_token: float = 0.0
    memory: int = 0
    mapped: bool = False


class RandomWeights(Mapping):
    """Weights of a shape by Meta's names, made when they are asked for and not kept."""

    def __init__(self, config: Config, type: str):
        self._shapes, self._type = config.tensor_shapes(), type

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return Tensor.from_array(name, np.ones(shape, np.float32))
        return Tensor(name, self._type, shape, (random_blocks(self._type, *shape),))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_blocks(type: str, n_rows: int, n_cols: int) -> np.ndarray:
    """Blocks of a type: some random rows over and over, as speed asks for no more."""
    few = min(n_rows, 32)
    noise = np.random.default_rng(0).standard_normal((few, n_cols), dtype=np.float32)
    rows = quantize(noise * np.float32(n_cols**-0.5), type)
    return np.resize(rows, (n_rows, *rows.shape[1:]))


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
    prefill: tuple[int, ...] = PREFILL,
) -> Iterator[Result]:
    """Measure a file, or random weights of a shape, on backends, levels of the C backend and thread counts.

    Args:
        model: a file or name, as `load` takes it; where `shape` is given it isn't looked at.
        shape: "7B", "13B", "30B" or "65B".
        type: of the random weights.
        backends: None for the fastest that runs here.
        levels: of the C backend; None for the best of this CPU.
        mmap: measure the C backend a second time, running from the mapped file.
        n_predict: tokens to write.
    Raises:
        TinyllamaError: there is no such model, backend or level, or it doesn't fit into memory.
    """
    if shape is not None and shape not in PRESETS:
        raise TinyllamaError(f"there is no shape {shape!r}: there are {', '.join(PRESETS)}")
    if shape is not None and mmap:
        raise TinyllamaError("a shape has no file that could be mapped")
    if type not in TYPES:
        raise TinyllamaError(f"there is no type {type!r}: there are {', '.join(TYPES)}")
    if not 1 <= n_predict <= CONTEXT:
        raise TinyllamaError(f"n_predict must be from 1 to {CONTEXT}, not {n_predict}")
    for backend in backends or [None]:
        for n_threads in threads or [None]:
            table = get_backend(backend, n_threads)
            for level in (levels or [None]) if table.name == "c" else [None]:
                for mapped in (False, True) if mmap and table.name == "c" else (False,):
                    with _level(level):
                        yield _measure(model, shape, type, table, mapped, n_predict, prefill)
                    gc.collect()


class _level:
    """A context in which the C backend runs on a level."""

    def __init__(self, name: str | None):
        self._name = name

    def __enter__(self):
        if self._name is None:
            return
        from .. import _native

        self._before = _native.level()
        if self._name not in _native.levels():
            raise TinyllamaError(
                f"this computer has no level {self._name!r}: there are {', '.join(_native.levels())}"
            )
        _native.use_level(self._name)

    def __exit__(self, *_):
        if self._name is not None:
            from .. import _native

            _native.use_level(self._before)


def _measure(model, shape, type, table, mapped: bool, n_predict: int, prefill: tuple[int, ...]) -> Result:
    config, tensors, name = _open(model, shape, type)
    if shape is not None:
        resources.require_memory(_memory(config, bits_per_weight(type) / 8), name)
    else:
        type = tensors["layers.0.attention.wq.weight"].type
        resources.require_memory((not mapped) * sum(tensor.nbytes for tensor in tensors.values()), name)
    n_ctx, at_once = max(prefill, default=0) + CONTEXT, max(prefill, default=1)
    check_run(config, table.name, n_ctx, at_once)
    result = Result(name, type, table.name, _level_of(table), table.threads, mapped=mapped)
    loaded = build(config, tensors, partial(_timed, result, table))
    cache = table.new_cache(config, n_ctx)
    run = partial(forward, loaded, table, cache=cache, last=True)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, at_once)
    result.first_token = result.load + _seconds(run, tokens[:SHORT_PROMPT], 0)
    for n_tokens in prefill:
        seconds = [_seconds(run, tokens[:n_tokens], 0) for _ in range(REPEATS)]
        result.prefill[n_tokens] = n_tokens / median(seconds)
    _measure_decoding(result, run, tokens, n_predict, weights := _weights(loaded), table.threads)
    _measure_multiplying(result, config, table)
    result.memory = sum(weight.nbytes for weight in weights) + cache.keys.nbytes + cache.values.nbytes
    return result


def _timed(result: Result, table, tensor: Tensor):
    """Prepare a weight; making random ones isn't counted."""
    started = time.perf_counter()
    ready = table.prepare(tensor, copy=table.name == "c" and not result.mapped)
    result.load += time.perf_counter() - started
    return ready


def _open(model, shape, type) -> tuple[Config, Mapping[str, Tensor], str]:
    if shape is not None:
        return PRESETS[shape], RandomWeights(PRESETS[shape], type), f"{shape}, random weights"
    checkpoint = open_checkpoint(find(model))
    return checkpoint.config, checkpoint.tensors, str(model)


def _memory(config: Config, bytes_per_weight: float) -> int:
    """Bytes for the weights, one more of the largest, and the cache."""
    largest = config.hidden_dim * config.dim
    cache = 4 * 2 * config.n_layers * (max(PREFILL) + CONTEXT) * config.kv_dim
    return int((config.n_params() + largest) * bytes_per_weight) + cache


def _level_of(table) -> str | None:
    if table.name != "c":
        return None
    from .. import _native

    return _native.level()


def _weights(model) -> list:
    """Every matrix that a token is multiplied by."""
    layers = [
        getattr(layer, name) for layer in model.layers for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    ]
    return [*layers, model.output]


def _seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def _measure_decoding(result: Result, run, tokens, n_predict: int, weights: list, threads: int) -> None:
    """Tokens and read probes in turn: what disturbs one disturbs the other."""
    decode, probe = [], []
    run(tokens[:1], 0)  # wakes the threads
    for pos in range(1, n_predict + 1):
        decode.append(_seconds(run, tokens[:1], pos))
        if result.level is not None:
            probe.append(_seconds(_read, weights, threads))
    result.decode = 1 / median(decode)
    if probe:
        result.read_probe = 1 / median(probe)
        result.read_bandwidth = sum(array.nbytes for weight in weights for array in weight.memory) / median(
            probe
        )


def _read(weights: list, threads: int) -> None:
    from .. import _native

    for weight in weights:
        for array in weight.memory:
            _native.read_all(array, threads)


def _measure_multiplying(result: Result, config: Config, table) -> None:
    """A token multiplies every weight of the layers once; the output layer runs for the last token alone."""
    if result.level is None:
        return
    from .. import _native

    rounds, products, seconds = 1000, 0.0, 0.0
    while seconds < 0.1:  # long enough for the clock to settle
        started = time.perf_counter()
        products = _native.multiply_all(rounds, table.threads)
        seconds, rounds = time.perf_counter() - started, rounds * 4
    per_token = config.n_params() - 2 * config.vocab_size * config.dim
    result.multiply_probe = products / seconds / per_token


# --- showing it -----------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """Results as a table: speeds in tokens a second, with the share of their limit."""
    lengths = sorted({length for result in results for length in result.prefill})
    head = ["backend", "threads", "write", *(f"read {length}" for length in lengths)]
    head += ["load", "first token", "memory"]
    rows = [head, *([*_row(result, lengths)] for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    first = results[0]
    title = f"{first.model}, {first.type}: tokens a second, and the share of what memory or arithmetic allow"
    return "\n".join([title, "", *lines, *_limits(results)])


def _row(result: Result, lengths: list[int]) -> Iterator[str]:
    name = f"{result.backend} {result.level}" if result.level else result.backend
    yield f"{name}, mapped" if result.mapped else name
    yield str(result.threads)
    yield _share(result.decode, result.read_probe)
    for length in lengths:
        yield _share(result.prefill[length], result.multiply_probe)
    yield f"{result.load:.2f} s"
    yield f"{result.first_token:.2f} s"
    yield resources.human(result.memory)


def _share(speed: float, limit: float | None) -> str:
    number = f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"
    return f"{number} ({speed / limit:.0%})" if limit else number


def _limits(results: list[Result]) -> Iterator[str]:
    known = [result for result in results if result.read_bandwidth]
    if known:
        best = max(known, key=lambda result: result.read_bandwidth)
        yield ""
        yield f"Memory was read at {best.read_bandwidth / 1e9:.1f} GB/s with {best.threads} threads."


def as_json(results: list[Result]) -> list[dict]:
    """Results as plain dicts."""
    return [asdict(result) for result in results]


def plot(results: list[Result], path: str | Path) -> None:
    """Save a roofline: speed over the tokens that are computed together, below its two limits."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    for result in results:
        speeds = {1: result.decode, **result.prefill}
        name = f"{result.backend} {result.level or ''}, {result.threads} threads{', mapped' * result.mapped}"
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
