"""AMX on computers that lack it: its kernels on emulated tile instructions, and the real ones by name."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

_native = pytest.importorskip("tinyllama._native", reason="the C backend is not built")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]

pytestmark = [
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="AMX is an extension of x86-64"),
    pytest.mark.skipif(not shutil.which(COMPILER), reason="there is no C compiler"),
]


def run(*command, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> str:
    """A folder with the package, built so that tile instructions are emulated."""
    build = tmp_path_factory.mktemp("emulated")
    flags = f"{os.environ.get('CFLAGS', '')} -DTINYLLAMA_EMULATE_TILES"
    setup = [
        "setup.py",
        "-q",
        "build",
        "--parallel=2",
        f"--build-base={build}",
        f"--build-lib={build / 'lib'}",
    ]
    done = run(sys.executable, *setup, CFLAGS=flags)
    assert done.returncode == 0, done.stderr
    levels = "from tinyllama import _native; print(_native.levels())"
    if "amx" not in run(sys.executable, "-P", "-c", levels, PYTHONPATH=str(build / "lib")).stdout:
        pytest.skip("this CPU lacks AVX-512 with bf16, or the compiler AMX")
    return str(build / "lib")


def test_every_test_of_the_c_backend_passes_on_emulated_tiles(emulated):
    tests = [
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "amx",
        f"--ignore={__file__}",
        str(HERE),
    ]
    done = run(sys.executable, *tests, PYTHONPATH=emulated)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_environment_variable_chooses_amx(emulated):
    code = "from tinyllama import _native; print(_native.level())"
    assert run(sys.executable, "-P", "-c", code, PYTHONPATH=emulated, TINYLLAMA_CPU="amx").stdout == "amx\n"


MISUSE = {
    "nothing": "",
    "no configuration": "_tile_release(); _tile_zero(0);",
    "another palette": "config.palette = 2; _tile_loadconfig(&config);",
    "too long rows": "config.row_bytes[0] = 65; _tile_loadconfig(&config);",
    "too many rows": "config.rows[0] = 17; _tile_loadconfig(&config);",
    "a ninth tile": "config.rows[8] = 16; config.row_bytes[8] = 64; _tile_loadconfig(&config);",
    "reserved bytes": "config.reserved[3] = 1; _tile_loadconfig(&config);",
    "a tile without rows": "config.rows[2] = 0; _tile_loadconfig(&config); _tile_loadd(2, memory, 64);",
    "fewer sums than rows": "config.rows[0] = 8; _tile_loadconfig(&config); _tile_dpbf16ps(0, 1, 2);",
    "more pairs than rows": "config.rows[2] = 8; _tile_loadconfig(&config); _tile_dpbf16ps(0, 1, 2);",
    "columns that differ": "config.row_bytes[2] = 32; _tile_loadconfig(&config); _tile_dpbf16ps(0, 1, 2);",
    "a tile twice": "_tile_dpbf16ps(0, 1, 1);",
}

PROGRAM = """
#include <stdint.h>
#include "tiles.h"
struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {1};
uint8_t memory[1024];
int main(int count, char **arguments) {
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
    switch (count > 1 ? atoi(arguments[1]) : 0) {
%s
    }
}
"""


@pytest.fixture(scope="module")
def misuse(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("misuse")
    cases = "\n".join(f"    case {i}: {code} break;" for i, code in enumerate(MISUSE.values()))
    (folder / "misuse.c").write_text(PROGRAM % cases)
    done = run(COMPILER, f"-I{HERE}", str(folder / "misuse.c"), "-lm", "-o", str(folder / "misuse"))
    assert done.returncode == 0, done.stderr
    return folder / "misuse"


@pytest.mark.parametrize("case", MISUSE)
def test_the_emulation_ends_where_a_tile_instruction_would_fault(case, misuse):
    done = run(str(misuse), str(list(MISUSE).index(case)))
    if case == "nothing":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and "would fault" in done.stderr


@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump")
def test_the_extension_holds_the_instructions():
    listing = run("objdump", "-d", "--no-show-raw-insn", _native.__file__).stdout
    if not re.search("HAVE_AMX", run(COMPILER, "-dM", "-E", "ext/kernels.h").stdout):
        pytest.skip("this compiler does not know AMX")
    found = set(re.findall(r"\b(?:tile\w+|ldtilecfg|tdpbf16ps)\b", listing))
    assert {"ldtilecfg", "tileloadd", "tilezero", "tdpbf16ps", "tilestored", "tilerelease"} <= found


def test_a_compiler_without_amx_builds_the_rest(tmp_path):
    """Where no header can be asked for, none of AMX's is found."""
    for name in ("amx", "dispatch"):
        output = str(tmp_path / f"{name}.o")
        done = run(COMPILER, "-U__has_include", "-c", f"ext/{name}.c", "-o", output)
        assert done.returncode == 0, done.stderr
        assert b"amx" not in Path(output).read_bytes().replace(b"amx.c", b"")
