from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffalign.samplers import KERNELS, denoise, drain, randn, step
from diffalign.schedules import VP, RectifiedFlow, Schedule, flow_match_sigmas, noised, plain_sigmas, vp_sigmas
from diffalign.solvers import dpm2
from diffalign.types import Step, UserError

FLOW = RectifiedFlow()
SD = VP.scaled_linear()
STOCHASTIC = [(k, e, FLOW) for k, e in (("flow_sde", 0.7), ("cps", 0.7), ("dance", 0.3), ("ddim", 1.0))] + [
    ("ddim", 0.6, SD),
    ("cps", 0.6, SD),
]


@dataclass(frozen=True)
class Linear:
    """A model whose output is 0.3 x: plain arithmetic, so that equal inputs give equal bits in any batch."""

    schedule: Schedule = FLOW

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        return self.schedule.to_x0_eps(0.3 * x, x, s)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def grid(schedule: Schedule, steps: int = 6) -> Tensor:
    return vp_sigmas(steps) if isinstance(schedule, VP) else plain_sigmas(steps, 3.0)


def states(steps: list[Step]) -> Tensor:
    return torch.stack([s.next for s in steps])


@pytest.mark.parametrize("kind", KERNELS)
def test_eta_zero_is_the_ode_to_the_bit(kind: str) -> None:
    x, sigmas = draw(3, 4, 2, dtype=torch.float32), plain_sigmas(7, 3.0)
    ode = list(denoise(Linear(), x, sigmas))
    assert torch.equal(states(list(denoise(Linear(), x, sigmas, kind, eta=0.0))), states(ode))


def test_the_ode_step_is_euler() -> None:
    x0, eps = draw(2, 3, 5).unbind(0)
    taken = step(FLOW, x0, eps, noised(FLOW, x0, eps, 0.8), 0.8, 0.55)
    torch.testing.assert_close(taken.next, noised(FLOW, x0, eps, 0.8) - 0.25 * (eps - x0), atol=1e-14, rtol=0)
    assert torch.equal(taken.std, torch.zeros(3, 1, dtype=torch.float64))
    assert torch.equal(taken.log_prob, torch.zeros(3, dtype=torch.float64))


def test_the_ode_is_diffusers_for_flow_and_vp() -> None:
    x = draw(2, 4, 3, 3, dtype=torch.float32)
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(9)
    ddim = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
        clip_sample=False,
    )  # fmt: skip
    ddim.set_timesteps(10)
    for scheduler, schedule, sigmas in ((euler, FLOW, flow_match_sigmas(9, 3.0)), (ddim, SD, vp_sigmas(10))):
        expected = x
        for t in scheduler.timesteps:
            expected = scheduler.step(0.3 * expected, t, expected).prev_sample
        torch.testing.assert_close(drain(denoise(Linear(schedule), x, sigmas)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize(("s", "s_next"), [(1.0, 0.96), (0.8, 0.7), (0.3, 0.0089), (0.0089, 0.0)])
def test_flow_sde_on_a_point_mass(s: float, s_next: float, eta: float) -> None:
    """mu = (1 - s') x0 + (s' - g^2 h / 2s) e, and the total noise is (s' - g^2 h / 2s)^2 + g^2 h > s'^2."""
    x0, e = draw(2, 2, 6).unbind(0)
    x, v, h = noised(FLOW, x0, e, s), e - x0, s - s_next
    g2 = eta**2 * s / (1 - (s_next if s == 1 else s))
    taken = step(FLOW, *FLOW.to_x0_eps(v, x, s), x, s, s_next, "flow_sde", eta, x)
    kept = s_next - g2 * h / (2 * s)
    torch.testing.assert_close(taken.mean, (1 - s_next) * x0 + kept * e, atol=1e-12, rtol=0)
    official = x * (1 - g2 / (2 * s) * h) - v * (1 + g2 * (1 - s) / (2 * s)) * h
    torch.testing.assert_close(taken.mean, official, atol=1e-12, rtol=0)
    torch.testing.assert_close(taken.std.flatten().square(), torch.full((2,), g2 * h, dtype=torch.float64))
    assert kept**2 + g2 * h > s_next**2


def test_log_ratio_of_two_policies() -> None:
    """mean_d [dmu z / S - dmu^2 / 2S^2] for x' = mu_old + S z."""
    x, v, v_new, z = draw(4, 3, 8).unbind(0)
    old = step(FLOW, *FLOW.to_x0_eps(v, x, 0.7), x, 0.7, 0.6, "flow_sde", 0.7, x)
    stored = old.mean + old.std * z
    old, new = (step(FLOW, *FLOW.to_x0_eps(u, x, 0.7), x, 0.7, 0.6, "flow_sde", 0.7, stored) for u in (v, v_new))
    shift = (new.mean - old.mean) / old.std
    torch.testing.assert_close(new.log_prob - old.log_prob, (shift * z - shift**2 / 2).mean(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "eta", "schedule"), [c for c in STOCHASTIC if c[0] in ("cps", "ddim")])
def test_total_noise_is_sigma_next(kind: str, eta: float, schedule: Schedule) -> None:
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for s, s_next in zip(grid(schedule), grid(schedule)[1:], strict=False):
        taken = step(schedule, zero, one, zero, s, s_next, kind, eta, zero)
        assert float(taken.mean**2 + taken.std**2) == pytest.approx(float(schedule.sigma(s_next)) ** 2, abs=1e-15)


def test_cps_log_prob_has_no_scale_and_outlives_std_zero() -> None:
    x0, eps = draw(2, 3, 5).unbind(0)
    for s_next in (0.4, 0.0):
        taken = step(FLOW, x0, eps, x0, 0.8, s_next, "cps", 0.5, x0 + 1)
        torch.testing.assert_close(taken.log_prob, -((x0 + 1 - taken.mean) ** 2).mean(1), atol=1e-14, rtol=0)


def test_ddim_and_flow_sde_meet_in_small_steps() -> None:
    """ddim(eta) is flow_sde(sqrt(2) eta) up to O(h)."""
    zero, one, s, h = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), 0.6, 1e-5
    ddim = step(FLOW, zero, one, zero, s, s - h, "ddim", 0.5, zero)
    sde = step(FLOW, zero, one, zero, s, s - h, "flow_sde", 0.5 * math.sqrt(2), zero)
    assert float(ddim.std / sde.std) == pytest.approx(1, abs=1e-4)
    assert float((s - h - ddim.mean) / (s - h - sde.mean)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "eta", "schedule"), STOCHASTIC)
