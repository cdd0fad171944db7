"""The one training loop: rollout -> rewards -> advantages -> losses -> step, for every algorithm."""

from __future__ import annotations

import random
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign import adapters, evaluation, rewards
from diffalign.advantages import group_advantages, weighted_sum
from diffalign.algorithms import Algorithm
from diffalign.config import Config, Sampling
from diffalign.eval import report
from diffalign.interrupt import Interrupt
from diffalign.rollout import collect, sample_seed
from diffalign.run import Run, export, prepare, save
from diffalign.types import Conditioning, Denoiser, Rollout, UserError


@dataclass(frozen=True)
class TrainedPolicy:
    """The model as an algorithm sees it, with the sampling it was rolled out with; see :class:`algorithms.Policy`."""

    pipeline: Any  # a Pipeline that adapters can work on
    sampling: Sampling
    negative: Conditioning | None

    @property
    def kernel(self) -> str:
        return self.sampling.kernel

    @property
    def eta(self) -> float:
        return self.sampling.eta

    def denoiser(self, cond: Conditioning) -> Denoiser:
        denoiser: Denoiser = self.pipeline.denoiser(cond, self.sampling.guidance, self.negative)
        return denoiser

    def reference(self) -> AbstractContextManager[None]:
        return adapters.reference(self.pipeline)


def train(config: Config, resume: str | None = None) -> Path:
    """Run to the last epoch and return the run folder. `resume` is 'auto' or a checkpoint folder.

    Ctrl-C (or SIGTERM) ends the run after the epoch under way and saves it; KeyboardInterrupt follows. Raises UserError
    for a folder that already holds a run, a checkpoint that does not fit, and numbers that are not finite.
    """
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
                export(run)
                run.tracker.say(report.summary(run.folder)["verdict"])
                run.tracker.say(f"report: {report.write(run.folder)}")
            run.accelerator.wait_for_everyone()
    finally:
        run.tracker.close()
    return run.folder


def epoch(run: Run) -> None:
    """One rollout and one optimizer step."""
    config, began = run.config, time.monotonic()
    algorithm: Algorithm = config.algorithm
    rollout, total = sample(run)
    sampled = time.monotonic()
    assert rollout.images is not None
    if not all(gather_object([bool(rollout.images.isfinite().all())])):
        raise UserError(
            f"images of epoch {run.epoch + 1} are not finite: training has diverged; resume from an earlier checkpoint "
            "with a lower trainer.lr"
        )
    with torch.no_grad():
        rollout.rewards = rewards.score(
            run.scorers, rollout.images, rollout.prompts, rollout.metadata, config.trainer.micro_batch
        )
    values = advantages(run, rollout)
    scored = time.monotonic()
    values |= update(run, algorithm, rollout, total)
    run.epoch += 1
    now = time.monotonic()
    values |= {
        "seconds": now - began,
        "seconds/rollout": sampled - began,
        "seconds/reward": scored - sampled,
        "seconds/train": now - scored,
        "images_per_second": total / (now - began),
    }
    run.tracker.log(run.epoch, "train", {k: float(f"{v:.6g}") for k, v in values.items()})
    shown = "  ".join(f"{name} {values.get(f'reward/{name}', float('nan')):.3f}" for name in run.scorers)
    run.tracker.advance(f"epoch {run.epoch}/{config.trainer.epochs}  {shown}  {now - began:.1f} s")


def sample(run: Run) -> tuple[Rollout, int]:
    """This process's share of the epoch's images, and how many there are over all processes."""
    t, c = run.config.trainer, run.config
    chosen = random.Random(f"prompts {c.seed} {run.epoch}").sample(range(len(run.train_prompts)), t.prompts)
    pairs = [(p, j) for p in chosen for j in range(t.images_per_prompt)]
    share = torch.arange(len(pairs)).tensor_split(run.accelerator.num_processes)[run.accelerator.process_index]
    mine = [pairs[i] for i in share.tolist()]
    with run.memory.acting():
        rollout = collect(
            run.pipeline,
            [run.train_prompts[p] for p, _ in mine],
            torch.tensor([p for p, _ in mine]),
            torch.tensor([sample_seed(c.seed, run.epoch, p, j) for p, j in mine]),
            c.sampling,
            c.algorithm.stochastic(c.sampling.steps, c.seed, run.epoch),
            t.micro_batch,
        )
    return rollout, len(pairs)


