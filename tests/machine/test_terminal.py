import io
import sys

import pytest

from tinyllama.machine import terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_status_replaces_the_one_before_fits_on_one_line_and_goes_at_the_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setenv("COLUMNS", "20")
    with terminal.status_line() as show:
        show("first")
        show("second, and much longer than a line")
    assert screen.getvalue().split("\r\x1b[K") == ["", "first", "second, and much lo", ""]


def test_a_status_goes_even_where_something_fails(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    with pytest.raises(ValueError, match="it"), terminal.status_line() as show:
        show("first")
        raise ValueError("it")
    assert screen.getvalue().endswith("first\r\x1b[K")


@pytest.mark.parametrize("stderr", [io.StringIO(), None])
def test_where_nobody_looks_no_status_is_written(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    with terminal.status_line() as show:
        show("first")
    assert stderr is None or stderr.getvalue() == ""
