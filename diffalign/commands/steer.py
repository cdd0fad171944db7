"""Steer images of prompts towards a reward while they are sampled, without training."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import few_steps, prompts, reward_entries
from diffalign.commands import _common
from diffalign.config_help import validated
from diffalign.few_steps import FewSteps
from diffalign.listing import summaries
from diffalign.pipelines import few_steps as remembered
from diffalign.sections import Sampling
from diffalign.steering import Steering, parse_kernel, parse_options, resolve
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.steering._problem import Spent

COMPARE = ("base", "bon")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list-methods", action="store_true", help="say what methods and options there are, and stop")
    parser.add_argument("--model", help="embedded name such as tiny-sd3, diffusers folder or hub id")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    source.add_argument("--prompts", metavar="FILE", help="text file, JSONL, or shapes-train or shapes-test")
    parser.add_argument("--first", type=int, metavar="N", help="steer the first N prompts of the file only")
    parser.add_argument("--reward", action="append", metavar="NAME[:WEIGHT]", help=reward_entries.HELP)
    parser.add_argument("--judge", action="append", metavar="NAME", help="rewards that score the result, not steer it")
    parser.add_argument(
        "--method",
        default="fk",
        metavar="NAME[:OPTION=VALUE,...]",
        help="such as fk (default) or dts_star:rollouts=64; --list-methods names them and their options",
    )
    parser.add_argument("--particles", type=int, metavar="K", help="images that are denoised together")
    parser.add_argument("--lam", metavar="X", help="strength of the reward, or auto: 3 / std of plain samples' rewards")
    parser.add_argument("--resample-at", metavar="I,J,...", help="steps at which particles are weighed, auto or all")
    parser.add_argument("--select", choices=("best", "sample", "all"), default="best", help="default best")
    parser.add_argument("--budget-nfe", type=int, metavar="N", help="network forwards a prompt may cost")
    parser.add_argument("--budget-seconds", type=float, metavar="S", help="seconds a prompt may take")
    parser.add_argument("--kernel", metavar="KIND:ETA", help="such as flow_sde:0.7, ddim:1 or ode")
    parser.add_argument("--window", metavar="FIRST,LAST", help="steps with noise (default: all but the last step)")
    parser.add_argument(
        "--compare",
        default="base,bon",
        metavar="WHAT",
        help="base: one plain image; bon: best of N at the same cost; or none (default base,bon)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="a new folder, or one to go on in with --resume; default runs/steer"
    )
    parser.add_argument("--resume", action="store_true", help="keep the prompts that are done in --out")
    parser.add_argument("--dry-run", action="store_true", help="say what a prompt would cost, and stop")
    few_steps.arguments(parser)
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="guidance scale; default 1 for SD3 and 3.5, which is none, and the pipeline's own for others",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT")
    parser.add_argument("--height", type=int, metavar="PX", help="default: what the model was trained at")
    parser.add_argument("--width", type=int, metavar="PX")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="images in one forward (default 8)")
    parser.add_argument("--lora", metavar="DIR", help="LoRA in the diffusers format, or a run folder that holds lora/")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", help="such as cpu or cuda:1")


def run(args: argparse.Namespace) -> None:
    if args.list_methods:
        print("\n".join(described(name, summary) for name, summary in summaries("diffalign.steering").items()))
        return
    for option, value in (("steps", args.steps), ("micro-batch", args.micro_batch), ("first", args.first)):
        if value is not None and value < 1:
            raise UserError(f"steer: --{option} must be at least 1, got {value}")
    if args.seed < 0:
        raise UserError(f"steer: --seed must be 0 or more, got {args.seed}")
    method, compare = chosen_method(args), chosen_comparison(args)
    rewards = reward_entries.parse_fixed(args.reward) if args.reward else []
    judges = reward_entries.parse_fixed(args.judge) if args.judge else []
    lora = None if args.lora is None else lora_folder(args.lora)
    sampling, kernel = chosen_steps(args, lora)
    spent = rehearsed(args, method, sampling, kernel)  # finds what does not fit before anything is loaded or written
    if args.dry_run:
        _common.quiet()
        dry_run(args, method, sampling.steps, spent)
        return
    if args.resume and args.out is None:
        raise UserError("steer: --resume needs --out, the folder to go on in")
    for option in ("model", "reward"):
        if getattr(args, option) is None:
            raise UserError(f"steer: --{option} is missing; add it, or see `diffalign steer --help`")
    wanted = chosen_prompts(args)
    given = {
        "guidance_scale": args.guidance,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
    }
    call = {k: v for k, v in given.items() if v is not None}
    settings = {
        **{k: getattr(args, k) for k in ("model", "revision", "dtype", "window", "seed")},
        "kernel": kernel,
        "steps": sampling.steps,
        "timesteps": None if sampling.timesteps is None else list(sampling.timesteps),
        "lora": lora,
        "method": method.model_dump(mode="json"),
        "rewards": [r.model_dump(mode="json") for r in rewards],
        "judges": [r.model_dump(mode="json") for r in judges],
        "compare": compare,
        "arguments": call,
    }
    _common.quiet()
    from diffalign import adapters, pipelines, steering_run
    from diffalign.devices import choose
    from diffalign.pipelines.any import AnyPipeline
    from diffalign.rewards import build
    from diffalign.steer import Steer

    folder = free_folder() if args.out is None else Path(args.out)
    done = steering_run.finished(folder, settings, wanted, args.resume)
    pipeline: Any = pipelines.load(args.model, args.revision, args.dtype, args.device, steering=True)
    if lora is not None and isinstance(pipeline, AnyPipeline):
        pipeline.load_lora(lora)
    elif lora is not None:
        adapters.load_lora(pipeline, lora)
    pipeline.few_steps = FewSteps.of(sampling)
    steer = Steer(pipeline, rewards, method, kernel, chosen_window(args.window), args.micro_batch)
    scorers = build(judges, choose(args.device))
    steps = sampling.steps if sampling.timesteps is None else None
    job = steering_run.Job(folder, wanted, steps, args.seed, compare, scorers, call, args.micro_batch)
    steering_run.begin(job, settings, done)
    steering_run.run(job, steer, done)


def free_folder() -> Path:
    """runs/steer, or the first runs/steer-N that is not there."""
    names = ("steer" if k == 1 else f"steer-{k}" for k in itertools.count(1))
    return next(folder for folder in (Path("runs", name) for name in names) if not folder.exists())


def chosen_comparison(args: argparse.Namespace) -> list[str]:
    words = [] if args.compare == "none" else [word.strip() for word in args.compare.split(",")]
    if strange := [word for word in words if word not in COMPARE]:
        raise UserError(f"steer: --compare knows base, bon and none, not '{strange[0]}'")
    return words


def described(name: str, summary: str) -> str:
    """A method's name, its summary, and its options with their defaults."""
    lines = [f"{name}: {summary}"]
    for option, field in type(resolve(name)).model_fields.items():
        if option not in ("name", "select", "budget_nfe", "budget_seconds"):
            lines.append(f"  {option} = {field.default}: {' '.join((field.description or '').split())}")
    return "\n".join(lines)


