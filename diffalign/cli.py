"""The command line. Everything heavy is imported by the command that needs it, so help and mistakes answer at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffalign import __version__
from diffalign.types import UserError

Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 after a mistake of the user, 130 after Ctrl-C."""
    args = _parse(argv)
    command: Command = args.command
    try:
        command(args)
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="diffalign", description="Align text-to-image diffusion and flow models.")
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(command=command)
        return sub

    train = add("train", _train, "Train as a configuration says.")
    train.add_argument("--output", metavar="DIR", help="run folder; overrides the configuration's")
    train.add_argument("--resume", metavar="auto|DIR", help="go on from the newest checkpoint, or from this one")
    check = add("check", _check, "Check a configuration, or explain one of its keys, without loading a model.")
    check.add_argument("--explain", metavar="KEY", help="print what a key such as trainer.lr means")
    for sub, nargs in ((train, None), (check, "?")):
        sub.add_argument("config", metavar="CONFIG", nargs=nargs, help="YAML file, or a preset's name (see list)")
        sub.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="such as trainer.lr=3e-4 or rewards.0.weight=2"
        )

    generate = add("generate", _generate, "Write images of prompts, and a grid of them.")
    generate.add_argument("--model", required=True, help="embedded name such as tiny-sd3, diffusers folder or hub id")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    source.add_argument("--prompts", metavar="FILE", help="text file, JSONL, or shapes-train or shapes-test")
    generate.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    generate.add_argument("--lora", metavar="DIR", help="LoRA in the diffusers format, such as RUN/lora")
    generate.add_argument("--revision", help="branch, tag or commit of a hub id")
    generate.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    generate.add_argument("--device", help="such as cpu or cuda:1")
    generate.add_argument("--images", type=int, default=1, metavar="N", help="images of each prompt (default 1)")
    generate.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (default 20)")
    generate.add_argument("--guidance", type=float, default=1.0, metavar="W", help="guidance scale (default 1: none)")
    generate.add_argument("--negative-prompt", default="", metavar="TEXT")
    generate.add_argument("--height", type=int, metavar="PX", help="default: what the model was trained at")
    generate.add_argument("--width", type=int, metavar="PX")
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.add_argument("--micro-batch", type=int, default=8, metavar="N", help="images at once (default 8)")

    report = add("report", _report, "Write the HTML report of a run folder again.")
    report.add_argument("run", metavar="RUN", help="run folder")
    add("list", _list, "List methods, models, presets and prompt sets.")
    add("schema", _schema, "Print the JSON schema of configuration files, for editors.")

    args, rest = parser.parse_known_args(argv)  # argparse leaves overrides that follow an option
    stray = [a for a in rest if a.startswith("-") or "overrides" not in args]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        args.overrides += rest
    return args


def _quiet() -> None:
    """Loading bars and notices of the libraries below would bury what this program says."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _train(args: argparse.Namespace) -> None:
    from diffalign import loading

    output = [] if args.output is None else [f"output={json.dumps(args.output)}"]
    config = loading.load(args.config, [*args.overrides, *output])
    _quiet()
    from diffalign import trainer  # after the checks: it imports torch

    trainer.train(config, resume=args.resume)


def _check(args: argparse.Namespace) -> None:
    from diffalign import config_help, loading, summary

    if args.explain is not None:
        data = loading.read(args.config, args.overrides).data if args.config is not None else {}
        print(config_help.explain(args.explain, data))
    elif args.config is None:
        raise UserError("give a configuration to check, or --explain KEY")
    else:
        print(summary.summary(loading.load(args.config, args.overrides)))


def _generate(args: argparse.Namespace) -> None:
    from diffalign import prompts
    from diffalign.config_help import validated
    from diffalign.sections import Sampling

    if args.prompt and not all(p.strip() for p in args.prompt):
        raise UserError("a prompt is empty; write what the image should show")
    wanted = prompts.load(args.prompts) if args.prompts is not None else [{"prompt": p} for p in args.prompt]
    settings = {k: getattr(args, k) for k in ("steps", "guidance", "negative_prompt", "height", "width")}
    given = {k: v for k, v in settings.items() if v is not None}
    sampling = validated(Sampling, {**given, "kernel": "ode", "eta": 0.0}, "generate")
    for name in ("images", "micro_batch"):
        if getattr(args, name) < 1:
            raise UserError(f"generate: {name} must be at least 1, got {getattr(args, name)}")
    _quiet()
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


def _report(args: argparse.Namespace) -> None:
    from diffalign.eval import report

    print(report.write(args.run))


def _list(args: argparse.Namespace) -> None:
    from diffalign import catalogue

    for kind, entries in catalogue.everything().items():
        print(f"{kind}:")
        width = max(map(len, entries), default=0)
        for name, summary in entries.items():
            print(f"  {name:{width}}  {summary}".rstrip())


def _schema(args: argparse.Namespace) -> None:
    from diffalign import config_help

    print(json.dumps(config_help.schema(), indent=2))
