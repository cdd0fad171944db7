"""What a run carries from epoch to epoch, as named tensors: the parts that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffalign.ema import EMA


@dataclass(frozen=True)
class State:
    """A part of the run: `collect` gives it as named tensors, `restore` puts such tensors back in place.

    `restore` raises KeyError or ValueError when they do not fit.
    """

    collect: Callable[[], dict[str, Tensor]]
    restore: Callable[[dict[str, Tensor]], None]


def of_weights(parameters: dict[str, nn.Parameter]) -> State:
    @torch.no_grad()
    def restore(saved: dict[str, Tensor]) -> None:
        if parameters.keys() != saved.keys() or any(p.shape != saved[n].shape for n, p in parameters.items()):
            raise ValueError("they are not what this run trains; are adapter.rank and adapter.targets the same?")
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])

    return State(lambda: {name: p.detach() for name, p in parameters.items()}, restore)


def of_average(ema: EMA, parameters: dict[str, nn.Parameter]) -> State:
    def collect() -> dict[str, Tensor]:
        return {"updates": torch.tensor(ema.updates), **dict(zip(parameters, ema.shadow, strict=True))}

    def restore(saved: dict[str, Tensor]) -> None:
        ema.updates = int(saved["updates"])
        for shadow, name in zip(ema.shadow, parameters, strict=True):
            shadow.copy_(saved[name])

    return State(collect, restore)


def of_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> State:
    """Moments and step counts by parameter; lr, betas and weight decay stay what the configuration says now."""

    def collect() -> dict[str, Tensor]:
        return {f"{n}/{key}": t for n, p in parameters.items() for key, t in optimizer.state.get(p, {}).items()}

    def restore(saved: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        number = {name: i for i, name in enumerate(parameters)}
        for place, value in saved.items():
            name, _, key = place.rpartition("/")
            state.setdefault(number[name], {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    return State(collect, restore)


def of_tensors(state: dict[str, Tensor]) -> State:
    """A dictionary that its owner changes in place."""

    def restore(saved: dict[str, Tensor]) -> None:
        state.clear()
        state.update(saved)

    return State(lambda: {name: t.clone() for name, t in state.items()}, restore)  # a file cannot share memory


def of_fixed(tensor: Tensor, otherwise: str) -> State:
    """What must be the same when a run goes on; `otherwise` says what is wrong if it is not."""

    def restore(saved: dict[str, Tensor]) -> None:
        if not torch.equal(saved["fixed"], tensor):
            raise ValueError(otherwise)

    return State(lambda: {"fixed": tensor}, restore)
