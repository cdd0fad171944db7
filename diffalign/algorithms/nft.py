"""DiffusionNFT (arXiv 2509.16117): online RL on the forward process, with an implicit positive and negative policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field

from diffalign.algorithms import Memory, Policy
from diffalign.algorithms._forward import ForwardProcess, Noised, reference_velocity, squared
from diffalign.algorithms._shadow import Decay, Shadow

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffalign.types import Denoiser, Rollout

SMALLEST = 1e-5  # no weight counts as less


class NFT(ForwardProcess):
    """Flow matching towards good images and away from bad ones, relative to the old policy that sampled them.

    With x0hat the clean prediction at x = alpha x0 + sigma eps, r = 1/2 + clip(A, -c, c) / (2 c) and c = `clip`:

        x0hat+ = beta x0hat + (1 - beta) x0hat_old,      x0hat- = (1 + beta) x0hat_old - beta x0hat
        L+-    = mean_d (x0hat+- - x0)^2 / max(mean_d |x0hat+- - x0|, 1e-5)        no gradient through the divisor
        L      = c (r L+ + (1 - r) L-) / beta + kl mean_d (v - v_ref)^2

    At the old policy the gradient is that of flow matching weighted by A, whatever beta is. Images come from the old
    policy by any sampler, best a deterministic one, without guidance.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    beta: float = Field(1.0, gt=0)
    """How far the implicit policies are from the old one; small: a trust region that lets theta move far (paper: 1.0,
    and 0.1 for OCR and several rewards)."""
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    """What of the advantages is used: all; those above or below 0; 1 for those above 0; their sign."""
    clip: float = Field(5.0, gt=0)
    """c: advantages beyond it count as c. It also scales the loss, so that the first step does not depend on it."""
    kl: float = Field(1e-4, ge=0)
    """Weight of the velocity's squared distance to the model before training; 0 skips that forward pass."""
    old: Decay = Decay()
    """How the old policy follows after every epoch: the defaults are DiffusionNFT's decay_type 1; type 0 is {rate: 0},
    type 2 {rate: 0.0075, start: 75, cap: 0.999}, MARBLE's {cap: 0.95}."""

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    @property
    def copies(self) -> tuple[str, ...]:
        return ("old policy",)

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        apart = passes if self.old.lags else passes - 1 / updates  # in an epoch's first update they may be equal
        own = super().forwards(steps, updates, passes)
        return own | ({"of the old policy": apart * self.levels(steps)} if apart else {})

    def affine(self, updates: int) -> bool:
        return self.mode == "all"

    def start(self, pipeline: Any, parameters: dict[str, nn.Parameter]) -> Memory:
        return Shadow(parameters, self.old, "epoch", acts=True)

    def trains_on(self, rollout: Rollout, memory: Memory, update: int) -> Tensor:
        assert isinstance(memory, Shadow)
        idle = update == 0 and memory.equal and not self.kl  # L+ and L- then cancel at A = 0
        return ~rollout.flat | (not idle)

    def terms(
        self, denoiser: Denoiser, policy: Policy, batch: Rollout, memory: Memory, at: Noised, k: int
    ) -> tuple[Callable[[Tensor], Tensor], Tensor | None, dict[str, Tensor]]:
        import torch

        assert isinstance(memory, Shadow)
        x0, eps = denoiser.predict(at.x, at.s)
        if memory.equal:  # the same numbers as another forward pass would give
            old = x0.detach()
        else:
            with torch.no_grad(), memory.applied():
                old, _ = denoiser.predict(at.x, at.s)
        positive, negative = (matching(x, at.x0) for x in implicit(x0, old, self.beta))
        objective = partial(nft_loss, positive, negative, self.beta, self.mode, self.clip)
        metrics = {"old_gap": squared(x0.detach(), old)}
        if not self.needs_reference:
            return objective, None, metrics
        kl = squared(eps - x0, reference_velocity(denoiser, policy, at))
        return objective, self.kl * kl, metrics | {"kl": kl}


def implicit(x0: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Clean predictions of the positive and the negative policy, [B, ...] each."""
    off = beta * (x0 - old)  # so written, both are `old` to the last bit where x0 is
    return old + off, old - off


def matching(prediction: Tensor, x0: Tensor) -> Tensor:
    """mean_d (prediction - x0)^2 over its own mean_d |prediction - x0|, which carries no gradient; [B]."""
    weight = (prediction.detach() - x0).abs().flatten(1).mean(1).clamp(min=SMALLEST)
    return squared(prediction, x0) / weight


def probability(advantages: Tensor, mode: str, clip: float) -> Tensor:
    """r = 1/2 + A / (2 c) in [0, 1], A cut to [-c, c] and then reduced to what `mode` uses; [B]."""
    a = advantages.clamp(-clip, clip)
    if mode == "positive_only":
        a = a.clamp(min=0)
    elif mode == "negative_only":
        a = a.clamp(max=0)
    elif mode == "one_only":
        a = (a > 0).to(a)
    elif mode == "binary":
        a = a.sign()
    return (a / clip / 2 + 0.5).clamp(0, 1)


def nft_loss(positive: Tensor, negative: Tensor, beta: float, mode: str, clip: float, advantages: Tensor) -> Tensor:
    """c (r L+ + (1 - r) L-) / beta, [B]."""
    r = probability(advantages, mode, clip).to(positive)
    return clip * (r * positive + (1 - r) * negative) / beta
