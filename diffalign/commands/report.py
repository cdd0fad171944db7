"""Write the HTML report of a run folder again."""

from __future__ import annotations

import argparse

from diffalign.eval import report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")


def run(args: argparse.Namespace) -> None:
    print(report.write(args.run))
