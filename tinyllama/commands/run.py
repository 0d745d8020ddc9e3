"""What each command does: it takes the arguments that `cli` parsed and returns an exit status, None for 0.

Modules that `generate` can do without are imported by the commands that need them: the first word of a small
model would wait for them.
"""

import argparse
import json
import random
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path

from ..backends import available, get_backend
from ..errors import TinyllamaError
from ..generation import STOP_REASONS, Generation, Settings
from ..llama import Llama, load
from ..machine.limits import human, peak_memory

LARGEST_TEXT = 50_000_000  # bytes; a novel has one million

#: What a text begins with if nobody says.
PROMPTS = (
    "Once upon a time",
    "The old king had three daughters, and",
    "In the middle of the forest there stood",
    "One winter morning, the little girl",
    "Far out at sea, where the water is",
    "There was once a poor miller who",
    "The wolf looked at the moon and",
)


# --- convert, quantize, download ------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> None:
    from .convert import convert

    _print_files(convert(args.folder, args.ftype, args.outfile, args.format))


def _quantize(args: argparse.Namespace) -> None:
    from .convert import quantize

    _print_files(quantize(args.source, args.target, args.type))


def _print_files(paths: list[Path]) -> None:
    for path in paths:
        print(f"{path}  {human(path.stat().st_size)}")


def _download(args: argparse.Namespace) -> None:
    from ..machine.download import MODELS, download

    if args.name not in MODELS:
        args.parser.error(f"argument NAME: no model {args.name!r}, there is {', '.join(MODELS)}")
    download(args.name)


# --- generate -------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    settings = _settings(args)
    prompt = _prompt(args)
    llama = _load(args)
    with _cancelled_by_interrupt() as cancel:
        run = llama.stream(prompt, cancel=cancel, **settings)
        _announce(run)
        try:
            _print_text(prompt, run)
        finally:
            print(flush=True)
    _print_timings(run)
    return 130 if run.stop_reason == "cancelled" else 0


def _settings(args: argparse.Namespace) -> dict:
    """The arguments that are fields of Settings, checked before anything takes time."""
    settings = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name in args}
    if args.escape:
        settings["stop"] = [unescape(text) for text in args.stop]
    with _argument_errors(args):
        Settings(**settings)
    return settings


def _prompt(args: argparse.Namespace) -> str:
    """What -p, -f and -e ask for, or a random prompt, which the seed chooses too."""
    if args.prompt == "":
        args.parser.error("argument -p/--prompt: the prompt is empty")
    if args.prompt is None and args.file is None:
        return random.Random(args.seed if args.seed >= 0 else None).choice(PROMPTS)
    prompt = _read_text(args.file) if args.prompt is None else args.prompt
    return unescape(prompt) if args.escape else prompt


def unescape(text: str) -> str:
    r"""Replace \n, \r, \t, \', \", \\ and \xHH, a byte, as llama.cpp's -e does; others stay as they are."""
    plain = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}

    def replace(match: re.Match) -> bytes:
        code = match[1].decode()
        return bytes.fromhex(code[1:]) if code[0] == "x" else plain[code].encode()

    data = re.sub(rb"\\(x[0-9a-fA-F]{2}|[nrt'\"\\])", replace, text.encode("utf-8", "surrogateescape"))
    return data.decode("utf-8", "surrogateescape")


@contextmanager
def _cancelled_by_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C is a KeyboardInterrupt."""
    cancel = threading.Event()

    def set_once(*_) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, set_once)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


def _announce(run: Generation) -> None:
    for warning in run.warnings:
        _say(f"warning: {warning}")
    backend = run.llama.backend
    threads = f"{backend.threads} thread{'s' if backend.threads > 1 else ''}"
    _say(f"seed {run.seed}, {len(run.prompt_ids)} prompt tokens, backend {backend.name}, {threads}\n")


def _print_text(prompt: str, run: Generation) -> None:
    """To a terminal without what would steer it; into a file or a pipe to the letter."""
    show = harmless if sys.stdout.isatty() else str
    print(show(prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")), end="", flush=True)
    for piece in run:
        print(show(piece), end="", flush=True)


def harmless(text: str) -> str:
    """Control characters but tab and newline as pictures: a terminal obeys what follows an Escape, and a
    vocabulary is a stranger's."""
    return text.translate(_PICTURES)


#: Unicode's pictures of the first 32 and of Delete; of U+0080 to U+009F there are none.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def _print_timings(run: Generation) -> None:
    took = run.timings
    _say(f"\nload     {took.load:6.2f} s")
    _say(_timing("prompt", took.prompt, took.n_prompt))
    _say(_timing("sample", took.sample, len(run.tokens)))
    _say(_timing("predict", took.predict, took.n_predict))
    _say(f"total    {took.load + took.total:6.2f} s, peak memory {human(peak_memory())}")
    if run.stop_reason != "length":
        _say(f"stopped: {STOP_REASONS[run.stop_reason]}")