def advantages(run: Run, rollout: Rollout) -> dict[str, float]:
    """Set the advantages from the rewards of all processes; returns what to log of them."""
    a, weights = run.config.advantage, {name: s.reward.weight for name, s in run.scorers.items()}
    mine = {"group": rollout.group.cpu(), **{name: r.cpu() for name, r in rollout.rewards.items()}}
    parts: list[dict[str, Tensor]] = gather_object([mine])
    every = {name: torch.cat([part[name] for part in parts]) for name in mine}
    group = every.pop("group")
    total = weighted_sum(every, weights, group)
    if bool(total.isnan().all()):
        raise UserError(
            f"no reward applies to any of the {len(total)} images of epoch {run.epoch + 1}; check that the prompt set "
            "carries the metadata they need"
        )
    values = group_advantages(total, group, a.std, a.ddof, a.eps)
    values = values.nan_to_num(0.0).clamp(-a.clip, a.clip)
    first = sum(len(part["group"]) for part in parts[: run.accelerator.process_index])
    own = values[first : first + len(rollout)]
    rollout.advantages = own.float().to(rollout.x0.device)
    _, row = group.unique(return_inverse=True)
    largest = values.new_zeros(int(row.max()) + 1).scatter_reduce_(0, row, values.abs(), "amax")
    logged = {"zero_advantage_groups": float((largest == 0).double().mean())}
    for name, r in every.items():
        valid = r[~r.isnan()].double()
        if len(valid):
            logged |= {f"reward/{name}": float(valid.mean()), f"reward/{name}_std": float(valid.std(correction=0))}
        if len(valid) < len(r):
            logged[f"applies/{name}"] = len(valid) / len(r)
    return logged


def update(run: Run, algorithm: Algorithm, rollout: Rollout, total: int) -> dict[str, float]:
    """Back-propagate every loss over this process's samples, sum gradients over processes, take one step."""
    c = run.config
    negative = run.pipeline.encode([c.sampling.negative_prompt]) if c.sampling.guidance != 1 else None
    policy = TrainedPolicy(run.pipeline, c.sampling, negative)
    rows = algorithm.trains_on(rollout).nonzero().flatten().cpu()
    sums: dict[str, float] = {"trained": float(len(rows))}
    for index in rows.split(c.trainer.micro_batch) if len(rows) else ():
        for loss in algorithm.losses(policy, rollout[index], run.memory):
            value = loss.per_sample.sum() / total
            value.backward()
            for name, metric in {"loss": loss.per_sample.detach(), **loss.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(metric.sum())
    reduce_gradients(run)
    norm = float(nn.utils.clip_grad_norm_(run.parameters.values(), c.trainer.max_grad_norm))
    if not norm < float("inf"):
        raise UserError(
            f"gradients of epoch {run.epoch + 1} are not finite, so it was not applied; resume from the last "
            "checkpoint with a lower trainer.lr, or with model.dtype fp32"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.memory.after_step()
    if run.ema is not None:
        run.ema.update()
    shared: list[dict[str, float]] = gather_object([sums])
    trained = sum(part["trained"] for part in shared)
    names = dict.fromkeys(name for part in shared for name in part if name != "trained")
    logged = {name: sum(part.get(name, 0.0) for part in shared) / max(trained, 1.0) for name in names}
    return logged | {"grad_norm": norm, "trained_images": trained}


@torch.no_grad()
def reduce_gradients(run: Run) -> None:
    """Sum over processes in one message. By hand, because a process may have nothing to back-propagate."""
    for p in run.parameters.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if run.accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in run.parameters.values() if p.grad is not None]
    flat: Tensor = run.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


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
        evaluation.write(run.folder, run.epoch, samples, images, c.evaluation.steps, began)
    shown = "  ".join(f"{name.removeprefix('reward/')} {value:.3f}" for name, value in values.items())
    run.tracker.say(f"held-out, epoch {run.epoch}: {shown or 'no reward applies to these prompts'}")
