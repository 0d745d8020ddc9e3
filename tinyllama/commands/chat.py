"""`chat`: a conversation with a model in the terminal, or with what comes through a pipe.

Answers go to stdout, everything else to stderr. Somebody at a terminal is told what went wrong and
goes on; in a pipe that ends the command.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path

from ..errors import Cancelled, TinyllamaError, check_cancelled, naming, printable, require
from ..generation import Generation
from ..llama import Llama
from ..machine.files import read_file, written
from ..machine.interrupts import interruptible, ours
from ..machine.places import everything, state_folder
from ..machine.terminal import say, spinner, unechoed
from ..settings import Settings, default_ctx_size
from ..texts.chat import Chat
from ..texts.keywords import nearest
from ..texts.templates import prompt_of
from . import editor
from .printing import Wrapped, counted

LARGEST = 50_000_000  # bytes of a conversation
#: The settings that are kept with a conversation: those that decide what is written.
KEPT = ("n_predict", "seed", "temp", "top_k", "top_p", "repeat_penalty", "repeat_last_n", "stop")
KEPT += ("ctx_size", "chat_template")

#: What can be said to the command instead of the model, each with what comes behind it and what it does.
COMMANDS = {
    "help": ("", "show this"),
    "retry": ("", "answer once more"),
    "edit": ("[TEXT]", "change the last message"),
    "undo": ("", "take the last turn back"),
    "system": ("[TEXT]", "what it is told before"),
    "tokens": ("[all]", "how long all this is"),
    "save": ("FILE", "keep the conversation"),
    "load": ("FILE", "go on with a kept one"),
    "model": ("[NAME]", "go on with another"),
    "quit": ("", "end, as Ctrl-D does"),
}
KEYS = (
    "Alt-Enter, or a backslash before Enter, begins another line. Ctrl-C stops an answer. "
    "A message that begins with / is written with //."
)


class Conversation:
    """What happens between a user and a model, message by message."""

    def __init__(self, args: argparse.Namespace, opened: Callable[[str], Llama]):
        """Args:
        args: of the command.
        opened: loads a model by its name.
        """
        self._opened, self._single, self._verbose = opened, args.single_turn, args.verbose
        self._typed, self._shown = sys.stdin.isatty(), sys.stdout.isatty()
        self._prefilled, self._edits, self._n_retries, self._told = "", False, 0, set()
        self._goes_on = self._typed and not self._single
        with unechoed() if self._typed else nullcontext():
            self.chat = Chat(opened(args.model), system=args.system_prompt or "", **args.settings)
        self._introduce()
        if self._typed and self._shown and editor.available():
            history = None if args.no_history else state_folder() / "history"
            self._input = editor.Editor(completions, history)
        else:
            self._input = editor.Lines()

    def run(self, first: str | None = None) -> None:
        """Talk until the user ends it; what is said first may be given."""
        with ours() if self._typed else nullcontext(), suppress(EOFError):
            self._turn(self._ask() if first is None else _literally(first))
            check_cancelled()
            while not self._single:
                self._turn(self._ask())
                check_cancelled()

    def _introduce(self) -> None:
        """Say who answers, and what one should know about it."""
        llama, name = self.chat.llama, _short(self.chat.llama.name)
        has_template = llama.template(self.chat.settings.get("chat_template"))
        if self._goes_on:
            self._note(f"{name}, {llama.backend.title}. /help lists the commands, Ctrl-D ends.")
        if not has_template:
            self._note(
                f"{name} has no chat template: it goes on with what you write. --chat-template names one."
            )

    def _ask(self) -> str:
        """What the user types, in which Ctrl-C begins anew."""
        while True:
            try:
                prefilled, self._prefilled = self._prefilled, ""
                return self._input.ask(prefilled)
            except KeyboardInterrupt:
                self._edits = False

    def _turn(self, text: str) -> None:
        """A message or a command, and what comes of it; somebody at a terminal goes on after an error."""
        try:
            with interruptible():
                self._do(text)
        except KeyboardInterrupt:
            if not self._goes_on:
                raise
        except (Cancelled, BrokenPipeError):
            raise
        except (TinyllamaError, OSError, MemoryError) as error:
            if not self._goes_on:
                raise
            self._note(f"{error or 'there is not enough memory'}\n", dim=False)

    def _do(self, text: str) -> None:
        is_edit, self._edits = self._edits, False
        if text.startswith("/") and not text.startswith("//"):
            name, *rest = text[1:].split(None, 1) or [""]
            meant = "quit" if name in ("exit", "bye", "q") else nearest(name, COMMANDS)
            hint = f"did you mean /{meant}?" if meant else "/help lists them"
            require(name in COMMANDS, f"there is no command /{name}: {hint} (// says it to the model)")
            getattr(self, f"_{name}")(rest[0].strip() if rest else "")
        elif text.strip():
            text = text.removeprefix("/") if text.startswith("//") else text
            self._replace(text) if is_edit else self._answer(text)

    # --- answers ----------------------------------------------------------------------------------

    def _answer(self, content: str | None, **settings) -> None:
        """Say something, or nothing for another answer, and print what the model answers, as it comes."""
        before = self.chat.answer

        def doing() -> str:
            answer = self.chat.answer
            n_unread = len(answer.unread) if answer and answer is not before else 0
            n_prompt = n_unread and len(answer.prompt_ids)
            return f"reading {n_prompt - n_unread} of {n_prompt} tokens" if n_unread else "thinking"

        with unechoed() if self._typed else nullcontext():
            with spinner(doing):
                answer = self.chat.stream(content, **settings)
                piece = next(answer, "")
            for warning in answer.warnings:
                if warning not in self._told and "chat template" not in warning:  # that was said at once
                    self._note(f"({warning})")
            self._told = {*answer.warnings}
            self._print(chain([piece], answer))
        if self._goes_on and (why := _trouble(answer)):
            self._note(f"({why})")
        if self._verbose:
            self._note(self._figures())
        if self._goes_on:
            say("")

    def _print(self, pieces: Iterator[str]) -> None:
        """To a terminal without what would steer it, word by word; into a file or a pipe to the letter."""
        wrapped = Wrapped()
        try:
            for piece in pieces:
                print(wrapped.feed(piece) if self._shown else piece, end="", flush=True)
        finally:
            print(wrapped.flush(), flush=True)

    def _figures(self) -> str:
        """What the last answer took."""
        answer = self.chat.answer
        took, n_tokens = answer.timings, len(answer.tokens)
        speed = f", {took.n_predict / took.predict:.1f} tokens/s" if took.predict else ""
        read = f"{took.n_prompt - took.n_remembered} of {took.n_prompt} tokens read in {took.prompt:.1f} s"
        return f"({read}, {n_tokens} written{speed})"

    def _note(self, text: str, dim: bool = True) -> None:
        """A line to stderr, dim where somebody looks."""
        is_seen = sys.stderr and sys.stderr.isatty()
        if is_seen:
            wrapped = Wrapped()
            text = wrapped.feed(text) + wrapped.flush()
        is_dim = dim and is_seen and not os.environ.get("NO_COLOR")
        say(f"\x1b[2m{text}\x1b[0m" if is_dim else text)

    # --- commands ---------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        for name, (argument, what) in COMMANDS.items():
            self._note(f"{f'/{name} {argument}':14} {what}")
        self._note(f"\n{KEYS}\n")

    def _retry(self, _: str) -> None:
        """With a seed that is given, the next one's answer, which is the same each time too."""
        seed = self.chat.settings["seed"]
        self._n_retries += 1
        self._answer(None, seed=seed + self._n_retries if seed >= 0 else seed)

    def _edit(self, text: str) -> None:
        asked = [message["content"] for message in self.chat.messages if message["role"] == "user"]
        require(asked, "nothing has been said that could be edited")
        if text:
            return self._replace(text)
        require(self._input.can_prefill, "there is no editor here: say /edit TEXT")
        self._prefilled, self._edits = _literally(asked[-1]), True

    def _replace(self, text: str) -> None:
        """Say something else than the last message; that stays where this isn't answered."""
        said = self.chat.messages
        self.chat.undo()
        try:
            self._answer(text)
        finally:
            if self.chat.answer is None:
                self.chat.messages = said

    def _undo(self, _: str) -> None:
        taken = self.chat.undo()
        require(taken, "nothing has been said that could be taken back")
        self._note(f"(taken back: {_beginning(taken[0]['content'])})\n")

    def _system(self, text: str) -> None:
        if text:
            self.chat.system = text.removeprefix("-") if text == "-" else text
        told = f'"{self.chat.system}"; /system - takes it back' if self.chat.system else "nothing"
        self._note(f"(the model is told before: {told})\n")

    def _tokens(self, which: str) -> None:
        from .inspect import token_rows, token_table

        require(which in ("", "all"), f"/tokens or /tokens all, not /tokens {which}")
        chat, ids = self.chat, self.chat.tokens()
        if which:
            say(token_table(token_rows(chat.llama.tokenizer, ids)))
        n_ctx = chat.settings["ctx_size"] or default_ctx_size(chat.llama.config)
        left_out = f"; the first {chat.n_left_out} messages are left out" * bool(chat.n_left_out)
        self._note(f"({len(ids)} of {n_ctx} tokens, {counted(len(chat.messages), 'message')}{left_out})")
        if chat.answer:
            self._note(self._figures())
        say("")

    def _save(self, name: str) -> None:
        require(name, "say /save FILE")
        path, chat = Path(name).expanduser(), self.chat
        require(chat.messages, "nothing has been said that could be kept")
        if path.exists():  # else a slip of the finger costs a file
            try:
                _read(path)
            except TinyllamaError:
                what = "is there already, and is no conversation; name another file"
                raise TinyllamaError(f"{path}: {what}") from None
        kept = {"model": chat.llama.name, "messages": chat.messages}
        kept["settings"] = {name: chat.settings[name] for name in KEPT}
        text = json.dumps(kept, ensure_ascii=False, indent=2)
        with written(path) as (target,):
            target.write_bytes(f"{text}\n".encode("utf-8", "surrogateescape"))
        self._note(f"({counted(len(chat.messages), 'message')} in {path})\n")

    def _load(self, name: str) -> None:
        require(name, "say /load FILE")
        path, chat = Path(name).expanduser(), self.chat
        model, messages, settings = _read(path)
        chat.messages, chat.settings = messages, chat.settings | settings
        other = f"; they were with {model}" * bool(model and model != chat.llama.name)
        last = f", the last one: {_beginning(messages[-1]['content'])}"
        self._note(f"({counted(len(messages), 'message')}{last}{other})\n")

    def _model(self, name: str) -> None:
        chat = self.chat
        if name:
            llama = self._opened(name)
            llama.template(chat.settings["chat_template"])
            said, chat.llama = chat.messages, llama
            chat.messages = said
            self._introduce()
        else:
            self._note(f"({chat.llama.name}; /model NAME goes on with another one)")
        say("")

    def _quit(self, _: str) -> None:
        raise EOFError


