"""What a user types into `chat`: in an editor with a history, or line by line, as from a pipe."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from select import select

from ..errors import Cancelled, check_cancelled, require
from ..machine.limits import human

CONTINUED = "\\"  # at the end of a line: the message has another one
LARGEST_LINE = 10_000_000  # bytes
OFTEN = 0.1  # seconds between two looks at whether to end


def available() -> bool:
    """Whether the package that edits lines is installed."""
    return find_spec("prompt_toolkit") is not None


class Lines:
    """Messages as lines of stdin; a prompt only for somebody at a terminal."""

    can_prefill = False

    def __init__(self):
        self._data, self._ended = b"", False
        self._prompt = "> " if sys.stdin.isatty() else ""

    def ask(self, prefilled: str = "") -> str:
        """The next message. Raises EOFError behind the last one, and KeyboardInterrupt for Ctrl-C."""
        try:
            return self._message()
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if self._prompt else "", file=sys.stderr)
            raise

    def _message(self) -> str:
        lines = [self._line(self._prompt)]
        while lines[-1].endswith(CONTINUED):
            lines[-1] = lines[-1].removesuffix(CONTINUED)
            with suppress(EOFError):
                lines.append(self._line(self._prompt and "  "))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        print(prompt, end="", file=sys.stderr, flush=True)
        while b"\n" not in self._data and not self._ended:
            while not select([sys.stdin.fileno()], [], [], OFTEN)[0]:
                check_cancelled()
            more = os.read(sys.stdin.fileno(), 1 << 16)
            self._data, self._ended = self._data + more, not more
            require(len(self._data) <= LARGEST_LINE, f"stdin: a line of more than {human(LARGEST_LINE)}")
        if not self._data:
            raise EOFError
        line, _, self._data = self._data.partition(b"\n")
        return line.decode("utf-8", "surrogateescape").removesuffix("\r")


class Editor:
    """Messages from prompt_toolkit's editor: Enter ends one; Alt-Enter, or a backslash before, a line."""

    can_prefill = True

    def __init__(self, completions: Callable[[str], Iterable[str]], history: Path | None):
        """Args:
        completions: text -> by what the word that it ends in can be replaced.
        history: the file with what was typed before; None for none.
        """
        from prompt_toolkit import PromptSession
        from prompt_toolkit.application import get_app
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.filters import Condition

        class Words(Completer):
            def get_completions(self, document, event):
                begun = document.text_before_cursor
                word = begun.rpartition(" ")[2]
                return (Completion(found, -len(word)) for found in completions(begun))

        is_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        self._session = PromptSession(
            [("bold", "> ")],
            prompt_continuation="  ",
            multiline=True,
            key_bindings=_keys(),
            completer=Words(),
            complete_while_typing=is_command,
            history=_history(history),
            enable_suspend=True,
        )

    def ask(self, prefilled: str = "") -> str:
        """The next message. Raises EOFError for Ctrl-D, and KeyboardInterrupt for Ctrl-C."""
        # To the editor Ctrl-C is a key. As a signal it would come while the editor begins or ends.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self._session.prompt(default=prefilled, pre_run=_look, handle_sigint=False)
        finally:
            signal.signal(signal.SIGINT, before)


def _keys():
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(CONTINUED) and not buffer.document.text_after_cursor:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(path: Path | None):
    """That of a file which only its owner reads; where there can be none, one for this conversation."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk is no reason to end a conversation
                super().store_string(string)

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        return History(path)
    except OSError:
        return InMemoryHistory()


def _look() -> None:
    """End the editor where the command is told to end: prompt_toolkit sees keys, but no flag."""
    import asyncio

    from prompt_toolkit.application import get_app

    async def look() -> None:
        while True:
            try:
                check_cancelled()
            except Cancelled as told:
                return get_app().exit(exception=told)
            await asyncio.sleep(OFTEN)

    get_app().create_background_task(look())
