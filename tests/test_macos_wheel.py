"""Looks inside the wheel for Apple's computers, which runs nowhere else; `make wheel-macos` runs this."""

import os
import zipfile
from pathlib import Path

import pytest

capstone = pytest.importorskip("capstone", reason="reads Arm code; `make wheel-macos` installs it")
lief = pytest.importorskip("lief", reason="reads Mach-O files; `make wheel-macos` installs it")

ROOT = Path(__file__).parents[1]
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
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tinyllama").rglob("*.py")}
    small = {"params.json", "consolidated.00.pth", "tokenizer.model"}
    model = {f"tinyllama/data/small/{name}" for name in small}
    assert held == code | model | {"tinyllama/_native.abi3.so"}
    (info,) = (name for name in wheel.namelist() if name.endswith("/WHEEL"))
    assert "Tag: cp311-abi3-macosx_11_0_arm64" in wheel.read(info).decode().splitlines()
    (scripts,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "tinyllama = tinyllama.cli:main" in wheel.read(scripts).decode()


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
