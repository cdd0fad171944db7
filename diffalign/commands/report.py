"""Write the report of a training run, a steering run or an evaluation again, or show it to a browser elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.eval import gallery_report, records, report, serving, steering_folder, steering_report
from diffalign.types import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a training run, a steering run or an evaluation")
    parser.add_argument(
        "--mode",
        choices=("folder", "single"),
        default="folder",
        help="of an evaluation: images beside the page, or in it",
    )
    parser.add_argument(
        "--votes",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="what people chose in the page's blind mode",
    )
    parser.add_argument(
        "--serve", action="store_true", help="show an evaluation's page on this machine's loopback address"
    )
    parser.add_argument(
        "--port", type=int, default=8765, metavar="N", help="of --serve (default 8765; 0: any free one)"
    )


def run(args: argparse.Namespace) -> None:
    folder = Path(args.run)
    if (folder / records.SETTINGS).is_file():
        print(gallery_report.write(folder, args.mode, [Path(file) for file in args.votes]))
        if args.serve:
            serving.serve(folder, args.port)
        return
    if args.serve or args.votes or args.mode != "folder":
        raise UserError(f"'{folder}' is no evaluation, and --serve, --votes and --mode are for those; leave them out")
    steered = (folder / steering_folder.SETTINGS).is_file()
    print(steering_report.write(folder) if steered else report.write(args.run))
