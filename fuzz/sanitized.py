"""The C extension as clang builds it: branches count as coverage, and every bad access ends the process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitized"
EXTENSION = "tinyllama/_native.abi3.so"
CLANG = os.environ.get("CLANG", "clang")
COUNTED = "-O0 -fprofile-instr-generate -fcoverage-mapping"
#: AMX is emulated where the CPU lacks it (tests/ext/tiles.c).
TILES = "-DTINYLLAMA_EMULATE_TILES"
CHECKED = "-g -O1 -fsanitize=fuzzer-no-link,address,undefined,float-cast-overflow -fno-sanitize-recover=all"


def load() -> None:
    """Make what `environment` names the tinyllama._native of this process, before another is imported."""
    if path := os.environ.get("FUZZED_EXTENSION"):
        spec = importlib.util.spec_from_file_location("tinyllama._native", path)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])


def environment() -> dict[str, str]:
    """Variables for a process that fuzzes a sanitized extension, which is built first if need be.

    Without clang or Linux it is the installed one: then only what Python sees is checked.
    """
    atheris = importlib.util.find_spec("atheris")
    library = Path(atheris.origin).parents[1] / "asan_with_fuzzer.so" if atheris else BUILD / "none"
    if sys.platform != "linux" or not library.exists() or not _has_clang():
        print("no Linux, clang or atheris: the C extension is fuzzed without sanitizers")
        return {}
    preload = [str(library)]
    flags = CHECKED
    if tiles := _emulated_tiles():
        flags, preload = f"{CHECKED} {TILES}", [*preload, str(tiles)]
    return {
        "FUZZED_EXTENSION": str(_build("checked", flags)),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OPENBLAS_NUM_THREADS": "1",  # NumPy's library for products
    }


def coverage(paths: list[Path]) -> dict[str, str]:
    """How much of ext/ these inputs reach; build/sanitized/coverage.txt says it of each file."""
    tiles = _emulated_tiles()
    extension = _build("counted", f"{COUNTED} {TILES}" if tiles else COUNTED)
    raw, data = BUILD / "raw", BUILD / "data"
    variables = {"FUZZED_EXTENSION": str(extension), "LLVM_PROFILE_FILE": str(raw)}
    environment = os.environ | variables | ({"LD_PRELOAD": str(tiles)} if tiles else {})
    names = "\n".join(map(str, paths))
    again = [sys.executable, "-c", "from fuzz.sanitized import try_all; try_all()"]
    subprocess.run(again, cwd=ROOT, env=environment, input=names, text=True)
    subprocess.run([_tool("llvm-profdata"), "merge", raw, "-o", data], check=True)
    report = [_tool("llvm-cov"), "report", extension, f"-instr-profile={data}", "-show-branch-summary"]
    (BUILD / "coverage.txt").write_text(_output(*report, "-show-region-summary=false", "ext"))
    totals = json.loads(
        _output(_tool("llvm-cov"), "export", "-summary-only", extension, f"-instr-profile={data}", "ext")
    )
    totals = totals["data"][0]["totals"]
    return {name: f"{int(totals[name]['percent'])}%" for name in ("lines", "branches")}


def _build(name: str, flags: str) -> Path:
    """The extension with these flags, new if the sources are newer."""
    built = BUILD / name / EXTENSION
    sources = [*(ROOT / "ext").glob("*.[ch]"), Path(__file__)]
    if not built.exists() or built.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        print(f"Building {built.relative_to(ROOT)} (a minute or two) ...", flush=True)
        variables = {"CC": CLANG, "LDSHARED": f"{CLANG} -shared", "CFLAGS": flags, "LDFLAGS": flags}
        setup = [sys.executable, "setup.py", "-q", "build_ext", "--parallel=2"]
        folders = [f"--build-temp={BUILD / name / 'objects'}", f"--build-lib={BUILD / name}", "--force"]
        subprocess.run([*setup, *folders], cwd=ROOT, env=os.environ | variables, check=True)
    return built


def _emulated_tiles() -> Path | None:
    """tests/ext/tiles.c as a library, where this CPU has all of AMX but the tiles."""
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    if "avx512_bf16" not in flags or "amx_bf16" in flags:
        return None
    library = BUILD / "tiles.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    source = ROOT / "tests" / "ext" / "tiles.c"
    subprocess.run(
        [CLANG, "-O3", "-march=native", "-shared", "-fPIC", source, "-lm", "-o", library], check=True
    )
    return library


def _has_clang() -> bool:
    try:
        return subprocess.run([CLANG, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def _tool(name: str) -> str:
    return _output(CLANG, f"-print-prog-name={name}").strip()


def _output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def try_all() -> None:
    """Try the inputs that standard input names; each has been tried before."""
    from .contract import Broken
    from .targets import native

    for path in sys.stdin.read().splitlines():
        try:
            native.check(Path(path).read_bytes())
        except Broken as broken:
            print(f"{path}: {broken}", file=sys.stderr)
