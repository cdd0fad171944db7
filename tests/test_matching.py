"""Distribution matching where the answer is known: Gaussian data, affine generators, float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from golden_data import FLOW
from torch import Tensor, nn

from diffalign.algorithms._ambient import (
    consistency,
    denoising_loss,
    levels,
    matching_gradient,
    matching_loss,
    projected,
    renoised,
)
from diffalign.algorithms.rtdmd import RTDMD, Backpropagated
from diffalign.samplers import denoise, step
from diffalign.schedules import few_step_sigmas
from diffalign.types import Conditioning, Denoiser, Rollout

SIGMAS = few_step_sigmas([1000, 750, 500, 250], 3.0)  # SD3's: 1, .9, .75, .5, 0
ETA = 0.9


@dataclass(frozen=True)
class Gaussian:
    """The best denoiser of data N(mean, var)."""

    mean: float
    var: float
    schedule = FLOW

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(s, dtype=x.dtype).expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))
        centred, total = x - (1 - t) * self.mean, (1 - t) ** 2 * self.var + t**2
        return self.mean + (1 - t) * self.var * centred / total, t * centred / total


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def within(values: Tensor, expected: Tensor | float, sigmas: float = 4.0) -> None:
    """The mean of independent values [N, ...] is what is expected, to so many standard errors."""
    error = values.std(0) / len(values) ** 0.5
    off = (values.mean(0) - expected).abs()
    assert (off <= sigmas * error + 1e-12).all(), (off / error).tolist()


def test_a_step_at_eta_one_noises_the_prediction_anew() -> None:
    x0, eps, noise = normal(3, 3, 8).unbind()
    s, after = 0.8, 0.35
    taken = step(FLOW, x0, eps, (1 - s) * x0 + s * eps, s, after, "cps", 1.0)
    torch.testing.assert_close(taken.mean + taken.std * noise, (1 - after) * x0 + after * noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("room", [0.2, 0.7])
def test_what_is_expected_of_the_velocity_does_not_depend_on_where_noising_began(s: float, room: float) -> None:
    """E[u | x_t] = E[eps - x0 | x_t]: for data N(m, d^2) its slope is (t - (1-t) d^2) / ((1-t)^2 d^2 + t^2)."""
    n, m, d, t = 1_000_000, 1.5, 0.6, s + room * (1 - s)
    x0, eps, noise = normal(3, n, 1, seed=int(100 * (s + room))).unbind()
    at = renoised(FLOW, (1 - s) * (m + d * x0) + s * eps, s, t, noise)
    total = (1 - t) ** 2 * d**2 + t**2
    slope = (t - (1 - t) * d**2) / total
    centred, left = at.x - (1 - t) * m, at.target / at.std + m
    within((left - slope * centred) * centred / total, 0.0)
    within(left - slope * centred, 0.0)
    best, eps_hat = Gaussian(m, d**2).predict(at.x, at.t)
    torch.testing.assert_close(eps_hat - best, slope * centred - m, rtol=0, atol=1e-9)


def test_the_fake_score_s_loss_is_least_at_the_best_denoiser() -> None:
    """Weighted or not, at samples of a noisy level: a gradient of zero at the truth, and not beside it."""
    n, s = 400_000, 0.5
    x0, eps, noise = normal(3, n, 1, seed=3).unbind()
    t = levels(torch.rand(n, generator=seeded(), dtype=torch.float64), s)
    at = renoised(FLOW, (1 - s) * (0.7 + 0.8 * x0) + s * eps, s, t, noise)
    for weighted in (True, False):
        for mean, expected in ((0.7, True), (0.9, False)):
            off = torch.zeros(n, 1, dtype=torch.float64, requires_grad=True)  # of the velocity, for each sample
            clean, noisy = Gaussian(mean, 0.64).predict(at.x, at.t)
            t_ = at.t[:, None]
            loss = denoising_loss(FLOW, clean - t_ * off, noisy + (1 - t_) * off, at, weighted)
            (by_velocity,) = torch.autograd.grad(loss.sum(), off)
            z = by_velocity.mean() / by_velocity.std() * n**0.5
            assert (abs(float(z)) < 4) == expected


@pytest.mark.parametrize(("t", "after"), [(0.9, 0.75), (0.5, 0.2)])
def test_consistency_is_the_squared_bias_or_with_one_path_the_variance_too(t: float, after: float) -> None:
    """For Gaussian data every term is known: with the noise of the ancestral step the best denoiser has no bias."""
    n, m, d2 = 200_000, 0.5, 0.36
    data, denoiser = normal(4, n, 1, seed=5), Gaussian(m, d2)
    at = renoised(FLOW, m + d2**0.5 * data[0], 0.0, t, data[1])
    x0, eps = denoiser.predict(at.x, at.t)
    gain = (1 - after) * d2 / ((1 - after) ** 2 * d2 + after**2)  # of h' by x'
    ancestral = math.acos((1 - t) * after / ((1 - after) * t)) * 2 / math.pi
    for eta in (ancestral, 0.9, 0.3):
        kept = after * math.cos(eta * math.pi / 2)
        bias = m + gain * ((1 - after) * (x0 - m) + kept * eps) - x0
        variance = (gain * after * math.sin(eta * math.pi / 2)) ** 2
        assert (bias.abs().max() < 1e-12) == (eta == ancestral)
        back = [torch.full((n,), 1000 * (t - after), dtype=torch.float64)]
        one, two = (
            consistency(denoiser, at, x0, eps, back, [[z] for z in data[2 : 2 + paths]], eta) for paths in (1, 2)
        )
        within(two - bias.flatten() ** 2, 0.0)
        within(one - bias.flatten() ** 2, variance)


def test_projections_differ_by_the_velocities_and_share_their_noise() -> None:
    """y_f - y_T = (s cos(theta) (1-t) - (1-s) t) (v_f - v_T)."""
    s, t, noise, count = 0.5, 0.8, normal(5, 7, seed=1), 5
    at = renoised(FLOW, normal(count, 7), s, t, normal(count, 7, seed=2))
    fake, real = Gaussian(0.3, 0.5).predict(at.x, at.t), Gaussian(2.0, 0.25).predict(at.x, at.t)
    ends = [projected(FLOW, p, at, noise, ETA) for p in (fake, real)]
    kappa = s * math.cos(ETA * math.pi / 2) * (1 - t) - (1 - s) * t
    apart = (fake[1] - fake[0]) - (real[1] - real[0])
    torch.testing.assert_close(ends[0] - ends[1], kappa * apart, rtol=0, atol=1e-12)
    assert kappa < 0


@dataclass(frozen=True)
class Affine:
    """A generator whose clean prediction of step k is a x + b; its samples stay Gaussian."""

    a: Tensor
    b: Tensor

    def move(self, k: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clean prediction, mean and std of the next state."""
        x0 = self.a[k] * x + self.b[k]
        s = SIGMAS[k]
        taken = step(FLOW, x0, (x - (1 - s) * x0) / s, x, s, SIGMAS[k + 1], "cps", ETA, next=x)
        return x0, taken.mean, taken.std

    @torch.no_grad()
    def law(self, k: int, mean: float, var: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """(mean, var) of the clean prediction, and of the next state, when the state has those."""
        ends = torch.tensor([[mean], [mean + 1]], dtype=torch.float64)
        x0, moved, std = self.move(k, ends)
        gain, noise = float(moved[1, 0] - moved[0, 0]), float(std.flatten()[0])
        return (float(x0[0, 0]), float(self.a[k]) ** 2 * var), (float(moved[0, 0]), gain**2 * var + noise**2)


class Ambient:
    """The best denoiser for the samples N(mean, var) of a generator at level s, noised to t."""

    def __init__(self, s: float, mean: float, var: float) -> None:
        # as for data of mean m and variance d2 with (1-s) m = mean and (1-s)^2 d2 + s^2 = var; d2 may be negative
        self.as_data = Gaussian(mean / (1 - s), (var - s**2) / (1 - s) ** 2)

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        return self.as_data.predict(x, s)


def learnt(matching: str, iterations: int = 250) -> list[tuple[float, float]]:
    """Train by the matching loss with a fake score that is always the best one; (mean, var) after every step."""
    steps, shape, generator = len(SIGMAS) - 1, (64, 1, 8, 8), seeded()
    teacher = Gaussian(2.0, 0.25)
    net = Affine(nn.Parameter(torch.full((steps,), 0.3).double()), nn.Parameter(torch.ones(steps).double()))
    optimizer = torch.optim.Adam([net.a, net.b], 0.03, (0.8, 0.95))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / iterations)) + 1e-3)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for _ in range(iterations):
        x, law, total = draw(), (0.0, 1.0), torch.zeros((), dtype=torch.float64)
        for k in range(steps):
            x0, moved, std = net.move(k, x)
            clean, law = net.law(k, *law)
            x_next = moved + std * draw()
            sample, s, of = (x_next, float(SIGMAS[k + 1]), law) if matching == "ambient" else (x0, 0.0, clean)
            u = torch.rand(len(x), generator=generator, dtype=torch.float64)
            at = renoised(FLOW, sample.detach(), s, levels(u, s), draw())
            predictions = [d.predict(at.x, at.t) for d in (Ambient(s, *of), teacher)]
            total = total + matching_loss(FLOW, sample, at, predictions[0], predictions[1], draw(), ETA).sum()
            x = x_next.detach()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rate.step()
    reached, law = [], (0.0, 1.0)
    for k in range(steps):
        _, law = net.law(k, *law)
        reached.append(law)
    return reached


