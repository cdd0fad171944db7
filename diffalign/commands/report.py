"""Write the HTML report of a training or steering run again."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.eval import report, steering_folder, steering_report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")


def run(args: argparse.Namespace) -> None:
    steered = (Path(args.run) / steering_folder.SETTINGS).is_file()
    print(steering_report.write(Path(args.run)) if steered else report.write(args.run))
