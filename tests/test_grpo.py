"""Flow-GRPO on a small random Stable Diffusion 3: exact ratios, KL identities, windows, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from diffalign import adapters, pipelines
from diffalign.algorithms import Memory
from diffalign.algorithms._policy_gradient import KL
from diffalign.algorithms.grpo import GRPO
from diffalign.rollout import collect, sample_seed
from diffalign.sections import Sampling
from diffalign.types import Rollout
from diffalign.windows import Window

KERNELS = [("flow_sde", 0.7), ("cps", 0.7), ("dance", 0.3)]
PROMPTS = [{"prompt": p} for p in ("a cat", "a cat", "two dogs", "two dogs")]


@dataclass
class Policy:
    pipeline: Any
    kernel: str
    eta: float
    guidance: float = 1.0

    def denoiser(self, cond: Any, guided: bool = True) -> Any:
        if not guided or self.guidance == 1:
            return self.pipeline.denoiser(cond, 1.0)
        return self.pipeline.denoiser(cond, self.guidance, self.pipeline.encode([""]))

    @contextmanager
    def reference(self) -> Iterator[None]:
        with adapters.reference(self.pipeline):
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def pipeline(folder: Path) -> Any:
    loaded = pipelines.load(folder, device="cpu", max_sequence_length=4)
    torch.manual_seed(0)
    adapters.add_lora(loaded, 4, 8)
    return loaded


def roll(
    pipeline: Any, kernel: str, eta: float, kept: list[int], micro_batch: int = 4, guidance: float = 1.0
) -> Rollout:
    sampling = Sampling(steps=5, kernel=kernel, eta=eta, height=32, width=32, guidance=guidance)
    seeds = torch.tensor([sample_seed(0, 0, 0, j) for j in range(4)])
    rollout = collect(pipeline, PROMPTS, torch.tensor([0, 0, 1, 1]), seeds, sampling, kept, micro_batch)
    rollout.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    return rollout


def perturb(pipeline: Any, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.trainable_parameters(pipeline):
            p.add_(scale * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(("kernel", "eta"), KERNELS)
def test_first_update_is_exactly_on_policy(pipeline: Any, kernel: str, eta: float) -> None:
    rollout = roll(pipeline, kernel, eta, [0, 1, 2, 3])
    for loss in GRPO(name="grpo").losses(Policy(pipeline, kernel, eta), rollout, Memory()):
        total = {name: 4 * metric for name, metric in loss.metrics.items()}  # metrics are shares of the four steps
        assert total["ratio"].tolist() == [1.0] * 4
        assert total["logp_gap"].tolist() == [0.0] * 4  # stored transitions score bitwise as they were sampled
        assert total["clip_fraction"].tolist() == [0.0] * 4


def test_rollout_does_not_depend_on_the_micro_batch(pipeline: Any) -> None:
    whole, single = (roll(pipeline, "cps", 0.7, [1, 2], micro_batch) for micro_batch in (4, 1))
    assert whole.states is not None and single.states is not None
    torch.testing.assert_close(single.x0, whole.x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(single.states, whole.states, rtol=0, atol=1e-5)
    torch.testing.assert_close(single.log_probs, whole.log_probs, rtol=0, atol=1e-5)
    assert not torch.equal(whole.x0[0], whole.x0[1])  # same prompt, other seed


@pytest.mark.parametrize(("kernel", "eta"), KERNELS)
def test_gradient_is_advantage_times_score(pipeline: Any, kernel: str, eta: float) -> None:
    """On policy, the PPO loss has the gradient of -A log p."""
    perturb(pipeline)
    rollout, policy = roll(pipeline, kernel, eta, [1]), Policy(pipeline, kernel, eta)
    parameters = adapters.trainable_parameters(pipeline)
    (loss,) = GRPO(name="grpo").losses(policy, rollout, Memory())
    actual = torch.autograd.grad(loss.per_sample.sum(), parameters)

    from diffalign.samplers import step

    assert rollout.states is not None and rollout.advantages is not None
    x, x_next = rollout.states[:, 0, 0], rollout.states[:, 0, 1]
    s, s_next = rollout.sigmas[1], rollout.sigmas[2]
    denoiser = policy.denoiser(rollout.cond)
    taken = step(denoiser.schedule, *denoiser.predict(x, s), x, s, s_next, kernel, eta, next=x_next)
    expected = torch.autograd.grad(-(rollout.advantages * taken.log_prob).sum(), parameters)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert any(b.abs().max() > 0 for b in expected)


def kl_of(pipeline: Any, rollout: Rollout, kernel: str, eta: float, norm: str) -> Tensor:
    algorithm = GRPO(name="grpo", kl=KL(weight=1.0, norm=norm))
    (loss,) = algorithm.losses(Policy(pipeline, kernel, eta), rollout, Memory())
    return loss.metrics["kl"]


@pytest.mark.parametrize(("kernel", "eta"), KERNELS)
def test_kl_norms_agree_with_their_definitions(pipeline: Any, kernel: str, eta: float) -> None:
    rollout = roll(pipeline, kernel, eta, [1])
    assert kl_of(pipeline, rollout, kernel, eta, "exact").abs().max() == 0  # a fresh LoRA is the reference
    perturb(pipeline)
    exact, code, velocity = (kl_of(pipeline, rollout, kernel, eta, n) for n in ("exact", "code", "velocity"))
    s, s_next = rollout.sigmas[1], rollout.sigmas[2]
    step_length = 1.0 if kernel == "cps" else s - s_next
    torch.testing.assert_close(code, exact * step_length, rtol=1e-5, atol=0)
    h = float(s - s_next)
    if kernel == "cps":
        std = float(s_next) * torch.tensor(0.7 * torch.pi / 2).sin()
        moved = -(1 - s_next) * s + (s_next**2 - std**2).sqrt() * (1 - s)
    else:
        g = 0.3 if kernel == "dance" else 0.7 * float((s / (1 - s)).sqrt())
        std, moved = torch.tensor(g * h**0.5), -h * (1 + g**2 * (1 - s) / (2 * s))
    torch.testing.assert_close(exact, velocity * moved**2 / (2 * std**2), rtol=1e-3, atol=0)


def gradient(pipeline: Any, algorithm: GRPO, policy: Policy, rollout: Rollout) -> Tensor:
    losses = [loss.per_sample.sum() for loss in algorithm.losses(policy, rollout, Memory())]
    parts = torch.autograd.grad(torch.stack(losses).sum(), adapters.trainable_parameters(pipeline))
    return torch.cat([p.flatten() for p in parts])


@pytest.mark.parametrize("settings", [{}, {"ratio_norm": True, "clip": 2e-6}], ids=str)
def test_later_updates_compare_with_the_policy_that_sampled(pipeline: Any, settings: dict[str, Any]) -> None:
    """Until the weights move, stored old values change nothing; then ratios leave 1 and the clip cuts gradients off."""
    perturb(pipeline)
    algorithm, policy = GRPO(name="grpo", **settings), Policy(pipeline, "flow_sde", 0.7)
    rollout = roll(pipeline, "flow_sde", 0.7, [0, 1, 2])
    first = gradient(pipeline, algorithm, policy, rollout)
    with torch.no_grad():
        rollout.old = algorithm.behaviour(policy, rollout)
    torch.testing.assert_close(gradient(pipeline, algorithm, policy, rollout), first, rtol=0, atol=0)

    perturb(pipeline, 0.5)
    losses = list(algorithm.losses(policy, rollout, Memory()))
    ratio, clipped = (3 * torch.stack([loss.metrics[n] for loss in losses]) for n in ("ratio", "clip_fraction"))
    assert ((ratio - 1).abs() > algorithm.clip).any() and torch.equal((ratio - 1).abs() > algorithm.clip, clipped > 0)
    gains = (ratio - 1) * rollout.advantages > algorithm.clip  # what is already more, or less, likely as it should be
    rollout.advantages = torch.where(gains.all(0), rollout.advantages, 0.0)
    if gains.all(0).any():
        assert gradient(pipeline, algorithm, policy, rollout).abs().max() == 0


def test_the_guarded_ratio_is_the_noise_times_the_shift(pipeline: Any) -> None:
    """log rho = mean_d (mu - mu_old) z, with z the noise that was drawn: GRPO-Guard's identity."""
    algorithm, policy = GRPO(name="grpo", ratio_norm=True), Policy(pipeline, "flow_sde", 0.7)
    rollout = roll(pipeline, "flow_sde", 0.7, [1])
    with torch.no_grad():
        rollout.old = algorithm.behaviour(policy, rollout)
        perturb(pipeline)
        taken, _ = algorithm.score(policy.denoiser(rollout.cond), policy, rollout, 0)
        (loss,) = algorithm.losses(policy, rollout, Memory())
    assert rollout.states is not None
    old_mean = rollout.old["mean"][:, 0]
    noise = (rollout.states[:, 0, 1] - old_mean) / taken.std
    expected = ((taken.mean - old_mean) * noise).flatten(1).mean(1)
    torch.testing.assert_close(loss.metrics["ratio"].log(), expected, rtol=1e-2, atol=2e-6)
    assert expected.abs().min() > 1e-5


