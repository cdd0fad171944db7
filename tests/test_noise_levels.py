"""The noise that forward-process methods train at: the choice of levels, and whose noise it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from forward_process import images, small
from torch import Tensor

from diffalign.algorithms._timesteps import Timesteps
from diffalign.algorithms.nft import NFT
from diffalign.schedules import plain_sigmas
from diffalign.sections import Sampling


def nft(**options: Any) -> NFT:
    return NFT.model_validate({"name": "nft", **options})


def draws(timesteps: Timesteps, steps: int, count: int = 200) -> Tensor:
    grid = plain_sigmas(steps, 3.0)
    return torch.stack([timesteps.draw(grid, torch.Generator().manual_seed(i)) for i in range(count)])


def positions(levels: Tensor, steps: int) -> Tensor:
    """Where on the sampler's grid, in steps from its start, each level lies."""
    grid = plain_sigmas(steps, 3.0)
    i = (grid[None, None] >= levels[..., None]).sum(-1).clamp(max=steps) - 1
    return i + (grid[i] - levels) / (grid[i] - grid[i + 1])


@pytest.mark.parametrize(("steps", "number"), [(10, 9), (25, 24), (1, 1), (200, 198)])
def test_by_default_all_levels_of_the_grid_but_one(steps: int, number: int) -> None:
    assert Timesteps().number(steps) == number == max(1, int(0.99 * steps))
    found = draws(Timesteps(), steps, 50)
    assert found.shape == (50, number) and all(len(row.unique()) == number for row in found)
    assert torch.isin(found, plain_sigmas(steps, 3.0)[:-1]).all()
    assert steps > 10 or len(found.unique()) == steps  # the one that is left out differs


def test_levels_lie_in_the_range() -> None:
    some = Timesteps(range=(0.2, 0.7))
    assert some.steps(10) == [2, 3, 4, 5, 6] and some.number(10) == 5
    assert set(draws(Timesteps(range=(0.2, 0.7), count=2), 10).flatten().tolist()) == set(
        plain_sigmas(10, 3.0)[2:7].tolist()
    )
    for choice in ("stratified", "uniform"):
        found = positions(draws(Timesteps(choice=choice, count=4, range=(0.2, 0.7)), 10), 10)
        assert 2 <= found.min() < 2.1 and 6.9 < found.max() < 7
        assert len(found.unique()) == found.numel()


def test_stratified_takes_one_of_each_stretch_and_uniform_does_not() -> None:
    edges = torch.linspace(0, 10, 6, dtype=torch.float64)
    for choice in ("stratified", "uniform"):
        found = positions(draws(Timesteps(choice=choice, count=5), 10), 10)
        stretch = torch.bucketize(found, edges, right=True) - 1
        assert (stretch == torch.arange(5)).all() == (choice == "stratified")
        share = found.flatten().histc(10, 0, 10) / found.numel()
        assert (share - 0.1).abs().max() < 0.04


def test_noise_is_the_image_s_own() -> None:
    """Whatever the batch; other images and other passes have other noise."""
    batch, model, method = images([0.0] * 4), small(), nft()
    whole = list(method.noised(model, batch))
    order = torch.tensor([2, 0, 3])
    for at, part in zip(whole, method.noised(model, batch[order]), strict=True):
        assert all(torch.equal(getattr(at, name)[order], getattr(part, name)) for name in ("x", "s", "x0", "eps"))
    eps, s = (torch.stack([getattr(at, name) for at in whole]) for name in ("eps", "s"))
    assert len(eps.unique()) == eps.numel() and s.std(1).max() > 0
    again = list(method.noised(model, replace(batch, turn=1)))
    assert not torch.isin(torch.stack([at.eps for at in again]), eps).any()
    assert not torch.equal(torch.stack([at.s for at in again]), s)
    for at in whole:
        t = at.s.view(-1, 1, 1, 1)
        torch.testing.assert_close(at.x, (1 - t) * at.x0 + t * at.eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"range": (0.5, 0.5)}, "range must rise within 0 to 1, got 0.5 to 0.5"),
        ({"range": (-0.1, 0.5)}, "range must rise within 0 to 1"),
        ({"choice": "stratified"}, "stratified needs a count"),
        ({"choice": "uniform"}, "uniform needs a count"),
        ({"count": 0}, "greater than or equal to 1"),
    ],
)
def test_levels_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Timesteps(**options)


@pytest.mark.parametrize(
    ("timesteps", "sampling", "key", "said"),
    [
        ({"count": 11}, {}, ("algorithm", "timesteps"), "11 levels asked for, but 10 of the 10 steps are in the range"),
        ({"range": (0.05, 0.08)}, {}, ("algorithm", "timesteps"), "all levels asked for, but 0 of the 10 steps"),
        ({}, {"guidance": 3.0}, ("sampling", "guidance"), "'nft' trains the conditional prediction itself"),
    ],
)
def test_settings_that_do_not_fit_together(timesteps: Any, sampling: Any, key: tuple[str, ...], said: str) -> None:
    ((where, sentence),) = nft(timesteps=timesteps).conflicts(Sampling(**sampling))
    assert where == key and said in sentence


def test_any_sampler_and_any_choice_of_levels_fit() -> None:
    for kernel in ("dpm2", "ode", "cps", "flow_sde"):
        for timesteps in ({}, {"count": 10}, {"choice": "uniform", "count": 40}, {"range": (0.05, 0.11)}):
            assert not list(nft(timesteps=timesteps).conflicts(Sampling(kernel=kernel)))
