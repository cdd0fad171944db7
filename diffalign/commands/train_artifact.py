"""Train the `artifact_head` reward on a folder of clean pictures and one of pictures with artifacts."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign import image_lists
from diffalign.commands import _common
from diffalign.rewards import _artifact
from diffalign.types import UserError
from diffalign.writing import try_out

UNFINISHED = {_artifact.WEIGHTS, f"{_artifact.WEIGHTS}.tmp", f"{_artifact.NOTE}.tmp"}  # of a head that was not saved


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clean", required=True, metavar="DIR", help="folder or list of pictures without faults")
    parser.add_argument(
        "--artifact",
        required=True,
        metavar="DIR",
        help="folder or list of pictures with faults; those with the file name of a clean one are held out with it",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--features",
        default="tiny-dino",
        metavar="MODEL",
        help="frozen backbone (default tiny-dino), such as facebook/dinov2-base",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--size", type=int, metavar="PX", help="side of the square that the backbone sees (default: its own)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the GPU when there is one")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="pictures at once (default 16)")
    parser.add_argument(
        "--steps", type=int, default=1000, metavar="N", help="training steps of 64 pictures each (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split and of training (default 0)")


def run(args: argparse.Namespace) -> None:
    for name, given in (("batch", args.batch), ("steps", args.steps), ("size", args.size)):
        if given is not None and given < 1:
            raise UserError(f"train-artifact: --{name} must be at least 1, got {given}")
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or {p.name for p in output.iterdir()} - UNFINISHED):
        raise UserError(f"'{output}' is not empty; name a new folder")
    clean, artifact = (image_lists.find(where) for where in (args.clean, args.artifact))
    try:
        try_out(output / _artifact.WEIGHTS if output.exists() else output)  # now, and not after the training
    except OSError as error:
        raise _unwritable(output, error) from error
    _common.quiet()
    from diffalign.artifact_training import Plan, sentence, train
    from diffalign.devices import choose

    device, local = choose(args.device), Path(args.features).expanduser()
    named = str(local.resolve()) if local.is_dir() else args.features  # the reward may run in another folder
    features = _artifact.Features(named, args.revision, args.size)
    backbone = features.load("fp32", device, local_files_only=False)
    weights, report = train(backbone, clean, artifact, Plan(steps=args.steps, seed=args.seed), args.batch, device)
    try:
        _artifact.save(_artifact.Trained(features, weights, report), output)
    except OSError as error:
        raise _unwritable(output, error) from error
    print(sentence(report))
    print(f"use it as {{name: artifact_head, model: {output}}}")


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"could not write '{output}': {error.strerror}; give another --output")