@pytest.mark.parametrize("cfg", [True, False])
def test_guidance_in_training(pipeline: Any, cfg: bool) -> None:
    """The guided prediction is trained as it was sampled; the bare one is another policy, and the gap shows it."""
    perturb(pipeline)
    rollout = roll(pipeline, "cps", 0.7, [1, 2], guidance=4.5)
    losses = GRPO(name="grpo", cfg=cfg).losses(Policy(pipeline, "cps", 0.7, 4.5), rollout, Memory())
    gap = torch.stack([loss.metrics["logp_gap"] for loss in losses])
    assert gap.max() == 0 if cfg else gap.min() > 0


def test_window_is_drawn_inside_its_range_and_reproducibly() -> None:
    algorithm = GRPO(name="grpo", window=Window(size=2, range=(1, 6)))
    windows = [algorithm.stochastic(10, 0, epoch) for epoch in range(200)]
    assert {w[0] for w in windows} == {1, 2, 3, 4}
    assert all(w == [w[0], w[0] + 1] for w in windows)
    assert windows == [algorithm.stochastic(10, 0, epoch) for epoch in range(200)]
    assert windows != [algorithm.stochastic(10, 1, epoch) for epoch in range(200)]
    assert GRPO(name="grpo").stochastic(10, 0, 0) == list(range(9))  # all but the last


