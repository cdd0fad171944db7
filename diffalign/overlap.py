"""Remote rewards are asked for as soon as an image is decoded, while the next ones are being sampled."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from diffalign import rewards
from diffalign.rewards import _pool
from diffalign.types import RewardOutput

Call = tuple[Future[RewardOutput], Tensor, Sequence[str], Sequence[Mapping[str, Any]]]


class Early:
    """`with Early(scorers) as early:` hand every decoded batch to `submit`; `outputs` waits for the last answer.

    Whatever is not answered at the end of the block is given up.
    """

    def __init__(self, scorers: Mapping[str, rewards.Scorer]) -> None:
        self.remote = {name: s for name, s in scorers.items() if s.reward.remote}
        self.asked: dict[str, list[Future[RewardOutput]]] = {name: [] for name in self.remote}
        self.calls: dict[str, SimpleQueue[Call | None]] = {name: SimpleQueue() for name in self.remote}
        self.stop = threading.Event()
        self.threads = [  # one a head, which itself sends as many requests as it may
            threading.Thread(target=_work, args=(scorer, self.calls[name], self.stop), daemon=True)
            for name, scorer in self.remote.items()
        ]

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        for name, calls in self.calls.items():
            future: Future[RewardOutput] = Future()
            self.asked[name].append(future)
            calls.put((future, images, prompts, metadata))

    def outputs(self) -> dict[str, RewardOutput]:
        return {name: rewards.joined([f.result() for f in futures]) for name, futures in self.asked.items()}

    def __enter__(self) -> Early:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        for calls in self.calls.values():
            calls.put(None)
        _pool.finish(self.threads)


@torch.no_grad()  # the mode is one of each thread
def _work(scorer: rewards.Scorer, calls: SimpleQueue[Call | None], stop: threading.Event) -> None:
    _pool.STOP.set(stop)
    while (call := calls.get()) is not None:
        future, *args = call
        _pool.settle(future, scorer, *args)