def _trouble(answer: Generation) -> str:
    """What somebody should know about how an answer ended."""
    is_empty, is_stopped = not str(answer.completion()), answer.stop_reason == "cancelled"
    if is_empty:
        why = "stopped before it began" if is_stopped else "the model has nothing to say"
        return f"{why}: the message is left out; /retry asks again, /edit changes it"
    ends = {"cancelled": "stopped", "context": "the context is full", "length": "as long as asked for"}
    return ends.get(answer.stop_reason, "")


def _short(name: str) -> str:
    """A model's name, or its file's."""
    return printable(Path(name).name if os.sep in name else name)


def _literally(text: str) -> str:
    """What is typed to say this, and not a command."""
    return f"/{text}" if text.startswith("/") else text


def _beginning(text: str, most: int = 60) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[:most]} ..."


def _read(path: Path) -> tuple[str, list[dict], dict]:
    """The model, the messages and the settings of a file. Raises TinyllamaError unless all are right."""
    with naming(path, RecursionError):
        found = json.loads(read_file(path, LARGEST).decode("utf-8", "surrogateescape"))
        found = {"messages": found} if isinstance(found, list) else found
        require(isinstance(found, dict) and "messages" in found, "is no conversation: it has no messages")
        model, settings = found.get("model", ""), found.get("settings", {})
        require(isinstance(model, str), f"model must be a text, not {model!r:.40}")
        prompt_of(found["messages"] if isinstance(found["messages"], list) else [], None)
        require(isinstance(settings, dict), f"settings must be an object, not {settings!r:.40}")
        others = [name for name in settings if name not in KEPT]
        require(
            not others, f"there is no setting {others[:1]} of a conversation: there are {', '.join(KEPT)}"
        )
        Settings(**settings)
        messages = [{key: message[key] for key in ("role", "content")} for message in found["messages"]]
        return model, messages, settings


def completions(begun: str) -> list[str]:
    """By what the word that a command ends in can be replaced."""
    command, is_complete, _ = begun.partition(" ")
    word = begun.rpartition(" ")[2]
    if not begun.startswith("/"):
        return []
    found: list[str] = [f"/{name}" for name in COMMANDS]
    if is_complete:
        found = []
        with suppress(OSError, TinyllamaError):
            if command == "/model":
                found = [name for name, _ in everything()]
            elif command in ("/save", "/load"):
                folder = os.path.dirname(word)
                names = sorted(os.listdir(os.path.expanduser(folder) or "."))
                found = [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return [one for one in found if one.startswith(word)]