def chosen_method(args: argparse.Namespace) -> Steering:
    """The method with the options of its own text, then those that have a flag of their own."""
    options = {"select": args.select, **parse_options(args.method, f"--method {args.method!r}")}
    points = args.resample_at
    if points is not None and points not in ("auto", "all"):
        points = tuple(whole_numbers(points, "--resample-at"))
    lam = args.lam
    if lam is not None and lam != "auto":
        try:
            lam = float(lam)
        except ValueError:
            raise UserError(f"--lam {lam!r} is no number; give one, or auto") from None
    flags = {
        "particles": args.particles,
        "lam": lam,
        "resample_at": points,
        "budget_nfe": args.budget_nfe,
        "budget_seconds": args.budget_seconds,
    }
    method = resolve({**options, **{k: v for k, v in flags.items() if v is not None}})
    if dict(method).get("particles") == 1 and method.stochastic:
        raise UserError(
            f"one particle leaves '{method.name}' nothing to choose from; take --particles 2 or more, or "
            "--method best_of_n for plain sampling"
        )
    return method


def chosen_prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.prompt is None and args.prompts is None:
        raise UserError("steer: give a --prompt, or --prompts FILE")
    if args.prompt and not all(p.strip() for p in args.prompt):
        raise UserError("a prompt is empty; write what the image should show")
    wanted = prompts.load(args.prompts) if args.prompts is not None else [{"prompt": p} for p in args.prompt]
    return wanted[: args.first]