def test_where_matching_leads() -> None:
    """The teacher's law at every level by AC-DMD; by DMD2 at the end alone, wider by 5 and 10 % on the way."""
    data = [((1 - s) * 2.0, (1 - s) ** 2 * 0.25 + s**2) for s in SIGMAS[1:].tolist()]
    for found, expected in zip(learnt("ambient"), data, strict=True):
        assert found == pytest.approx(expected, rel=0.01)
    clean = learnt("clean")
    for (mean, _), (expected, _) in zip(clean, data, strict=True):
        assert mean == pytest.approx(expected, rel=0.01)
    assert clean[-1][1] == pytest.approx(data[-1][1], rel=0.01)
    wider = [found[1] / expected[1] - 1 for found, expected in zip(clean, data, strict=True)]
    assert 0.04 < wider[1] < 0.06 and 0.09 < wider[2] < 0.12


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_tilted_law_is_where_both_gradients_cancel(beta: float) -> None:
    """Teacher N(0, 1), reward a x: of matching and reward together nothing is left at N(beta a, 1), in mean or spread.

    The matching gradient of N(mu, 1) is mu t^2 / ((1-t)^2 + t^2) at every x: its weight over t is what turns the
    weights of the two terms into beta.
    """
    a, n = 0.6, 4096
    u, noise, base = torch.rand(n, generator=seeded(), dtype=torch.float64), normal(n, 1), normal(n, 1, seed=1)
    t = levels(u, 0.0)
    weight = float((t**2 / ((1 - t) ** 2 + t**2)).mean())

    def left(mean: float, var: float) -> tuple[float, float]:
        """Of the summed gradient by the mean and by the spread of the samples."""
        x = mean + var**0.5 * base
        at = renoised(FLOW, x, 0.0, t, noise)
        fake, real = (projected(FLOW, g.predict(at.x, at.t), at, noise, 1.0) for g in (Gaussian(mean, var), TEACHER))
        total = matching_gradient(x, fake, real, normalised=False) / weight - beta * a
        return float(total.mean()), float((total * base).mean())

    by_mean, by_spread = left(beta * a, 1.0)
    assert by_mean == pytest.approx(0, abs=1e-9)
    assert abs(by_spread) < 4 * beta * a * 2 / n**0.5
    assert left(beta * a + 0.1, 1.0)[0] > 0.05 > -0.05 > left(beta * a - 0.1, 1.0)[0]
    assert left(beta * a, 1.5)[1] > 0.05 > -0.05 > left(beta * a, 0.6)[1]


