"""Looks inside the wheel for Apple's computers, which runs nowhere else; `make wheel-macos` runs this."""

import itertools
import os
import struct
import zipfile
from pathlib import Path

import pytest

capstone = pytest.importorskip("capstone", reason="reads Arm code; `make wheel-macos` installs it")
lief = pytest.importorskip("lief", reason="reads Mach-O files; `make wheel-macos` installs it")

ROOT = Path(__file__).parents[2]
LIBRARIES = {
    "/usr/lib/libSystem.B.dylib",
    "/System/Library/Frameworks/Accelerate.framework/Versions/A/Accelerate",
}


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    if "MACOS_WHEEL" not in os.environ:
        pytest.skip("MACOS_WHEEL names no wheel; `make wheel-macos` builds one")
    return zipfile.ZipFile(os.environ["MACOS_WHEEL"])


@pytest.fixture(scope="module")
def extension(wheel):
    file = lief.MachO.parse(list(wheel.read("tinyllama/_native.abi3.so")))
    assert file.size == 1
    yield file.at(0)  # which lives as long as `file`


def test_the_wheel_holds_the_code_the_small_model_and_the_command(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kinds = {".py", ".js", ".css", ".html", ".txt"}
    files = (path for path in (ROOT / "tinyllama").rglob("*") if path.suffix in kinds)
    code = {path.relative_to(ROOT).as_posix() for path in files}
    small = {"params.json", "consolidated.00.pth", "tokenizer.model"}
    model = {f"tinyllama/data/small/{name}" for name in small}
    assert held == code | model | {"tinyllama/_native.abi3.so"}
    (info,) = (name for name in wheel.namelist() if name.endswith("/WHEEL"))
    assert "Tag: cp311-abi3-macosx_11_0_arm64" in wheel.read(info).decode().splitlines()
    (scripts,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "tinyllama = tinyllama.commands:main" in wheel.read(scripts).decode()


def test_the_extension_is_signed_arm64_code_for_macos_11(extension):
    assert extension.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
    assert extension.build_version.platform == lief.MachO.BuildVersion.PLATFORMS.MACOS
    assert extension.build_version.minos == [11, 0, 0]
    assert extension.has_code_signature  # Apple's processors run nothing without one


def test_every_symbol_comes_from_the_system_accelerate_or_python(extension):
    name, *libraries = (library.name for library in extension.libraries)
    assert name == "@rpath/_native.abi3.so" and set(libraries) <= LIBRARIES
    for symbol in extension.imported_symbols:
        if symbol.has_binding_info and not symbol.binding_info.has_library:
            assert symbol.name.startswith(("_Py", "__Py")), f"no library has {symbol.name}"
    assert "_PyInit__native" in {symbol.name for symbol in extension.exported_symbols}


#: What an M1 lacks: only the kernels of i8mm may have it, and these run only where the processor says so.
NOT_ON_M1 = {"smmla", "ummla", "usmmla", "usdot", "sudot", "bfmmla", "bfdot", "bfmlalb", "bfmlalt", "bfcvtn"}
#: What makes a level fast.
LEVELS = {"neon": {"smull", "smlal", "fmla"}, "dotprod": {"sdot", "fmla"}, "i8mm": {"smmla", "fmla"}}


def addresses_in(instructions):
    """Where calls and jumps lead, and addresses taken as `adrp x, page; add x, x, offset`."""
    for before, this in itertools.pairwise([None, *instructions]):
        last = this.op_str.split(", ")[-1]
        if this.mnemonic in ("b", "bl"):
            yield int(last[1:], 16)
        elif this.mnemonic == "add" and before and before.mnemonic == "adrp" and last[0] == "#":
            yield int(before.op_str.split("#")[1], 16) + int(last[1:], 16)


class Code:
    """The functions of the extension, disassembled."""

    def __init__(self, binary):
        self.binary = binary
        self.addresses = {symbol.name: symbol.value for symbol in binary.symbols if symbol.value}
        text = binary.get_section("__text")
        within = range(text.virtual_address, text.virtual_address + text.size)
        starts = {symbol.value for symbol in binary.symbols} & set(within)
        self.bounds = sorted(starts | {within.stop})
        engine, data = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM), bytes(text.content)
        self.functions = {
            start: list(engine.disasm(data[start - within.start : stop - within.start], start))
            for start, stop in itertools.pairwise(self.bounds)
        }

    def of_level(self, level: str) -> set[int]:
        """Where the functions begin that a level's table of kernels leads to, directly and by calls."""
        table = self.addresses[f"_{level}_kernels"]
        end = min(address for address in self.addresses.values() if address > table)
        words = bytes(self.binary.get_content_from_virtual_address(table, (end - table) // 8 * 8))
        found, left = set(), [word for (word,) in struct.iter_unpack("<Q", words)]
        while left:
            start = left.pop()
            if start in self.functions and start not in found:
                found.add(start)
                left += addresses_in(self.functions[start])
        return found

    def instructions(self, functions) -> set[str]:
        return {i.mnemonic for start in functions for i in self.functions[start]}


@pytest.fixture(scope="module")
def code(extension):
    return Code(extension)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_s_functions_have_its_instructions(level, code):
    assert code.instructions(code.of_level(level)) >= LEVELS[level]


def test_every_function_is_disassembled_to_its_end(code):
    for start, instructions in code.functions.items():
        assert instructions and instructions[-1].address + 4 in code.bounds, hex(start)


def test_nothing_that_runs_on_every_processor_needs_more_than_an_m1(code):
    special = code.of_level("i8mm") - code.of_level("dotprod")
    assert not code.instructions(code.functions.keys() - special) & NOT_ON_M1
