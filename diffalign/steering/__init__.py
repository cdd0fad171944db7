"""Inference-time steering and search: one file a method, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, get_args

import yaml
from pydantic import Field

from diffalign.listing import nearest
from diffalign.methods import Method, configured, lookup
from diffalign.sections import Kernel
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.schedules import Schedule
    from diffalign.steering._problem import Problem

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)] | Literal["auto"]


class Oracle(Protocol):
    """A model bound to one prompt and one grid of noise levels: all that a steering method asks of it.

    A family's own adapter, any diffusers pipeline, and the closed-form mixture have the same four methods. The number
    of samples n may differ from call to call.
    """

    @property
    def schedule(self) -> Schedule: ...

    @property
    def sigmas(self) -> Tensor: ...  # [T+1], from noise to data

    @property
    def cost(self) -> int: ...  # network forwards of one `predict` of one sample; 2 with classifier-free guidance

    def start(self, generators: Sequence[torch.Generator]) -> Tensor: ...  # [n, ...] pure noise, one generator each

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]: ...  # (x0, eps) of states at step i, fp32 or more

    def decode(self, x0: Tensor) -> Tensor: ...  # images [n, 3, H, W] in [0, 1]


@dataclass
class Lineage:
    """The family tree of all states that were kept or weighed; node 0 and up, parents before children."""

    step: list[int] = field(default_factory=list)
    parent: list[int | None] = field(default_factory=list)
    reward: list[float | None] = field(default_factory=list)

    def add(self, step: int, parent: int | None, reward: float | None = None) -> int:
        """A new node's number."""
        self.step.append(step)
        self.parent.append(parent)
        self.reward.append(reward)
        return len(self.step) - 1

    def root(self, node: int) -> int:
        """The first ancestor."""
        while (parent := self.parent[node]) is not None:
            node = parent
        return node


@dataclass(frozen=True)
class Outcome:
    """What a method found for one prompt: n finished latents."""

    x: Tensor  # [n, ...]
    rewards: Tensor  # [n] float64, -inf where the reward was NaN
    log_weights: Tensor  # [n] float64, normalised: of the samples as draws from the method's target
    leaves: list[int]  # [n] nodes of `lineage`
    lineage: Lineage
    log_z: float | None = None  # estimate of log E[exp(lam r)], for methods that have one
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry a weighing or an improvement, for people
    standing: Tensor | None = None  # [n] what the images are sorted by, where that is not the reward


class Steering(Method):
    """Base of every method. It is its own configuration and defines `run`."""

    budget_nfe: Count | None = None
    """Network forwards that a prompt may cost, beside those that set lam. A method with a set size is repeated while
    another round fits."""
    budget_seconds: Positive | None = None
    """Seconds that a prompt may take. The first round is always finished."""
    select: Literal["best", "sample", "all"] = "all"
    """Images that are returned: the one of highest reward, one draw by weight (exact for fk, das and dts), or all."""

    stochastic: ClassVar[bool] = True
    """The method needs transitions with noise; without it the ODE is walked."""
    differentiates: ClassVar[bool] = False
    """The method follows the reward's gradient."""

    def forwards(self, steps: int, cost: int) -> int:
        """Network forwards that one prompt takes, or may take at most, on T steps."""
        raise UserError(f"steering '{self.name}' cannot tell its cost: its class must define forwards()")

    def run(self, problem: Problem) -> Outcome:
        raise UserError(f"steering '{self.name}' cannot run: its class must define run()")

    def rounds(self, problem: Problem, size: int, once: Callable[[int], Outcome]) -> Outcome:
        """`once(first)` as often as the budgets allow, `size` more particles each time, and their outcomes as one."""
        from diffalign.steering._pooling import pooled

        one = self.forwards(problem.steps, problem.oracle.cost)
        if self.budget_nfe is not None and one > self.budget_nfe:
            raise UserError(
                f"budget_nfe {self.budget_nfe} is less than one round of '{self.name}', {one} network forwards; "
                "raise it, or lower the number of particles or steps"
            )
        outcomes = [once(0)]
        while self._another(problem, len(outcomes), one):
            outcomes.append(once(len(outcomes) * size))
        return pooled(outcomes)

    def _another(self, problem: Problem, done: int, one: int) -> bool:
        spent = problem.spent
        if self.budget_nfe is None and self.budget_seconds is None:
            return False
        in_time = self.budget_seconds is None or spent.elapsed * (done + 1) / done <= self.budget_seconds
        return in_time and (self.budget_nfe is None or spent.nfe + one <= self.budget_nfe)


def resolve(method: str | Mapping[str, Any] | Steering) -> Steering:
    """The validated configuration of a method. Raises UserError for an unknown name or option."""
    if isinstance(method, Steering):
        return method
    options = {"name": method} if isinstance(method, str) else dict(method)
    if not isinstance(options.get("name"), str):
        raise UserError("a steering method needs a name, such as {name: fk, particles: 8}")
    found = lookup(__name__, options["name"], Steering)
    if not (isinstance(found, type) and issubclass(found, Steering)):
        raise UserError(f"'{options['name']}' is no Steering class")
    return configured(found, options, "steering")


def parse_options(text: str, where: str) -> dict[str, Any]:
    """'fk:particles=8,lam=auto' -> the section that `resolve` takes; values are YAML. UserError, told from `where`."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {"name": name}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{where}: {part!r} is no option; write OPTION=VALUE after the colon")
        try:
            options[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{where}: {value!r} is no YAML value; put it in quotes") from error
    return options


def parse_kernel(text: str) -> tuple[str, float]:
    """'flow_sde:0.7' -> ('flow_sde', 0.7); 'ode' needs no number."""
    kind, _, eta = text.partition(":")
    known = [k for k in get_args(Kernel) if k != "dpm2"]  # a multistep solver cannot go on from a state it did not see
    if kind not in known:
        raise UserError(f"unknown kernel '{kind}'; {nearest(kind, known)}")
    try:
        return kind, float(eta) if kind != "ode" else 0.0
    except ValueError:
        raise UserError(f"kernel '{text}' needs a noise level; write {kind}:0.7") from None


HIGHEST = 0.95  # above this noise level a prediction says little of the image
POINTS = 5


def scheduled(
    wanted: Sequence[int] | Literal["auto", "all"], sigmas: Sequence[float], noisy: Sequence[int], name: str
) -> list[int]:
    """Steps at which particles are weighed: those given, all that can be, or about five between 20 and 80 % of them.

    Raises UserError where no transition has noise, or a step is none of 1 to T - 1 or comes after the last noise.
    """
    end = len(sigmas) - 1
    if not noisy:
        raise UserError(
            f"steering '{name}' needs noise: copies of an image stay copies under the ODE; take a stochastic kernel "
            "such as flow_sde:0.7, or best_of_n, noise_search or prune"
        )
    usable = [i for i in range(1, end) if i <= noisy[-1]]
    if isinstance(wanted, str):
        if wanted == "all":
            return usable
        middle = [i for i in usable if 0.2 * end <= i <= 0.8 * end and sigmas[i] <= HIGHEST] or usable[-1:]
        every = max(1, round(len(middle) / POINTS))
        return middle[::-1][::every][::-1]
    if len(wanted) > end:
        raise UserError(f"{len(wanted)} resampling points for {end} steps; take fewer, or raise the number of steps")
    outside = [i for i in wanted if i not in usable]
    if outside:
        last = usable[-1] if usable else 0
        raise UserError(
            f"cannot resample at step {outside[0]}: give steps 1 to {last}, which noise still follows, of the {end}"
        )
    return sorted(set(wanted))
