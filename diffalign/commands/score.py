"""Score images on the disk with rewards, and print a table of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffalign import image_lists, reward_entries
from diffalign.commands import _common
from diffalign.types import UserError
from diffalign.writing import STREAMS, try_out


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reward", action="append", required=True, metavar="NAME[:OPTION=VALUE,...]", help=reward_entries.HELP
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|FILE",
        help="folder that generate wrote, folder of images, or .json or .jsonl list of image, prompt",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts of a plain folder, one for each image in the order of the names; or metadata of listed prompts",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="also write this JSONL file: scores and details, one line for each image"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the GPU when there is one")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at once (default 16)")


def run(args: argparse.Namespace) -> None:
    if args.batch < 1:
        raise UserError(f"score: --batch must be at least 1, got {args.batch}")
    wanted = reward_entries.parse_fixed(args.reward)
    images = image_lists.find(args.images, args.prompts)
    asking = [r.key for r in wanted if r.needs_prompt]
    bare = [i.name for i in images if not i.metadata.get("prompt", "").strip()]
    if asking and bare:
        raise UserError(f"'{asking[0]}' needs prompts, and the image {bare[0]!r} has none; add --prompts FILE")
    output = None if args.output is None else Path(args.output)
    replaces = output is not None and output.is_file() and str(output) not in STREAMS
    if output is not None:
        try:
            try_out(output)
        except OSError as error:
            raise UserError(f"could not write '{output}': {error.strerror}; give another --output") from error
    _common.quiet()
    from diffalign import rewards, scoring
    from diffalign.devices import choose

    results = [scoring.Scored(image) for image in images]
    scorers = rewards.build(wanted, choose(args.device))
    try:
        scoring.score(results, scorers, args.batch)
    except BaseException as error:  # a damaged image, Ctrl-C, a bug in a head: what was scored is not lost
        if output is not None:
            said = scoring.kept(results, output, len(scorers))
            if isinstance(error, UserError):
                raise UserError(f"{error}; {said}") from error
            print(said, file=sys.stderr)
        raise
    print(scoring.table(results))
    if output is not None:
        scoring.write(results, output)
        print(f"{len(results)} images in {output}" + (", in place of what it held" if replaces else ""))
    scoring.refuse_invalid(results)
