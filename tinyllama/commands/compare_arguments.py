"""What `tinyllama compare` was asked for: its one name stands for four things."""

import argparse

from ..machine.terminal import say
from .cli import SHORTEST

#: The options that each of them takes, beside models, --backends, -t and --json.
TAKEN = {
    "backends": {"prompt", "plot"},
    "models": {
        "file",
        "ctx_size",
        "batch_size",
        "steps",
        "limit",
        "mmap",
        "kl_divergence_base",
        "plot",
        "html",
    },
    "base": {"file", "ctx_size", "batch_size", "mmap", "kl_divergence_base"},
    "file": {"batch_size", "mmap", "kl_divergence_base", "kl_divergence", "plot", "html"},
}
CALLED = {"backends": "two backends", "models": "two models", "base": "a base file that is written"}
IN_FILE = {"file", "ctx_size", "steps", "limit"}  # without a meaning where a base file is read
SHORT = {"file": "-f", "prompt": "-p", "ctx_size": "-c", "batch_size": "-b"}
DEFAULTS = {"ctx_size": 512, "batch_size": 512, "steps": 512}


def asked(args: argparse.Namespace) -> tuple[str, list, list]:
    """What to do (a key of TAKEN: "base" writes a file, "file" reads it), the models, a backend for each.

    Of two backends there is one model, None for the default. Options get their defaults. Raises SystemExit
    where it makes no sense; says what is ignored.
    """
    wrong, base, reads = args.parser.error, args.kl_divergence_base, args.kl_divergence
    models = [args.model] * (args.model is not None) + args.models
    if len(models) > 2:
        wrong(f"compares two models, not {len(models)}")
    if reads and (not base or len(models) != 1):
        wrong("argument --kl_divergence: needs one model and --kl_divergence_base FILE")
    one = "base" if base else "backends"
    does = "file" if reads else "models" if len(models) == 2 else one
    _check_options(args, does)
    if does in ("models", "base") and not args.file:
        wrong("argument -f: name the text that is read")
    vars(args).update({name: value for name, value in DEFAULTS.items() if getattr(args, name) is None})
    if 0 < args.steps < SHORTEST:
        wrong(f"argument --steps: must be 0 or at least {SHORTEST}, not {args.steps}")
    models, backends = models or [None], args.backends or (["numpy", "c"] if does == "backends" else [None])
    if "" in backends:
        wrong("argument --backends: a name is missing beside the comma")
    if does == "backends":
        if len(backends) != 2:
            wrong(f"argument --backends: name two, not {len(backends)}")
        return does, models, backends
    if len(backends) > len(models):
        wrong(f"argument --backends: name at most {len(models)}, not {len(backends)}")
    return does, models, [backends[0], backends[-1]][: len(models)]


def _check_options(args: argparse.Namespace, does: str) -> None:
    given = {name for names in TAKEN.values() for name in names if getattr(args, name) not in (None, False)}
    others = {name: SHORT.get(name, f"--{name}") for name in sorted(given - TAKEN[does])}
    if does == "file" and others.keys() <= IN_FILE:
        ignored = f"{', '.join(others.values())} {'are' if len(others) > 1 else 'is'} ignored"
        if others:
            say(f"warning: {ignored}: {args.kl_divergence_base} has the windows of its text, and no steps")
        return
    for name, option in others.items():
        takes = next(called for deed, called in CALLED.items() if name in TAKEN[deed])
        instead = ": name a second model, or a prompt (-p)" if (does, name) == ("backends", "file") else ""
        args.parser.error(
            f"argument {option}: is for {takes}, not for {CALLED.get(does, 'a base file')}{instead}"
        )
