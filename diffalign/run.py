"""One training run: the model, what is trained, the optimizer and the log; made, saved and exported here."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign import adapters, checkpoint, pipelines, prompts, rewards
from diffalign.algorithms import Memory
from diffalign.balancing import Balancer
from diffalign.config import Config
from diffalign.ema import EMA
from diffalign.few_step_export import complete_lora
from diffalign.guard import Watch
from diffalign.loading import save as save_config
from diffalign.lora_tensors import digest
from diffalign.states import State, of_average, of_fixed, of_optimizer, of_tensors, of_weights
from diffalign.tracking import Tracker, require
from diffalign.types import Elsewhere, UserError
from diffalign.writing import writing


@dataclass
class Run:
    """Everything one training run holds."""

    config: Config
    folder: Path
    accelerator: Accelerator
    pipeline: Any
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    memory: Memory
    scorers: dict[str, rewards.Scorer]
    eval_scorers: dict[str, rewards.Scorer]
    tracker: Tracker
    watch: Watch
    balancer: Balancer | None  # with `multireward`
    states: dict[str, dict[str, Tensor]]  # of the advantage estimators and of the curriculum
    kept: dict[str, State]  # all that a checkpoint holds
    learners: dict[str, rewards.Learner]  # the heads among `scorers` that are trained too
    train_prompts: list[dict[str, Any]]
    test_prompts: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0
    between: bool = True  # the weights are those that the last epoch left

    def sum(self, tensor: Tensor) -> Tensor:
        """Over processes."""
        return reduce_sum(self.accelerator, tensor)


def reduce_sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    total: Tensor = accelerator.reduce(tensor, "sum")
    return total


def prepare(config: Config, resume: str | None) -> Run:
    """Load the model, attach what is trained, restore a checkpoint."""
    folder = Path(config.output)
    start = find_checkpoint(folder, resume)
    saved = config.model_dump(mode="json")
    begun = checkpoint.check(start, saved) if start else 0
    require(config.log_with)
    train_prompts = prompts.load(config.prompts.train)
    rewards.check_prompts(config.rewards, train_prompts)
    curriculum = config.curriculum.start(train_prompts)
    test_prompts = prompts.first(config.prompts.test, config.evaluation.prompts) if config.prompts.test else []
    # without `cpu=True` accelerate lets the processes of a machine without an accelerator run one by one
    cpu = config.model.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, log_with=list(config.log_with) or None, project_dir=config.output)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, but accelerate does not join them on {accelerator.device}; start one,"
            " or set model.device to cpu"
        )
    images = config.trainer.prompts * config.trainer.images_per_prompt
    if started > images:
        raise UserError(f"{started} processes cannot share {images} images; raise trainer.prompts or start fewer")
    if accelerator.num_processes > 1 and (config.model.device or "cpu") != "cpu":
        raise UserError("model.device is for a single process; leave it out and each process takes its own accelerator")
    device = config.model.device or str(accelerator.device)
    scorers = rewards.build(config.rewards, device)
    same = {r.key: s for r, s in zip(config.rewards, scorers.values(), strict=True)}
    eval_scorers = {
        r.key: same[r.key] if r in config.rewards else rewards.build([r], device)[r.key]
        for r in config.evaluation.rewards
    }
    for r in config.evaluation.rewards:
        if r.learns and r not in config.rewards:
            raise UserError(f"evaluation.rewards: '{r.key}' learns during training; list it, alike, under rewards too")
    m = config.model
    pipeline: Any = pipelines.load(m.path, m.revision, m.dtype, device, m.max_sequence_length, m.encoders)
    if config.adapter.name == "lora":
        a = config.adapter
        if a.start is not None:
            adapters.load_frozen(pipeline, a.start)
        torch.manual_seed(config.seed)
        adapters.add_lora(pipeline, a.rank, a.alpha, a.init, a.targets)
    else:
        adapters.add_full(pipeline, reference=config.algorithm.needs_reference)
    if config.trainer.gradient_checkpointing:
        pipeline.network.enable_gradient_checkpointing()
    parameters: dict[str, nn.Parameter] = {n: p for n, p in pipeline.network.named_parameters() if p.requires_grad}
    t = config.trainer
    optimizer = torch.optim.AdamW(parameters.values(), t.lr, t.betas, weight_decay=t.weight_decay)
    ema = EMA(list(parameters.values()), t.ema, t.ema_every) if t.ema else None
    memory = config.algorithm.start(pipeline, parameters)
    learners: dict[str, rewards.Learner] = {n: s.head for n, s in scorers.items() if s.reward.learns}  # type: ignore[misc]
    watch = Watch(config.guard)
    balancer, states = None, {"advantage": config.advantage.start(), "curriculum": curriculum}
    if config.multireward is not None:
        weights, reduced = {r.key: r.weight for r in config.rewards}, partial(reduce_sum, accelerator)
        main = accelerator.is_main_process
        balancer = Balancer.of(config.multireward, config.seed, weights, list(parameters.values()), reduced, main)
        states = {f"advantage_{i}": config.advantage.start() for i in range(len(weights))} | {
            "curriculum": curriculum,
            "multireward": balancer.state,
        }
    kept = {
        "weights": of_weights(parameters),
        "optimizer": of_optimizer(optimizer, parameters),
        "memory": State(memory.state_dict, memory.load_state_dict),
        "guard": State(watch.state_dict, watch.load_state_dict),
        **{name: of_tensors(state) for name, state in states.items()},
        **{f"learner_{i}": State(h.state_dict, h.load_state_dict) for i, h in enumerate(learners.values())},
    }
    if ema is not None:
        kept["ema"] = of_average(ema, parameters)
    if config.adapter.name == "lora" and config.adapter.start is not None:
        said = f"adapter.start '{config.adapter.start}' does not hold the LoRA that the run began with"
        kept["frozen_weights"] = of_fixed(digest(pipeline.network), said)
    if start:
        checkpoint.load(start, kept)
    accelerator.wait_for_everyone()  # what is discarded next may still be read
    if accelerator.is_main_process:
        with writing("the run folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
            discard_after(folder, begun if start else -1)
            save_config(config, folder / "config.yaml")
    tracker = Tracker(accelerator, folder, t.epochs, begun if start else -1, saved)
    return Run(
        config, folder, accelerator, pipeline, parameters, optimizer, ema, memory, scorers, eval_scorers, tracker,
        watch, balancer, states, kept, learners, train_prompts, test_prompts, begun,
    )  # fmt: skip


def discard_after(folder: Path, epoch: int) -> None:
    """A run that goes on from an earlier checkpoint makes the later epochs again; what is left of them goes."""
    checkpoint.tidy(folder / "checkpoints")
    for path in checkpoint.finished(folder / "checkpoints"):
        if int(path.name) > epoch:
            checkpoint.remove(path)
    for path in [path for name in ("eval", "images") for path in (folder / name).glob("*")]:
        number = re.match(r"(?:eval_|train_)?(\d+)", path.name)  # also 0002.tmp and eval_0002.png.tmp
        if number is not None and int(number[1]) > epoch:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    found = checkpoint.finished(folder / "checkpoints")
    if resume is None:
        if found or (folder / "metrics.jsonl").exists():
            raise UserError(f"'{folder}' already holds a run; continue it with --resume auto or choose another output")
        return None
    if resume == "auto":
        return found[-1] if found else None
    if not (Path(resume) / "meta.json").is_file():
        known = f"; the last one here is {found[-1]}" if found else ""
        raise UserError(f"'{resume}' is no checkpoint{known}")
    own = Path(resume).resolve().parent == (folder / "checkpoints").resolve()
    if not own and (found or (folder / "metrics.jsonl").exists()):
        raise UserError(f"'{folder}' holds another run than '{resume}'; choose a new output, or one of its checkpoints")
    return Path(resume)


@contextmanager
def by_main(run: Run) -> Iterator[bool]:
    """Inside, the main process alone is to act (the value says so); if it fails, every process leaves."""
    error: UserError | None = None
    try:
        yield run.accelerator.is_main_process
    except UserError as raised:
        error = raised
    failed = any(gather_object([error is not None]))
    if error is not None:
        raise error
    if failed:
        raise Elsewhere


def save(run: Run) -> None:
    with by_main(run) as main:
        if main:
            write_checkpoint(run)


def write_checkpoint(run: Run) -> None:
    config, folder = run.config.model_dump(mode="json"), run.folder / "checkpoints"
    with writing(f"the checkpoint of epoch {run.epoch}", run.folder):
        checkpoint.save(folder, run.epoch, run.kept, config, run.config.checkpoint.keep)


def export(run: Run) -> None:
    """What others load: a diffusers LoRA or a diffusers folder, of the averaged weights when there are any."""
    shadow = dict(zip(run.parameters, run.ema.shadow, strict=True)) if run.ema is not None else None
    if run.config.adapter.name == "lora":
        for name, state in [("lora", shadow)] if shadow is None else [("lora", shadow), ("lora_live", None)]:
            adapters.export_lora(run.pipeline, run.folder / name, state=state)
            complete_lora(run.folder / name, run.pipeline, run.config.sampling)
    else:
        adapters.export_full(run.pipeline, run.folder / "model", shadow, run.config.sampling)
