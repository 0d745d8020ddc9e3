"""The command line: convert, quantize, generate, perplexity, inspect, download, bench,
compare.

What a command produces goes to stdout, everything else to stderr, so that a pipe gets text alone. Exit
status: 0; 1 for a file or machine that won't do; 2 for bad arguments; 130 after Ctrl-C; 141 where the reader
of a pipe has gone; 143 where it was told to end, 129 where its terminal was closed.

Here are the arguments; `commands` holds what each command does. It is imported when one runs, so that
`tinyllama --help` doesn't wait for NumPy.
"""

import argparse
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from .. import __version__
from ..errors import TinyllamaError, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status. Raises SystemExit for --help and bad arguments."""
    if hasattr(sys.stdout, "reconfigure"):
        # Better a "?" than no text where a terminal lacks a character.
        sys.stdout.reconfigure(errors="replace")
    parser = make_parser()
    args = parser.parse_args(_with_underscores(sys.argv[1:] if argv is None else argv))
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    with _ended_tidily(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's of NaN: we say it in one line
        warnings.showwarning = lambda message, *_: _say(printable(f"warning: {message}"))
        return _run(args)


@contextmanager
def _ended_tidily() -> Iterator[None]:
    """Leave by an exception at Ctrl-C, `kill` and where the terminal is closed: half-written files go too.

    A second such signal doesn't disturb that. Where one is ignored, as under nohup, it stays so.
    """
    before = {}

    def leave(number, _):
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    if threading.current_thread() is threading.main_thread():
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
        for number, handler in before.items():
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace) -> int:
    """Run the chosen command; every failure that isn't a bug becomes one line on stderr."""
    try:
        from .run import COMMANDS

        status = COMMANDS[args.command](args) or 0
        print(end="", flush=True)  # here, where a full disk or a closed pipe can still be told
    except KeyboardInterrupt as interrupt:
        status = 128 + (interrupt.args or (signal.SIGINT,))[0]
        if args.command in ("convert", "quantize", "download"):
            _say("tinyllama: interrupted; no file was left half-written")
    except BrokenPipeError:
        status = 141
    except (TinyllamaError, OSError, MemoryError) as error:
        if os.environ.get("TINYLLAMA_DEBUG"):
            raise
        status = _fail(error)
    _drop_unwritten()
    return status


def _drop_unwritten() -> None:
    """Where stdout takes no more, don't let Python try again, and complain, when it exits."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = f"there is not enough memory: {text or 'the system gave none'}"
    _say(printable(f"tinyllama: {' '.join(text.split())}"))
    return 1


def _say(line: str = "") -> None:
    with suppress(OSError):  # the terminal may have been closed
        print(line, file=sys.stderr, flush=True)


# --- arguments ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; its sub-parsers are of this class too."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` lists the arguments)\n")


def _with_underscores(argv: Sequence[str]) -> list[str]:
    """Spell "--top-k" as "--top_k", as all options are below; what follows "--" isn't an option."""
    end = list(argv).index("--") if "--" in argv else len(argv)

    def spell(arg: str) -> str:
        option = re.match(r"--\w[\w-]*(?==|$)", arg)
        return "--" + option[0][2:].replace("-", "_") + arg[option.end() :] if option else arg

    return [*map(spell, argv[:end]), *argv[end:]]


