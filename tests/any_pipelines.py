"""What tests of any pipeline have in common: native calls to compare with, and our walk of them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from diffalign.pipelines.any import AnyOracle, AnyPipeline
from diffalign.samplers import step

STEPS = 4
CASES = {**tiny_pipelines.ALL, "pixart": tiny_pipelines.pixart}
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
every_pipeline = pytest.mark.parametrize("name", CASES)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def native(pipe: Any, arguments: dict[str, Any], output_type: str = "latent", steps: int = STEPS) -> Tensor:
    settings = {"num_inference_steps": steps, "generator": generators(0)[0], "return_dict": False}
    images: Tensor = pipe(**arguments, **settings, output_type=output_type)[0]
    return images


@torch.no_grad()
def ode(oracle: AnyOracle, x: Tensor) -> Tensor:
    for i in range(len(oracle.sigmas) - 1):
        x0, eps = oracle.predict(x, i)
        x = step(oracle.schedule, x0, eps, x, oracle.sigmas[i], oracle.sigmas[i + 1], "ode").next
    return x


def agrees(pipe: Any, arguments: dict[str, Any], expected: Tensor, steps: int = STEPS) -> None:
    oracle = AnyPipeline(pipe).oracle(None, steps, arguments)
    start = oracle.start(generators(0))
    final = ode(oracle, start)
    assert (final - start).abs().max() > 0.5  # the network moves the latents
    torch.testing.assert_close(final, expected, atol=2e-5, rtol=0)
