"""Beside the original: images per second and seconds per training step of yifan123/flow_grpo and of this trainer.

    git clone https://github.com/yifan123/flow_grpo && git -C flow_grpo checkout 9745241
    OMP_NUM_THREADS=2 python benchmarks/vs_flow_grpo.py --flow-grpo flow_grpo

Both programs get the same model, prompts, batch and threads, and take turns. First comes a check that their log-probs
and gradients are ours on the same tensors, so that equal work is compared. Prints markdown; see vs_flow_grpo.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rollout import Stopwatch, table
from torch import Tensor
from vs_flow_grpo_programs import ALGORITHM, DEFAULT, GROUP, SETTINGS, SIZE, STEPS, Ours, ProcessorTime, Setting, Theirs

from diffalign import prompts
from diffalign.types import Rollout, UserError

MODEL = "tiny-sd3"
NEEDED = "flow_grpo/diffusers_patch/sd3_pipeline_with_logprob_fast.py"
EPOCH = 128  # images, as in the preset shapes_demo
AIM = 1.5


def same_lora(theirs: Theirs, ours: Ours) -> tuple[list[Tensor], list[Tensor]]:
    """Put the same random LoRA into both and return its parameters; a fresh one would change no output."""
    names = {name.removeprefix("base_model.model."): p for name, p in theirs.transformer.named_parameters()}
    mine = {name: p for name, p in ours.network.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
            names[name].copy_(p)
    return [names[name] for name in mine], list(mine.values())


def as_rollout(samples: dict[str, Tensor], ours: Ours, texts: list[str], setting: Setting) -> Rollout:
    """Transitions that their sampler stored, in our form."""
    sigmas, used = ours.pipeline.sigmas(STEPS, SIZE, SIZE), setting.trained
    first = int((1000 * sigmas - samples["timesteps"][0, 0]).abs().argmin())
    return Rollout(
        prompts=texts,
        metadata=[{"prompt": text} for text in texts],
        group=torch.arange(len(texts)) // GROUP,
        seeds=torch.arange(len(texts)),
        cond=ours.pipeline.encode(texts),
        sigmas=sigmas,
        kept=torch.arange(first, first + used),
        x0=samples["next_latents"][:, -1].float(),
        states=torch.stack([samples["latents"][:, :used], samples["next_latents"][:, :used]], 2).float(),
        log_probs=samples["log_probs"][:, :used],
    )


def differences(theirs: Theirs, ours: Ours, texts: list[str], setting: Setting) -> dict[str, str]:
    """Largest differences between the programs on one rollout of theirs."""
    torch.manual_seed(0)
    their_parameters, our_parameters = same_lora(theirs, ours)
    samples = theirs.rollout(texts, setting, len(texts))
    rollout = as_rollout(samples, ours, texts, setting)
    assert rollout.states is not None and rollout.log_probs is not None
    with torch.no_grad():
        ours_now = ALGORITHM.behaviour(ours.policy(setting), rollout)["log_prob"]
        theirs_now = torch.stack([theirs.log_prob(samples, k, setting) for k in range(setting.trained)], 1)
    advantages = torch.linspace(-1, 1, len(texts))
    theirs.backward(samples, advantages, setting, len(texts), lambda: None)
    ours.backward(rollout, advantages, setting, len(texts))
    one, other = (torch.cat([p.grad.flatten() for p in ps]) for ps in (their_parameters, our_parameters))
    theirs.optimizer.zero_grad()
    ours.optimizer.zero_grad()
    return {
        "setting": setting.name,
        "largest log-prob": f"{float(rollout.log_probs.abs().max()):.2g}",
        "max log-prob difference": f"{float((ours_now - theirs_now).abs().max()):.0e}",
        "text embeddings": f"{float((rollout.cond.rows()['embeds'] - samples['embeds']).abs().max()):.0e}",
        "gradient (relative)": f"{float((one - other).norm() / other.norm()):.0e}",
    }


class Row:
    """One program at one setting and precision, and the seconds it took each time."""

    def __init__(self, program: Theirs | Ours, dtype: str, setting: Setting) -> None:
        self.program, self.dtype, self.setting = program, dtype, setting
        self.rollout: list[dict[str, float]] = []
        self.step: list[dict[str, float]] = []

    def run(self, texts: list[str], batch: int) -> None:
        program: Any = self.program
        watch = program.watch
        watch.seconds()
        with watch.span("total"):
            samples = program.rollout(texts, self.setting, batch)
        self.rollout.append(watch.seconds())
        with watch.span("total"):
            program.train(samples, torch.linspace(-1, 1, len(texts)), self.setting, batch)
        self.step.append(watch.seconds())

    def median(self, part: str) -> float:
        """Seconds of a rollout, of a step, or of both together."""
        both = [(r["total"], s["total"]) for r, s in zip(self.rollout, self.step, strict=True)]
        return statistics.median({"rollout": r, "step": s, "epoch": r + s}[part] for r, s in both)

    def timing(self, images: int) -> dict[str, str]:
        rates = [images / r["total"] for r in self.rollout]
        steps = [s["total"] for s in self.step]
        return {
            "setting": self.setting.name,
            "program": self.program.program,
            "dtype": self.dtype,
            "trained steps": str(self.setting.trained),
            "images/s": f"{images / self.median('rollout'):.3g} ({min(rates):.3g} to {max(rates):.3g})",
            "s/step": f"{self.median('step'):.3g} ({min(steps):.3g} to {max(steps):.3g})",
            f"s/epoch of {EPOCH}": f"{self.median('epoch') * EPOCH / images:.3g}",
        }

    def shares(self) -> dict[str, str]:
        """Medians in milliseconds: where the time of a rollout and of a training step goes."""

        def ms(spans: Sequence[dict[str, float]], *names: str) -> str:
            taken = [s["total"] - sum(s.get(n, 0.0) for n in names[1:]) if names[0] == "rest" else s.get(names[0], 0.0)
                     for s in spans]  # fmt: skip
            return f"{1000 * statistics.median(taken):.0f}"

        return {
            "setting": self.setting.name,
            "program": self.program.program,
            "dtype": self.dtype,
            "rollout: encode": ms(self.rollout, "encode"),
            "transformer": ms(self.rollout, "forward"),
            "VAE": ms(self.rollout, "decode"),
            "rest": ms(self.rollout, "rest", "encode", "forward", "decode"),
            "step: forward": ms(self.step, "forward"),
            "backward": ms(self.step, "backward"),
            "the rest": ms(self.step, "rest", "forward", "backward"),
        }


def ratios(rows: Sequence[Row]) -> list[dict[str, str]]:
    """How many times faster each row of ours is than theirs: rollout / step / epoch."""
    ours = [row for row in rows if isinstance(row.program, Ours)]

    def times(old: Row, new: Row) -> str:
        parts = {part: old.median(part) / new.median(part) for part in ("rollout", "step", "epoch")}
        said = " / ".join(f"{value:.2f}" for value in parts.values())
        return f"**{said}**" if min(parts.values()) >= AIM else said

    lines = []
    for row in rows:
        if isinstance(row.program, Theirs):
            like = {mine.dtype: mine for mine in ours if mine.setting == row.setting}
            lines.append({
                "setting": row.setting.name,
                "flow_grpo in": row.dtype,
                "ours, same dtype": times(row, like[row.dtype]),
                "ours, bf16": times(row, like["bf16"]),
                f"ours, {DEFAULT.name} (bf16)": times(row, ours[-1]),
            })  # fmt: skip
    return lines


def compare(options: argparse.Namespace) -> None:
    texts = [p["prompt"] for p in prompts.load("shapes-train")[: options.images // GROUP] for _ in range(GROUP)]
    watch = ProcessorTime if options.clock == "cpu" else Stopwatch
    theirs = {dtype: Theirs(MODEL, dtype, watch("cpu")) for dtype in ("fp32", "bf16")}
    ours = {dtype: Ours(MODEL, dtype, watch("cpu")) for dtype in ("fp32", "bf16")}
    for program in (*theirs.values(), *ours.values()):
        program.watch.forwards(program.network, "forward")
        program.watch.forwards(program.pipe.vae.decoder, "decode")
        program.watch.forwards(program.pipe.text_encoder, "encode")
        program.watch.forwards(program.pipe.text_encoder_2, "encode")
    print(f"\nDifferences on the same tensors, {GROUP} images, fp32:\n")
    print(table([differences(theirs["fp32"], ours["fp32"], texts[:GROUP], setting) for setting in SETTINGS]))
    if not options.repeats:
        return
    both = [(dtype, program) for dtype in theirs for program in (theirs[dtype], ours[dtype])]
    rows = [Row(program, dtype, setting) for setting in SETTINGS for dtype, program in both]
    rows.append(Row(ours["bf16"], "bf16", DEFAULT))
    began = time.monotonic()
    for row in rows:  # warm-up: first calls are slow
        row.run(texts[:GROUP], options.batch)
        row.rollout, row.step = [], []
    for repeat in range(options.repeats):
        for row in rows if repeat % 2 == 0 else reversed(rows):
            row.run(texts, options.batch)
    print(f"\nMedian of {options.repeats} turns (least to most), {time.monotonic() - began:.0f} s in all:\n")
    print(table([row.timing(options.images) for row in rows]))
    print(f"\nTimes faster than flow_grpo, rollout / step / epoch; bold where all reach {AIM}:\n")
    print(table(ratios(rows)))
    print("\nWhere the time of a turn goes, in milliseconds:\n")
    print(table([row.shares() for row in rows]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed beside yifan123/flow_grpo.")
    parser.add_argument("--flow-grpo", required=True, type=Path, help="a checkout of yifan123/flow_grpo")
    parser.add_argument("--images", type=int, default=32, help=f"images of a turn, a multiple of {GROUP}")
    parser.add_argument("--batch", type=int, default=32, help="images in a forward pass")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each row; 0 only checks equality")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    return parser.parse_args()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    options = arguments()
    try:
        if not (options.flow_grpo / NEEDED).is_file():
            raise UserError(f"'{options.flow_grpo}' has no {NEEDED}; clone yifan123/flow_grpo at 9745241")
        if options.images < GROUP or options.images % GROUP or options.images % options.batch:
            raise UserError(f"--images must be a multiple of {GROUP} and of --batch")
        sys.path.insert(0, str(options.flow_grpo.resolve()))
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "peft"))
        if options.clock == "cpu":
            torch.set_num_threads(1)
        machine = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        print(
            f"{datetime.date.today()}, {machine}; {packages}; {options.images} images, batch {options.batch}, "
            f"{'processor' if options.clock == 'cpu' else 'wall'} time"
        )
        compare(options)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
