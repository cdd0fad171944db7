from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffalign.oracle import GaussianMixture
from diffalign.samplers import denoise, drain, step
from diffalign.schedules import VP, RectifiedFlow, Schedule, noised, plain_sigmas
from diffalign.solvers import dpm2


def f64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


A = f64([0.6, 0.6])
TOY = GaussianMixture(
    f64([0.4, 0.3, 0.2, 0.1]), f64([[-2.5, -2.5], [2.5, -1.5], [-1.5, 2.5], [2.5, 2.5]]), f64([0.5, 0.6, 0.5, 0.4])
)
N = 20_000  # the sampling floor of `tv` is then about .03


def cells(mixture: GaussianMixture) -> Tensor:
    """Exact mass of the 24 x 24 cells on [-6, 6]^2."""
    edges = torch.linspace(-6, 6, 25, dtype=torch.float64)
    cdf = torch.special.ndtr((edges - mixture.means[..., None]) / mixture.stds[:, None, None])  # [K, 2, 25]
    mass = cdf.diff(dim=2)
    return torch.einsum("k,ki,kj->ij", mixture.weights, mass[:, 0], mass[:, 1])


def tv(x: Tensor, mixture: GaussianMixture) -> float:
    edges = [torch.linspace(-6, 6, 25, dtype=torch.float64)] * 2
    return float((torch.histogramdd(x, edges).hist / len(x) - cells(mixture)).abs().sum() / 2)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VP.scaled_linear()])
@pytest.mark.parametrize("s", [0.1, 0.5, 0.9])
def test_against_quadrature(schedule: Schedule, s: float) -> None:
    """One dimension, Bayes' rule summed over a fine grid of x0."""
    mixture = GaussianMixture(
        f64([0.3, 0.7]), f64([[-1.0], [2.0]]), f64([0.5, 0.3]),
        schedule,
    )  # fmt: skip
    x, x0 = f64([-1.5, 0.2, 1.7]), torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(s), schedule.sigma(s)
    prior = (
        mixture.weights * torch.distributions.Normal(mixture.means[:, 0], mixture.stds).log_prob(x0[:, None]).exp()
    ).sum(1)
    joint = prior * torch.distributions.Normal(alpha * x0, sigma).log_prob(x[:, None]).exp()
    dx = float(x0[1] - x0[0])
    evidence = joint.sum(1) * dx
    mean = (joint * x0).sum(1) * dx / evidence
    a = f64([0.8])
    value = ((joint * (1.5 * 0.8 * x0).exp()).sum(1) * dx / evidence).log() / 1.5

    found, eps = mixture.predict(x[:, None], s)
    torch.testing.assert_close(mixture.log_prob(x[:, None], s), evidence.log(), atol=1e-8, rtol=0)
    torch.testing.assert_close(found[:, 0], mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(eps[:, 0], (x - alpha * mean) / sigma, atol=1e-7, rtol=0)
    torch.testing.assert_close(mixture.soft_value(x[:, None], s, a, 1.5), value, atol=1e-8, rtol=0)


@pytest.mark.parametrize("s", [0.0, 1e-6, 0.5, 1.0])
def test_prediction_splits_the_state_at_every_level(s: float) -> None:
    x = torch.randn(16, 2, dtype=torch.float64)
    torch.testing.assert_close(noised(TOY.schedule, *TOY.predict(x, s), s), x, atol=1e-9, rtol=0)


def test_states_of_any_shape_and_precision() -> None:
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 12), torch.ones(1))
    for given, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = torch.randn(5, 3, 2, 2).to(given)
        x0, eps = mixture.predict(x, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
        assert x0.shape == eps.shape == x.shape and x0.dtype == eps.dtype == kept
        assert mixture.sample_posterior(x, 0.5).shape == x.shape


def test_tilted_is_the_prior_times_the_reward() -> None:
    x = torch.randn(32, 2, dtype=torch.float64)
    lhs = TOY.tilted(A, 0.7).log_prob(x)
    torch.testing.assert_close(lhs, TOY.log_prob(x) + 0.7 * x @ A - TOY.log_z(A, 0.7), atol=1e-9, rtol=0)


def test_value_ends_in_the_reward_and_starts_in_log_z() -> None:
    x = torch.randn(8, 2, dtype=torch.float64)
    torch.testing.assert_close(TOY.soft_value(x, 0.0, A, 2.0), x @ A, atol=1e-9, rtol=0)
    torch.testing.assert_close(TOY.soft_value(x, 1.0, A, 2.0), f64([TOY.log_z(A, 2.0) / 2] * 8), atol=1e-9, rtol=0)


def test_samples_are_the_mixture_and_follow_their_generators() -> None:
    torch.manual_seed(0)
    assert tv(TOY.sample(N), TOY) < 0.035
    both = [torch.Generator().manual_seed(s) for s in (3, 4)]
    assert torch.equal(TOY.sample(2, both)[1:], TOY.sample(1, [torch.Generator().manual_seed(4)]))


def test_the_exact_chain_ends_in_the_mixture_after_few_steps() -> None:
    torch.manual_seed(1)
    x, sigmas = torch.randn(N, 2, dtype=torch.float64), plain_sigmas(4)
    for s, s_next in pairwise(sigmas):
        x0 = TOY.sample_posterior(x, s)
        x = step(TOY.schedule, x0, (x - (1 - s) * x0) / s, x, s, s_next, "ddim", 1.0).next
    assert tv(x, TOY) < 0.035


@pytest.mark.parametrize(
    ("kernel", "eta", "low", "high"),
    [("flow_sde", 1.0, 0.0, 0.055), ("ode", 0.0, 0.06, 0.1), ("ddim", 1.0, 0.07, 0.12), ("cps", 0.7, 0.12, 0.18)],
)
def test_marginals_of_the_kernels(kernel: str, eta: float, low: float, high: float) -> None:
    """T = 20, no shift: the SDE is near the sampling floor, cps samples a narrowed law whatever T is."""
    torch.manual_seed(2)
    x = drain(denoise(TOY, torch.randn(N, 2, dtype=torch.float64), plain_sigmas(20), kernel, eta))
    assert low < tv(x, TOY) < high


def test_all_but_cps_converge_to_the_mixture() -> None:
    torch.manual_seed(3)
    error = {}
    for kernel, eta in (("ode", 0.0), ("flow_sde", 0.7), ("ddim", 1.0), ("dance", 0.3), ("cps", 0.7)):
        x = drain(denoise(TOY, torch.randn(N, 2, dtype=torch.float64), plain_sigmas(100), kernel, eta))
        error[kernel] = tv(x, TOY)
    assert error.pop("cps") > 0.1 and max(error.values()) < 0.045, error


def test_dpm2_needs_far_fewer_steps_than_the_ode() -> None:
    torch.manual_seed(4)
    x = torch.randn(N, 2, dtype=torch.float64)
    assert tv(drain(dpm2(TOY, x, plain_sigmas(20))), TOY) < 0.045
