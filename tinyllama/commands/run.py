"""What each command does: a function of its name, which takes the arguments that `cli` parsed.

Modules that `generate` can do without are imported by the commands that need them: the first word of a small
model would wait for them.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from ..backends import OPTIONS
from ..cluster.loading import load
from ..errors import require
from ..llama import Llama
from ..machine.limits import human, peak_memory
from ..machine.terminal import say, status_line
from ..texts.completion import STOP_REASONS, Timings
from .cli import ON_HUB
from .control_vectors import ControlVectors
from .inputs import read_template, read_text
from .outputs import require_new, require_picture
from .printing import counted, harmless, unescape
from .prompt_cache import PromptCache

SERVING = ("starlette", "uvicorn", "prometheus_client")  # packages
SERVED = ("host", "port", "texts", "ctx_size", "chat_template", "grace", "log_prompts")

#: What a text begins with if nobody says.
PROMPTS = (
    "Once upon a time",
    "The old king had three daughters, and",
    "In the middle of the forest there stood",
    "One winter morning, the little girl",
    "Far out at sea, where the water is",
)


def generate(args: argparse.Namespace) -> None:
    """Continue a prompt."""
    prompt, settings = _prompt(args), args.settings
    if args.escape:
        settings["stop"] = [unescape(text) for text in args.stop]
    saved, vectors = PromptCache(args), ControlVectors(args)
    llama = _load(args)
    with _released(args, llama), vectors.applied(llama):
        if args.each_line or args.json:
            from . import lines

            return lines.generate(llama, prompt, args)
        _print_text(llama, prompt, saved, args)


def _print_text(llama: Llama, prompt: str, saved: PromptCache, args: argparse.Namespace) -> None:
    """Write the continuation of one prompt as it comes."""
    settings = args.settings
    saved.restore(llama)
    run = llama.stream(prompt, **settings)
    for warning in run.warnings:
        say(f"warning: {warning}")
    say(f"seed {run.seed}, {len(run.prompt_ids)} prompt tokens, {llama.backend.title}\n")
    # To a terminal without what would steer it; into a file or a pipe to the letter.
    show = harmless if sys.stdout and sys.stdout.isatty() else str
    try:
        shown = (
            "" if settings["chat"] else prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        )
        for text in chain([shown], run):
            print(show(text), end="", flush=True)
            saved.keep(run)
    finally:
        print(flush=True)
    saved.keep(run, ended=True)
    _print_timings(run.timings, len(run.tokens), saved.figures)
    if llama.packing.trouble:
        say(f"warning: {counted(run.timings.n_left, 'weight')} stayed in the file: {llama.packing.trouble}")
    if run.stop_reason != "length":
        say(f"stopped: {STOP_REASONS[run.stop_reason]}")


def _prompt(args: argparse.Namespace) -> str:
    """What -p, -f and -e ask for, or a random prompt, which the seed chooses too."""
    if args.prompt is None and args.file is None:
        return random.Random(args.seed if args.seed >= 0 else None).choice(PROMPTS)
    prompt = read_text(args.file) if args.prompt is None else args.prompt
    return unescape(prompt) if args.escape and not args.each_line else prompt


def _print_timings(took: Timings, n_sampled: int, more: Iterable[str]) -> None:
    counts = {"prompt": took.n_prompt, "sample": n_sampled, "predict": took.n_predict}
    say(f"\nload     {took.load:6.2f} s")
    for step, n_tokens in counts.items():
        n_remembered = took.n_remembered if step == "prompt" else 0
        seconds, n_computed = getattr(took, step), n_tokens - n_remembered
        line = f"{step:8} {seconds:6.2f} s {n_tokens:6} tokens" + f", {n_remembered} remembered" * (
            n_remembered > 0
        )
        if seconds and n_computed:
            line += f" {1000 * seconds / n_computed:8.2f} ms/token {n_computed / seconds:9.1f} tokens/s"
        say(line)
    for line in more:
        say(line)
    if took.n_drafted:
        say(f"draft    {took.n_drafted} guessed, {took.n_accepted} right")
    if took.n_packed or took.n_left:
        left = f", {took.n_left} are still in the file" * bool(took.n_left)
        say(f"pack     {took.pack:6.2f} s {took.n_packed:6} weights, in the background{left}")
    say(f"total    {took.load + took.total:6.2f} s, peak memory {human(peak_memory())}")


def convert(args: argparse.Namespace) -> None:
    """Any model -> a GGUF or ggml file."""
    from .convert import convert

    _print_files(convert(args.source, args.ftype, args.outfile, args.format))


def quantize(args: argparse.Namespace) -> None:
    """A model of 16 or 32 bits a weight -> a file of 2 to 8."""
    from .convert import quantize

    types = {"output_tensor_type": args.output_tensor_type, "token_embedding_type": args.token_embedding_type}
    more = {"pure": args.pure, "imatrix": args.imatrix}
    _print_files(quantize(args.source, args.target, args.type, **more, **types))


def _print_files(paths: Iterable[Path]) -> None:
    for path in paths:
        print(f"{path}  {human(path.stat().st_size)}")


def download(args: argparse.Namespace) -> None:
    """Fetch a model."""
    from ..machine import download, hub

    (hub if args.name.startswith(ON_HUB) else download).download(args.name)


def list(args: argparse.Namespace) -> None:
    """Show the models on this computer."""
    from . import list as models

    _print_found(models.models(), models.table, args)


def chat(args: argparse.Namespace) -> None:
    """Talk with a model."""
    from .chat import Conversation

    is_piped = args.single_turn and args.prompt is None and not sys.stdin.isatty()
    file = "-" if is_piped and args.file is None else args.file
    first = args.prompt if file is None else read_text(file)

    vectors = ControlVectors(args)
    with ExitStack() as used:  # the model that answers, which /model may change, and what steers it

        def opened(model: str) -> Llama:
            with status_line() as show:
                llama = _load(argparse.Namespace(**vars(args) | {"model": model}), show)
            steering = vectors.applied(llama)  # or it is refused, and the last one goes on
            used.close()
            used.enter_context(_released(args, llama))
            used.enter_context(steering)
            return llama

        Conversation(args, opened).run(first)


def batch(args: argparse.Namespace) -> None:
    """Answer a file of requests."""
    from .batch import batch

    batch(args, _model_name(args.model), partial(_answering, args))


@contextmanager
def _answering(args: argparse.Namespace) -> Iterator:
    """What answers the requests of a batch: this process, or those of a cluster."""
    name, how = _model_name(args.model), (args.ctx_size, args.batch_size)
    if args.scheduler is None and args.processes is None:
        from ..texts.answering import Answering

        llama = _load(args)
        _warn_of_context(llama, args.ctx_size)
        yield Answering(llama, name, *how)
    else:
        from ..cluster.connect import connected
        from ..cluster.spread import Spread

        options = {option: getattr(args, option) for option in ("backend", "threads", "mmap", *OPTIONS)}
        with (
            connected(args.scheduler, args.processes, args.threads) as client,
            Spread(client, args.model, name, *how, **options) as spread,
        ):
            yield spread


def serve(args: argparse.Namespace) -> None:
    """Answer over HTTP."""
    missing = [name for name in SERVING if not find_spec(name)]
    require(not missing, f"serve needs {', '.join(missing)}: pip install 'tinyllama-lab[serve]'")
    require(args.api_key != "", "--api-key is empty")
    from ..serve.server import serve

    llama, key = _load(args), args.api_key or os.environ.get("TINYLLAMA_API_KEY")
    _warn_of_context(llama, args.ctx_size)
    options = {name: getattr(args, name) for name in SERVED}
    if args.chat_template_file is not None:
        options["chat_template"] = read_template(args.chat_template_file)
    serve(llama, _model_name(args.model), api_key=key, **options)


def _model_name(model: str) -> str:
    """What answers call a model."""
    return Path(model).name if Path(model).exists() else model


def perplexity(args: argparse.Namespace) -> None:
    """Measure how well a model predicts a text."""
    from ..texts.perplexity import perplexity

    text, llama = read_text(args.file), _load(args)
    _warn_of_context(llama, args.ctx_size)
    with _released(args, llama):
        score = perplexity(llama, text, args.ctx_size, args.batch_size, partial=True)  # after Ctrl-C
    found = {"model": args.model, "text": args.file} | asdict(score)
    _print_found(found, lambda _: str(score), args)


def imatrix(args: argparse.Namespace) -> None:
    """Collect how large the inputs of each matrix are on a text."""
    from .imatrix import imatrix

    require_new([args.output], [args.model, args.file])
    names = "ctx_size", "batch_size", "chunks", "parse_special", "process_output"
    how = {name: getattr(args, name) for name in names} | {"ppl": not args.no_ppl}
    text, llama = read_text(args.file), _load(args)
    _warn_of_context(llama, args.ctx_size)
    imatrix(llama, text, path=args.output, dataset=args.file, **how)
    _print_files([Path(args.output)])
    say(f"use it: tinyllama quantize MODEL OUT.gguf Q4_K_M --imatrix {args.output}")


def cvector(args: argparse.Namespace) -> None:
    """Make a control vector from pairs of prompts."""
    from . import control_vectors

    require_new([args.output], [args.model, args.positive_file, args.negative_file])
    pairs = control_vectors.read_pairs(args.positive_file, args.negative_file)
    llama = _load(args)
    control_vectors.make(llama, pairs, args.method, args.output)
    _print_files([Path(args.output)])
    say(f"use it: tinyllama generate -m {args.model} -p TEXT --control-vector-scaled {args.output}:SCALE")


def inspect(args: argparse.Namespace) -> None:
    """Show what is in a model file, how it cuts a text, or what can compute here."""
    from . import inspect

    if args.backends:
        return _print_found(inspect.backends(), inspect.backend_table, args)
    if args.tokens is not None:
        return _print_found(inspect.tokens(args.model, args.tokens), inspect.token_table, args)
    found = inspect.inspect(args.model, args.ctx_size, args.check)
    _print_found(found, inspect.report, args)
    require(not found["not_finite"], f"{args.model}: holds NaN or infinity: it is damaged, fetch it again")


def bench(args: argparse.Namespace) -> None:
    """Measure how fast this computer, or a cluster, runs a model."""
    if args.scheduler:
        return _bench_workers(args)
    from . import bench, bench_report

    require_new([args.plot])
    require_picture(args.plot)
    names = "shape", "type", "threads", "mmap", "n_predict", "prefill", "tokens", "texts", "against"
    how = {name: getattr(args, name) for name in names}
    with status_line() as progress:
        measured = bench.bench(args.model, backends=args.backend, levels=args.level, progress=progress, **how)
        results = [*measured]
    _print_found(results, bench_report.table, args)
    if args.plot:
        bench_report.plot(results, args.plot)


def _bench_workers(args: argparse.Namespace) -> None:
    from . import bench_pipeline

    (backend,), (threads,) = args.backend or [None], args.threads or [None]
    args.threads = threads
    how = {"texts": args.texts or bench_pipeline.TEXTS, "n_predict": args.n_predict}
    with _load_side(args, args.model, backend) as llama, status_line() as progress:
        found = bench_pipeline.bench(llama, [*args.prefill, *args.tokens], **how, progress=progress)
    _print_found(found, bench_pipeline.table, args)


def compare(args: argparse.Namespace) -> None:
    """Compare two models on a text, or two backends on a prompt."""
    from .compare_arguments import asked

    does, *sides = asked(args)
    base = args.kl_divergence_base
    inputs, outputs = [*sides[0], args.file], [args.plot, args.html]
    (inputs if does == "file" else outputs).append(base)
    require_new(outputs, inputs)
    require_picture(args.plot)
    models = {"models": _compare_models, "file": _compare_models}
    ({"backends": _compare_backends, "base": _save_base} | models)[does](args, *sides)


def _compare_backends(args: argparse.Namespace, models: Sequence, backends: Sequence[str]) -> None:
    from . import compare

    prompt = args.prompt or "Once upon a time"
    found = compare.compare_backends(models[0], prompt, tuple(backends), args.threads)
    _print_found(found, compare.table, args)
    if args.plot:
        compare.plot(found, args.plot)


def _save_base(args: argparse.Namespace, models: Sequence, backends: Sequence) -> None:
    from .compare_models import finite, save_base

    text, path, llama = read_text(args.file), args.kl_divergence_base, _load_side(args, *models, *backends)
    _warn_of_context(llama, args.ctx_size)
    score = save_base(llama, text, path, args.ctx_size, args.batch_size, text_name=args.file)
    _print_found({"base": path} | finite(asdict(score)), lambda _: str(score), args)
    say(f"{path}: {human(os.path.getsize(path))}")


def _compare_models(args: argparse.Namespace, models: Sequence, backends: Sequence) -> None:
    from .compare_inside import named_limit
    from .compare_models import compare
    from .kl_divergence import BaseFile

    how, base = {"batch_size": args.batch_size}, args.kl_divergence_base
    if args.kl_divergence:
        first, text = [BaseFile(base)], None
        args.ctx_size = first[0].ctx_size
    else:
        named_limit(args.limit)
        first, text = [], read_text(args.file)
        how |= {"ctx_size": args.ctx_size, "n_steps": args.steps, "limit": args.limit, "base": base}
    opened = [_load_side(args, *side) for side in zip(models, backends, strict=True)]
    _warn_of_context(min(opened, key=lambda llama: llama.config.max_seq_len), args.ctx_size)
    found = compare(*first, *opened, text, **how, partial=True, text_name=args.file)  # after Ctrl-C
    _print_found(found.as_dict() if args.json else found, lambda found: found.table(), args)
    if args.plot:
        found.plot(args.plot)
    if args.html:
        found.html(args.html)


def _load_side(args: argparse.Namespace, model: str, backend: str | None) -> Llama:
    """One of the models that are compared."""
    options = dict.fromkeys(OPTIONS) | {"model": model, "backend": backend}
    return _load(argparse.Namespace(**vars(args) | options))


def _print_found(found, show: Callable, args: argparse.Namespace) -> None:
    print(json.dumps(found, default=asdict, indent=2) if args.json else show(found))


def _load(args: argparse.Namespace, tell: Callable[[str], None] = say) -> Llama:
    """The model that -m, -t and --backend ask for; what loading will take is said before."""
    where = {name: getattr(args, name, None) for name in ("scheduler", "split")}

    def announce(path: Path | str, needed: dict[str, int], mapped: bool) -> None:
        total, size = sum(needed.values()), needed["weights"] + needed.get("gpu_weights", 0)
        what = f"{human(size)} weights, {human(needed['kv_cache'])} KV cache"
        costs = f"up to {human(total)} of memory ({what})"
        if mapped:
            costs = f"{human(size)} of weights stay in the file, up to {human(total - size)} of memory beside"
            costs += " them; it starts at once, and a token takes about twice as long as without --mmap"
        tell(f"loading {path}: {costs}")

    if where["scheduler"]:
        tell(f"measuring {args.model} on the workers of {args.scheduler}")
    options = where | {name: getattr(args, name) for name in OPTIONS}
    return load(args.model, args.backend, args.threads, mmap=args.mmap, announce=announce, **options)


def _released(args: argparse.Namespace, llama: Llama) -> AbstractContextManager:
    """Several machines give a model's memory back at the end; here it stays loaded."""
    return llama if args.scheduler else nullcontext()


def _warn_of_context(llama: Llama, ctx_size: int | None) -> None:
    if ctx_size and ctx_size > (trained := llama.config.max_seq_len):
        say(f"warning: {llama.name} was trained on {trained} tokens, ctx_size (-c) is {ctx_size}")
