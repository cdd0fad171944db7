"""One prompt to steer: the model, the reward, where randomness comes from, and what has been spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.clock import Clock
from diffalign.rollout import sample_seed
from diffalign.samplers import step
from diffalign.steering import Oracle
from diffalign.types import Step, UserError

# (images [n, 3, H, W], sigma of the state that they were predicted from; 0 for finished ones) -> scores [n], or [n, R]
# of R rewards, each times its weight
Judge = Callable[[Tensor, float], Tensor]
Move = Callable[[Tensor, Tensor, Tensor, int, Sequence[torch.Generator]], Step]


@dataclass
class Spent:
    """What a prompt has cost so far; `clock` holds the seconds of 'model', 'decode' and 'reward'."""

    clock: Clock
    began: float = field(default_factory=time.monotonic)
    nfe: int = 0  # network forwards, one sample each; guidance counts twice
    gradients: int = 0  # of them, those that were also differentiated
    decodes: int = 0
    reward_calls: int = 0  # images scored

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began


@dataclass(frozen=True)
class Watched:
    """A step of a method, as a progress bar or the caller's own callback sees it."""

    step: int
    x: Tensor  # [n, ...] the states after it
    x0: Tensor  # [n, ...] what the model made of the states before it
    row: Mapping[str, Any]  # what was weighed at it: 'rewards', 'log_weights', 'ess', 'roots', 'best'; or nothing


