"""The one training loop: rollout -> rewards -> advantages -> losses -> step, for every algorithm."""

from __future__ import annotations

import math
import resource
import sys
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffalign import evaluation, rewards
from diffalign.advantages._statistics import combined
from diffalign.clock import Clock
from diffalign.config import Config
from diffalign.curriculums import k_repeat
from diffalign.eval import report
from diffalign.interrupt import Interrupt
from diffalign.knobs import reworded
from diffalign.overlap import Early
from diffalign.rewards import Lesson, shaped
from diffalign.rollout import collect, sample_seed
from diffalign.run import Run, export, prepare, save
from diffalign.types import RewardOutput, Rollout, UserError
from diffalign.update import update
from diffalign.writing import writing

EXAMPLES = 12  # training images sent to trackers at every evaluation
INVALID = 0.2  # share of the images above which a reward that cannot score them stops the run
GROUP = 2**31  # the image number whose seed is that of the noise a group shares
SHOWN = {  # metric -> (its name in the progress line, format)
    "grad_norm": ("grad", ".2g"),
    "kl": ("kl", ".2g"),
    "clip_fraction": ("clipped", ".0%"),
    "zero_advantage_groups": ("flat groups", ".0%"),
    "images_per_second": ("images/s", ".1f"),
    "seconds": ("s", ".1f"),
}


def train(config: Config, resume: str | None = None) -> Path:
    """Run to the last epoch and return the run folder. `resume` is 'auto' or a checkpoint folder.

    Ctrl-C (or SIGTERM) ends the run after the epoch under way and saves it; KeyboardInterrupt follows. Raises UserError
    for a folder that already holds a run, a checkpoint that does not fit, a full disk, a small accelerator,
    rewards that never differ, and numbers that are not finite.
    """
    try:
        return _train(config, resume)
    except torch.OutOfMemoryError as error:
        raise UserError(reworded(error, config)) from error


def _train(config: Config, resume: str | None) -> Path:
    run = prepare(config, resume)
    try:
        with Interrupt() as interrupt:
            evaluate_if_due(run)
            while run.epoch < config.trainer.epochs:
                epoch(run)
                stopping = any(gather_object([interrupt.asked]))
                last = run.epoch == config.trainer.epochs
                if stopping or last or (config.checkpoint.every and run.epoch % config.checkpoint.every == 0):
                    save(run)
                if stopping:
                    run.tracker.say(f"stopped after epoch {run.epoch}; continue with --resume auto")
                    raise KeyboardInterrupt
                evaluate_if_due(run)
            if run.accelerator.is_main_process:
                with writing("the trained weights", run.folder):
                    export(run)
                with writing("the report", run.folder):
                    run.tracker.say(report.summary(run.folder)["verdict"])
                    run.tracker.say(f"report: {report.write(run.folder)}")
            run.accelerator.wait_for_everyone()
    finally:
        run.tracker.close()
    return run.folder


def epoch(run: Run) -> None:
    """One rollout and its optimizer steps."""
    config, clock = run.config, Clock(run.pipeline.device)
    began = time.monotonic()
    with Early(run.scorers) as early:
        rollout, first, total = sample(run, clock, early)
        assert rollout.images is not None
        values = turn(run, clock, rollout, first, total, early)
    run.epoch += 1
    seconds = time.monotonic() - began
    values |= {"images_per_second": total / seconds, "seconds": seconds, "memory_gib": peak_memory(run)}
    values |= {f"seconds/{phase}": s for phase, s in clock.seconds.items()}
    run.tracker.log(run.epoch, "train", {k: float(f"{v:.6g}") for k, v in values.items()})
    if config.evaluation.every and run.epoch % config.evaluation.every == 0:
        run.tracker.show(run.epoch, "train/images", list(rollout.images[:EXAMPLES]))
    shown = [f"{name} {values.get(f'reward/{name}', math.nan):.3f}" for name in run.scorers]
    shown += [f"{name} {values[key]:{form}}" for key, (name, form) in SHOWN.items() if key in values]
    run.tracker.advance(f"epoch {run.epoch}/{config.trainer.epochs}  {'  '.join(shown)}")


