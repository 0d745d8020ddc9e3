"""`generate` for many prompts: the lines of a file, written together, and printed in their order."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext

from ..errors import Cancelled, naming
from ..generation import Generation
from ..llama import Llama
from ..machine.limits import human, peak_memory
from ..machine.terminal import say, status_line
from ..settings import Settings, default_ctx_size
from ..taps.names import matching
from ..texts.completion import STOP_REASONS
from ..texts.jobs import Jobs
from .printing import counted, escape, harmless, unescape

OFTEN = 0.1  # seconds between two lines of progress


def generate(llama: Llama, text: str, args: argparse.Namespace) -> None:
    """Continue a prompt, or each line of a text; print of each a line, in their order, as soon as possible.

    Args:
        args: of the command: settings, each_line, json, escape and file.
    Raises:
        TinyllamaError: a line is no prompt; names it.
    """
    wanted, prompts = Settings(**args.settings), [*_prompts(llama, text, args)]
    matching(llama.config, wanted.taps)  # a wrong name is refused before anything is said
    say(f"{counted(len(prompts), 'prompt')}, {llama.backend.title}\n")
    jobs, found, warned = Jobs(llama, wanted.batch_size), {}, set()
    n_begun, n_printed, shown = 0, 0, 0.0
    started = time.perf_counter()
    try:
        with status_line() as progress:
            while n_printed < len(prompts):
                while jobs.room and n_begun < len(prompts):
                    (run,) = jobs.add(n_begun, [(prompts[n_begun], wanted)])
                    n_begun += 1
                    for warning in set(run.warnings) - warned:
                        progress("")
                        say(f"warning: {warning}")
                    warned |= set(run.warnings)
                for number, (run,) in jobs.turn():
                    found[number] = run
                ready = n_printed in found
                if ready:
                    progress("")
                while n_printed in found:
                    _print(prompts[n_printed], found.pop(n_printed), args.json)
                    n_printed += 1
                if ready or time.perf_counter() > shown + OFTEN:
                    shown = time.perf_counter()
                    speed = jobs.n_tokens / max(shown - started, 1e-9)
                    progress(f"{n_begun - len(jobs)}/{len(prompts)}, {speed:.1f} tokens/s of all together")
    except (Cancelled, KeyboardInterrupt):
        say(f"stopped: {STOP_REASONS['cancelled']} after {n_printed} of {len(prompts)} texts")
        raise
    finally:
        say("")
        print_speed(llama.load_seconds, jobs)


def _prompts(llama: Llama, text: str, args: argparse.Namespace) -> Iterator[str]:
    """The prompts, once it is known that each fits; of lines those that aren't empty."""
    n_ctx = Settings(**args.settings).ctx_size or default_ctx_size(llama.config)
    for number, line in enumerate(text.split("\n") if args.each_line else [text], 1):
        if args.each_line:
            line = unescape(line.strip("\r")) if args.escape else line.strip("\r")
        if line.strip() or not args.each_line:
            with naming(f"{args.file}: line {number}") if args.each_line else nullcontext():
                llama.tokens(line, n_ctx)
            yield line


def _print(prompt: str, run: Generation, as_json: bool) -> None:
    """A line: what was asked and what was written."""
    text, prompt = run.completion(), prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if as_json:
        about = {"prompt": prompt, "text": str(text), "ids": text.ids}
        about |= {"stop_reason": text.stop_reason, "seed": text.seed}
        line = json.dumps(about)
        if run.watch:  # token by token: as text, numbers take many times their memory
            print(line[:-1], end=', "taps": [')
            for number, token in enumerate(text.tokens):
                print(", " * bool(number), json.dumps(token.as_dict()["taps"]), sep="", end="")
            line = "]}"
    else:
        line = escape(prompt + text)
        line = harmless(line) if sys.stdout.isatty() else line
    print(line, flush=True)


def print_speed(load_seconds: float, jobs: Jobs) -> None:
    """What many texts took together; jobs: or what else has n_tokens and seconds."""
    speed = f", {jobs.n_tokens / jobs.seconds:.1f} tokens/s of all together" if jobs.n_tokens else ""
    say(f"load     {load_seconds:6.2f} s")
    say(f"texts    {jobs.seconds:6.2f} s {jobs.n_tokens:6} tokens{speed}")
    say(f"total    {load_seconds + jobs.seconds:6.2f} s, peak memory {human(peak_memory())}")
