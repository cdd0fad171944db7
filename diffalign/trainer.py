"""The one training loop: rollout -> rewards -> advantages -> losses -> step, for every algorithm."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffalign import evaluation, rewards
from diffalign.algorithms import Study
from diffalign.clock import Clock
from diffalign.config import Config
from diffalign.curriculums import k_repeat
from diffalign.eval import report
from diffalign.images import grid, save_png
from diffalign.interrupt import Interrupt
from diffalign.judging import advantages
from diffalign.knobs import reworded
from diffalign.overlap import Early
from diffalign.rewards import Lesson
from diffalign.rollout import collect, sample_seed, shared_noise_seed
from diffalign.run import Run, by_main, export, prepare, save, write_checkpoint
from diffalign.types import Rollout, Stopped, UserError
from diffalign.update import TrainedPolicy, update
from diffalign.writing import writing

EXAMPLES = 12  # training images sent to trackers at every evaluation
GROUP = 2**31  # the image number whose seed is that of the noise a group shares
SHOWN = {  # metric -> (its name in the progress line, format)
    "grad_norm": ("grad", ".2g"),
    "fake_loss": ("fake score", ".3g"),
    "matching": ("matching", ".3g"),
    "kl": ("kl", ".2g"),
    "clip_fraction": ("clipped", ".0%"),
    "zero_advantage_groups": ("flat groups", ".0%"),
    "images_per_second": ("images/s", ".1f"),
    "seconds": ("s", ".1f"),
}


class Cut(Exception):
    """The run was asked to stop while it was sampling."""


def train(config: Config, resume: str | None = None) -> Path:
    """Run to the last epoch and return the run folder. `resume` is 'auto' or a checkpoint folder.

    Ctrl-C (or SIGTERM) ends the run after the epoch under way and saves it; KeyboardInterrupt follows. Raises UserError
    for a folder that already holds a run, a checkpoint that does not fit, a full disk, a small accelerator,
    rewards that never differ, and numbers that are not finite.
    """
    try:
        return _train(config, resume)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(reworded(error, config)) from error
    except RuntimeError as error:  # as a CPU's allocator says it
        if "DefaultCPUAllocator" in str(error):
            raise UserError(reworded(error, config)) from error
        raise


def _train(config: Config, resume: str | None) -> Path:
    run = prepare(config, resume)
    try:
        with Interrupt() as interrupt:
            evaluate_if_due(run)
            while run.epoch < config.trainer.epochs:
                with saved_if_stopped(run):
                    stopping = asked(interrupt) or not epoch(run, interrupt) or asked(interrupt)
                last = run.epoch == config.trainer.epochs
                if run.epoch and (stopping or last or due(config.checkpoint.every, run.epoch)):
                    save(run)
                if stopping:
                    run.tracker.say(f"stopped after epoch {run.epoch}; continue with --resume auto")
                    raise KeyboardInterrupt
                evaluate_if_due(run)
            with by_main(run) as main:
                if main:
                    with writing("the trained weights", run.folder):
                        export(run)
                    with writing("the report", run.folder):
                        run.tracker.say(report.summary(run.folder)["verdict"])
                        run.tracker.say(f"report: {report.write(run.folder)}")
    finally:
        run.tracker.close()
    return run.folder


@contextmanager
def saved_if_stopped(run: Run) -> Iterator[None]:
    try:
        yield
    except Stopped:
        if run.between and run.epoch:
            save(run)
        raise


def asked(interrupt: Interrupt) -> bool:
    """Whether any process was asked to stop."""
    return any(gather_object([interrupt.asked]))


def due(every: int, epoch: int) -> bool:
    return bool(every) and epoch % every == 0


def epoch(run: Run, interrupt: Interrupt) -> bool:
    """One rollout and its optimizer steps; False if the run was asked to stop before the rollout was complete.

    `accelerate launch` kills a run 30 seconds after it passed Ctrl-C on, so sampling is broken off.
    """
    config, clock = run.config, Clock(run.pipeline.device)
    began = time.monotonic()
    with Early(run.scorers) as early:
        try:
            sampled = sample(run, clock, early, interrupt)
        except Cut:
            sampled = None
        if any(gather_object([sampled is None])):
            return False
        assert sampled is not None
        rollout, first, total = sampled
        values = turn(run, clock, rollout, first, total, early)
    run.epoch += 1
    run.between = True
    seconds = time.monotonic() - began
    values |= {"images_per_second": total / seconds, "seconds": seconds, "memory_gib": peak_memory(run)}
    values |= {f"seconds/{phase}": s for phase, s in clock.seconds.items()}
    with by_main(run):
        run.tracker.log(run.epoch, "train", {k: float(f"{v:.6g}") for k, v in values.items()})
    every = config.evaluation.every or config.checkpoint.every
    if rollout.images is not None and (due(every, run.epoch) or run.epoch == config.trainer.epochs):
        show(run, list(rollout.images[:EXAMPLES]))
    rewarded = {name: values[key] for name in run.scorers if (key := f"reward/{name}") in values}
    shown = [f"{name} {value:.3f}" for name, value in rewarded.items()]
    shown += [f"{name} {values[key]:{form}}" for key, (name, form) in SHOWN.items() if key in values]
    run.tracker.advance(f"epoch {run.epoch}/{config.trainer.epochs}  {'  '.join(shown)}")
    return True


def show(run: Run, images: list[Tensor]) -> None:
    """Some training images, for the trackers and in `images/train_NNNN.png`."""
    run.tracker.show(run.epoch, "train/images", images)
    with by_main(run) as main:
        if main:
            path = run.folder / "images" / f"train_{run.epoch:04d}.png"
            with writing(f"the images of epoch {run.epoch}", run.folder):
                path.parent.mkdir(exist_ok=True)
                save_png(grid(torch.stack(images), 6), path)


def turn(run: Run, clock: Clock, rollout: Rollout, first: int, total: int, early: Early) -> dict[str, float]:
    """What the epoch's images are used for: heads that learn, then the generator; returns what to log."""
    config = run.config
    made = rollout.x0 if rollout.images is None else rollout.images
    if not all(gather_object([bool(made.isfinite().all())])):
        raise Stopped(
            f"images of epoch {run.epoch + 1} are not finite: training has diverged; resume from an earlier checkpoint "
            "with a lower trainer.lr"
        )
    values: dict[str, float] = {}
    with clock("learn"):
        study = Study(
            config.seed, run.epoch, TrainedPolicy.of(run), rollout, total, config.trainer.micro_batch, run.sum
        )
        generator, logged = run.memory.learn(study)
    run.between = run.between and not logged  # what learns beside the model has taken a step
    values |= logged
    for name, head in run.learners.items():
        with clock("learn"):
            assert rollout.images is not None
            lesson = Lesson(
                run.epoch, rollout.images, rollout.prompts, rollout.metadata, rollout.seeds, total,
                config.trainer.micro_batch, run.sum,
            )  # fmt: skip
            trains, logged = head.learn(lesson)
        run.between = False
        generator &= trains
        values |= {f"{name}/{key}": value for key, value in logged.items()}
    if not generator:
        return values
    if config.algorithm.rewarded:
        assert rollout.images is not None
        with clock("reward"), torch.no_grad():
            local = {name: scorer for name, scorer in run.scorers.items() if not scorer.reward.remote}
            batch = config.trainer.micro_batch
            outputs = rewards.score(local, rollout.images, rollout.prompts, rollout.metadata, batch) | early.outputs()
        values |= advantages(run, rollout, outputs)
    else:
        rollout.advantages = rollout.x0.new_zeros(len(rollout))
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