TEACHER = Gaussian(0.0, 1.0)


class Own:
    """v = w x + b with weights of its own for every step and every sample, so that gradients come one by one."""

    kernel, eta, schedule = "cps", ETA, FLOW

    def __init__(self, count: int) -> None:
        steps = len(SIGMAS) - 1
        values = torch.tensor([[0.9, -0.5], [0.5, -0.2], [0.1, 0.3], [-0.4, 0.2]], dtype=torch.float64)
        self.weights = values[:steps, :, None].repeat(1, 1, count).requires_grad_()

    def denoiser(self, cond: Conditioning, guided: bool = True) -> Denoiser:
        return self

    def guided(self, cond: Conditioning, guidance: float) -> Denoiser:
        return self

    @contextmanager
    def reference(self) -> Iterator[None]:
        yield

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        w, b = self.weights[SIGMAS.tolist().index(float(s))]
        return FLOW.to_x0_eps(w[:, None] * x + b[:, None], x, s)

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def score(self, reward: str, images: Tensor, batch: Rollout, prompts: Sequence[str] | None = None) -> Tensor:
        return reward_of(images)


def reward_of(x0: Tensor) -> Tensor:
    return (x0 - 0.1 * (x0 - 1) ** 2).flatten()


def walked(model: Own, noises: Tensor) -> tuple[list[Tensor], Tensor]:
    """The states before each step, and the last one; noises [T + 1, N, 1]."""
    x, states = noises[0], []
    walk = denoise(model, x, SIGMAS, "cps", ETA)
    for i, noise in enumerate(noises[1:]):
        taken = next(walk) if i == 0 else walk.send(x)
        states.append(x)
        x = taken.mean + taken.std * noise
    return states, x


