"""The one exception type that tinyllama raises for what a user can cause; strangers' text made harmless."""

LONGEST = 1000  # characters of a message; a name in somebody's file may have millions


class TinyllamaError(Exception):
    """One line that names the file or setting and what is wrong with it; a file's words in it do no harm."""

    def __init__(self, message: object = ""):
        text = str(message)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 3 // 4]} … {text[-LONGEST // 5 :]}"
        super().__init__(printable(text))


class Cancelled(TinyllamaError):
    """Somebody set the cancel flag while a prompt or a token was being computed."""


def printable(text: str) -> str:
    r"""Text of a stranger's as one line that does nothing to a terminal: a newline becomes \n, Escape \x1b.

    Backslashes stay as they are, so that doing it twice changes nothing.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
