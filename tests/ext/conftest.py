"""Runs every test of this folder that asks for `level` on each level of this CPU, or on TINYLLAMA_CPU's."""

import os

import pytest

try:
    from tinyllama import _native
except ImportError:
    _native = None  # each module here is skipped as a whole


def levels() -> list[str]:
    if not _native:
        return ["none"]
    return [_native.level()] if "TINYLLAMA_CPU" in os.environ else _native.levels()


def pytest_generate_tests(metafunc):
    if "level" in metafunc.fixturenames:
        metafunc.parametrize("level", levels(), indirect=True)


@pytest.fixture
def level(request):
    before = _native.level()
    _native.use_level(request.param)
    yield request.param
    _native.use_level(before)
