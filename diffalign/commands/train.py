"""Train as a configuration says."""

from __future__ import annotations

import argparse
import json

from diffalign import loading
from diffalign.commands import _common


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", help="run folder; overrides the configuration's")
    parser.add_argument("--resume", metavar="auto|DIR", help="go on from the newest checkpoint, or from this one")
    _common.configuration(parser)


def run(args: argparse.Namespace) -> None:
    output = [] if args.output is None else [f"output={json.dumps(args.output)}"]
    config = loading.load(args.config, [*args.overrides, *output])
    _common.quiet()
    from diffalign import trainer  # after the checks: it imports torch

    trainer.train(config, resume=args.resume)
