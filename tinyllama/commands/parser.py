"""Command lines as people type them: underscores for dashes, values that begin with one, misspelled words."""

import argparse
import re
from collections.abc import Iterator, Sequence

DASHES = "\0--"  # stands for the value "--", which Python's argparse drops before 3.13
LONG = re.compile(r"(?<=\A--)\w[\w-]*(?==|\Z)")  # the name of a long option, before its value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; its sub-parsers are of this class too."""

    def error(self, message: str):
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            from ..texts.keywords import nearest  # here: few are wrong

            near = nearest(wrong[1], re.findall(r"[^', ]+", wrong[2]))
            message += f": did you mean {near}?" if near else ""
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` lists the arguments)\n")


def meant(args: argparse.Namespace, word: str) -> str:
    """What somebody may have meant by a word that makes no sense."""
    if args.command in ("generate", "chat") and not word.startswith("-"):
        return ": the prompt comes behind -p"
    from ..texts.keywords import nearest  # here: few are wrong

    known = args.parser._option_string_actions if args.command else ["--version"]
    near = nearest(word.partition("=")[0], known)
    return f": did you mean {near}?" if near else ""


def joined(argv: Sequence[str], options: Sequence[argparse.Action]) -> Iterator[str]:
    """The words; of long options with underscores for dashes; a value that begins with a dash behind a "=".

    The word behind an option that takes a value is that value: argparse takes `--stop ---` for two options.
    """
    spelled = [option.option_strings for option in options if option.nargs is None and option.option_strings]
    valued = {flag: long for *short, long in spelled for flag in (*short, long)}
    words, is_option = iter(argv), True
    for word in words:
        is_option = is_option and word != "--"
        name = LONG.sub(lambda found: found[0].replace("-", "_"), word) if is_option else word
        value = next(words, None) if name in valued and is_option else None
        is_dashed = value is not None and value.startswith("-")
        yield f"{valued[name]}={DASHES if value == '--' else value}" if is_dashed else name
        yield from [] if is_dashed or value is None else [value]


def undashed(value):
    """A value, or a list of some, with "--" for DASHES."""
    return [*map(undashed, value)] if isinstance(value, list) else "--" if value == DASHES else value
