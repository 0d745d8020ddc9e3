"""What the inner loops of the Arm levels can do on Apple's processors, by analysis: python benchmarks/mca.py

Nothing here is measured. The loops that multiply q4_0 blocks are compiled for macOS by zig (PyPI: ziglang),
cut out of the assembly, and their cycles are counted in two ways:

    llvm-mca (Debian: llvm-22) follows each instruction through its model of Apple's processors, which is that
    of 2013's under every name that it has for them, to the M5's: 6 instructions a cycle, 3 units for vectors;
    the M1 and later start 8 and have 4 such units, so a quarter of the vector instructions is the least.

What a core does in a cycle (bytes of weights for one token, multiply-adds for several at once) lies between
the two. Neither counts copies of registers, which an M1 makes by renaming, or what is done once for a chunk.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tinyllama.config import PRESETS

EXT = Path(__file__).parents[1] / "ext"
OPTIONS = ["-target", "aarch64-macos.11.0", "-O3", "-g0", "-std=gnu11", "-ffp-contract=off", f"-I{EXT}"]
OPTIONS += ["-mllvm", "-aarch64-neon-syntax=generic"]
MCA = shutil.which("llvm-mca-22") or shutil.which("llvm-mca-19") or "llvm-mca"

#: How many products an instruction makes.
PRODUCTS = {"smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8, "sdot": 16, "smmla": 32}
BYTES_PER_WEIGHT = 18 / 32
#: How many are multiplied at once; so many that prefill has nothing but whole tiles.
TOKENS = [1, 2, 3, 4, 6, 8, 512]
#: Units for vector instructions: https://dougallj.github.io/applecpu/firestorm.html
VECTOR_UNITS = 4
LEVELS = ["neon", "dotprod", "i8mm"]
LIMITS = ["decode, tokens/s", "prefill, tokens/s"]
#: Its tiles have an even number of tokens, and a single one is another level's.
PAIRS, SINGLE = "i8mm", "dotprod"
#: Billions of weights that a token is multiplied by: all but the embedding.
WEIGHTS = {
    name: (PRESETS[name].n_params() - PRESETS[name].vocab_size * PRESETS[name].dim) / 1e9
    for name in ("7B", "13B")
}


class Chip(NamedTuple):
    """Performance cores, their GHz when all are busy, and memory's GB/s: ext/README.md has the sources."""

    level: str
    cores: int
    clock: float
    bandwidth: float


CHIPS = {
    "M1": Chip("dotprod", 4, 3.2, 68.3),
    "M2 Pro": Chip("i8mm", 8, 3.3, 200),
    "M3 Max, 14 cores": Chip("i8mm", 10, 4.06, 300),
    "M3 Max, 16 cores": Chip("i8mm", 12, 4.06, 400),
}

#: A level's loop over a tile of so many tokens, as a function of its own.
FUNCTION = """
void tokens_{n}(const weight *w, const token_tile *tile, long first, long last, float *out, long stride) {{
    multiply_strips(Q4_0, {n}, w, tile, first, last, out, stride);
}}
"""


def run(command: list, text: str | None = None) -> str:
    """What a command prints."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def source(level: str) -> str:
    """Its file."""
    return (EXT / f"{level}.c").read_text()


def most_tokens(level: str) -> int:
    """Of a tile."""
    return int(re.search(r"TOKENS = (\d+)", source(level))[1])


@cache
def assembly(level: str, n: int) -> str:
    """Of the level's loop over a tile of n tokens, in place of all that its file makes for other types."""
    rest = re.compile(r"^(static )?MULTIPLY_TILE.*?(?=^TARGET_END|^#endif)", re.M | re.S)
    with tempfile.TemporaryDirectory() as folder:
        code, output = Path(folder, "loop.c"), Path(folder, "loop.s")
        code.write_text(rest.sub(FUNCTION.format(n=n), source(level)))
        run([sys.executable, "-m", "ziglang", "cc", *OPTIONS, "-S", code, "-o", output])
        return re.search(rf"^_tokens_{n}:.*?\.cfi_endproc", output.read_text(), re.M | re.S)[0]


def loops(function: str) -> dict[str, tuple[str | None, list[list[str]]]]:
    """{header: (header of the loop around it, basic blocks in it but in no loop inside it)}.

    The compiler says in comments to which loop each basic block belongs.
    """
    found, here = {}, None
    for block in re.split(r"^(?=LBB|; %bb)", function, flags=re.M):
        label = re.match(r"LBB\w+", block)
        parents = re.findall(r"Parent Loop (BB\w+)", block)
        if label and re.search(r"Loop Header", block):
            here = label[0][1:]
            found.setdefault(here, (parents[-1] if parents else None, []))
        elif header := re.search(r"in Loop: Header=(BB\w+)", block):
            here = header[1]
            found.setdefault(here, (None, []))
        else:
            here = None
        if here:
            found[here][1].append(re.findall(r"^\t([a-z][^;\n]*)", block, re.M))
    return found


