"""Builds the C backend, tinyllama._native, from ext/. Everything else stands in pyproject.toml."""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

#: Python's stable interface as of 3.11, the first with the buffer protocol: one build serves all later ones.
STABLE_ABI = "0x030b0000"

#: With the sanitizers' checks in it, -O3 takes minutes a file.
OPTIMIZE = os.environ.get("OPTIMIZE", "-O3")

#: Apple's library of matrix products, for ext/accelerate.c. The platform is the one that is compiled for.
ACCELERATE = ["-framework", "Accelerate"] if sysconfig.get_platform().startswith("macosx") else []

native = Extension(
    "tinyllama._native",
    sources=sorted(str(path) for path in Path("ext").glob("*.c")),
    depends=sorted(str(path) for path in Path("ext").glob("*.h")),
    define_macros=[("Py_LIMITED_API", STABLE_ABI)],
    # A product and a sum stay two roundings unless the code says otherwise: the same bits from any compiler.
    extra_compile_args=[] if sys.platform == "win32" else [OPTIMIZE, "-std=gnu11", "-ffp-contract=off"],
    extra_link_args=[] if sys.platform == "win32" else ["-lm", "-pthread", *ACCELERATE],
    py_limited_api=True,
    optional=True,  # without a compiler tinyllama installs all the same and runs on NumPy
)


class BuildExt(build_ext):
    """Compiles the files of an extension at the same time, on all cores."""

    def build_extensions(self):
        compile = self.compiler.compile

        def together(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile([source], **options), sources)
                return [file for files in made for file in files]

        self.compiler.compile = together
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[native],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
