"""Files that a command reads: a text, a chat template."""

import sys
from select import select

from ..errors import check_cancelled, naming, require
from ..machine.limits import human

LARGEST_TEXT = 50_000_000  # bytes; a novel has one million


def read_text(path: str) -> str:
    """A file or, for "-", stdin, without the newline that editors put at its end.

    What isn't UTF-8 stays in it as surrogates, as in arguments: the tokenizer makes the same bytes of them.
    Raises TinyllamaError if there is no text.
    """
    is_stdin, data = path == "-", bytearray()
    with naming("stdin" if is_stdin else path):
        require(sys.stdin or not is_stdin, "is closed")
        with open(sys.stdin.fileno() if is_stdin else path, "rb", buffering=0, closefd=not is_stdin) as file:
            more = True
            while more:
                while not select([file], [], [], 0.1)[0]:  # Ctrl-C is heard while nobody types
                    check_cancelled()
                more = file.read(1 << 20)
                data += more
                require(len(data) <= LARGEST_TEXT, f"more than {human(LARGEST_TEXT)} of text")
        text = data.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
        require(text, "there is no text in it")
    return text


def read_template(path: str) -> str:
    """A chat template from a file. Raises TinyllamaError, naming the file, if it can't be one."""
    from ..texts.sandbox import LONGEST

    with naming(path), open(path, "rb") as file:
        data = file.read(4 * LONGEST + 1)
        text = data.decode()
        require(len(text) <= LONGEST, f"more than {LONGEST:,} characters: it is no chat template")
        require(text.strip(), "there is no chat template in it")
    return text