def test_window_strategies() -> None:
    fixed = Window(size=2, range=(1, 6), strategy="fixed")
    assert {tuple(fixed.steps(0, epoch)) for epoch in range(20)} == {(1, 2)}
    slides = Window(size=2, range=(1, 5), strategy="progressive", every=2)
    assert [slides.steps(0, epoch)[0] for epoch in range(8)] == [1, 1, 2, 2, 3, 3, 1, 1]
    stays = Window(size=2, range=(0, 5), strategy="progressive", every=1, stride=2, roll_back=False)
    assert [stays.steps(0, epoch)[0] for epoch in range(5)] == [0, 2, 3, 3, 3]


def test_trained_steps_are_some_of_the_stochastic_ones() -> None:
    algorithm = GRPO(name="grpo", trained=3)
    drawn = [tuple(algorithm.kept(10, 0, epoch)) for epoch in range(100)]
    assert {len(set(steps)) for steps in drawn} == {3} and {i for steps in drawn for i in steps} == set(range(9))
    assert algorithm.stochastic(10, 0, 0) == list(range(9))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 4, "range": (0, 3)}, "a window of 4 steps does not fit"),
        ({"every": 3}, "every has no effect with strategy 'random'"),
        ({"strategy": "progressive", "least": 3}, "least has no effect with strategy 'progressive'"),
    ],
)
def test_windows_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Window(**settings)


@pytest.mark.parametrize(
    ("algorithm", "sampling", "said"),
    [
        ({"ratio_norm": True}, {"kernel": "cps"}, "derived for flow_sde, not 'cps'"),
        ({"cfg": False}, {}, "no effect at guidance 1"),
        ({"trained": 12}, {}, "12 exceeds the 9 stochastic steps"),
        ({"window": {"size": 2, "range": (0, 10)}}, {}, "the last of 10 steps is never trained"),
    ],
)
def test_settings_that_do_not_fit_together(algorithm: dict[str, Any], sampling: dict[str, Any], said: str) -> None:
    conflicts = list(GRPO(name="grpo", **algorithm).conflicts(Sampling(**sampling)))
    assert len(conflicts) == 1 and said in conflicts[0][1]


def test_a_gap_between_sampling_and_training_is_told() -> None:
    algorithm = GRPO(name="grpo", clip=1e-4)
    assert not algorithm.warnings({"logp_gap": 4e-5})
    assert "differ by 6.0e-05, over half of algorithm.clip 0.0001" in algorithm.warnings({"logp_gap": 6e-5})["logp_gap"]


def test_samples_without_advantage_are_skipped_unless_kl_needs_them(pipeline: Any) -> None:
    rollout = roll(pipeline, "cps", 0.7, [1])
    rollout.advantages = torch.tensor([0.0, 0.0, 0.5, -0.5])
    assert GRPO(name="grpo").trains_on(rollout, Memory(), 0).tolist() == [False, False, True, True]
    assert GRPO(name="grpo", kl=KL(weight=0.1)).trains_on(rollout, Memory(), 0).tolist() == [True] * 4
