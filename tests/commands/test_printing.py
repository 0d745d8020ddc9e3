"""Text that streams to a terminal: no word is cut, and nothing steers the terminal."""

import pytest

from tinyllama.commands.printing import Wrapped

TEXT = "The quick brown fox\njumps over    the lazy dog.\n\n    an indented line that is long\n- a list\n"


@pytest.fixture
def columns(monkeypatch):
    return lambda number: monkeypatch.setenv("COLUMNS", str(number))


@pytest.mark.parametrize("width", [7, 12, 20, 40, 80])
@pytest.mark.parametrize("n", [1, 3, 1000])
def test_words_that_do_not_fit_begin_the_next_line_however_text_comes(columns, width, n):
    columns(width)
    wrapped = Wrapped()
    shown = "".join(wrapped.feed(TEXT[at : at + n]) for at in range(0, len(TEXT), n)) + wrapped.flush()
    assert all(len(line) <= width for line in shown.split("\n") if " " in line.strip())
    assert shown.split() == [part for word in TEXT.split() for part in chunks(word, width)]
    if width == 80:
        assert shown == TEXT


def chunks(word: str, width: int) -> list[str]:
    return [word[at : at + width] for at in range(0, len(word), width)]


def test_a_word_is_held_back_until_it_has_ended(columns):
    columns(12)
    wrapped = Wrapped()
    assert wrapped.feed("one two") == "one"
    assert wrapped.feed("fold three") == " twofold"
    assert wrapped.flush() == "\nthree" and wrapped.flush() == ""


def test_a_line_may_end_between_wide_characters(columns):
    columns(8)
    wrapped = Wrapped()
    assert wrapped.feed("字" * 6) + wrapped.flush() == "字字字字\n字字"


def test_tabs_become_spaces_and_what_steers_a_terminal_a_picture(columns):
    columns(80)
    wrapped = Wrapped()
    assert wrapped.feed("a\tb\x1b[2J\rc\n") == "a       b␛[2J␍c\n"
