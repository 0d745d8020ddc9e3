import io
import os
import sys
import termios
import threading

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


def test_who_waits_long_sees_what_is_done_and_nothing_of_it_stays(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setattr(terminal, "PATIENCE", 0)
    shown = threading.Event()
    with terminal.spinner(lambda: (shown.set(), "reading")[1]):
        assert shown.wait(30)
    assert "\r\x1b[K| reading" in screen.getvalue() and screen.getvalue().endswith("\r\x1b[K")


def test_who_does_not_wait_long_sees_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setattr(terminal, "PATIENCE", 60)
    with pytest.raises(ValueError, match="it"), terminal.spinner(lambda: "reading"):
        raise ValueError("it")
    assert "reading" not in screen.getvalue()


def test_what_is_typed_meanwhile_is_not_shown(monkeypatch):
    leader, follower = os.openpty()
    echoes = lambda: bool(termios.tcgetattr(follower)[3] & termios.ECHO)  # noqa: E731
    with open(follower) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = echoes()
        with terminal.unechoed():
            assert not echoes()
        assert echoes() == before is True
    os.close(leader)
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with terminal.unechoed():
            pass
