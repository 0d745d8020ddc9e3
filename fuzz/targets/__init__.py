"""What is fuzzed, one module each. A target has

    READS      the modules of the package whose coverage counts
    check      bytes -> bool: whether they were accepted; raises where the contract doesn't hold
    inputs     a hypothesis strategy of nearly valid bytes
    seeds      () -> name -> bytes: a few small inputs that are valid, or once weren't treated well

and may have

    WORDS      bytes that the format is made of, to be thrown in
    environment  () -> variables that its process needs, such as LD_PRELOAD for a sanitizer
    coverage   paths of inputs -> the shares of lines and branches that they reach, where READS can't say
"""

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Every target."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """A target's module."""
    if name not in names():
        raise SystemExit(f"no target {name}: there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
