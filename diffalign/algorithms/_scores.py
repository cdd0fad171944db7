"""The three networks of distribution matching in one: generator, fake score, teacher."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffalign.algorithms import Memory, Policy, Study
from diffalign.algorithms._fakes import Base, FakeNetwork

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.types import Denoiser, Rollout

COPIES = ("fake score", "its first moments", "its second moments")  # each as large as the trained weights
FAKE, GENERATOR = 2, 3  # tell the seeds of training noise from those of sampling


Share = Annotated[float, Field(ge=0, lt=1)]
STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Consistency(BaseModel):
    """Keeps the fake score's clean prediction the mean of its predictions after a step back (AC-DMD)."""

    model_config = STRICT

    weight: float = Field(0.01, ge=0)
    """Weight of the term; 0 saves two of three forward passes."""
    span: int = Field(200, ge=1, le=1000)
    """Each move goes back by 1 to so many timesteps."""
    moves: int = Field(1, ge=1)
    """Moves one after another."""
    paths: int = Field(2, ge=1, le=2)
    """2: an unbiased estimate; 1: one forward pass less, biased by the variance of the prediction."""

    @model_validator(mode="after")
    def _counts(self) -> Consistency:
        if not self.weight and (self.span, self.moves, self.paths) != (200, 1, 2):
            raise ValueError("span, moves and paths have no effect with weight 0; remove them")
        return self


class Fake(BaseModel):
    """The fake score: learns the law of the generator's samples, without guidance."""

    model_config = STRICT

    lr: float = Field(3e-5, gt=0)
    """Learning rate of its AdamW."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of AdamW's moments."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    weighted: bool = True
    """Bound the weight of small added noise, whose target is unbounded; false: the plain squared error."""
    consistency: Consistency = Consistency()
    """A regulariser of the fake score."""
    base: Base = "generator"
    """What it starts from: generator; or teacher, which a distilled generator's own network is no score of. With a LoRA
    and `algorithm.teacher` it is a LoRA on the teacher's network."""

    @property
    def forwards(self) -> int:
        """Forward passes of its loss."""
        return 1 + (self.consistency.paths * self.consistency.moves if self.consistency.weight else 0)

    @property
    def graphs(self) -> int:
        """Of those, the ones with a gradient."""
        return 1 + (self.consistency.paths if self.consistency.weight else 0)