def turn(run: Run, clock: Clock, rollout: Rollout, first: int, total: int, early: Early) -> dict[str, float]:
    """What the epoch's images are used for: heads that learn, then the generator; returns what to log."""
    config, images = run.config, rollout.images
    assert images is not None
    if not all(gather_object([bool(images.isfinite().all())])):
        raise UserError(
            f"images of epoch {run.epoch + 1} are not finite: training has diverged; resume from an earlier checkpoint "
            "with a lower trainer.lr"
        )
    values, generator = {}, True
    for name, head in run.learners.items():
        with clock("learn"):
            lesson = Lesson(
                run.epoch, images, rollout.prompts, rollout.metadata, rollout.seeds, total,
                config.trainer.micro_batch, run.sum,
            )  # fmt: skip
            trains, logged = head.learn(lesson)
        generator &= trains
        values |= {f"{name}/{key}": value for key, value in logged.items()}
    if not generator:
        return values
    with clock("reward"), torch.no_grad():
        local = {name: scorer for name, scorer in run.scorers.items() if not scorer.reward.remote}
        batch = config.trainer.micro_batch
        outputs = rewards.score(local, images, rollout.prompts, rollout.metadata, batch) | early.outputs()
    values |= advantages(run, rollout, outputs)
    with clock("train"):
        values |= update(run, rollout, first, total)
    for key, sentence in config.algorithm.warnings(values).items():
        run.tracker.warn(key, f"epoch {run.epoch + 1}: {sentence}")
    return values


def peak_memory(run: Run) -> float:
    """GiB that the accelerator's allocator has held at most, or that this process has on a CPU."""
    if run.accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.accelerator.device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20


def sample(run: Run, clock: Clock, early: Early) -> tuple[Rollout, int, int]:
    """This process's share of the epoch's images, the number of its first one, and how many there are in all."""
    t, c, algorithm = run.config.trainer, run.config, run.config.algorithm
    generator = torch.Generator().manual_seed(sample_seed(c.seed, run.epoch, len(run.train_prompts), t.prompts))
    chosen = c.curriculum.draw(len(run.train_prompts), t.prompts, generator, run.states["curriculum"])
    order = k_repeat(chosen, t.images_per_prompt, generator).tolist()
    counts: dict[int, count[int]] = {p: count() for p in chosen.tolist()}
    pairs = [(p, next(counts[p])) for p in order]
    share = torch.arange(len(pairs)).tensor_split(run.accelerator.num_processes)[run.accelerator.process_index].tolist()
    mine = [pairs[i] for i in share]
    shared = torch.tensor([sample_seed(c.seed, run.epoch, p, GROUP) for p, _ in mine])
    with run.memory.acting():
        rollout = collect(
            run.pipeline,
            [run.train_prompts[p] for p, _ in mine],
            torch.tensor([p for p, _ in mine]),
            torch.tensor([sample_seed(c.seed, run.epoch, p, j) for p, j in mine]),
            c.sampling,
            algorithm.kept(c.sampling.steps, c.seed, run.epoch),
            t.micro_batch,
            shared if c.sampling.shared_noise else None,
            algorithm.stochastic(c.sampling.steps, c.seed, run.epoch),
            clock,
            early.submit,
        )
    return rollout, share[0] if share else 0, len(pairs)


