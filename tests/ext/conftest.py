"""Runs every test of this folder that asks for `level` on each level that this CPU has."""

import pytest

try:
    from tinyllama import _native
except ImportError:
    _native = None  # each module here is skipped as a whole


def pytest_generate_tests(metafunc):
    if "level" in metafunc.fixturenames:
        metafunc.parametrize("level", _native.levels() if _native else ["none"], indirect=True)


@pytest.fixture
def level(request):
    before = _native.level()
    _native.use_level(request.param)
    yield request.param
    _native.use_level(before)
