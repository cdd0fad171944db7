"""AC-DMD, the cold start of RTDMD (arXiv 2605.26108), and DMD2 (2405.14867): a many-step teacher into few steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from diffalign.algorithms import Algorithm, Loss, Memory, Policy, unrewarded
from diffalign.algorithms._fakes import fake_network
from diffalign.algorithms._scores import COPIES, Fake, Sample, Scores, distribution_matching, scores_conflicts
from diffalign.algorithms._steps import few_step_conflicts, last_step

if TYPE_CHECKING:
    from torch import nn

    from diffalign.sections import Sampling
    from diffalign.types import Rollout


class ACDMD(Algorithm):
    """Distribution matching on the noisy states of a few-step generator; needs no rewards and no images.

    The generator is sampled up to a random step k. What step k gives is x_s, at the noise level s that the next step
    starts from. It is noised on to t, where teacher and fake score say where it came from, y_T and y_f, and
        g = (y_f - y_T) / mean_d |x_s - y_T|,    L = mean_d (x_s - sg(x_s - g))^2 / 2
    moves it towards the teacher's law at level s. The gradient passes through step k alone. The fake score f learns
    the law of x_s by L_f = mean_d min(1/std^2, 10) (std f - std u)^2 + consistency. At the last step s = 0, and this is
    DMD2, which matches the clean prediction of every step instead of x_s.

    An epoch is one optimizer step: `ratio` of the fake score, then one of the generator, each on samples of its own.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    compares: ClassVar[bool] = False
    rewarded: ClassVar[bool] = False

    matching: Literal["ambient", "clean"] = "ambient"
    """ambient: AC-DMD; clean: DMD2."""
    ratio: int = Field(10, ge=1)
    """Steps of the fake score for each of the generator (DMD2: 5)."""
    guidance: float | tuple[float, float] = 4.5
    """Guidance of the teacher; or the ends of a range, from which each epoch draws one."""
    teacher: str | None = None
    """The model to match, when it is not the one that training starts from."""
    fake: Fake = Fake()
    """The fake score."""

    @property
    def needs_reference(self) -> bool:
        return self.teacher is None

    @property
    def copies(self) -> tuple[str, ...]:
        return COPIES

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from few_step_conflicts(self.name, sampling)
        yield from scores_conflicts(self.fake, self.teacher, self.guidance)

    def stochastic(self, steps: int, seed: int, epoch: int) -> list[int]:
        return list(range(steps))

    def until(self, steps: int, seed: int, epoch: int) -> int | None:
        return random.Random(f"stop {seed} {epoch}").randint(1, steps)

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        return [(self.until(steps, seed, epoch) or steps) - 1]

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        generator = 1 / (self.ratio + 1)  # of the epochs
        again = 1 - generator if self.matching == "clean" else 0.0  # to see what the last step predicted
        trained = generator * passes
        fake = (1 - generator) * self.fake.forwards + trained
        found = {"to train": trained, "of the teacher": trained, "of the fake score": fake}
        return found | ({"to predict the samples": again} if again else {})

    def graphs(self, steps: int) -> dict[str, int]:
        return {"training": 1, "fake score": self.fake.graphs}

    def start(self, pipeline: Any, parameters: dict[str, nn.Parameter]) -> Memory:
        network = fake_network(pipeline, parameters, self.teacher, self.fake.base)
        return Scores(network, self.fake, self.guidance, self.made, self.turn)

    def turn(self, epoch: int) -> tuple[bool, bool]:
        """Whether an epoch trains the fake score, and whether the generator."""
        generator = (epoch + 1) % (self.ratio + 1) == 0
        return not generator, generator

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        assert isinstance(memory, Scores) and batch.advantages is not None
        denoiser = policy.denoiser(batch.cond, guided=False)
        sample = self.remade(policy, batch)
        loss = distribution_matching(denoiser, policy, memory, batch, sample)
        yield Loss(unrewarded, batch.advantages, loss, {"matching": loss.detach()})

    def made(self, policy: Policy, batch: Rollout) -> Sample:
        """What the last step taken gave, x_s, or the clean prediction when that is matched; without gradient."""
        sample = self.remade(policy, batch, self.matching == "clean")
        return Sample(sample.x.detach(), sample.s, sample.eta)

    def remade(self, policy: Policy, batch: Rollout, again: bool = True) -> Sample:
        taken, s, eta = last_step(policy, batch, again)
        return Sample(taken.next, s, eta) if self.matching == "ambient" else Sample(taken.x0, 0 * s, eta)