def scores_conflicts(
    fake: Fake, teacher: str | None, guidance: float | tuple[float, float]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not suit the teacher."""
    low, high = (guidance, guidance) if isinstance(guidance, float) else guidance
    if not 1 <= low <= high:
        yield ("algorithm", "guidance"), "must be at least 1, or a range from such a number up; 1 turns it off"


@dataclass(frozen=True)
class Sample:
    """The generator's samples of a batch."""

    x: Tensor  # [B, ...]
    s: Tensor  # [B] their noise level
    eta: float  # of the CPS steps that made them


class Scores(Memory):
    """The fake score beside the generator, with an optimizer of its own. The teacher is the model before training, all
    adapters off, or a network of its own."""

    def __init__(
        self,
        network: FakeNetwork,
        options: Fake,
        guidance: float | tuple[float, float],
        sample: Callable[[Policy, Rollout], Sample],
        turn: Callable[[int], tuple[bool, bool]],
    ) -> None:
        """
        Args:
            guidance: the teacher's, or the ends of a range from which each epoch draws one.
            sample: the generator's samples in a batch, without gradient.
            turn: whether an epoch (from 0) trains the fake score, and whether the generator.
        """
        import torch

        from diffalign.states import of_optimizer

        self.options, self.range, self.sample, self.turn = options, guidance, sample, turn
        self.guidance = 1.0  # the teacher's in this epoch
        self.faked, self.fake = network.applied, network.parameters
        self.optimizer = torch.optim.AdamW(
            self.fake.values(), options.lr, options.betas, weight_decay=options.weight_decay
        )
        self.moments = of_optimizer(self.optimizer, self.fake)

    def learn(self, study: Study) -> tuple[bool, dict[str, float]]:
        self.guidance = (
            self.range
            if isinstance(self.range, float)
            else random.Random(f"guidance {study.seed} {study.epoch}").uniform(*self.range)
        )
        fake, generator = self.turn(study.epoch)
        return generator, self.fit(study) if fake else {}

    def fit(self, study: Study) -> dict[str, float]:
        """One optimizer step of the fake score on the samples of all processes; returns its mean losses."""
        import torch

        from diffalign.balancing import reduce
        from diffalign.types import Stopped

        sums = torch.zeros(2, dtype=torch.float64)
        rows = torch.arange(len(study.rollout)).split(study.batch) if len(study.rollout) else ()
        for part in rows:
            batch = study.rollout[part]
            with torch.no_grad():
                sample = self.sample(study.policy, batch)
            with self.faked(), torch.enable_grad():
                losses = self.losses(study.policy, batch, sample, study.epoch)
                total = losses[0] + self.options.consistency.weight * losses[1]
                (total.sum() / study.total).backward()
                sums += torch.stack([loss.detach().sum() for loss in losses]).double().cpu() / study.total
        for p in self.fake.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in self.fake.values() if p.grad is not None]
        reduce(study.sum, gradients)
        means = study.sum(sums.to(gradients[0].device)).tolist()
        norm = float(torch.nn.utils.clip_grad_norm_(self.fake.values(), self.options.max_grad_norm))
        if not norm < float("inf"):
            raise Stopped(
                f"the fake score's gradient is not finite in epoch {study.epoch + 1}: training has diverged; resume "
                "from an earlier checkpoint with a lower algorithm.fake.lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        terms = {"fake_loss": means[0], "fake_grad_norm": norm}
        return terms | ({"consistency": means[1]} if self.options.consistency.weight else {})

    def losses(self, policy: Policy, batch: Rollout, sample: Sample, turn: int) -> tuple[Tensor, Tensor]:
        """Denoising and consistency loss of the fake score, which is in place, each [B]."""
        import torch

        from diffalign.algorithms._ambient import consistency, denoising_loss, levels, renoised

        draw, c = Draws(batch.seeds, turn, FAKE), self.options.consistency
        denoiser = policy.denoiser(batch.cond, guided=False)
        x = sample.x
        at = renoised(denoiser.schedule, x, sample.s, levels(draw.uniform(x), sample.s), draw.normal(x))
        x0, eps = denoiser.predict(at.x, at.t)
        denoising = denoising_loss(denoiser.schedule, x0, eps, at, self.options.weighted)
        if not c.weight:
            return denoising, torch.zeros_like(denoising)
        back = [(1 + (draw.uniform(x) * c.span).floor()).clamp(max=c.span) for _ in range(c.moves)]
        noises = [[draw.normal(x) for _ in range(c.moves)] for _ in range(c.paths)]
        return denoising, consistency(denoiser, at, x0, eps, back, noises, sample.eta).nan_to_num(0.0, 0.0, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        weights = {f"fake/{name}": p.detach() for name, p in self.fake.items()}
        return weights | {f"adam/{name}": t for name, t in self.moments.collect().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        import torch

        weights = {n.removeprefix("fake/"): t for n, t in state.items() if n.startswith("fake/")}
        if {n: t.shape for n, t in weights.items()} != {n: p.shape for n, p in self.fake.items()}:
            raise ValueError("it holds no fake score of this shape; resume with the algorithm's settings as they were")
        with torch.no_grad():
            for name, p in self.fake.items():
                p.copy_(weights[name])
        self.moments.restore({n.removeprefix("adam/"): t for n, t in state.items() if n.startswith("adam/")})


class Draws:
    """Random numbers of a batch, those of each sample a function of its seed, the turn and the purpose."""

    def __init__(self, seeds: Tensor, turn: int, purpose: int) -> None:
        from diffalign.rollout import generators, sample_seed

        self.own = generators([sample_seed(seed, turn, 0, purpose) for seed in seeds.tolist()])

    def uniform(self, like: Tensor) -> Tensor:
        """[B] in [0, 1), on the device and in the precision of `like`, at least fp32."""
        import torch

        drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in self.own]
        return torch.stack(drawn).to(like.device, torch.promote_types(like.dtype, torch.float32))

    def normal(self, like: Tensor) -> Tensor:
        """[B, ...] of the shape of `like`."""
        import torch

        from diffalign.samplers import randn

        return randn(like.shape, self.own, like.device, torch.promote_types(like.dtype, torch.float32))


def distribution_matching(denoiser: Denoiser, policy: Policy, memory: Scores, batch: Rollout, sample: Sample) -> Tensor:
    """The loss that pulls the generator's samples, which carry their gradient, to the teacher's law; [B]."""
    import torch

    from diffalign.algorithms._ambient import levels, matching_loss, renoised

    draw, schedule = Draws(batch.seeds, batch.turn, GENERATOR), denoiser.schedule
    x = sample.x.detach()
    at = renoised(schedule, x, sample.s, levels(draw.uniform(x), sample.s), draw.normal(x))
    with torch.no_grad():
        with policy.reference():
            teacher = policy.guided(batch.cond, memory.guidance).predict(at.x, at.t)
        with memory.faked():
            fake = denoiser.predict(at.x, at.t)
    return matching_loss(schedule, sample.x, at, fake, teacher, draw.normal(x), sample.eta)
