"""The command line. Only the command that is asked for is imported, so help and mistakes answer at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from diffalign import __version__
from diffalign.listing import summaries
from diffalign.types import Elsewhere, UserError

COMMANDS = "diffalign.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 after a mistake of the user, 130 after Ctrl-C."""
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        importlib.import_module(f"{COMMANDS}.{args.command.replace('-', '_')}").run(args)
        sys.stdout.flush()
    except UserError as error:
        if not isinstance(error, Elsewhere):
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="diffalign", description="Align text-to-image diffusion and flow models.")
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    asked = next((word for word in argv if not word.startswith("-")), None)
    for file, summary in summaries(COMMANDS).items():
        name = file.replace("_", "-")
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == asked:
            importlib.import_module(f"{COMMANDS}.{file}").arguments(sub)
    args, rest = parser.parse_known_args(argv)  # argparse leaves overrides that follow an option
    stray = [a for a in rest if a.startswith("-") or "overrides" not in args]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        args.overrides += rest
    return args