def test_precision(given: torch.dtype, kind: str, eta: float, schedule: Schedule) -> None:
    kept = torch.float64 if given == torch.float64 else torch.float32
    x = draw(2, 3, 4).to(given)
    for taken in denoise(Linear(schedule), x, grid(schedule), kind, eta):
        assert {t.dtype for t in (taken.mean, taken.std, taken.next, taken.log_prob, taken.x0)} == {kept}
        assert taken.std.shape == (2, 1, 1) and taken.log_prob.shape == (2,)


@pytest.mark.parametrize(("kind", "eta", "schedule"), STOCHASTIC)
def test_a_stored_transition_scores_the_same_bits(kind: str, eta: float, schedule: Schedule) -> None:
    x = draw(5, 3, 7, dtype=torch.float32)
    sigmas, model = grid(schedule).float(), Linear(schedule)
    for i, taken in enumerate(denoise(model, x, sigmas, kind, eta, generators=seeded(*range(5)))):
        assert taken.log_prob.isfinite().all()
        s, s_next = sigmas[i].expand(5), sigmas[i + 1].expand(5)
        again = step(schedule, *model.predict(x, s), x, s, s_next, kind, eta, taken.next)
        assert torch.equal(again.log_prob, taken.log_prob) and torch.equal(again.next, taken.next)
        x = taken.next


def test_steps_of_different_samples_batch_together() -> None:
    x, model, sigmas = draw(4, 6), Linear(), plain_sigmas(8, 3.0)
    index = torch.tensor([0, 3, 5, 7])
    s, s_next = sigmas[index], sigmas[index + 1]
    together = step(FLOW, *model.predict(x, s), x, s, s_next, "flow_sde", 0.7, x + 0.1)
    for j, i in enumerate(index.tolist()):
        one = x[j : j + 1]
        alone = step(FLOW, *model.predict(one, sigmas[i]), one, sigmas[i], sigmas[i + 1], "flow_sde", 0.7, one + 0.1)
        torch.testing.assert_close(together.log_prob[j], alone.log_prob[0], atol=1e-12, rtol=0)


def test_gradient_reaches_the_mean_and_not_the_state() -> None:
    x = draw(2, 5)
    v = (0.3 * x).requires_grad_()
    sampled = step(FLOW, *FLOW.to_x0_eps(v, x, 0.7), x, 0.7, 0.6, "flow_sde", 0.7, generators=seeded(0, 1))
    scored = step(FLOW, *FLOW.to_x0_eps(v, x, 0.7), x, 0.7, 0.6, "flow_sde", 0.7, sampled.next.detach())
    (a,), (b,) = (torch.autograd.grad(t.log_prob.sum(), v, retain_graph=True) for t in (sampled, scored))
    assert torch.equal(a, b) and a.abs().sum() > 0
    (through,) = torch.autograd.grad(sampled.next.sum(), v)  # while sampling itself stays differentiable
    assert through.abs().sum() > 0


