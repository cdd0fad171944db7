"""RTDMD (arXiv 2605.26108): reward-tilted distribution matching for few-step generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from diffalign.algorithms import Algorithm, Loss, Memory, Policy, unrewarded
from diffalign.algorithms._backpropagated import Backpropagated
from diffalign.algorithms._fakes import fake_network
from diffalign.algorithms._policy_gradient import weighted_policy_loss
from diffalign.algorithms._scores import COPIES, Fake, Sample, Scores, distribution_matching, scores_conflicts
from diffalign.algorithms._steps import few_step_conflicts, last_step, stored_step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffalign.sections import Sampling
    from diffalign.types import Rollout


class RTDMD(Algorithm):
    """A few-step generator tilted towards reward, p ~ p_T exp(beta r), by the gradient of each kernel's own kind.

    The T - 1 stochastic steps get a policy gradient on the CPS log-probability; the last, deterministic step the
    gradient of the reward itself, and of the distance to the teacher's law as in AC-DMD at s = 0:
        L = (sum_{k in S} max(-A rho_k, -A clip(rho_k)) + lambda_dm L_dm + lambda_bp relu(margin - R(x0))) / (|S| + 1)
    SubGRPO: only the steps in S, drawn each epoch, are trained, and in the other stochastic ones all images of a prompt
    share their noise, so that rewards within a group differ by what is trained. An epoch is one step of the fake score
    and one of the generator. The program's log-probability has no 1 / (2 std^2), which weighs each step by 2 std^2;
    `logp: gaussian` puts it back.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    trajectory: ClassVar[bool] = True

    clip: float = Field(1e-5, gt=0)
    """PPO clip range of the probability ratio; with one update an epoch the ratio is 1."""
    logp: Literal["cps", "gaussian"] = "cps"
    """Log-probability of a step: cps: -mean_d (x' - mean)^2, the program's; gaussian: the density's own scale."""
    subset: int | None = Field(2, ge=1)
    """SubGRPO: stochastic steps trained in an epoch; null: all, with no shared noise."""
    matching: float = Field(1e-3, ge=0)
    """lambda_dm, weight of distribution matching; 0 does without teacher and fake score."""
    backpropagated: Backpropagated = Backpropagated()
    """The reward that is back-propagated through the last step."""
    guidance: float | tuple[float, float] = 4.5
    """Guidance of the teacher; or the ends of a range, from which each epoch draws one."""
    teacher: str | None = None
    """The model to stay close to, when it is not the one that training starts from: for a distilled generator the
    many-step model."""
    fake: Fake = Fake()
    """The fake score."""
    warmup: int = Field(0, ge=0)
    """First epochs, which train the fake score alone."""

    @property
    def needs_reference(self) -> bool:
        return self.teacher is None and self.matching > 0

    @property
    def copies(self) -> tuple[str, ...]:
        return COPIES if self.matching else COPIES[:1]

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().conflicts(sampling)
        yield from few_step_conflicts(self.name, sampling)
        yield from scores_conflicts(self.fake, self.teacher, self.guidance)
        if self.subset is not None and self.subset > sampling.steps - 1:
            yield ("algorithm", "subset"), f"{self.subset} exceeds the {sampling.steps - 1} stochastic steps"
        yield from self.backpropagated.conflicts()
        if self.warmup and not self.matching:
            yield ("algorithm", "warmup"), "trains the fake score, which matching 0 does without; set it to 0"

    def ascends(self) -> tuple[str, ...]:
        return self.backpropagated.rewards if self.backpropagated.weight else ()

    def affine(self, updates: int) -> bool:
        return updates == 1  # rho is 1

    def stochastic(self, steps: int, seed: int, epoch: int) -> list[int]:
        return list(range(steps - 1))

    def chosen(self, steps: int, seed: int, epoch: int) -> list[int]:
        """S: the stochastic steps that are trained."""
        if self.subset is None:
            return self.stochastic(steps, seed, epoch)
        return sub_steps(seed, 100_000 * epoch, steps - 1, self.subset)

    def tied(self, steps: int, seed: int, epoch: int) -> list[int]:
        return [i for i in range(steps - 1) if i not in self.chosen(steps, seed, epoch)]

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        return [*self.chosen(steps, seed, epoch), steps - 1]

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        trained = float(self.levels(steps) * passes)
        if not (self.matching or self.backpropagated.weight):
            trained -= passes  # the last step
        if not self.matching:
            return {"to train": trained}
        return {"to train": trained, "of the teacher": passes, "of the fake score": self.fake.forwards + passes}

    def graphs(self, steps: int) -> dict[str, int]:
        return {"training": 1} | ({"fake score": self.fake.graphs} if self.matching else {})

    def start(self, pipeline: Any, parameters: dict[str, nn.Parameter]) -> Memory:
        if not self.matching:
            return Memory()
        network = fake_network(pipeline, parameters, self.teacher, self.fake.base)
        return Scores(network, self.fake, self.guidance, made, self.turn)

    def turn(self, epoch: int) -> tuple[bool, bool]:
        """Whether an epoch trains the fake score, and whether the generator."""
        return self.matching > 0, epoch >= self.warmup

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return self.backpropagated.warnings(metrics)

    def trains_on(self, rollout: Rollout, memory: Memory, update: int) -> Tensor:
        return rollout.group >= 0  # the last step's terms need no advantage

    def behaviour(self, policy: Policy, batch: Rollout) -> dict[str, Tensor]:
        import torch

        denoiser = policy.denoiser(batch.cond)
        steps = [stored_step(denoiser, policy, batch, k).log_prob for k in range(len(batch.kept) - 1)]
        return {"log_prob": torch.stack(steps, 1)}

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        assert batch.advantages is not None
        denoiser, share = policy.denoiser(batch.cond), 1 / len(batch.kept)
        for k in range(len(batch.kept) - 1):
            taken = stored_step(denoiser, policy, batch, k)
            old = batch.old["log_prob"][:, k] if batch.old else taken.log_prob.detach()
            scale = 1.0 if self.logp == "cps" else 1 / (2 * taken.std.flatten().square())
            ratio = (scale * (taken.log_prob - old)).exp()
            clipped = ((ratio.detach() - 1).abs() > self.clip).float()
            metrics = {"ratio": ratio.detach(), "clip_fraction": clipped}
            metrics = {name: m / (len(batch.kept) - 1) for name, m in metrics.items()}
            yield Loss(partial(weighted_policy_loss, ratio, self.clip, share), batch.advantages, None, metrics)
        if self.matching or self.backpropagated.weight:
            penalty, metrics = self.last(policy, batch, memory)
            yield Loss(unrewarded, batch.advantages, share * penalty, metrics)

    def last(self, policy: Policy, batch: Rollout, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of the deterministic step, weighted, and what to log; all [B]."""
        import torch

        taken, s, eta = last_step(policy, batch)
        penalty, metrics = torch.zeros_like(s), {}
        if self.matching:
            assert isinstance(memory, Scores)
            sample = Sample(taken.x0, s, eta)
            denoiser = policy.denoiser(batch.cond)
            loss = distribution_matching(denoiser, policy, memory, batch, sample)
            penalty, metrics = self.matching * loss, {"matching": loss.detach()}
        b = self.backpropagated
        if b.weight:
            loss, reward = b.loss(policy, batch, taken.x0)
            penalty, metrics = penalty + b.weight * loss, metrics | {"backpropagated": reward}
        return penalty, metrics


def sub_steps(seed: int, epoch_seed: int, stochastic: int, count: int) -> list[int]:
    """SubGRPO's draw of `count` of the stochastic steps 0, 1, ..., the same on every process."""
    return sorted(random.Random(seed + epoch_seed + 104729).sample(range(stochastic), count))


def made(policy: Policy, batch: Rollout) -> Sample:
    """The finished samples, without gradient."""
    taken, s, eta = last_step(policy, batch, again=False)
    return Sample(taken.next, s, eta)
