"""How fast a model runs that lies on several machines, and what others like them should make of it.

A pass takes the computing of all stages, one after the other, and a hop to each: the residual stream goes to
the next machine, and the answer comes back. Several texts, or the pieces of a long prompt, follow each other,
and then all stages compute at once. What is measured takes turns, and figures are medians of these rounds.

What other numbers of machines should give is arithmetic. A token's computing takes C in all stages together,
and a hop h. Of N machines the slowest one has a part p of the layers: 1 / N, but whole layers.

    one text                C + N h a token
    N texts                 a token every p C, by the slowest machine, but every C / N + h if that is longer
    a prompt of P pieces    computing C' in all: (P - 1 + N) p C' / P + N h, since the last of its pieces
                            begins behind P - 1 others and passes N machines
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from textwrap import fill

import numpy as np

from ..cluster.pipeline import Pipeline
from ..errors import check_cancelled
from ..generation import Generation
from ..machine.limits import human
from ..model import Step
from ..settings import Settings
from ..texts.schedule import Schedule
from .bench_report import WIDTH
from .mixes import ALIASES
from .printing import columns, counted
from .programs import Endless

MOST, LEAST, ENOUGH = 15, 3, 10.0  # rounds: at most, at least, and more until so many seconds have passed
TEXTS = (1, 2, 4, 8)  # that are written together
MACHINES = (1, 2, 4, 8)  # of which is told what they should give
SPEEDS = """Milliseconds a token by how many are computed at once: of 1, a text is written, of more, a prompt
is read, a long one in pieces that follow each other through the stages. A hop is the way to a stage and
back."""
TOGETHER = "Texts that are written together, with all that generate does, in tokens a second:"
EXPECTED = """What so many machines like these should give, in tokens a second. It isn't measured, but
arithmetic: one text takes all stages and hops; as many texts as machines wait for the slowest one, or for
hops."""
ALONE = "Workers on one computer share its memory and cores: machines of their own may be faster."


@dataclass
class Share:
    """What one stage is: the layers first to last on a worker."""

    worker: str
    host: str
    backend: str
    level: str | None
    threads: int
    first: int
    last: int
    memory: int  # bytes that it takes at most

    @property
    def name(self) -> str:
        """Who computes it: "mac1, c neon, 8 threads"."""
        kind = " ".join(filter(None, (self.backend, self.level)))
        return f"{self.host}, {kind}, {counted(self.threads, 'thread')}"


@dataclass
class Expected:
    """Tokens a second that a number of machines should give."""

    text: float  # of one text
    texts: float  # of as many texts as machines, all together
    prompt: float  # of the longest prompt


@dataclass
class Result:
    """What was measured, by how many tokens were computed at once: of 1, a text is written."""

    model: str
    type: str
    stages: list[Share]
    load: float  # seconds
    seconds: dict[int, float] = field(default_factory=dict)  # a token
    computing: dict[int, list[float]] = field(default_factory=dict)  # of these, in each stage
    hops: dict[int, float] = field(default_factory=dict)  # a hop; of what is computed in one pass
    texts: dict[int, float] = field(default_factory=dict)  # tokens a second of so many texts, all together
    expected: dict[int, Expected] = field(default_factory=dict)  # of so many machines, by arithmetic


def bench(
    llama: Pipeline,
    lengths: Sequence[int] = (32, 128, 512),
    texts: Sequence[int] = TEXTS,
    n_predict: int = 16,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure a model on several machines.

    Args:
        lengths: of prompts, in tokens.
        texts: how many are written together.
        n_predict: tokens that each writes.
        progress: called with what is being measured, again and again.
    """
    lengths, texts, n_layers = sorted({1, *lengths}), sorted({1, *texts}), llama.config.n_layers
    took, speeds = _measured(llama, lengths, texts, n_predict, progress)
    kind = ALIASES.get(str(llama.checkpoint.metadata.get("general.file_type")), "")
    result = Result(llama.name, kind, _shares(llama), llama.load_seconds)
    for n_tokens, passes in took.items():
        whole, parts = zip(*passes, strict=True)
        result.seconds[n_tokens] = median(whole) / n_tokens
        result.computing[n_tokens] = [median(part) / n_tokens for part in zip(*parts, strict=True)]
        if llama.n_pieces(n_tokens) == 1:
            result.hops[n_tokens] = median((every - sum(part)) / len(llama.shares) for every, part in passes)
    result.texts = {n_texts: median(found) for n_texts, found in speeds.items()}
    pieces = llama.n_pieces(lengths[-1])
    result.expected = {n: expected(result, n, n_layers, pieces) for n in MACHINES if n <= n_layers}
    return result


def _shares(llama: Pipeline) -> list[Share]:
    return [
        Share(w.address, w.host, w.backend, w.level, w.threads, layers[0], layers[-1], w.needs(layers))
        for w, layers in llama.shares.items()
    ]


