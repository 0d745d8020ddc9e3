"""The arguments of the command line. `run` holds what each command does.

Nothing here needs NumPy, so that help, and the refusal of a wrong option, come at once.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from .. import __version__
from .options import add_mixes, add_settings, settings_of
from .parser import Parser, joined, meant, undashed

BACKENDS = ("auto", "mlx", "c", "numexpr", "numpy")
NAMED = ("smollm2",)
ON_HUB = "hf:"  # how names of the Hugging Face hub begin
SHORTEST = 8  # tokens of a window of perplexity


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """A command and its arguments; of generate, `settings` are those that are fields of Settings.

    Raises SystemExit, with a line on stderr, where they make no sense.
    """
    parser = Parser(
        prog="tinyllama",
        allow_abbrev=False,
        description="LLaMA on your own laptop: from a checkpoint to a 4-bit file to text.",
        epilog="Dashes and underscores in long options are the same: --top-k is --top_k.",
    )
    parser.add_argument("--version", action="version", version=f"tinyllama {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    wanted, options = next((word for word in argv if not word.startswith("-")), None), []
    for name, (summary, *arguments) in COMMANDS.items():
        about = {"help": summary, "description": f"{summary[0].upper()}{summary[1:]}."}
        aliases = ["main"] if name == "generate" else []
        command = commands.add_parser(name, aliases=aliases, allow_abbrev=False, **about)
        command.set_defaults(command=name, parser=command)
        if wanted in (name, *aliases):
            arguments += [] if name in WITHOUT_MODEL else [OFFLINE]
            more = {"generate": add_settings, "chat": add_settings, "quantize": add_mixes}
            more = more.get(name, lambda _: ())
            options = [*_add(command, arguments), *more(command)]
            command.set_defaults(**CHAT_DEFAULTS if name == "chat" else {})
    args, unknown = parser.parse_known_args(list(joined(argv, options)))
    if unknown:
        message = f"unrecognized arguments: {' '.join(unknown)}{meant(args, unknown[0])}"
        getattr(args, "parser", parser).error(message)
    vars(args).update({name: undashed(value) for name, value in vars(args).items()})
    if args.command is None:
        parser.print_help(sys.stderr)
        sys.exit(2)
    for name, why in _misused(args):
        args.parser.error(f"argument --{name}: {why}")
    if args.command in ("generate", "chat"):
        args.settings = settings_of(args)
    return args


def _misused(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Options that make no sense beside the others, and why."""
    given = vars(args).get
    steered, several = given("control_vector") or given("control_vector_scaled"), given("scheduler")
    if given("control_vector_layer_range") and not steered:
        yield "control_vector_layer_range", "needs --control_vector"
    if given("each_line") and given("file") is None:
        yield "each_line", "needs --file"
    if given("taps") and not given("json"):
        yield "taps", "needs --json"
    if given("prompt_cache"):
        if given("each_line") or given("json"):
            yield "prompt_cache", "is for one prompt, not with --each_line or --json"
        if steered:
            yield "prompt_cache", "holds what a model computes without --control_vector"
        if several:
            yield "prompt_cache", "a cache that lies on several machines can't be kept in a file"
    elif given("prompt_cache_all") or given("prompt_cache_ro") or given("prompt_cache") == "":
        yield "prompt_cache", "name the file"
    if given("split") and not several:
        yield "split", "needs --scheduler"
    for name in ("gpu_layers", "shape", "level", "against", "plot"):
        if "split" in args and several and given(name) is not None:
            yield name, "is for a model on one computer, not with --scheduler"
    for name in ("backend", "threads"):
        if args.command == "bench" and several and len(given(name) or ()) > 1:
            yield name, "is one for all workers of --scheduler"


def _add(command: argparse.ArgumentParser, arguments: Sequence) -> Iterator[argparse.Action]:
    """The arguments of a command; those in a list exclude each other."""
    for some in arguments:
        group = command.add_mutually_exclusive_group() if isinstance(some, list) else command
        for flags, options in some if isinstance(some, list) else [some]:
            yield group.add_argument(*flags, **options)


def _arg(flags: str, help: str, **options) -> tuple[list[str], dict]:
    """What `add_argument` takes."""
    return flags.split(), {"help": help, **options}


def _flag(name: str, help: str) -> tuple[list[str], dict]:
    return _arg(name, help, action="store_true")


def _at_least(least: int) -> dict:
    def number(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text}")
        return int(text)

    return {"type": number, "metavar": "N"}