@dataclass
class Problem:
    """What a method works on. Random numbers are functions of (seed, prompt, particle), so neither `micro_batch` nor
    other prompts change a result.

    Attributes:
        kernel, eta: the transition kernel of :mod:`diffalign.samplers`.
        stochastic: steps that use it; the others take the ODE step.
        few_steps: the model was distilled for these steps, and for this noise on the way.
        particles: generators of the particles, where the caller brings his own.
        move: another transition than the kernel's, such as an exact chain.
        preview: scores predictions of unfinished states in place of `judge`.
        watch: sees every step; what it returns replaces the states.
        about: all else that decides the images, as JSON: prompt, rewards, model, arguments. Saved trees are told by it.
    """

    oracle: Oracle
    judge: Judge
    kernel: str = "ode"
    eta: float = 0.0
    stochastic: Collection[int] = ()
    few_steps: bool = False
    seed: int = 0
    prompt: int = 0
    micro_batch: int = 8
    own: Sequence[torch.Generator] | None = None
    move: Move | None = None
    preview: Judge | None = None
    watch: Callable[[Watched], Tensor | None] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    best: float | None = None  # highest score so far, for people
    spent: Spent = field(default_factory=lambda: Spent(Clock()))

    @property
    def steps(self) -> int:
        return len(self.oracle.sigmas) - 1

    def particles(self, first: int, n: int) -> list[torch.Generator]:
        """Generators of particles first to first + n - 1: initial noise, then that of each transition.

        Particle j starts from the noise of image j that `diffalign generate` makes of this prompt with this seed.
        """
        if self.own is not None:
            if first + n > len(self.own):
                raise UserError(f"{first + n} particles need as many generators, got {len(self.own)}; or give one seed")
            return list(self.own[first : first + n])
        return [
            torch.Generator().manual_seed(sample_seed(self.seed, 0, self.prompt, j)) for j in range(first, first + n)
        ]

    def generator(self, *key: int) -> torch.Generator:
        """For any other decision, such as resampling: a function of the key."""
        # a spawn key, and its length: no plain list of numbers, nor a list that ends in zeros, gives the same words
        sequence = np.random.SeedSequence([self.seed, self.prompt], spawn_key=(len(key), *key))
        words = sequence.generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))

    def start(self, generators: Sequence[torch.Generator]) -> Tensor:
        return self.oracle.start(generators)

    @torch.no_grad()
    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """(x0, eps) [n, ...] of the states x at step i."""
        with self.spent.clock("model"):
            parts = [self.oracle.predict(part, i) for part in x.split(self.micro_batch)]
        self.spent.nfe += len(x) * self.oracle.cost
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def score(self, x0: Tensor, i: int, some: bool = True) -> Tensor:
        """[n] float64 on the CPU, -inf where a reward is NaN; i is the step whose state predicts x0, T for the end.

        Raises UserError when no sample has a score, unless `some` is False: others may follow.
        """
        return self.columns(x0, i, some).sum(1)

    @torch.no_grad()
    def columns(self, x0: Tensor, i: int, some: bool = True) -> Tensor:
        """[n, R] likewise, the rewards apart; NaN in one is -inf in all, for such a sample cannot be chosen."""
        scores = torch.cat([self._judged(part, i) for part in x0.split(self.micro_batch)])
        known = self.checked(scores, i) if some else _without_nan(scores)
        self._remember(known)
        return known

    def differentiate(self, x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0, eps, scores [n] float64, d score / d x [n, ...]) through model and decoder; NaN gradients are 0."""
        parts = []
        for part in x.split(self.micro_batch):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_(True)
                with self.spent.clock("model"):
                    x0, eps = self.oracle.predict(leaf, i)
                scores = self._judged(x0, i).sum(1)
                if not scores.requires_grad:
                    raise UserError("the reward gives no gradient; this method needs a differentiable one")
                with self.spent.clock("model"):
                    (slope,) = torch.autograd.grad(scores.nan_to_num(0.0).sum(), leaf)
            parts.append((x0.detach(), eps.detach(), scores.detach(), slope.nan_to_num(0.0, 0.0, 0.0)))
        self.spent.nfe += len(x) * self.oracle.cost
        self.spent.gradients += len(x) * self.oracle.cost
        x0, eps, scores, slope = (torch.cat(p) for p in zip(*parts, strict=True))
        known = self.checked(scores[:, None], i)
        self._remember(known)
        return x0, eps, known.sum(1), slope

    def advance(self, x: Tensor, x0: Tensor, eps: Tensor, i: int, generators: Sequence[torch.Generator]) -> Step:
        """The transition from step i to i + 1, with fresh noise from each generator."""
        if self.move is not None:
            return self.move(x, x0, eps, i, generators)
        kind = self.kernel if i in self.stochastic else "ode"
        levels = self.oracle.sigmas[i], self.oracle.sigmas[i + 1]
        return step(self.oracle.schedule, x0, eps, x, *levels, kind, self.eta, generators=generators)

    def walk(self, x: Tensor, generators: Sequence[torch.Generator], first: int = 0, last: int | None = None) -> Tensor:
        """The states at step `last`, by default T, of states x at step `first`: plain sampling."""
        for i in range(first, self.steps if last is None else last):
            x0, eps = self.predict(x, i)
            x = self.seen(i, self.advance(x, x0, eps, i, generators).next, x0)
        return x

    def seen(self, i: int, x: Tensor, x0: Tensor, row: Mapping[str, Any] | None = None) -> Tensor:
        """The states to go on from after step i, which `watch` may have replaced."""
        if self.watch is None:
            return x
        known = {} if self.best is None else {"best": self.best}
        replaced = self.watch(Watched(i, x, x0, {**known, **(row or {})}))
        return x if replaced is None else replaced

    def noisy(self) -> list[int]:
        """Steps whose transition has noise; copies made after the last of them would stay copies."""
        if self.move is not None:
            return list(range(self.steps))
        probe = torch.zeros(1, 1, dtype=torch.float64)
        sigmas, schedule = self.oracle.sigmas, self.oracle.schedule
        kinds = [self.kernel if i in self.stochastic else "ode" for i in range(self.steps)]
        taken = [
            step(schedule, probe, probe, probe, sigmas[i].double(), sigmas[i + 1].double(), kind, self.eta, probe)
            for i, kind in enumerate(kinds)
        ]
        return [i for i, t in enumerate(taken) if float(t.std) > 0]

    def _judged(self, x0: Tensor, i: int) -> Tensor:
        with self.spent.clock("decode"):
            images = self.oracle.decode(x0)
        finished = i == self.steps
        judge = self.judge if finished or self.preview is None else self.preview
        with self.spent.clock("reward"):
            scores = judge(images, 0.0 if finished else float(self.oracle.sigmas[i]))
        self.spent.decodes += len(x0)
        self.spent.reward_calls += len(x0)
        return scores.double().cpu().reshape(len(x0), -1)

    def _remember(self, scores: Tensor) -> None:
        highest = float(scores.sum(1).max())
        if highest > -torch.inf:
            self.best = highest if self.best is None else max(self.best, highest)

    def checked(self, scores: Tensor, i: int) -> Tensor:
        """Scores [n, R] with -inf for NaN. Raises UserError when no sample has one."""
        known = _without_nan(scores)
        if bool((known == torch.inf).any()):
            raise UserError(f"the reward is infinite for an image at step {i} of {self.steps}; bound it")
        if bool((known == -torch.inf).all()):
            raise UserError(
                f"the reward is NaN for all {len(scores)} images at step {i} of {self.steps}, so there is nothing to "
                "choose by; check that it applies to this prompt"
            )
        return known


def _without_nan(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.isnan().any(1, keepdim=True), -torch.inf)