def _measured(llama: Pipeline, lengths, texts, n_predict: int, progress) -> tuple[dict, dict]:
    """What passes of each length took, as `_passes` says, and the speeds of each number of texts."""
    took, speeds = defaultdict(list), defaultdict(list)
    for number in _rounds():
        for n_tokens in lengths:
            progress(f"round {number}: {counted(n_tokens, 'token')} at once")
            took[n_tokens] += _passes(llama, n_tokens, n_predict if n_tokens == 1 else 1)
        for n_texts in texts:
            progress(f"round {number}: {counted(n_texts, 'text')} together")
            speeds[n_texts].append(_written(llama, n_texts, n_predict))
    return took, speeds


def _rounds() -> Iterator[int]:
    """Numbers of rounds, as many as the constants above say."""
    started = time.perf_counter()
    for number in range(1, MOST + 1):
        yield number
        if number >= LEAST and time.perf_counter() > started + ENOUGH:
            return


def _passes(llama: Pipeline, n_tokens: int, n: int) -> Iterator[tuple[float, tuple[float, ...]]]:
    """What n passes behind each other take: seconds, and those of each stage."""
    ids, cache = _ids(llama, n_tokens), llama.new_cache(n * n_tokens, at_once=n_tokens)
    for _ in range(n):
        llama.run([Step(ids, cache, 1)])
        yield llama.took


def _ids(llama: Pipeline, n_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, llama.config.vocab_size, n_tokens).tolist()


def _written(llama: Pipeline, n_texts: int, n_predict: int) -> float:
    """Tokens a second of so many texts that are written together."""
    schedule, started = Schedule(llama.start, math.inf, depth=llama.backend.depth), time.perf_counter()
    for seed in range(n_texts):
        settings = Settings(n_predict=n_predict, seed=seed)
        cache, begin = llama.new_cache(n_predict + 1), _ids(llama, 1, seed)
        schedule.add(Generation(llama.run, Endless(), cache, begin, settings), 0)
    while len(schedule):
        check_cancelled()
        schedule.turn()
    return n_texts * n_predict / (time.perf_counter() - started)


def expected(result: Result, n: int, n_layers: int, pieces: int) -> Expected:
    """What n machines should give, as above; of the longest prompt in so many pieces."""
    longest, largest = max(result.seconds), math.ceil(n_layers / n) / n_layers
    token, prompt, hop = sum(result.computing[1]), longest * sum(result.computing[longest]), result.hops[1]
    seconds = (pieces + n - 1) * largest * prompt / pieces + n * hop
    return Expected(1 / (token + n * hop), 1 / max(token * largest, token / n + hop), longest / seconds)


# --- as text --------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """The figures, in lines of at most 80 columns."""
    title = f"{result.model}{f', {result.type}' * bool(result.type)}, loaded in {result.load:.1f} s"
    shared = len({share.host for share in result.stages}) < len(result.stages)
    parts = [title, fill(SPEEDS, WIDTH), _stages(result), TOGETHER, _texts(result)]
    parts += [fill(EXPECTED, WIDTH), _expected(result), *[fill(ALONE, WIDTH)] * shared]
    return "\n\n".join(parts)


def _stages(result: Result) -> str:
    lengths = sorted(result.seconds)
    rows = [["stage", "layers", "memory", *(counted(n, "token") for n in lengths)]]
    for number, share in enumerate(result.stages):
        times = [_ms(result.computing[n][number]) for n in lengths]
        rows.append([share.name, f"{share.first}-{share.last}", human(share.memory), *times])
    rows.append(["a hop", "", "", *(_ms(result.hops[n] / n) if n in result.hops else "" for n in lengths)])
    rows.append(["all in all", "", "", *(_ms(result.seconds[n]) for n in lengths)])
    rows.append(["tokens a second", "", "", *(_number(1 / result.seconds[n]) for n in lengths)])
    return _lines(rows)


def _texts(result: Result) -> str:
    speeds = result.texts.values()
    gains = [f"{speed / result.texts[1]:.2f}" for speed in speeds]
    rows = [counted(n, "text") for n in result.texts], [*map(_number, speeds)], gains
    return _lines([label, *row] for label, row in zip(["", "together", "gain"], rows, strict=True))


def _expected(result: Result) -> str:
    rows = [["", "one text", "as many texts", f"a prompt of {max(result.seconds)}"]]
    for n, some in result.expected.items():
        rows.append([counted(n, "machine"), *map(_number, (some.text, some.texts, some.prompt))])
    return _lines(zip(*rows, strict=True))


def _lines(rows) -> str:
    rows = [[*row] for row in rows]
    return "\n".join(columns(rows, "<" + ">" * (len(rows[0]) - 1), indent=""))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _number(speed: float) -> str:
    return f"{speed:.1f}" if speed < 99.95 else f"{speed:.0f}"