def _timing(step: str, seconds: float, n_tokens: int) -> str:
    line = f"{step:8} {seconds:6.2f} s {n_tokens:6} tokens"
    if not seconds or not n_tokens:
        return line
    return f"{line} {1000 * seconds / n_tokens:8.2f} ms/token {n_tokens / seconds:9.1f} tokens/s"


# --- perplexity, inspect --------------------------------------------------------------------------


def _perplexity(args: argparse.Namespace) -> None:
    from ..score import check_sizes, perplexity

    with _argument_errors(args):
        check_sizes(args.ctx_size, args.batch_size)
    text = _read_text(args.file)
    llama = _load(args)
    if args.ctx_size > (trained := llama.config.max_seq_len):
        _say(f"warning: the model was trained on {trained} tokens, ctx_size is {args.ctx_size}")
    score = perplexity(llama, text, args.ctx_size, args.batch_size)
    if args.json:
        print(json.dumps({"model": args.model, "text": args.file} | asdict(score), indent=2))
    else:
        print(score)


def _inspect(args: argparse.Namespace) -> None:
    from . import inspect

    if args.ctx_size is not None and args.ctx_size < 1:
        args.parser.error(f"argument -c/--ctx_size: must be at least 1, not {args.ctx_size}")
    if args.backends:
        found, show = available(), inspect.backend_table
    elif args.tokens is not None:
        found, show = inspect.tokens(args.model, args.tokens), inspect.token_table
    else:
        found, show = inspect.inspect(args.model, args.ctx_size), inspect.report
    print(json.dumps(found, indent=2) if args.json else show(found))


def _bench(args: argparse.Namespace) -> None:
    from . import bench

    if args.n_predict < 1:
        args.parser.error(f"argument -n/--n_predict: must be at least 1, not {args.n_predict}")
    _check_plot(args)
    results = list(
        bench.bench(
            args.model,
            shape=args.shape,
            type=args.type,
            backends=args.backend,
            levels=args.level,
            threads=args.threads,
            mmap=args.mmap,
            n_predict=args.n_predict,
            prefill=tuple(args.prefill),
        )
    )
    print(json.dumps(bench.as_json(results), indent=2) if args.json else bench.table(results))
    if args.plot:
        bench.plot(results, args.plot)


def _compare(args: argparse.Namespace) -> None:
    from . import compare

    _check_plot(args)
    if len(args.backends) != 2:
        args.parser.error(f"argument --backends: name two, not {len(args.backends)}")
    if args.prompt == "":
        args.parser.error("argument -p/--prompt: the prompt is empty")
    found = compare.compare_backends(args.model, args.prompt, tuple(args.backends), args.threads)
    print(json.dumps(compare.as_json(found), indent=2) if args.json else compare.table(found))
    if args.plot:
        compare.plot(found, args.plot)


def _check_plot(args: argparse.Namespace) -> None:
    """Before anything takes time."""
    if args.plot and not find_spec("matplotlib"):
        raise TinyllamaError("--plot needs matplotlib: pip install 'tinyllama[notebooks]'")


# --- what they share ------------------------------------------------------------------------------


@contextmanager
def _argument_errors(args: argparse.Namespace) -> Iterator[None]:
    """Whatever is wrong with settings inside came from the arguments: exit status 2."""
    try:
        yield
    except TinyllamaError as error:
        args.parser.error(str(error))


def _load(args: argparse.Namespace) -> Llama:
    """The model that -m, -t and --backend ask for."""
    with _argument_errors(args):
        get_backend(args.backend, args.threads)
    return load(args.model, args.backend, args.threads, mmap=args.mmap, verbose=True)


def _read_text(path: str) -> str:
    """A file or, for "-", stdin, without the newline that editors put at its end.

    What isn't UTF-8 stays in it as surrogates, as in arguments: the tokenizer makes the same bytes of them.
    Raises TinyllamaError if there is no text.
    """
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        try:
            data = file.read(LARGEST_TEXT + 1)
        except OSError as error:  # which doesn't know the file's name
            raise TinyllamaError(f"{path}: {error.strerror}") from None
    if len(data) > LARGEST_TEXT:
        raise TinyllamaError(f"{path}: more than {human(LARGEST_TEXT)} of text")
    text = data.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
    if not text:
        raise TinyllamaError(f"{'stdin' if path == '-' else path}: there is no text in it")
    return text


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


COMMANDS = {
    "convert": _convert,
    "quantize": _quantize,
    "generate": _generate,
    "perplexity": _perplexity,
    "inspect": _inspect,
    "download": _download,
    "bench": _bench,
    "compare": _compare,
}
