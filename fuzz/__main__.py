"""`python -m fuzz run | try | seeds | merge`: see fuzz/__init__.py; `make fuzz` calls the first."""

import argparse
import sys
from pathlib import Path

from . import campaign, replay, targets


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="fuzz what reads files and prompts")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="fuzz each target for some minutes")
    run.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets.names()))
    run.add_argument("--minutes", type=float, default=1.0, help="of each target")
    run.add_argument("--jobs", type=int, default=1, help="targets at once")
    again = commands.add_parser("try", help="try inputs again")
    again.add_argument("target", metavar="TARGET")
    again.add_argument("paths", nargs="+", type=Path, metavar="FILE")
    for name, help in [
        ("seeds", "write the seeds into fuzz/corpus"),
        ("merge", "keep what reaches new code"),
    ]:
        commands.add_parser(name, help=help).add_argument("targets", nargs="*", metavar="TARGET")
    args = parser.parse_args()
    if args.command == "try":
        replay.try_again(args.target, args.paths)
        return 0
    names = args.targets or targets.names()
    if args.command == "run":
        return campaign.run(names, args.minutes, args.jobs) > 0
    for name in names:
        {"seeds": replay.write_seeds, "merge": campaign.merge}[args.command](name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
