"""AMX on computers that lack it: what the compiler made of its kernels, each tile instruction emulated."""

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
    pytest.mark.skipif(sys.platform != "linux", reason="instructions are emulated on Linux alone"),
    pytest.mark.skipif("amx" in _native.levels(), reason="this CPU has AMX: all tests here run on it"),
    pytest.mark.skipif(not shutil.which(COMPILER), reason="there is no C compiler"),
]


def run(*command, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> str:
    """tiles.c as a library, to be preloaded: what raises SIGILL is emulated."""
    library = tmp_path_factory.mktemp("tiles") / "tiles.so"
    flags = ["-O3", "-march=native", "-shared", "-fPIC"]
    done = run(COMPILER, *flags, str(HERE / "tiles.c"), "-lm", "-o", str(library))
    assert done.returncode == 0, done.stderr
    return str(library)


@pytest.fixture(scope="module")
def emulated(tiles, tmp_path_factory):
    """Runs Python on the package, built so that it takes this CPU for one with AMX."""
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

    def python(*arguments, **environment):
        environment = {"PYTHONPATH": str(build / "lib"), "LD_PRELOAD": tiles, **environment}
        return run(sys.executable, "-P", *arguments, **environment)

    if "amx" not in python("-c", LEVELS).stdout:
        pytest.skip("this CPU lacks AVX-512 with bf16, or the compiler AMX")
    return python


LEVELS = "from tinyllama import _native; print(_native.level(), _native.levels(), _native.amx_obstacle())"


def test_every_test_of_the_c_backend_passes_on_emulated_tiles(emulated):
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", "amx", f"--ignore={__file__}"]
    done = emulated("-m", "pytest", *options, str(HERE))
    assert done.returncode == 0, done.stdout + done.stderr


def test_amx_is_chosen_where_it_works(emulated):
    assert emulated("-c", LEVELS).stdout.startswith("amx ['amx', 'avx512', 'avx2', 'ref'] None")
    assert emulated("-c", LEVELS, TINYLLAMA_CPU="amx").stdout.startswith("amx ")


@pytest.mark.parametrize("trouble, reason", [("refused", "no room for tiles"), ("wrong", "multiply wrongly")])
def test_without_permission_or_right_results_avx512_is_chosen_and_why_can_be_asked(emulated, trouble, reason):
    shown = emulated("-c", LEVELS, TILES=trouble).stdout
    assert shown.startswith("avx512 ['avx512', 'avx2', 'ref'] ") and reason in shown
    assert reason in emulated("-m", "tinyllama", "inspect", "--backends", TILES=trouble).stdout
    forced = emulated("-m", "tinyllama", "inspect", "--backends", TILES=trouble, TINYLLAMA_CPU="amx").stdout
    assert "can't run here" in forced and reason in forced


def test_a_forked_child_and_new_threads_multiply_on_tiles_too(emulated):
    done = emulated("-c", FORK)
    assert done.returncode == 0, done.stderr


#: Two threads at once, and a child, which has neither of them nor those of the pool.
FORK = """
import os, threading
import numpy as np
from tinyllama.backends.native import Native
from tinyllama.tensor import Tensor
numbers = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) % 7
weight = Native(2).prepare(Tensor.from_array("", numbers, "f32"), True)
x = np.arange(64 * 600, dtype=np.float32).reshape(600, 64) % 5
right = []
def multiply():
    for _ in range(20):
        right.append(np.array_equal(Native(3).matmul(x, weight), x @ numbers.T))
both = [threading.Thread(target=multiply) for _ in range(2)]
[thread.start() for thread in both]
[thread.join() for thread in both]
child = os.fork()
multiply()
if not child:
    os._exit(not all(right))
assert os.waitpid(child, 0)[1] == 0 and len(right) == 60 and all(right)
"""


MISUSE = {
    "nothing": "",
    "no configuration": "_tile_release(); _tile_zero(0);",
    "no configuration in this thread": "in_a_thread();",
    "another palette": "config.palette = 2; load_config();",
    "too long rows": "config.row_bytes[0] = 65; load_config();",
    "too many rows": "config.rows[0] = 17; load_config();",
    "a ninth tile": "config.rows[8] = 16; config.row_bytes[8] = 64; load_config();",
    "reserved bytes": "config.reserved[3] = 1; load_config();",
    "a tile without rows": "config.rows[2] = 0; load_config(); _tile_loadd(2, memory, 64);",
    "fewer sums than rows": "config.rows[0] = 8; load_config(); _tile_dpbf16ps(0, 1, 2);",
    "more pairs than rows": "config.rows[2] = 8; load_config(); _tile_dpbf16ps(0, 1, 2);",
    "columns that differ": "config.row_bytes[2] = 32; load_config(); _tile_dpbf16ps(0, 1, 2);",
}

PROGRAM = """
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
static struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} config = {1};
static uint8_t memory[1024];
static void load_config(void) { __asm__ volatile("" ::: "memory"); _tile_loadconfig(&config); }
static void *zero(void *argument) { _tile_zero(0); return argument; }
static void in_a_thread(void) {
    pthread_t thread;
    pthread_create(&thread, 0, zero, 0);
    pthread_join(thread, 0);
}
int main(int count, char **arguments) {
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    load_config();
    switch (count > 1 ? atoi(arguments[1]) : 0) {
%s
    }
}
"""


@pytest.fixture(scope="module")
def misuse(tiles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("misuse")
    cases = "\n".join(f"    case {i}: {code} break;" for i, code in enumerate(MISUSE.values()))
    (folder / "misuse.c").write_text(PROGRAM % cases)
    flags = ["-mamx-tile", "-mamx-bf16", "-pthread"]
    done = run(COMPILER, *flags, str(folder / "misuse.c"), "-o", str(folder / "misuse"))
    assert done.returncode == 0, done.stderr
    return lambda case: run(str(folder / "misuse"), str(list(MISUSE).index(case)), LD_PRELOAD=tiles)


@pytest.mark.parametrize("case", MISUSE)
def test_the_emulation_ends_where_a_tile_instruction_would_fault(case, misuse):
    done = misuse(case)
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
        assert b"amx_kernels" not in Path(output).read_bytes()