def make_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = _Parser(
        prog="tinyllama",
        description="LLaMA on your own laptop: from a checkpoint to a 4-bit file to text.",
        epilog="Dashes and underscores in long options are the same: --top-k is --top_k.",
    )
    parser.add_argument("--version", action="version", version=f"tinyllama {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (summary, add_arguments) in ARGUMENTS.items():
        names = {"name": name, "aliases": ["main"] if name == "generate" else []}
        command = commands.add_parser(
            **names, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        command.set_defaults(command=name, parser=command)
        add_arguments(command)
    return parser


def _convert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("folder", metavar="FOLDER", help="holds consolidated.NN.pth and params.json")
    add("ftype", nargs="?", type=int, choices=(0, 1), default=1, help="0 writes f32, 1 f16 (default)")
    add("--format", choices=("ggml", "gguf"), default="ggml", help="of March 2023 (default), or today's")
    add("--outfile", metavar="FILE", help="default: FOLDER/ggml-model-f16.bin, or .gguf")


def _quantize(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="IN", help="a ggml file, the first part of several, or a GGUF file")
    add("target", metavar="OUT", help="where to write")
    types = "2 or q4_0, 3 or q4_1; of GGUF files also q5_0, q5_1, q8_0"
    add("type", metavar="TYPE", type=_block_type, help=types)


def _block_type(text: str) -> str:
    """2 and 3 are llama.cpp's numbers of file types, which the 2023 quantizer took."""
    name = {"2": "q4_0", "3": "q4_1"}.get(text, text.lower())
    if name not in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of 2, 3, q4_0, q4_1, q5_0, q5_1, q8_0")
    return name


def _generate(command: argparse.ArgumentParser) -> None:
    _model(command)
    prompt = command.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="what to continue; default: a random one")
    prompt.add_argument("-f", "--file", help="a file with the prompt; - is stdin")
    add, count, number = command.add_argument, _count(command), _number(command)
    add("-e", "--escape", action="store_true", help=r"\n in the prompt and in --stop is a newline, and so on")
    count("-n", "--n_predict", default=128, help="tokens to write (%(default)s); -1: no limit")
    count("-s", "--seed", default=-1, help="of the random numbers; -1 (default): a new one")
    number("--temp", default=0.8, help="temperature (%(default)s); 0: always the likeliest token")
    count("--top_k", default=40, help="choose among the N likeliest tokens (%(default)s); 0: among all")
    number("--top_p", default=0.9, help="and the likeliest that make up X (%(default)s); 1: all")
    number("--repeat_penalty", default=1.0, help="makes recent tokens unlikelier (%(default)s: doesn't)")
    count("--repeat_last_n", default=64, help="how many tokens are recent (%(default)s)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated")
    count("-c", "--ctx_size", help="room for prompt and text, in tokens; default: the model's, at most 2048")
    _batch_size(command)


def _perplexity(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("-f", "--file", required=True, help="the text; - is stdin")
    _count(command)("-c", "--ctx_size", default=512, help="tokens in a window (%(default)s)")
    _batch_size(command)
    command.add_argument("--json", action="store_true", help="print all figures as JSON")


def _inspect(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="FILE", nargs="?", default="small", help="a file, folder or name (%(default)s)")
    _count(command)("-c", "--ctx_size", help="the context that memory is reckoned for, in tokens")
    add("--tokens", metavar="TEXT", help="show this text's pieces and ids instead")
    add("--backends", action="store_true", help="show what can compute here instead")
    add("--json", action="store_true", help="print it as JSON, with every single tensor")


def _download(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="smollm2")


def _model(command: argparse.ArgumentParser) -> None:
    model = "a GGUF or ggml file, a folder with Meta's checkpoint, or a name: small (default), smollm2"
    command.add_argument("-m", "--model", default="small", help=model)
    _count(command)("-t", "--threads", help="default: one a core")
    command.add_argument(
        "--backend", metavar="NAME", help="auto, c, numexpr, numpy; default: $TINYLLAMA_BACKEND, or auto"
    )
    mmap = "run from the mapped file: starts at once, in little memory, and takes about twice as long a token"
    command.add_argument("--mmap", action="store_true", help=mmap)


def _batch_size(command: argparse.ArgumentParser) -> None:
    _count(command)("-b", "--batch_size", default=512, help="tokens computed at once (%(default)s)")


def _count(command: argparse.ArgumentParser) -> Callable:
    return partial(command.add_argument, type=int, metavar="N")


def _number(command: argparse.ArgumentParser) -> Callable:
    return partial(command.add_argument, type=float, metavar="X")


def _bench(command: argparse.ArgumentParser) -> None:
    add, count = command.add_argument, _count(command)
    model = command.add_mutually_exclusive_group()
    model.add_argument(
        "model", metavar="FILE", nargs="?", default="small", help="a file, folder or name (%(default)s)"
    )
    model.add_argument(
        "--shape", metavar="SIZE", help="7B, 13B, 30B or 65B with random weights, without a file"
    )
    add("--type", default="q4_0", help="of the random weights (%(default)s)")
    add("--backend", metavar="NAME,...", type=_names, help="default: the fastest that runs here")
    add(
        "--level",
        metavar="NAME,...",
        type=_names,
        help="of the C backend: amx, avx512, avx2, ref; default: the best",
    )
    add("-t", "--threads", metavar="N,...", type=_numbers, help="default: one a core")
    add("--mmap", action="store_true", help="measure the C backend also from the mapped file")
    count("-n", "--n_predict", default=16, help="tokens to write (%(default)s)")
    add(
        "--prefill",
        metavar="N,...",
        type=_numbers,
        default=[32, 128, 512],
        help="lengths of prompts (32,128,512)",
    )
    add("--json", action="store_true", help="print it as JSON")
    add("--plot", metavar="FILE.png", help="draw speeds below their limits (needs matplotlib)")


def _compare(command: argparse.ArgumentParser) -> None:
    add, count = command.add_argument, _count(command)
    add("-m", "--model", default="small", help="a file, folder or name (%(default)s)")
    add(
        "-p",
        "--prompt",
        metavar="TEXT",
        default="Once upon a time",
        help="what to run through both (%(default)s)",
    )
    add("--backends", metavar="ONE,OTHER", type=_names, default=["numpy", "c"], help="default: numpy,c")
    count("-t", "--threads", help="default: one a core")
    add("--json", action="store_true", help="print it as JSON, with every step of every layer")
    add("--plot", metavar="FILE.png", help="draw the error of each step over the layers (needs matplotlib)")


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers")
    return numbers


ARGUMENTS = {
    "convert": ("turn Meta's checkpoint into a ggml or GGUF file", _convert),
    "quantize": ("turn an f16 file into a 4-bit one", _quantize),
    "generate": ("continue a prompt", _generate),
    "perplexity": ("measure how well a model predicts a text", _perplexity),
    "inspect": ("show what is in a model file and what running it needs", _inspect),
    "download": ("fetch a model by name", _download),
    "bench": ("measure how fast this computer runs a model, real or of a size alone", _bench),
    "compare": ("run a prompt through two backends, step by step", _compare),
}
