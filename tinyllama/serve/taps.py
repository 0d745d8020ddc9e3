"""What is computed beside texts: intermediate values, as a file in safetensors' format, and scores."""

import json
import math
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np

from ..errors import require
from ..llama import SCORED, Llama
from ..model import tap_shapes
from ..taps.names import matching
from ..texts.score import scoring

LARGEST = 1 << 28  # bytes of one answer, and of all that are under way
PART = 1 << 16  # bytes that are sent at once: a slow client is seen to take them
BATCH = 512  # tokens that are scored in a pass
PATTERNS, LONGEST = 64, 200  # of a request, and characters of one


def wanted_taps(llama: Llama, patterns: list[str], n_tokens: int) -> tuple[list[str], int]:
    """The names that patterns mean for a prompt of n_tokens, and how many bytes their values have.

    Raises TinyllamaError where a pattern matches nothing, or they are more than LARGEST.
    """
    require(len(patterns) <= PATTERNS, f"there may be {PATTERNS} patterns, not {len(patterns)}")
    shapes, longest = tap_shapes(llama.config, n_tokens), max(map(len, patterns), default=0)
    require(longest <= LONGEST, f"a pattern may have {LONGEST} characters, not {longest}")
    names = matching(llama.config, patterns)
    n_bytes = sum(4 * math.prod(shapes[name]) for name in names.values())
    require(n_bytes <= LARGEST, f"these taps have {n_bytes:,} bytes, and at most {LARGEST:,} are answered")
    return [*names], n_bytes


def trace(llama: Llama, ids: list[int], names: list[str], cancel: threading.Event) -> Iterator[None]:
    """Compute taps: for `Engine.compute`, whose result is as of `Llama.trace`."""
    yield
    return llama.trace(ids, *names, cancel=cancel)


def scored(llama: Llama, ids: list[int], cancel: threading.Event) -> Iterator[None]:
    """Score ids: for `Engine.compute`, whose result is as of `Llama.score`."""
    n, found = min(BATCH, len(ids)), []
    cache = llama.new_cache(len(ids), at_once=n, n_logits=2 * n, n_bytes=SCORED * len(ids))
    for tokens in scoring(partial(llama.forward, cancel=cancel), llama.tokenizer, cache, ids, BATCH):
        found += tokens
        yield
    return found


def safetensors(arrays: dict[str, np.ndarray], about: dict[str, str]) -> Iterator[bytes | memoryview]:
    """A file in parts of at most PART bytes: its header, and each array as float32."""
    header, end = {"__metadata__": about}, 0
    for name, array in arrays.items():
        begin, end = end, end + 4 * array.size
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    yield len(told).to_bytes(8, "little") + told
    for array in arrays.values():
        data = np.ascontiguousarray(array, "<f4").data.cast("B")
        for at in range(0, len(data), PART):
            yield data[at : at + PART]