def products(instructions: list[str]) -> int:
    """Multiply-adds of the instructions."""
    names = (re.split(r"[\s.]", line)[0] for line in instructions)
    return sum(PRODUCTS.get(name, 0) for name in names)


def inner_loop(function: str) -> list[str]:
    """Instructions of the loop with the most products: those of a block and some columns, and prefetches."""
    bodies = ([line for block in blocks for line in block] for _, blocks in loops(function).values())
    return max(bodies, key=products)


def copies(line: str) -> bool:
    """Whether the instruction only copies a vector or zeros one:
    https://dougallj.github.io/applecpu/measurements/firestorm/MOV_v_16B.html, MOVI_v_8H_zero.html"""
    return bool(re.match(r"mov\s+v\d+\.16b|movi\s.*#0\b(?!x)", line))


def cycles(instructions: list[str]) -> float:
    """Of one pass of many that follow each other, by llvm-mca's model, in which a load stands for a copy."""
    straight = [line for line in instructions if not re.match(r"(b|b\.\w+|cbn?z|tbn?z)\s", line)]
    straight = [
        re.sub(r"\S+\s+v(\d+).*", r"ldr q\1, [sp]", line) if copies(line) else line for line in straight
    ]
    options = ["-mtriple=arm64-apple-macos", "-mcpu=apple-m1", "-mattr=+dotprod,+i8mm", "-iterations=200"]
    return int(re.search(r"Total Cycles:\s+(\d+)", run([MCA, *options], "\n".join(straight)))[1]) / 200


def vector_cycles(instructions: list[str]) -> float:
    """The least that the vector instructions take."""
    names_vector, moves = re.compile(r"\bv\d+\."), ("ld", "st")
    return (
        sum(bool(names_vector.search(i)) and not i.startswith(moves) and not copies(i) for i in instructions)
        / VECTOR_UNITS
    )


def tiles(level: str, n_tokens: int) -> list[int]:
    """Tokens of each: few tiles, as equal as possible, as ext/operations.c plans them."""
    n = -(-n_tokens // most_tokens(level))
    return [n_tokens * (i + 1) // n - n_tokens * i // n for i in range(n)]


def cycles_a_weight(level: str, n: int, count) -> float:
    """For a tile of n tokens, by one of the two ways to `count` the cycles of a loop."""
    if level == PAIRS:
        return cycles_a_weight(SINGLE, 1, count) if n == 1 else cycles_of_loop(level, n + n % 2, count)
    return cycles_of_loop(level, n, count)


def cycles_of_loop(level: str, n: int, count) -> float:
    """The same for a tile that is as full as the loop wants it."""
    loop = inner_loop(assembly(level, n))
    return n * count(loop) / products(loop)


def speed(level: str, n_tokens: int, count) -> float:
    """Multiply-adds a cycle with so many tokens at once."""
    planned = tiles(level, n_tokens)
    return n_tokens / sum(planned.count(n) * cycles_a_weight(level, n, count) for n in set(planned))


def row(*cells) -> None:
    """A row of a Markdown table; a pair is a range."""
    texts = [f"{cell[0]:.3g} – {cell[1]:.3g}" if isinstance(cell, list) else str(cell) for cell in cells]
    print("|", " | ".join(texts), "|")


def main() -> None:
    """Print both tables of ext/README.md."""
    ways = cycles, vector_cycles
    both = {level: {n: [speed(level, n, way) for way in ways] for n in TOKENS} for level in LEVELS}
    row("Level", "bytes of weights", *TOKENS)
    row("---", *["---:"] * (1 + len(TOKENS)))
    for level, of in both.items():
        row(f"`{level}`", [x * BYTES_PER_WEIGHT for x in of[1]], *of.values())
    print()
    row(
        "Chip",
        "its cores decode, GB/s",
        "its memory, GB/s",
        *(f"{size} {what}" for size in WEIGHTS for what in LIMITS),
    )
    row("---", *["---:"] * 6)
    for name, chip in CHIPS.items():
        giga, of = chip.cores * chip.clock, both[chip.level]
        limits = []
        for weights in WEIGHTS.values():
            limits.append(f"{chip.bandwidth / (weights * BYTES_PER_WEIGHT):.3g}")
            limits.append([giga * x / weights for x in of[TOKENS[-1]]])
        row(name, [giga * x * BYTES_PER_WEIGHT for x in of[1]], chip.bandwidth, *limits)


if __name__ == "__main__":
    main()
