"""Flow-GRPO (arXiv 2505.05470): policy gradients through the stochastic steps of a diffusion or flow sampler."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict, Field

from diffalign.algorithms import Algorithm, Loss, Memory, Policy
from diffalign.algorithms._policy_gradient import KL, guarded_ratio, mean_kl, weighted_policy_loss
from diffalign.windows import Window

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.sections import Sampling
    from diffalign.types import Denoiser, Rollout, Step


class GRPO(Algorithm):
    """PPO-clipped policy gradient on single denoising steps with group-relative advantages.

    For every stored step, with rho = exp(log p - log p_old): L = max(-A rho, -A clip(rho, 1 - clip, 1 + clip))
    + kl.weight KL, averaged over images and steps. In an epoch's first update log p_old is the current one, so rho is
    exactly 1; for later ones it is computed before the first, on the batches that are trained. log p is a mean over
    latent dimensions, which is why clip is so small. The last step is never trained: its noise is so small that its
    log-probability explodes.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    trajectory: ClassVar[bool] = True

    clip: float = Field(1e-4, gt=0)
    """PPO clip range of the probability ratio."""
    kl: KL = KL()
    """Penalty for leaving the reference policy."""
    window: Window | None = None
    """Stochastic, trained steps; not given, all but the last."""
    ratio_norm: bool = False
    """GRPO-Guard (arXiv 2510.22319): ratios of equal mean and scale at every step; flow_sde only, clip near 2e-6."""
    trained: int | None = Field(None, ge=1)
    """Train so many of the stochastic steps, drawn each epoch (DanceGRPO, arXiv 2505.07818); not given, all."""
    cfg: bool = True
    """Train the guided prediction, as it was sampled; false: the conditional branch alone, at half the cost."""

    @property
    def needs_reference(self) -> bool:
        return self.kl.weight > 0

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().conflicts(sampling)
        if self.window is not None and self.window.range[1] >= sampling.steps:
            ends, last = self.window.range[1], sampling.steps - 1
            said = f"ends at {ends}, but the last of {sampling.steps} steps is never trained; end at {last}"
            yield ("algorithm", "window", "range"), said
        if self.ratio_norm and sampling.kernel != "flow_sde":
            said = f"is derived for flow_sde, not '{sampling.kernel}'; set sampling.kernel: flow_sde"
            yield ("algorithm", "ratio_norm"), said
        noisy = len(self.stochastic(sampling.steps, 0, 0))
        if self.trained is not None and self.trained > noisy:
            yield ("algorithm", "trained"), f"{self.trained} exceeds the {noisy} stochastic steps of an epoch"
        if not self.cfg and sampling.guidance == 1:
            yield ("algorithm", "cfg"), "false has no effect at guidance 1; remove it"

    def stochastic(self, steps: int, seed: int, epoch: int) -> list[int]:
        return list(range(steps - 1)) if self.window is None else self.window.steps(seed, epoch)

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        noisy = self.stochastic(steps, seed, epoch)
        if self.trained is None:
            return noisy
        return sorted(random.Random(f"trained {seed} {epoch}").sample(noisy, self.trained))

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        later = 1.0 if passes > 1 else 1 - 1 / updates  # images of an epoch's later updates: scored once before them
        own = super().forwards(steps, updates, passes)
        return own | ({"of the old policy": later * self.levels(steps)} if later else {})

    def affine(self, updates: int) -> bool:
        return updates == 1  # rho is 1

    def trains_on(self, rollout: Rollout, memory: Memory, update: int) -> Tensor:
        return ~rollout.flat | self.needs_reference

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        gap = metrics.get("logp_gap", 0.0)
        if gap <= self.clip / 2 or not self.cfg:  # without guidance it differs from what sampled, as asked for
            return {}
        return {
            "logp_gap": f"log-probabilities of sampling and training differ by {gap:.1e}, over half of algorithm.clip "
            f"{self.clip:g}: training does not see the policy that sampled; use model.dtype fp32 or a larger clip"
        }

    def behaviour(self, policy: Policy, batch: Rollout) -> dict[str, Tensor]:
        import torch

        denoiser = policy.denoiser(batch.cond, self.cfg)
        steps = [self.score(denoiser, policy, batch, k)[0] for k in range(len(batch.kept))]
        old = {"log_prob": torch.stack([step.log_prob for step in steps], 1)}
        return old | ({"mean": torch.stack([step.mean for step in steps], 1)} if self.ratio_norm else {})

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        assert batch.log_probs is not None and batch.advantages is not None
        denoiser = policy.denoiser(batch.cond, self.cfg)
        for k, i in enumerate(batch.kept.tolist()):
            taken, velocity = self.score(denoiser, policy, batch, k)
            old = batch.old["log_prob"][:, k] if batch.old else taken.log_prob.detach()
            if self.ratio_norm:
                mean = batch.old["mean"][:, k] if batch.old else taken.mean.detach()
                ratio, length = guarded_ratio(taken, old, mean), float(batch.sigmas[i] - batch.sigmas[i + 1])
            else:
                ratio, length = (taken.log_prob - old).exp(), 1.0
            objective = partial(weighted_policy_loss, ratio, self.clip, 1 / (length * len(batch.kept)))
            metrics = {
                "ratio": ratio.detach(),
                "clip_fraction": ((ratio.detach() - 1).abs() > self.clip).float(),
                "logp_gap": (old - batch.log_probs[:, k]).abs(),
            }
            penalty = None
            if self.needs_reference:
                kl = self.penalty(denoiser, policy, batch, k, taken, velocity)
                penalty = self.kl.weight * kl / len(batch.kept)
                metrics["kl"] = kl.detach()
            share = {name: m / len(batch.kept) for name, m in metrics.items()}
            yield Loss(objective, batch.advantages, penalty, share)

    @staticmethod
    def score(denoiser: Denoiser, policy: Policy, batch: Rollout, k: int) -> tuple[Step, Tensor]:
        """The k-th stored transition under the current weights, and the velocity eps - x0 at its start."""
        from diffalign.samplers import step

        assert batch.states is not None
        i = int(batch.kept[k])
        x, x_next, s, s_next = batch.states[:, k, 0], batch.states[:, k, 1], batch.sigmas[i], batch.sigmas[i + 1]
        x0, eps = denoiser.predict(x, s)
        taken = step(denoiser.schedule, x0, eps, x, s, s_next, policy.kernel, policy.eta, next=x_next)
        return taken, eps - x0

    def penalty(
        self, denoiser: Denoiser, policy: Policy, batch: Rollout, k: int, taken: Step, velocity: Tensor
    ) -> Tensor:
        """KL of one step to the reference policy in the chosen norm, [B]."""
        import torch

        with torch.no_grad(), policy.reference():
            reference, reference_velocity = self.score(denoiser, policy, batch, k)
        if self.kl.norm == "velocity":
            return (velocity - reference_velocity).square().flatten(1).mean(1)
        kl = mean_kl(taken.mean, reference.mean, taken.std)
        program = self.kl.norm == "code" and policy.kernel in ("flow_sde", "dance")
        i = int(batch.kept[k])  # the program divides by g^2 where the KL has g^2 times the step
        return kl * (batch.sigmas[i] - batch.sigmas[i + 1]) if program else kl