def sample(run: Run, clock: Clock, early: Early, interrupt: Interrupt) -> tuple[Rollout, int, int]:
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

    def decoded(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        if interrupt.asked:
            raise Cut
        early.submit(images, prompts, metadata)

    tied = {
        i: torch.tensor([shared_noise_seed(run.train_prompts[p]["prompt"], i, c.seed, run.epoch) for p, _ in mine])
        for i in algorithm.tied(c.sampling.steps, c.seed, run.epoch)
    }
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
            decoded,
            algorithm.until(c.sampling.steps, c.seed, run.epoch),
            tied,
            algorithm.rewarded,
        )
    return rollout, share[0] if share else 0, len(pairs)


def evaluate_if_due(run: Run) -> None:
    """Score the test prompts with the averaged weights, unless this epoch's scores are there; 0 is before training."""
    c, began = run.config, time.monotonic()
    every, last = c.evaluation.every, run.epoch == c.trainer.epochs
    due = every and (last or run.epoch % every == 0) and not (run.folder / "eval" / f"{run.epoch:04d}.json").exists()
    if not gather_object([due])[0]:  # as the main process sees the folder
        return
    with saved_if_stopped(run), run.ema.applied() if run.ema is not None else nullcontext():
        samples, images, invalid = evaluation.evaluate(
            run.pipeline, run.test_prompts, c.evaluation.images_per_prompt, c.evaluation_sampling, run.eval_scorers,
            c.seed, c.trainer.micro_batch, run.accelerator,
        )  # fmt: skip
    values = evaluation.means(samples)
    with by_main(run) as main:
        run.tracker.log(run.epoch, "eval", values | invalid | {"seconds": time.monotonic() - began})
        if main:
            with writing(f"the evaluation of epoch {run.epoch}", run.folder, rescue=lambda: write_checkpoint(run)):
                evaluation.write(run.folder, run.epoch, samples, images, c.evaluation.steps, began)
    if run.accelerator.is_main_process:
        run.tracker.show(run.epoch, "eval/images", images)
    shown = "  ".join(f"{name.removeprefix('reward/')} {value:.3f}" for name, value in values.items())
    run.tracker.say(f"held-out, epoch {run.epoch}: {shown or 'no reward applies to these prompts'}")
