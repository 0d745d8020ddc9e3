"""Writes the table of docs/cluster.md anew: what several MacBooks should do, by arithmetic."""

import math
from pathlib import Path

from tinyllama.block_type import TYPES
from tinyllama.config import PRESETS, Config
from tinyllama.ops import FEW
from tinyllama.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
HEAD = """\
| Model, q4_0 | MacBooks | memory each, GB | one text | a prompt | many texts | many prompts, whole models |
|---|---:|---:|---:|---:|---:|---:|
"""

FREE = 11e9  # bytes of memory that a MacBook of 16 GB has for a model
READ = 0.75 * 68.3e9  # bytes of weights a second: three quarters of what an M1's memory delivers
MULTIPLY = 51 * 6.6e9  # multiply-adds a second: an M1's fast cores read 51 tokens/s of a prompt of 7B
HOP = 0.003  # seconds from one machine to the next
WIRE = 110e6  # bytes a second of an Ethernet cable of one gigabit
CONTEXT = 2048  # tokens whose keys and values have room
PIECE = 64  # tokens of a prompt that go from machine to machine together


def n_weights(config: Config, n_layers: float, n_ends: int) -> float:
    """How many weights so many layers have, and embedding and output, of which both are alike."""
    layer = sum(map(math.prod, config.layer_shapes().values()))
    return n_layers * layer + n_ends * config.vocab_size * config.dim


def n_bytes(weights: float) -> float:
    """What they take in q4_0."""
    return weights * TYPES["q4_0"].bits_per_weight / 8


def memory(config: Config, machines: int) -> float:
    """Bytes of the machine that has most to hold: its layers, and in 16 bits their keys and values."""
    n_layers, ends = math.ceil(config.n_layers / machines), 1 if machines > 1 else 2
    return n_bytes(n_weights(config, n_layers, ends)) + n_layers * CONTEXT * 2 * config.kv_dim * 2


def seconds(config: Config, machines: int, n_tokens: int) -> float:
    """How long one of the machines takes to compute so many tokens at once, and to send them on."""
    weights = n_weights(config, config.n_layers, 1) / machines
    send = HOP + n_tokens * config.dim * 4 / WIRE if machines > 1 else 0.0
    return max(n_bytes(weights) / READ, n_tokens * weights / MULTIPLY) + send


def speeds(config: Config, machines: int) -> list[float]:
    """Tokens a second of one text, of a prompt, and of FEW texts for each machine, with the layers spread."""
    one = machines * seconds(config, machines, 1)  # one machine after the other
    n_tokens = Settings.batch_size
    n_pieces = n_tokens / PIECE + machines - 1  # the last machine begins when the others have had one
    return [
        1 / one,
        n_tokens / (n_pieces * seconds(config, machines, PIECE)),
        FEW / seconds(config, machines, FEW),
    ]


def row(size: str, machines: int) -> str:
    """A line of the table."""
    config = PRESETS[size]
    needed, whole = memory(config, machines), memory(config, 1)
    cells = list(map(digits, speeds(config, machines))) if needed <= FREE else ["doesn't fit", "", ""]
    cells += [digits(machines * speeds(config, 1)[-1]) if whole <= FREE else "doesn't fit"]
    return f"| {size} | {machines} | {needed / 1e9:.1f} | {' | '.join(cells)} |\n"


def digits(speed: float) -> str:
    """Tokens a second: two digits at least."""
    return f"{speed:.{1 if speed < 9.95 else 0}f}"


def table() -> str:
    """All of it."""
    return HEAD + "".join(row(size, machines) for size in ("7B", "13B", "65B") for machines in (1, 2, 4, 8))


if __name__ == "__main__":
    before, after = PAGE.read_text(encoding="utf-8").split(HEAD)
    after = after[after.index("\n\n") + 1 :]
    PAGE.write_text(before + table() + after, encoding="utf-8")
