"""Check a configuration, or explain one of its keys, without loading a model."""

from __future__ import annotations

import argparse

from diffalign import config_help, loading, summary
from diffalign.commands import _common
from diffalign.types import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--explain", metavar="KEY", help="print what a key such as trainer.lr means")
    _common.configuration(parser, "?")


def run(args: argparse.Namespace) -> None:
    if args.explain is not None:
        data = loading.read(args.config, args.overrides).data if args.config is not None else {}
        print(config_help.explain(args.explain, data))
    elif args.config is None:
        raise UserError("give a configuration to check, or --explain KEY")
    else:
        print(summary.summary(loading.load(args.config, args.overrides)))