def _list(metavar: str, kind: Callable = str) -> dict:
    return {"type": lambda text: [kind(part) for part in text.split(",")], "metavar": metavar}


def _scaled(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition(":")
    try:
        return path, float(path and scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FILE:SCALE, not {text}") from None


def _name(text: str) -> str:
    if text not in NAMED and not text.startswith(ON_HUB):
        raise argparse.ArgumentTypeError(f"there is {', '.join(NAMED)} and {ON_HUB}org/name, not {text}")
    return text


def _prompt(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the prompt is empty")
    return text


COUNT, PROMPT = _at_least(1), {"type": _prompt, "metavar": "TEXT"}
NAMES, COUNTS = _list("NAME,..."), _list("N,...", COUNT["type"])
SEVERAL = {"action": "extend", "default": []}
RANGE = {"type": int, "nargs": 2, "metavar": ("START", "END")}
PLAIN = {"type": lambda text: int(text) if text in ("0", "1") else text.lower()}
PLAIN |= {"nargs": "?", "choices": (0, 1, "f32", "f16", "bf16"), "metavar": "TYPE"}
PLACES = "a file, a folder, smollm2, hf:org/name[:Q4_K_M], ollama:name; default: $TINYLLAMA_MODEL, or small"
MODEL = {"default": os.environ.get("TINYLLAMA_MODEL") or "small", "help": PLACES}
TALKING = MODEL | {"default": os.environ.get("TINYLLAMA_MODEL") or "smollm2"}
TALKING["help"] = PLACES.replace("or small", "or smollm2")
BACKEND = {"choices": BACKENDS, "metavar": "NAME"}
COMPUTING = (
    _arg("-t --threads", "default: one a core", **COUNT),
    _arg("--backend", "auto, mlx, c, numexpr, numpy; default: $TINYLLAMA_BACKEND, or auto", **BACKEND),
    _arg("--dtype", "of mlx: float32, float16, bfloat16; default: float16 on a GPU", metavar="TYPE"),
    _arg("--inexact_as", "of mlx, weights it can't say exactly: 8-bit (default), float", metavar="TYPE"),
    _arg(
        "-ngl --gpu_layers", "of mlx: so many layers on the GPU, the rest in C; default: all", **_at_least(0)
    ),
    _flag("--mmap", "run from the mapped file: starts at once in little memory; a token takes twice as long"),
)
RUNNING = (_arg("-m --model", **MODEL), *COMPUTING)
CLUSTER = _arg(
    "--scheduler", "spread the requests over the Dask cluster at tcp://HOST:8786", metavar="ADDRESS"
)
SCHEDULER = _arg(
    "--scheduler", "spread the layers over the Dask cluster at tcp://HOST:8786", metavar="ADDRESS"
)
LAYERS = _list("N,...", _at_least(0)["type"])
IN_ORDER = "so many layers for each of its workers, in the order of their names; default: by memory and speed"
SHARED = (SCHEDULER, _arg("--split", IN_ORDER, **LAYERS))
STEERING = (
    _arg("--control_vector", "add its directions to the residual stream", **SEVERAL, **_list("FILE,...")),
    _arg("--control_vector_scaled", "likewise, times SCALE", **SEVERAL, **_list("FILE:SCALE,...", _scaled)),
    _arg("--control_vector_layer_range", "of these layers alone, both included", **RANGE),
)
WINDOWS = (
    _arg("-c --ctx_size", "tokens in a window (%(default)s)", **_at_least(SHORTEST), default=512),
    _arg("-b --batch_size", "tokens computed at once (%(default)s)", **COUNT, default=512),
)
JSON = _flag("--json", "print it as JSON, with all figures")
OFFLINE = _flag("--offline", "fetch no model from the Hugging Face hub; as HF_HUB_OFFLINE=1")
WITHOUT_MODEL = ("list", "download")
CHAT_DEFAULTS = {"n_predict": -1, "batch_size": 128}  # a long prompt in pieces: one sees how far it is

#: What each command does, and its arguments; those in a list exclude each other. Those that take a model
#: also take OFFLINE.
COMMANDS = {
    "convert": (
        "turn any model into one GGUF file, or one as of March 2023",
        _arg("source", "Hugging Face's or Meta's folder, a GGUF or ggml file", metavar="FOLDER|FILE"),
        _arg(
            "ftype",
            "0 or f32, 1 or f16 (default), bf16; blocks of a GGUF file stay if none is named",
            **PLAIN,
        ),
        _arg("--format", "ggml is of March 2023; default: of Meta's folder ggml", choices=("ggml", "gguf")),
        _arg("--outfile", "default: FOLDER/ggml-model-f16.gguf, or .bin of ggml", metavar="FILE"),
    ),
    "quantize": (
        "turn a model into a file of 2 to 8 bits a weight",
        _arg("source", "a model of 16 or 32 bits: as of convert; of several parts the first", metavar="IN"),
        _arg("target", "where to write", metavar="OUT"),
        _flag("--pure", "the same type for all matrices"),
        _arg("--imatrix", "an importance matrix: which errors count how much", metavar="FILE"),
    ),
    "generate": (
        "continue a prompt",
        *RUNNING,
        [
            _arg("-p --prompt", "what to continue; default: a random one", **PROMPT),
            _arg("-f --file", "a file with the prompt; - is stdin"),
        ],
        _flag("-e --escape", r"\n in the prompt and in --stop is a newline, and so on"),
        _flag("--each_line", r"each line of the file is a prompt; each text becomes a line, with \n in it"),
        _flag("--json", "a line of JSON for each text: prompt, text, ids, stop_reason, seed; taps"),
        _arg(
            "--prompt_cache", "go on from what this file has of the prompt, and save it there", metavar="FILE"
        ),
        [
            _flag("--prompt_cache_all", "save the written text's tokens, too"),
            _flag("--prompt_cache_ro", "only read the file"),
        ],
        *STEERING,
        *SHARED,
    ),
    "chat": (
        "talk with a model, here in the terminal",
        _arg("-m --model", **TALKING),
        *COMPUTING,
        [
            _arg("-p --prompt", "what to say first", **PROMPT),
            _arg("-f --file", "a file with what to say first; - is stdin"),
        ],
        _arg("-sys --system_prompt", "what the model is told before the conversation", metavar="TEXT"),
        _flag("-st --single_turn", "end after the first answer"),
        _flag("--no_history", "keep nothing of what is typed"),
        _flag("-v --verbose", "say after each answer how fast it was"),
        *STEERING,
        *SHARED,
    ),
    "batch": (
        "answer a file of requests, in OpenAI's format for batches",
        *RUNNING,
        _arg("source", "a request a line, in JSON; - is stdin", metavar="IN.jsonl"),
        _arg("-o --output", "an answer a line; those it has are kept", metavar="OUT.jsonl", required=True),
        _arg("-c --ctx_size", "room in tokens for each; default: the model's, at most 2048", **COUNT),
        _arg("-b --batch_size", "tokens of a prompt computed at once (%(default)s)", **COUNT, default=512),
        _arg("-s --seed", "of line 1, and of each line the next; default: a new one", **_at_least(0)),
        [
            CLUSTER,
            _arg("--processes", "have so many processes of this computer answer", **COUNT),
        ],
    ),
    "serve": (
        "answer over HTTP, in OpenAI's form; a page to chat and look at tokens",
        *RUNNING,
        _arg("--host", "the address to listen on (%(default)s); 0.0.0.0 for all", default="127.0.0.1"),
        _arg("--port", "(%(default)s); 0 for a free one", **_at_least(0), default=8080),
        _arg("--api_key", "what clients must send; default: $TINYLLAMA_API_KEY, or nothing", metavar="KEY"),
        _arg("--texts", "so many are written together (32), and others wait", **COUNT),
        _arg("-c --ctx_size", "room in tokens for each; default: the model's, at most 2048", **COUNT),
        [
            _arg("--chat_template", "in place of the model's own: a name, or Jinja", metavar="NAME"),
            _arg("--chat_template_file", "as --chat_template, from a file", metavar="FILE"),
        ],
        _arg("--grace", "seconds that texts have to end (%(default)s)", **_at_least(0), default=10),
        _flag("--log_prompts", "write what is asked to stderr"),
    ),
    "perplexity": (
        "measure how well a model predicts a text",
        *RUNNING,
        *SHARED,
        _arg("-f --file", "the text; - is stdin", required=True),
        *WINDOWS,
        JSON,
    ),
    "imatrix": (
        "collect how large the inputs of each matrix are on a text, for quantize --imatrix",
        *RUNNING,
        _arg("-f --file", "the text; - is stdin", required=True),
        _arg("-o --output", "where to write (%(default)s)", metavar="FILE", default="imatrix.gguf"),
        _arg("--chunks", "use the first so many; default: all", **COUNT),
        _arg("-c --ctx_size", "tokens in a chunk (%(default)s)", **_at_least(SHORTEST), default=512),
        _arg("-b --batch_size", "tokens computed at once (%(default)s)", **COUNT, default=512),
        _flag("--process_output", "collect for the output matrix, too"),
        _flag("--parse_special", "special tokens that the text writes out are such; else they are text"),
        _flag("--no_ppl", "don't compute the perplexity: a little faster"),
    ),
    "cvector": (
        "make a control vector, a file for --control-vector, from pairs of prompts",
        *RUNNING,
        _arg("--positive_file", "what it leads to: a prompt a line", metavar="FILE", required=True),
        _arg("--negative_file", "what it leads away from: as many prompts", metavar="FILE", required=True),
        _arg("--method", "pca (default), mean", choices=("pca", "mean"), default="pca"),
        _arg("-o --output", "where to write (%(default)s)", metavar="FILE", default="control_vector.gguf"),
    ),
    "inspect": (
        "show what is in a model file and what running it needs",
        _arg("model", nargs="?", metavar="FILE", **MODEL),
        _arg("-c --ctx_size", "the context that memory is reckoned for, in tokens", **COUNT),
        _flag("--check", "read all weights, and name those with NaN or infinity"),
        _arg("--tokens", "show this text's pieces and ids instead", metavar="TEXT"),
        _flag("--backends", "show what can compute here instead"),
        JSON,
    ),
    "list": ("show the models on this computer, and which of them fit into its memory", JSON),
    "download": (
        "fetch a model",
        _arg("name", "smollm2, hf:org/name or hf:org/name:Q4_K_M", metavar="NAME", type=_name),
    ),
    "bench": (
        "measure how fast this computer runs a model, real or of a size alone",
        [
            _arg("model", nargs="?", metavar="FILE", **MODEL),
            _arg("--shape", "7B, 13B, 30B or 65B with random weights, without a file", metavar="SIZE"),
        ],
        _arg("--type", "of the random weights: q4_0 (default), q4_k, a mix as Q4_K_M", default="q4_0"),
        _arg("--backend", "default: the fastest that runs here", **NAMES),
        _arg("--level", "of the C backend: amx, avx512, avx2, ref; default: the best", **NAMES),
        _arg("-t --threads", "default: one a core", **COUNTS),
        _flag("--mmap", "measure also from the mapped file"),
        _arg("-n --n_predict", "tokens to write (%(default)s)", **COUNT, default=16),
        _arg("--prefill", "lengths of prompts (32,128,512)", **COUNTS, default=[32, 128, 512]),
        _arg("--tokens", "also so many tokens at once: 1,2,3,4,8,16", **COUNTS, default=[]),
        _arg("--texts", "also so many texts that are written together: 1,2,4,8,16,32", **COUNTS, default=[]),
        _arg("--against", "in turns with llama.cpp (llama-cpp-python)", metavar="NAME"),
        *SHARED,
        JSON,
        _arg("--plot", "draw speeds below their limits (needs matplotlib)", metavar="FILE.png"),
    ),
    "compare": (
        "compare two models on a text, or two backends on a prompt",
        _arg("models", nargs="*", metavar="A B", help=f"two models: {PLACES.partition(';')[0]}"),
        _arg("-m --model", "of two backends: as A; default: $TINYLLAMA_MODEL, or small"),
        _arg("-f --file", "the text that two models read; - is stdin"),
        _arg("-p --prompt", "what two backends run (Once upon a time)", **PROMPT),
        _arg("--backends", "of a model: numpy,c; of two models: auto, or one of each", **_list("ONE,OTHER")),
        _arg("-t --threads", "default: one a core", **COUNT),
        _flag("--mmap", "of two models: leave the weights in their files"),
        _arg("-c --ctx_size", "tokens in a window (512)", **_at_least(SHORTEST)),
        _arg("-b --batch_size", "tokens computed at once (512)", **COUNT),
        _arg("--steps", "tokens on which values inside are compared (512; 0: none)", **_at_least(0)),
        _arg("--limit", "what the error of a step may be: a number, rounding, 8-bit, 4-bit", metavar="X"),
        _arg("--kl_divergence_base", "write what A expects, as llama-perplexity does", metavar="FILE"),
        _flag("--kl_divergence", "read that file instead, in place of A"),
        JSON,
        _arg("--plot", "draw what was found (needs matplotlib)", metavar="FILE.png"),
        _arg("--html", "write what two models gave as a page", metavar="FILE.html"),
    ),
}
