"""Finds the package `fuzz`; gives the C backend its level back, which the target `native` changes."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last, so that it hides nothing


@pytest.fixture(autouse=True)
def same_level():
    try:
        from tinyllama import _native
    except ImportError:
        yield
        return
    before = _native.level()
    yield
    _native.use_level(before)
