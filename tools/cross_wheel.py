"""Builds the wheel of another kind of computer, with zig as its C compiler: cross_wheel.py macos dist

zig (PyPI's ziglang) brings clang, a linker and the C libraries of both systems. What it lacks is Apple's
Accelerate: macos/Accelerate.framework says where that library will be and which of its functions there are.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Target(NamedTuple):
    """What zig, Python and the linker call a kind of computer."""

    triple: str  # as zig names it, with the oldest system that the wheel runs on
    platform: str  # as Python names it
    link: str  # options for a shared library; on macOS it finds Python's functions when it is loaded


TARGETS = {
    "macos": Target(
        "aarch64-macos.11.0",
        "macosx-11.0-arm64",
        "-undefined dynamic_lookup -Wl,-install_name,@rpath/_native.abi3.so"
        f" -F {shlex.quote(str(Path(__file__).parent / 'macos'))}",
    ),
    "linux-arm64": Target("aarch64-linux-gnu.2.28", "linux-aarch64", ""),
}


def build(target: Target, folder: Path, compiler: str | None = None) -> Path:
    """The path of the wheel, in `folder`; SystemExit where the C extension does not compile."""
    compiler = compiler or f"{shlex.quote(sys.executable)} -m ziglang cc -target {target.triple}"
    environment = os.environ | {
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared {target.link}",
        "_PYTHON_HOST_PLATFORM": target.platform,
    }
    for left in ROOT.glob(f"build/lib.{target.platform}-*"):
        shutil.rmtree(left)  # modules that are gone by now would come along
    wheels = f"tinyllama_lab-*-{re.sub('[-.]', '_', target.platform)}.whl"
    for left in folder.glob(wheels):
        left.unlink()
    setup = [sys.executable, "-W", "ignore", "setup.py", "-q", "bdist_wheel", "--dist-dir", folder.resolve()]
    subprocess.run(setup, cwd=ROOT, env=environment, check=True)
    (wheel,) = folder.glob(wheels)
    if "tinyllama/_native.abi3.so" not in zipfile.ZipFile(wheel).namelist():
        wheel.unlink()
        raise SystemExit(f"{wheel.name}: the C extension did not compile")
    return wheel


if __name__ == "__main__":
    name, folder, *compiler = sys.argv[1:]
    print(build(TARGETS[name], Path(folder), *compiler))