def chosen_window(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    ends = whole_numbers(text, "--window")
    if len(ends) != 2 or ends[0] > ends[1]:
        raise UserError(f"--window {text!r} is no span of steps; write the first and the last, such as 0,12")
    return ends[0], ends[1]


def whole_numbers(text: str, option: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r} is no list of whole numbers, such as 6,10,14") from None


def lora_folder(path: str) -> str:
    """A run folder stands for the LoRA in it."""
    inner = Path(path, "lora")
    return str(inner) if inner.is_dir() else path


def chosen_steps(args: argparse.Namespace, lora: str | None) -> tuple[Sampling, str | None]:
    """The grid with its plain noise, and the kernel if anything but the method decides it: given, or by the model."""
    if args.kernel is not None and args.eta is not None:
        raise UserError("steer: --kernel has an eta of its own, as in cps:0.9; leave --eta out")
    known = None if args.model is None else remembered(args.model, lora)
    sampling = validated(Sampling, few_steps.asked(args, known, "steer"), "steer")
    few = FewSteps.of(sampling)
    if few is not None:
        return sampling, args.kernel or few.kernel
    return sampling, args.kernel if args.eta is None else few_steps.kernel(args.eta)


def dry_run(args: argparse.Namespace, method: Steering, steps: int, spent: Spent) -> None:
    """What a prompt would cost, without loading anything."""
    guided = args.guidance is not None and args.guidance != 1
    plain = steps * (2 if guided else 1)
    print(f"{method.name}, {steps} steps, {'guided' if guided else 'without guidance'}: for each prompt")
    print(f"  network forwards  {spent.nfe} ({spent.nfe / plain:.3g} plain images)")
    if spent.gradients:
        print(f"  differentiated    {spent.gradients}")
    print(f"  images decoded    {spent.decodes}, and those that are returned once more")
    print(f"  images scored     {spent.reward_calls}")
    if dict(method).get("lam") == "auto":
        print(f"  and once for lam  {8 * plain} forwards for each of the first 4 prompts")
    for word in chosen_comparison(args):
        print(f"  beside it, {word:6} {plain if word == 'base' else spent.nfe // plain * plain} forwards")
    if method.budget_seconds is not None:
        print(f"  but at most about {method.budget_seconds:g} seconds decide, which this cannot foresee")
    print_memory(args)


def rehearsed(args: argparse.Namespace, method: Steering, sampling: Sampling, kernel: str | None) -> Spent:
    from diffalign.steering._rehearsal import rehearse

    guided = args.guidance is not None and args.guidance != 1
    parsed = None if kernel is None else parse_kernel(kernel)
    return rehearse(method, sampling.grid, 2 if guided else 1, parsed, chosen_window(args.window))


def print_memory(args: argparse.Namespace) -> None:
    from diffalign import sizes
    from diffalign.estimate import BYTES
    from diffalign.sections import ModelRef

    found = None if args.model is None else sizes.find(ModelRef(path=args.model, revision=args.revision))
    if found is None:
        print("  memory            unknown: name an SD3 model that is on this machine with --model")
        return
    weights = sum(found.parts.values()) * BYTES[args.dtype]
    print(f"  memory            {weights / 2**30:.2f} GiB of weights, and the forward of {args.micro_batch} images")
