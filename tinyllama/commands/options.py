"""Options that are made of tables: of the settings of a text, of the mixes of a file.

Each table is imported by who asks for its options: most commands do without.
"""

import argparse
from collections.abc import Iterator

from ..errors import TinyllamaError


def add_settings(command: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """An option for each field of Settings."""
    from dataclasses import fields  # here: as slow to import as all the rest

    from ..settings import Settings

    is_chat = command.prog.endswith(" chat")
    for setting in fields(Settings):
        if is_chat and setting.name in ("chat", "taps"):
            continue
        flags = [flag for flag in (setting.metadata["flag"], f"--{setting.name}") if flag]
        text = setting.metadata["help"].replace("%", "%%")
        if setting.type == tuple[str, ...]:
            yield command.add_argument(*flags, metavar="TEXT", action="append", default=[], help=text)
        elif setting.type is bool and setting.metadata["flag"] is not None:
            yield command.add_argument(*flags, action="store_true", help=text)
        elif setting.type is not bool:
            text_of = "NAME|JINJA" if setting.name == "chat_template" else "MODEL"
            kinds = {float: (float, "X"), str | None: (str, text_of)}
            kind, metavar = kinds.get(setting.type, (int, "N"))
            text += "" if setting.default is None else "; default: %(default)s"
            yield command.add_argument(*flags, type=kind, metavar=metavar, default=setting.default, help=text)

    template = "as --chat_template, from a file"
    yield command.add_argument("--chat_template_file", metavar="FILE", help=template)


def add_mixes(command: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """What a file can be quantized to."""
    from .mixes import MIXES, TYPES, find_mix

    def mix(text: str) -> str:
        try:
            find_mix(text)
        except TinyllamaError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text.lower()

    names = f"{', '.join(MIXES)}, or llama.cpp's number of one; of a ggml file Q4_0 (2) or Q4_1 (3)"
    yield command.add_argument("type", type=mix, metavar="TYPE", help=names)
    for tensor in ("output_tensor", "token_embedding"):
        options = {"type": str.lower, "choices": TYPES, "metavar": "TYPE"}
        text = f"of the {tensor.replace('_', ' ')}, whatever the mix says: {', '.join(TYPES)}"
        yield command.add_argument(f"--{tensor}_type", help=text, **options)


def settings_of(args: argparse.Namespace) -> dict:
    """The fields of Settings among the arguments. Ends, with a line on stderr, where they make no sense."""
    from ..settings import Settings
    from .inputs import read_template

    settings = {name: value for name, value in vars(args).items() if name in Settings.__annotations__}
    if args.chat_template is not None and args.chat_template_file is not None:
        args.parser.error("argument --chat_template_file: not allowed with argument --chat_template")
    try:
        if args.chat_template_file is not None:
            settings["chat_template"] = read_template(args.chat_template_file)
        Settings(**settings)
    except TinyllamaError as error:
        args.parser.error(str(error))
    return settings
