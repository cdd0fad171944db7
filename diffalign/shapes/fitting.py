"""One resumable training loop for all stages of the pre-training recipe."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

Losses = dict[str, Tensor]  # the entry "loss" is minimised, the others are logged


@dataclass(frozen=True)
class Fit:
    """AdamW with linear warm-up, a constant stretch and linear decay to zero over the last `decay` of the steps."""

    steps: int
    lr: float
    warmup: int = 100
    decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    ema: float = 0.0  # 0 = keep the last weights
    save_every: int = 500

    def rate(self, step: int) -> float:
        tail = max(self.steps * self.decay, 1)
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / tail)


def atomic_save(value: object, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def fit(name: str, model: nn.Module, loss: Callable[[int, torch.Generator], Losses], plan: Fit, folder: Path) -> None:
    """Minimise `loss(step, generator)` in the parameters of `model`, in place; continue from `folder/name.pt`.

    Every step draws its random numbers from a generator seeded by the step, so a resumed run repeats no data.
    """
    optimizer = torch.optim.AdamW(model.parameters(), plan.lr, plan.betas, weight_decay=plan.weight_decay, fused=True)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()} if plan.ema else {}
    path, first, seconds = folder / f"{name}.pt", 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, first, seconds = saved["average"], saved["step"], saved["seconds"]
    began = time.monotonic() - seconds
    for step in tqdm(range(first, plan.steps), name, initial=first, total=plan.steps, mininterval=5):
        losses = loss(step, torch.Generator().manual_seed(step + 1_000_003))
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * plan.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        if plan.ema:
            weight = 1 - min(plan.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                live = [v for v in model.state_dict().values() if v.is_floating_point()]
                mean = [v for v in average.values() if v.is_floating_point()]
                torch._foreach_lerp_(mean, live, weight)
        done = step + 1
        if done % 100 == 0 or done == plan.steps:
            entry = {k: round(v.item(), 5) for k, v in losses.items()} | {"grad_norm": round(norm.item(), 4)}
            line = {"stage": name, "step": done, **entry, "seconds": round(time.monotonic() - began, 1)}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if done % plan.save_every == 0 or done == plan.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            atomic_save(state | {"step": done, "seconds": time.monotonic() - began}, path)
    if plan.ema:
        model.load_state_dict(average)


def batches(n: int, size: int) -> Iterator[slice]:
    for i in range(0, n, size):
        yield slice(i, min(i + size, n))
