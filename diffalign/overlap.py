"""Remote rewards are asked for as soon as an image is decoded, while the next ones are being sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from diffalign import rewards
from diffalign.types import RewardOutput


class Early:
    """`with Early(scorers) as early:` hand every decoded batch to `submit`; `outputs` waits for the last answer."""

    def __init__(self, scorers: Mapping[str, rewards.Scorer]) -> None:
        self.remote = {name: s for name, s in scorers.items() if s.reward.remote}
        self.pool = ThreadPoolExecutor(max(len(self.remote), 1))  # a head itself sends as many requests as it may
        self.asked: dict[str, list[Future[RewardOutput]]] = {name: [] for name in self.remote}

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        for name, scorer in self.remote.items():
            self.asked[name].append(self.pool.submit(_scored, scorer, images, prompts, metadata))

    def outputs(self) -> dict[str, RewardOutput]:
        return {name: rewards.joined([f.result() for f in futures]) for name, futures in self.asked.items()}

    def __enter__(self) -> Early:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=error is None, cancel_futures=True)


@torch.no_grad()  # the mode is one of each thread
def _scored(
    scorer: rewards.Scorer, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> RewardOutput:
    return scorer(images, prompts, metadata)