def test_sampled_noise_has_the_stated_mean_and_std() -> None:
    x = draw(1, 40_000)
    taken = step(FLOW, *Linear().predict(x, 0.7), x, 0.7, 0.6, "flow_sde", 0.7, generators=seeded(3))
    z = (taken.next - taken.mean) / taken.std
    assert abs(float(z.mean())) < 0.02 and float(z.std()) == pytest.approx(1, abs=0.02)


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    x, sigmas = draw(5, 3, 3, dtype=torch.float32), plain_sigmas(6, 3.0)
    whole = states(list(denoise(Linear(), x, sigmas, "flow_sde", 0.7, generators=seeded(7, 8, 9, 10, 11))))
    first = states(list(denoise(Linear(), x[:2], sigmas, "flow_sde", 0.7, generators=seeded(7, 8))))
    rest = states(list(denoise(Linear(), x[2:], sigmas, "flow_sde", 0.7, generators=seeded(9, 10, 11))))
    assert torch.equal(whole, torch.cat([first, rest], 1))
    assert not torch.equal(whole[:, 0] - whole[:, 0].mean(), whole[:, 1] - whole[:, 1].mean())


def test_randn_without_generators_is_the_global_rng() -> None:
    torch.manual_seed(5)
    a = randn((2, 3), None, "cpu")
    torch.manual_seed(5)
    assert torch.equal(a, torch.randn(2, 3))
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 3), seeded(0, 1), "cpu")


def test_only_the_named_steps_are_stochastic() -> None:
    x, sigmas = draw(2, 6), plain_sigmas(5, 3.0)
    steps = list(denoise(Linear(), x, sigmas, "flow_sde", 0.7, stochastic={1, 2}, generators=seeded(0, 1)))
    assert [bool((s.std > 0).all()) for s in steps] == [False, True, True, False, False]
    ode = drain(denoise(Linear(), steps[2].next, sigmas[3:]))
    assert torch.equal(steps[-1].next, ode)


@pytest.mark.parametrize("sampler", [denoise, dpm2])
def test_send_redirects(sampler: type[denoise]) -> None:
    x, other, sigmas = draw(2, 6), draw(2, 6, seed=1), plain_sigmas(5, 3.0)
    run = sampler(Linear(), x, sigmas)
    first = next(run)
    taken = run.send(other)
    assert torch.equal(taken.next, drain(denoise(Linear(), other, sigmas[1:3])))
    kept = sampler(Linear(), x, sigmas)
    assert torch.equal(next(kept).next, first.next) and not torch.equal(next(kept).next, taken.next)


def test_dpm2_beats_the_ode_and_leaves_nothing_to_score() -> None:
    x = draw(3, 4)
    reference = drain(denoise(Linear(), x, plain_sigmas(4000, 3.0)))
    steps = list(dpm2(Linear(), x, plain_sigmas(24, 3.0)))
    error = (steps[-1].next - reference).norm()
    assert error < 0.2 * (drain(denoise(Linear(), x, plain_sigmas(24, 3.0))) - reference).norm()
    assert all((s.std == 0).all() and (s.log_prob == 0).all() and torch.equal(s.mean, s.next) for s in steps)


def test_dpm2_on_vp_is_diffusers() -> None:
    x, steps = draw(2, 4, 3, 3, dtype=torch.float32), 10
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(0.3 * expected, t, expected).prev_sample
    sigmas = torch.cat([scheduler.timesteps.double() / 1000, torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(drain(dpm2(Linear(SD), x, sigmas)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flow_sd", 0.7), "did you mean 'flow_sde'"),
        (("heun", 0.7), "known: ode, flow_sde"),
        (("cps", 1.2), "eta 1.2 does not suit kernel 'cps'; use 0 to 1"),
        (("flow_sde", -0.1), "use 0 or more"),
        (("flow_sde", math.nan), "use 0 or more"),
        (("flow_sde", 0.7, {5}), "must lie in 0 to 4"),
        (("flow_sd", 0.7, ()), "did you mean"),
    ],
)
def test_mistakes_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(denoise(Linear(), draw(2, 3), plain_sigmas(5), *arguments))


def test_flow_kernels_refuse_vp_models() -> None:
    with pytest.raises(UserError, match="use 'ddim'"):
        next(denoise(Linear(SD), draw(2, 3), vp_sigmas(5), "flow_sde", 0.7))


@pytest.mark.parametrize("sampler", [denoise, dpm2])
@pytest.mark.parametrize("sigmas", [torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0])])
def test_grids_that_do_not_fall_are_refused(sampler: type[denoise], sigmas: Tensor) -> None:
    with pytest.raises(UserError, match="never rise"):
        next(sampler(Linear(), draw(2, 3), sigmas))
