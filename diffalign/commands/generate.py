"""Write images of prompts, and a grid of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffalign import few_steps, prompts
from diffalign.commands import _common
from diffalign.config_help import validated
from diffalign.pipelines import few_steps as remembered
from diffalign.sections import Sampling
from diffalign.types import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="embedded name such as tiny-sd3, diffusers folder or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    source.add_argument("--prompts", metavar="FILE", help="text file, JSONL, or shapes-train or shapes-test")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--lora", metavar="DIR", help="LoRA in the diffusers format, such as RUN/lora")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", help="such as cpu or cuda:1")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images of each prompt (default 1)")
    few_steps.arguments(parser)
    parser.add_argument("--guidance", type=float, default=1.0, metavar="W", help="guidance scale (default 1: none)")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT")
    parser.add_argument("--height", type=int, metavar="PX", help="default: what the model was trained at")
    parser.add_argument("--width", type=int, metavar="PX")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="images at once (default 8)")


def run(args: argparse.Namespace) -> None:
    if args.prompt and not all(p.strip() for p in args.prompt):
        raise UserError("a prompt is empty; write what the image should show")
    wanted = prompts.load(args.prompts) if args.prompts is not None else [{"prompt": p} for p in args.prompt]
    settings = {k: getattr(args, k) for k in ("guidance", "negative_prompt", "height", "width")}
    given = {k: v for k, v in settings.items() if v is not None}
    steps = few_steps.asked(args, remembered(args.model, args.lora, args.revision), "generate")
    sampling = validated(Sampling, {**given, **steps}, "generate")
    for name in ("images", "micro_batch"):
        if getattr(args, name) < 1:
            raise UserError(f"generate: {name} must be at least 1, got {getattr(args, name)}")
    _common.quiet()
    from diffalign import adapters, pipelines
    from diffalign.generate import generate, native_size

    pipeline: Any = pipelines.load(args.model, args.revision, args.dtype, args.device)
    if args.lora is not None:
        adapters.load_lora(pipeline, args.lora)
    if not {"height", "width"} <= given.keys():
        side = native_size(pipeline.pipe)
        sampling = sampling.model_copy(update={k: given.get(k, side) for k in ("height", "width")})
    grid = generate(pipeline, wanted, Path(args.output), sampling, args.images, args.seed, args.micro_batch)
    print(f"{len(wanted) * args.images} images in {args.output}, together in {grid}")
