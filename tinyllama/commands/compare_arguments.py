"""What `tinyllama compare` was asked for: its one name stands for four things."""

import argparse


def asked(args: argparse.Namespace) -> tuple[str, list, list]:
    """What to do ("backends", "models", or "base": write a file), the models, and a backend for each.

    Of two backends there is one model, None for the default. Raises SystemExit where it makes no sense.
    """
    wrong, base, reads = args.parser.error, args.kl_divergence_base, args.kl_divergence
    models = [args.model] * (args.model is not None) + args.models
    if len(models) > 2:
        wrong(f"compares two models, not {len(models)}")
    if reads and (not base or len(models) != 1):
        wrong("argument --kl_divergence: needs one model and --kl_divergence_base FILE")
    if len(models) < 2 and not base:
        return "backends", models or [None], _two_backends(args)
    if args.prompt:
        wrong("argument -p: is for two backends; two models read a text (-f)")
    if not (args.file or reads):
        wrong("argument -f: name the text that the models read")
    models, backends = models or [None], args.backends or [None]
    if len(backends) > len(models):
        wrong(f"argument --backends: name at most {len(models)}, not {len(backends)}")
    does = "models" if reads or len(models) == 2 else "base"
    return does, models, [backends[0], backends[-1]][: len(models)]


def _two_backends(args: argparse.Namespace) -> list[str]:
    backends = args.backends or ["numpy", "c"]
    if args.file:
        args.parser.error("argument -f: is for two models; two backends run a prompt (-p)")
    if args.html:
        args.parser.error("argument --html: is for two models")
    if len(backends) != 2:
        args.parser.error(f"argument --backends: name two, not {len(backends)}")
    return backends