def hybrid(model: Own, states: list[Tensor], x0: Tensor, logp: str) -> Tensor:
    """Minus the gradient of RTDMD's loss without matching, [T, 2, N]; the advantage is the reward less a constant."""
    count, steps = len(x0), len(states)
    method = RTDMD.model_validate(
        {
            "name": "rtdmd",
            "subset": None,
            "logp": logp,
            "matching": 0.0,
            "backpropagated": Backpropagated(weight=1.0, rewards=("r",), margin=1e6),
        }
    )
    batch = Rollout(
        prompts=["a"] * count,
        metadata=[{}] * count,
        group=torch.zeros(count, dtype=torch.long),
        seeds=torch.arange(count),
        cond=Conditioning({}, torch.arange(count)),
        sigmas=SIGMAS,
        kept=torch.tensor(method.kept(steps, 0, 0)),
        x0=x0,
        states=torch.stack([torch.stack([a, b], 1) for a, b in zip(states, [*states[1:], x0], strict=True)], 1),
        advantages=reward_of(x0) - 0.5,
    )
    memory = method.start(None, {"w": nn.Parameter(torch.zeros(1))})
    total = torch.stack([loss.per_sample for loss in method.losses(model, batch, memory)]).sum(0)
    (gradient,) = torch.autograd.grad(total.sum(), model.weights)
    return -steps * gradient


def test_the_hybrid_gradient_is_the_gradient_of_the_expected_reward() -> None:
    """Score function for the stochastic steps, the reward's own gradient for the last: as if all were differentiated."""
    count = 100_000
    model, noises = Own(count), normal(len(SIGMAS), count, 1, seed=11)
    states, x0 = walked(model, noises)
    (whole,) = torch.autograd.grad(reward_of(x0).sum(), model.weights)
    states, x0 = [x.detach() for x in states], x0.detach()
    found = hybrid(model, states, x0, "gaussian")
    torch.testing.assert_close(found[-1], whole[-1], rtol=0, atol=1e-12)  # the last step, sample by sample
    apart = (found - whole)[:-1].permute(2, 0, 1)
    within(apart, 0.0, 3.0)
    assert (whole.mean(2)[:-1].abs() > 10 * apart.std(0) / count**0.5).sum() >= 3  # precise enough to tell

    scaled = hybrid(model, states, x0, "cps")
    rho = SIGMAS[1:-1] * math.sin(ETA * math.pi / 2)
    torch.testing.assert_close(scaled[:-1], 2 * rho[:, None, None] ** 2 * found[:-1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled[-1], found[-1], rtol=0, atol=0)
