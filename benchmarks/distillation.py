"""Memory and speed of few-step distillation: generator, fake score and teacher in one network, against four copies.

    python benchmarks/distillation.py --model tiny-sd3 --batch 4
    python benchmarks/distillation.py --model random:sd35-medium --dtype bf16 --batch 4 --checkpoint

Stage 1 is AC-DMD: a step of the fake score, which is trained at every iteration, and one of the generator, at every
`--ratio`-th. Stage 2 is RTDMD: both in every iteration, with two of three stochastic steps trained and the gradient of
a made-up reward through the decoder, which is no network, so that no reward model counts. A LoRA of rank 32 is trained.
Samples are drawn once and not timed. "one model" is what to compare with: the same network with one LoRA and a plain
loss, whose peak is one model's weights plus activations; "four copies" adds three more networks (the average, the fake
score, the teacher). The goal is a peak below 1.3 of one model. The fake score's consistency term keeps the activations
of three forward passes (`--no-consistency`: of one), so that its micro-batch may have to be smaller than a plain one's.
On a CPU peaks are those of the process, which only grow. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rollout import Stopwatch, arguments, build, image_size, peak_gib, report
from torch import Tensor

from diffalign.adapters import add_lora
from diffalign.algorithms import Algorithm, Memory, Study
from diffalign.algorithms.acdmd import ACDMD
from diffalign.algorithms.rtdmd import RTDMD
from diffalign.rollout import collect
from diffalign.sections import Sampling
from diffalign.types import RewardOutput, Rollout
from diffalign.update import TrainedPolicy

TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
STAGES = ("one model", "1", "2")
COPIES = 4  # of the weights in the reference: generator, its average, fake score, teacher


class Brightness:
    """A reward with a gradient and without a network."""

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> RewardOutput:
        return RewardOutput(images.mean((1, 2, 3)), {}, torch.ones(len(images), dtype=torch.bool))


def method(stage: str, options: argparse.Namespace) -> Algorithm:
    fake = {"consistency": {"weight": 0.0 if options.no_consistency else 0.01}}
    shared = {"guidance": options.guidance, "fake": fake}
    if stage == "2":
        backpropagated = {"weight": 1e-4, "rewards": ("brightness",)}
        return RTDMD.model_validate({"name": "rtdmd", "backpropagated": backpropagated, **shared})
    return ACDMD.model_validate({"name": "acdmd", "ratio": options.ratio, **shared})


@dataclass
class Bench:
    """A stage, ready to take its steps on samples that were drawn once."""

    stage: str
    options: argparse.Namespace
    pipeline: Any
    algorithm: Algorithm
    memory: Memory
    policy: TrainedPolicy
    parameters: Mapping[str, torch.nn.Parameter]
    rollout: Rollout

    @classmethod
    def of(cls, options: argparse.Namespace, dtype: str, stage: str) -> Bench:
        torch.manual_seed(0)
        pipeline = build(options.model, dtype, options.device)
        add_lora(pipeline, rank=32, alpha=64)
        if options.checkpoint:
            pipeline.network.enable_gradient_checkpointing()
        parameters = {name: p for name, p in pipeline.network.named_parameters() if p.requires_grad}
        algorithm = method(stage, options)
        size = image_size(options)
        sampling = Sampling.model_validate({"timesteps": TIMESTEPS, "eta": 0.9, "height": size, "width": size})
        prompts, rows = [{"prompt": f"{n} red circles"} for n in range(options.batch)], torch.arange(options.batch)
        kept, walked = algorithm.kept(len(TIMESTEPS), 0, 0), range(len(TIMESTEPS))
        until = algorithm.until(len(TIMESTEPS), 0, 0)
        rollout = collect(
            pipeline, prompts, rows, rows, sampling, kept, options.micro, None, walked, until=until, decode=False
        )
        rollout.advantages = torch.linspace(-1, 1, options.batch, device=options.device)
        policy = TrainedPolicy(pipeline, sampling, None, {"brightness": Brightness()})  # type: ignore[dict-item]
        return cls(
            stage, options, pipeline, algorithm, algorithm.start(pipeline, parameters), policy, parameters, rollout
        )

    def batches(self) -> Iterator[Rollout]:
        for rows in torch.arange(len(self.rollout)).split(self.options.micro):
            yield self.rollout[rows]

    def steps(self) -> dict[str, Callable[[], Any]]:
        """Name -> one optimizer step."""
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-5)
        study = Study(0, self.policy, self.rollout, len(self.rollout), self.options.micro, lambda tensor: tensor)

        def losses(batch: Rollout) -> Iterator[Tensor]:
            if self.stage == "one model":
                x0, _ = self.policy.denoiser(batch.cond).predict(batch.x0, 0.5)
                yield (x0 - batch.x0).square().flatten(1).mean(1)
            else:
                for loss in self.algorithm.losses(self.policy, batch, self.memory):
                    yield loss.per_sample

        def generator() -> None:
            for batch in self.batches():
                for loss in losses(batch):
                    (loss.sum() / len(self.rollout)).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        if self.stage == "one model":
            return {"a plain step": generator}
        return {"fake score": lambda: self.memory.learn(study), "generator": generator}


def measure(options: argparse.Namespace, dtype: str, stage: str) -> list[dict[str, Any]]:
    gc.collect()  # what the last stage leaves behind would count as this one's memory
    bench = Bench.of(options, dtype, stage)
    weights = sum(p.numel() * p.element_size() for p in bench.pipeline.network.parameters() if not p.requires_grad)
    rows, watch, steps = [], Stopwatch(options.device), bench.steps()
    for step in steps.values():
        step()  # the optimizers' moments are there before anything is measured
    for name, step in steps.items():
        if torch.device(options.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        spent = []
        watch.seconds()
        for _ in range(options.repeats):
            with watch.span("total"):
                step()
            spent.append(watch.seconds()["total"])
        rows.append({
            "stage": stage,
            "step": name,
            "model": options.model,
            "dtype": dtype,
            "checkpointing": "yes" if options.checkpoint else "no",
            "size": image_size(options),
            "batch": options.batch,
            "micro": options.micro,
            "s/step": min(spent),
            "weights GiB": weights / 2**30,
            "peak GiB": peak_gib(options.device),
        })  # fmt: skip
    return rows


def compared(options: argparse.Namespace) -> list[Callable[[], dict[str, Any]]]:
    """Rows of all stages, with what an iteration takes beside sampling, and each
    peak beside one model's and four copies'."""
    rows = [row for dtype in options.dtype for stage in options.stage for row in measure(options, dtype, stage)]
    found = []
    for row in rows:
        same = [r for r in rows if r["dtype"] == row["dtype"]]
        alone = next((r["peak GiB"] for r in same if r["stage"] == "one model"), None)
        own = {r["step"]: r["s/step"] for r in same if r["stage"] == row["stage"]}
        share = 1 / options.ratio if row["stage"] == "1" else 1.0
        whole = own["fake score"] + share * own["generator"] if "fake score" in own else own["a plain step"]
        four = None if alone is None else alone + (COPIES - 1) * row["weights GiB"]
        found.append(row | {
            "s/step": f"{row['s/step']:.3g}",
            "s/iteration without sampling": f"{whole:.3g}",
            "weights GiB": f"{row['weights GiB']:.3f}",
            "peak GiB": f"{row['peak GiB']:.3f}",
            "of one model": "" if alone is None else f"{row['peak GiB'] / alone:.2f}",
            "of four copies": "" if four is None else f"{row['peak GiB'] / four:.2f}",
        })  # fmt: skip
    return [partial(dict, row) for row in found]


if __name__ == "__main__":
    parser = arguments("Memory and speed of few-step distillation.")
    parser.set_defaults(guidance=4.5)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="1: AC-DMD, 2: RTDMD")
    parser.add_argument(
        "--ratio", type=int, default=10, help="stage 1: steps of the fake score for each of the generator"
    )
    parser.add_argument("--micro", type=int, help="micro-batch; default the batch")
    parser.add_argument("--no-consistency", action="store_true", help="without the fake score's regulariser")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    options = parser.parse_args()
    options.micro = options.micro or options.batch
    report(options, compared(options))
