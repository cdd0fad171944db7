"""Compare models, training runs and ways to sample on the same prompts and seeds, and write a gallery report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from diffalign import image_lists, prompt_sets, reward_entries
from diffalign.commands import _common
from diffalign.config_help import validated
from diffalign.eval import contestant
from diffalign.eval.contestant import Wanted
from diffalign.eval.features import Embedder
from diffalign.eval.records import Asked, asked_before
from diffalign.sections import Sampling
from diffalign.types import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", action="extend", required=True, metavar="NAME=SOURCE", help=contestant.HELP
    )
    parser.add_argument("--prompts", required=True, metavar="SET|FILE", help=prompt_sets.HELP)
    parser.add_argument("--first", type=int, metavar="N", help="the first N prompts only")
    parser.add_argument("--images", type=int, default=4, metavar="K", help="images of each prompt (default 4)")
    parser.add_argument(
        "--rewards",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME[:OPTION=VALUE,...]",
        help=reward_entries.HELP,
    )
    parser.add_argument(
        "--steer-by", nargs="+", metavar="NAME", help="rewards of steered models; default: the first one"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="what the others are compared with (default: the first model)"
    )
    parser.add_argument(
        "--features",
        default="",
        metavar="NAME[:model=M]",
        help="embeds the images for diversity, such as dino:model=tiny-dino",
    )
    parser.add_argument("--reference", metavar="DIR", help="pictures to compare with by FID and KID of --features")
    parser.add_argument(
        "--probes", type=int, default=64, metavar="N", help="prompts probed for reward hacking (default 64)"
    )
    parser.add_argument("--no-noise-floor", action="store_true", help="leave out the baseline with other seeds")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, or one to go on in or add to")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (default 20)")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="guidance scale (default: none, or what a pipeline of another family has)",
    )
    parser.add_argument("--height", type=int, metavar="PX", help="default: what the baseline was trained at")
    parser.add_argument("--width", type=int, metavar="PX")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", help="such as cpu or cuda:1")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at once (default 16)")


def run(args: argparse.Namespace) -> None:
    for option in ("first", "images", "batch", "steps"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"eval: --{option} must be at least 1, got {getattr(args, option)}")
    for option in ("probes", "seed"):
        if getattr(args, option) < 0:
            raise UserError(f"eval: --{option} must be 0 or more, got {getattr(args, option)}")
    wanted = contestant.parse(args.models)
    names = [w.name for w in wanted]
    folder = Path(args.out)
    known = asked_before(folder)
    baseline = args.baseline or (known.baseline if known is not None else names[0])
    if known is None and baseline not in names:
        raise UserError(f"eval: --baseline '{baseline}' is none of the models ({', '.join(names)})")
    chosen = reward_entries.parse_fixed(args.rewards)
    steering = reward_entries.parse_fixed(args.steer_by) if args.steer_by else chosen[:1]
    if args.steer_by and not any(w.steering for w in wanted):
        raise UserError("eval: --steer-by has no effect without a steered model such as fk=tiny-sd3+fk; leave it out")
    if args.features:
        Embedder.parse(args.features)
    if args.reference and not args.features:
        raise UserError("eval: --reference compares embeddings; add --features, such as dino:model=tiny-dino")
    reference = image_lists.find(args.reference) if args.reference else []
    entries, notes = prompt_sets.load(args.prompts)
    entries = [{**entry, "id": f"{n:04d}"} for n, entry in enumerate(entries[: args.first])]
    given = {k: v for k in ("height", "width") if (v := getattr(args, k)) is not None}
    settings = {
        "steps": args.steps,
        "guidance": 1.0 if args.guidance is None else args.guidance,
        "kernel": "ode",
        "eta": 0.0,
        **given,
    }
    sampling = validated(Sampling, settings, "eval")
    _common.quiet()
    from diffalign import devices
    from diffalign.eval import gallery_report, session

    devices.choose(args.device)
    wanted, sides = _settled(args, wanted, baseline, known)
    sampling = sampling.model_copy(update=dict(zip(("height", "width"), sides, strict=True)))
    first = next((w for w in wanted if w.name == baseline), None)
    if not args.no_noise_floor and first is not None:
        wanted.append(session.floor(first))
    asked = Asked(
        prompts=args.prompts if args.first is None else f"{args.prompts}, the first {len(entries)}",
        images_per_prompt=args.images,
        seed=args.seed,
        height=sampling.height,
        width=sampling.width,
        baseline=baseline,
        contestants=tuple(w.name for w in wanted),
        rewards={r.key: r.model_dump(mode="json") for r in chosen},
        features=args.features,
        reference=args.reference or "",
        notes=tuple(notes),
    )
    job = session.Job(
        folder=folder,
        asked=session.agreed(folder, asked, entries),
        prompts=entries,
        contestants=wanted,
        rewards=chosen,
        steering=steering,
        sampling=sampling,
        dtype=args.dtype,
        probed=args.probes,
        batch=args.batch,
        command=shlex.join(["diffalign", *sys.argv[1:]]),
        reference=reference,
    )
    if session.run(job, args.device):
        page = gallery_report.write(folder)
        print((folder / gallery_report.TABLE).read_text("utf-8"))
        models = len(job.asked.contestants)
        count = f"{len(entries)} prompt{'s' * (len(entries) > 1)} x {models} model{'s' * (models > 1)}"
        print(f"{count} in {folder}; see {page}")


def _settled(
    args: argparse.Namespace, wanted: Sequence[Wanted], baseline: str, known: Asked | None
) -> tuple[list[Wanted], tuple[int, int]]:
    """The models with their guidance, and (height, width) of the images, before anything is written: raises UserError
    for a model that cannot be had, does not make such images, or has a LoRA that does not fit."""
    from diffalign.eval import making

    outlines = {w.name: making.outlined(w, args.dtype) for w in wanted}
    height, width = args.height, args.width
    if height is None or width is None:
        sides = (known.height, known.width) if known is not None else (making.side(outlines[baseline]),) * 2
        height, width = height or sides[0], width or sides[1]
    return [making.settled(outlines[w.name], w, args.guidance, height, width) for w in wanted], (height, width)
