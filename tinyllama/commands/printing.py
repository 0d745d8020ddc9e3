"""How commands print: results to stdout, everything else to stderr."""

import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator

from ..errors import printable

#: Unicode's pictures of the first 32 characters and of Delete; of U+0080 to U+009F there are none.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def harmless(text: str) -> str:
    """Text with pictures of control characters other than tab and newline.

    A terminal obeys what follows an Escape, and a vocabulary is a stranger's.
    """
    return text.translate(PICTURES)


def unescape(text: str) -> str:
    r"""Replace \n, \r, \t, \', \", \\ and \xHH, a byte, as llama.cpp's -e does; others stay as they are."""
    data = text.encode("utf-8", "surrogateescape")
    for_byte = lambda found: found[0].decode("unicode_escape").encode("latin-1")  # noqa: E731
    data = re.sub(rb"\\(x[0-9a-fA-F]{2}|[nrt'\"\\])", for_byte, data)
    return data.decode("utf-8", "surrogateescape")


def escape(text: str) -> str:
    r"""Text as one line: a newline becomes \n, a return \r, and a backslash two; `unescape` gives it back."""
    return text.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")


def counted(number: int, what: str) -> str:
    """1, "thread" -> "1 thread"; 2 -> "2 threads"."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def columns(rows: Iterable[Iterable], align: str, indent: str = "  ") -> Iterator[str]:
    """Rows as lines of aligned columns; `align` has a "<" or ">" for each column."""
    table = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)]
        yield (indent + "  ".join(cells)).rstrip()


class Wrapped:
    """Text for a terminal, as it comes: a word that doesn't fit into a line begins the next one."""

    def __init__(self):
        self._column, self._space, self._word = 0, "", ""

    def feed(self, text: str) -> str:
        """What can be shown by now: the word that text ends in is held back, since it may go on."""
        shown, width = [], shutil.get_terminal_size().columns
        for char in harmless(text):
            if char in " \t\n":
                shown.append(self.flush(width))
            if char == "\n":
                shown.append(char)
                self._column, self._space = 0, ""
            elif char in " \t":
                column = self._column + len(self._space)
                self._space += " " * (8 - column % 8 if char == "\t" else 1)
            else:
                self._word += char
                if _width(char) > 1 or _width(self._word) >= width:  # before and behind a 字 a line may end
                    shown.append(self.flush(width))
        return "".join(shown)

    def flush(self, width: int | None = None) -> str:
        """The word that was held back, and what is before it."""
        width = width or shutil.get_terminal_size().columns
        space, word, self._word = self._space, self._word, ""
        if not word:
            return ""
        self._space, needed = "", len(space) + _width(word)
        if self._column and self._column + needed > width:
            space, self._column, needed = "\n", 0, _width(word)
        self._column += needed
        return space + word


def _width(text: str) -> int:
    """Columns that text takes."""
    return sum(
        (not unicodedata.combining(char)) + (unicodedata.east_asian_width(char) in "WF") for char in text
    )
