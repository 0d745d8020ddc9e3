"""What the inner loops of the Arm levels can do on Apple's processors, by analysis: python benchmarks/mca.py

Nothing here is measured. The loops that multiply q4_0 blocks are compiled for macOS by zig (PyPI: ziglang),
cut out of the assembly, and their cycles are counted in two ways:

    llvm-mca (Debian: llvm-22) follows each instruction through its model of Apple's processors, which is that
    of 2013's under every name that it has for them, to the M5's: 6 instructions a cycle, 3 units for vectors;
    the M1 and later start 8 and have 4 such units, so a quarter of the vector instructions is the least.

What a core does in a cycle (bytes of weights in decoding, multiply-adds in prefill) lies between the two.
Neither counts copies of registers, which an M1 makes by renaming.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tinyllama.config import PRESETS

EXT = Path(__file__).parents[1] / "ext"
OPTIONS = ["-target", "aarch64-macos.11.0", "-O3", "-g0", "-std=gnu11", "-ffp-contract=off", f"-I{EXT}"]
OPTIONS += ["-mllvm", "-aarch64-neon-syntax=generic"]
MCA = shutil.which("llvm-mca-22") or shutil.which("llvm-mca-19") or "llvm-mca"

#: How many products an instruction makes.
PRODUCTS = {"smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8, "sdot": 16, "smmla": 32}
#: Of blocks, a quarter is multiplied twice (`REFINED` in ext/kernels.h), for a single token at once.
REFINED = 0.25
BLOCK_OF_ROWS = 32 * 32
BYTES_PER_WEIGHT = 18 / 32
#: Cache lines that decode asks for ahead, in a loop of its own, for each block of 32 rows.
PREFETCHES = 32 * 18 // 64
#: Units for vector instructions: https://dougallj.github.io/applecpu/firestorm.html
VECTOR_UNITS = 4
LEVELS = ["neon", "dotprod", "i8mm"]
LIMITS = ["decode, tokens/s", "prefill, tokens/s"]
#: A single token is another level's.
DECODES_WITH = {"i8mm": "dotprod"}
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

#: Each level's loops as functions of their own, put where its instruction set is switched on.
FUNCTIONS = """
void decode(const weight *w, const activations *acts, long strip, float *out, long stride) {
    if (acts->tile_tokens != 1) __builtin_unreachable();
    multiply_type(Q4_0, w, acts, strip, out, stride);
}
void prefill(const weight *w, const activations *acts, long strip, float *out, long stride) {
    if (acts->tile_tokens == 1) __builtin_unreachable();
    multiply_type(Q4_0, w, acts, strip, out, stride);
}
"""


def run(command: list, text: str | None = None) -> str:
    """What a command prints."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def assembly(level: str) -> dict[str, str]:
    """{"decode": its instructions, "prefill": its instructions}."""
    code = (EXT / f"{level}.c").read_text()
    at = code.index("\nLEVEL(")
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "loops.c"), Path(folder, "loops.s")
        source.write_text(code[:at] + FUNCTIONS + code[at:])
        run([sys.executable, "-m", "ziglang", "cc", *OPTIONS, "-S", source, "-o", output])
        text = output.read_text()
    names = "decode", "prefill"
    return {name: re.search(rf"^_{name}:.*?\.cfi_endproc", text, re.M | re.S)[0] for name in names}


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


def passes(function: str) -> list[list[str]]:
    """Ways through the loop with the most products, prefetches included, each through one block of products:
    in decoding that of a plain block of weights, then that of a refined one."""
    found = loops(function)
    header = max(found, key=lambda name: sum(map(products, found[name][1])))
    blocks = found[header][1]
    inside = [body for parent, body in found.values() if parent == header and "prfm" in str(body)]
    around = [line for block in blocks if not products(block) for line in block]
    around += PREFETCHES * [line for body in inside for block in body for line in block]
    return [around + block for block in sorted(blocks, key=products) if products(block)]


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


class Speed(NamedTuple):
    """What a core does in a cycle."""

    decode: float  # bytes of weights
    prefill: float  # multiply-adds


def speeds(level: str, count) -> Speed:
    """By one of the two ways to `count` the cycles of a loop."""
    plain, refined = map(count, passes(assembly(DECODES_WITH.get(level, level))["decode"]))
    (prefill,) = passes(assembly(level)["prefill"])
    return Speed(
        BLOCK_OF_ROWS * BYTES_PER_WEIGHT / (plain + REFINED * (refined - plain)),
        products(prefill) / count(prefill) / (1 + REFINED),
    )


def row(*cells) -> None:
    """A row of a Markdown table; a pair is a range."""
    texts = [f"{cell[0]:.3g} – {cell[1]:.3g}" if isinstance(cell, list) else str(cell) for cell in cells]
    print("|", " | ".join(texts), "|")


def main() -> None:
    """Print both tables of ext/README.md."""
    both = {level: [speeds(level, cycles), speeds(level, vector_cycles)] for level in LEVELS}
    row("Level", "decode: bytes of weights a cycle", "prefill: multiply-adds a cycle")
    row("---", "---:", "---:")
    for level, ways in both.items():
        row(f"`{level}`", [way.decode for way in ways], [way.prefill for way in ways])
    print()
    row(
        "Chip",
        "its cores decode, GB/s",
        "its memory, GB/s",
        *(f"{size} {what}" for size in WEIGHTS for what in LIMITS),
    )
    row("---", *["---:"] * 6)
    for name, chip in CHIPS.items():
        giga = chip.cores * chip.clock
        limits = []
        for weights in WEIGHTS.values():
            limits.append(f"{chip.bandwidth / (weights * BYTES_PER_WEIGHT):.3g}")
            limits.append([giga * way.prefill / weights for way in both[chip.level]])
        row(name, [giga * way.decode for way in both[chip.level]], chip.bandwidth, *limits)


if __name__ == "__main__":
    main()