def advantages(run: Run, rollout: Rollout, outputs: dict[str, RewardOutput]) -> dict[str, float]:
    """Set the advantages from the rewards of all processes; returns what to log of them."""
    rollout.rewards = {name: outputs[name].scores for name in run.scorers}
    logged = invalid(run, outputs)
    method = run.config.advantage
    by_name = {name: s.reward for name, s in run.scorers.items()}
    mine = {"group": rollout.group.cpu(), **{name: r.cpu() for name, r in rollout.rewards.items()}}
    mine[""] = rollout.x0.float().flatten(1).square().mean(1).sqrt().cpu()
    parts: list[dict[str, Tensor]] = gather_object([mine])
    every = {name: torch.cat([part[name] for part in parts]) for name in mine}
    group, x0_norm = every.pop("group"), every.pop("")
    if all(bool(r.isnan().all()) for r in every.values()):
        raise UserError(
            f"no reward applies to any of the {len(group)} images of epoch {run.epoch + 1}; check that the prompt set "
            "carries the metadata they need"
        )
    shaped_rewards = {name: shaped(by_name[name], r) for name, r in every.items()}
    weights = {name: reward.weight for name, reward in by_name.items()}
    values = method(shaped_rewards, weights, group, run.states["advantage"])
    run.config.curriculum.learn(group, values, combined(shaped_rewards, weights, group), run.states["curriculum"])
    values = values.nan_to_num(0.0).clamp(-method.clip, method.clip)
    first = sum(len(part["group"]) for part in parts[: run.accelerator.process_index])
    rollout.advantages = values[first : first + len(rollout)].float().to(rollout.x0.device)
    _, row = group.unique(return_inverse=True)
    largest = values.new_zeros(int(row.max()) + 1).scatter_reduce_(0, row, values.abs(), "amax")
    logged |= {"zero_advantage_groups": float((largest == 0).double().mean()), "x0_norm": float(x0_norm.mean())}
    spread = {}
    for name, r in every.items():
        valid = r[~r.isnan()].double()
        if len(valid):
            spread[name] = float(valid.std(correction=0))
            logged |= {f"reward/{name}": float(valid.mean()), f"reward/{name}_std": spread[name]}
        if len(valid) < len(r):
            logged[f"applies/{name}"] = len(valid) / len(r)
    run.watch.rewards(run.epoch + 1, spread, bool((largest == 0).all()))
    return logged


def invalid(run: Run, outputs: dict[str, RewardOutput]) -> dict[str, float]:
    """Share of the images that a reward could not score, of those it applies to; above the limit the run stops."""
    mine = {}
    for name, output in outputs.items():
        assert output.valid is not None
        reasons = [e for e in output.extra.get("error", []) if e is not None]
        mine[name] = (int((~output.valid).sum()), int((~output.scores.isnan()).sum()), reasons[:1])
    logged = {}
    every = gather_object([mine])
    for name in run.scorers:
        failed, scored = (sum(part[name][k] for part in every) for k in (0, 1))
        reasons = [reason for part in every for reason in part[name][2]]
        if failed:
            logged[f"invalid/{name}"] = failed / (failed + scored)
        if failed > INVALID * (failed + scored):
            raise UserError(
                f"reward '{name}' could not score {failed} of the {failed + scored} images of epoch {run.epoch + 1}, "
                f"more than {INVALID:.0%}: {reasons[0] if reasons else 'it gave no reason'}; the last checkpoint stays"
            )
    return logged


def evaluate_if_due(run: Run) -> None:
    """Score the test prompts with the averaged weights, unless this epoch's scores are there; 0 is before training."""
    c, began = run.config, time.monotonic()
    every, last = c.evaluation.every, run.epoch == c.trainer.epochs
    due = every and (last or run.epoch % every == 0) and not (run.folder / "eval" / f"{run.epoch:04d}.json").exists()
    if not gather_object([due])[0]:  # as the main process sees the folder
        return
    with run.ema.applied() if run.ema is not None else nullcontext():
        samples, images = evaluation.evaluate(
            run.pipeline, run.test_prompts, c.evaluation.images_per_prompt, c.evaluation_sampling, run.eval_scorers,
            c.seed, c.trainer.micro_batch, run.accelerator,
        )  # fmt: skip
    values = evaluation.means(samples)
    run.tracker.log(run.epoch, "eval", values | {"seconds": time.monotonic() - began})
    if run.accelerator.is_main_process:
        with writing(f"the evaluation of epoch {run.epoch}", run.folder, rescue=lambda: save(run)):
            evaluation.write(run.folder, run.epoch, samples, images, c.evaluation.steps, began)
        run.tracker.show(run.epoch, "eval/images", images)
    shown = "  ".join(f"{name.removeprefix('reward/')} {value:.3f}" for name, value in values.items())
    run.tracker.say(f"held-out, epoch {run.epoch}: {shown or 'no reward applies to these prompts'}")
