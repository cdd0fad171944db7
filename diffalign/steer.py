"""Steering from Python, in the manner of diffusers: `Steer(pipe, reward="pickscore")("a red cube").images[0]`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.clock import Clock
from diffalign.few_steps import FewSteps
from diffalign.images import to_pixels
from diffalign.rewards import build
from diffalign.steering import Lineage, Oracle, Outcome, Steering, parse_kernel, resolve
from diffalign.steering._inputs import (
    Preview,
    RewardLike,
    check_prompt,
    judge,
    previewed,
    rewards_of,
    seeded,
    suit,
    told,
    watching,
)
from diffalign.steering._native import Native
from diffalign.steering._problem import Problem, Spent
from diffalign.steering._tuning import PILOTED, default_kernel, noisy_steps, selected, tuned, warnings
from diffalign.types import UserError

STEPS = 28


@dataclass(frozen=True)
class Steered:
    """Images of one prompt, best first, and what they cost.

    Attributes:
        pixels: [n, 3, H, W] in [0, 1], fp32 on the CPU; `images` are the same for PIL.
        rewards: [n] float64; weights: [n] float64, sum 1, of the images as draws from the method's target.
        log_z: estimate of log E[exp(lam r)] over plain samples, for methods that have one.
        ancestors: [n] number of the initial noise that each image descends from, in order of appearance.
        lineage, leaves: the tree of states, and the node of each image in it.
        history: one entry a weighing: step, ess, best, mean, roots ...
        nfe: network forwards, a sample each, guidance counted twice; the pilot of lam included.
        seconds: of 'model', 'decode', 'reward', and 'total'.
    """

    prompt: str
    pixels: Tensor
    latents: Tensor
    rewards: Tensor
    weights: Tensor
    log_z: float | None
    ancestors: list[int]
    lineage: Lineage
    leaves: list[int]
    history: list[dict[str, Any]]
    method: Steering
    seed: int
    nfe: int
    reward_calls: int
    seconds: dict[str, float]
    warnings: list[str]

    @property
    def images(self) -> list[Image.Image]:
        return [Image.fromarray(to_pixels(image)) for image in self.pixels]


class Steer:
    """Steers a model towards a reward while it samples, without training.

    Args:
        pipeline: any text-to-image pipeline of diffusers, which is frozen and set to eval, or one that
            :func:`diffalign.pipelines.load` returned.
        reward: 'pickscore', a section such as {name: pickscore, model: tiny-clip}, a Reward, a function (images
            [n, 3, H, W] in [0, 1], prompts, metadata) -> n scores, or a list of them, whose weighted sum counts.
        method: a name ('fk'), a section ({name: fk, particles: 8}) or a Steering.
        kernel: 'flow_sde:0.7', KERNEL:ETA; by default ode for methods that need no noise, else flow_sde of eta 0.7 (1
            from 28 steps on) for flow models and ddim of eta 1 for the others; a distilled model has its own.
        window: first and last step with noise; by default all but the last step.
        micro_batch: images in one forward; changes no result.
        preview: (images, prompts, sigma) -> scores of pictures predicted at noise level sigma, where another reward
            knows such pictures better (noise-aware rewards).

    Raises UserError for an unknown reward, method or kernel.
    """

    def __init__(
        self,
        pipeline: Any,
        reward: RewardLike | Sequence[RewardLike],
        method: str | Mapping[str, Any] | Steering = "fk",
        kernel: str | None = None,
        window: tuple[int, int] | None = None,
        micro_batch: int = 8,
        preview: Preview | None = None,
    ) -> None:
        self.pipeline = _steerable(pipeline)
        self.method = resolve(method)
        self.kernel = None if kernel is None else parse_kernel(kernel)
        self.window = window
        if micro_batch < 1:
            raise UserError(f"micro_batch must be at least 1, got {micro_batch}")
        self.micro_batch = micro_batch
        self.preview = preview
        wanted = rewards_of(reward)
        suit(self.method, wanted)
        self.scorers = build(wanted, self.pipeline.device)

    def __call__(
        self,
        prompt: str,
        num_inference_steps: int | None = None,
        generator: int | torch.Generator | Sequence[torch.Generator] | None = None,
        metadata: Mapping[str, Any] | None = None,
        index: int = 0,
        callback_on_step_end: Callable[[Steer, int, float, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        **arguments: Any,
    ) -> Steered:
        """Steered images of one prompt.

        Args:
            num_inference_steps: on the scheduler's own grid; by default 28, and for a distilled model the steps and
                the noise that it was made for.
            generator: a seed, a generator to draw one from, or one generator a particle; by default torch's own.
            metadata: of the prompt, for rewards that read it.
            index: number of the prompt in a list; image j then starts like image j that `diffalign generate` makes.
            callback_on_step_end: (steer, step, sigma, {latents, x0, rewards, log_weights, ess}); may return
                {"latents": ...} to go on from.
            arguments: of the pipeline's own call, such as guidance_scale, height or negative_prompt; with prompt_embeds
                the prompt is read by rewards alone.
        """
        problem = self.problem(prompt, num_inference_steps, generator, metadata, index, arguments)
        if callback_on_step_end is not None:
            problem.watch = watching(self, problem, callback_on_step_end)
        method, said, pilot = tuned(self.method, [problem])
        outcome = method.run(problem)
        return self.finished(method, problem, outcome, prompt, said, pilot)

    def using(self, method: Steering, kernel: str | None = None) -> Steer:
        """The same model and rewards with another method: by the same kernel and window if it needs noise likewise,
        else by `kernel` or its default."""
        other = copy.copy(self)
        other.method = method
        if kernel is not None or method.stochastic != self.method.stochastic:
            other.kernel, other.window = None if kernel is None else parse_kernel(kernel), None
        return other

    def few_steps(self, steps: int | None) -> FewSteps | None:
        """Those of a distilled model, unless a number of other steps is given."""
        own: FewSteps | None = self.pipeline.few_steps
        return own if steps is None else None

    def plain(self, steps: int | None) -> str:
        """The kernel by which the model is sampled where nothing steers it."""
        few = self.few_steps(steps)
        return "ode" if few is None else few.kernel

    def calibrated(
        self, prompts: Sequence[Mapping[str, Any]], steps: int | None, seed: int, arguments: Mapping[str, Any]
    ) -> tuple[Steering, list[str], int]:
        """The method with lam set for a list of prompts; see :func:`diffalign.steering._tuning.tuned`."""
        if dict(self.method).get("lam") != "auto":
            return self.method, [], 0
        problems = [
            self.problem(str(m["prompt"]), steps, seed, m, index, arguments)
            for index, m in enumerate(prompts[:PILOTED])
        ]
        return tuned(self.method, problems)

    def problem(
        self,
        prompt: str,
        steps: int | None,
        generator: int | torch.Generator | Sequence[torch.Generator] | None,
        metadata: Mapping[str, Any] | None,
        index: int,
        arguments: Mapping[str, Any],
    ) -> Problem:
        """What the method will work on; encodes the prompt."""
        check_prompt(prompt)
        if steps is not None and steps < 1:
            raise UserError(f"sampling needs at least one step, got {steps}")
        spent, few = Spent(Clock(self.pipeline.device)), self.few_steps(steps)
        oracle = bound(self.pipeline, prompt, few.timesteps if few else steps or STEPS, arguments)
        by_default = default_kernel(self.method, oracle) if few is None else parse_kernel(few.kernel)
        kernel, eta = self.kernel or by_default
        entry: dict[str, Any] = {**(metadata or {}), "prompt": prompt}
        seed, own = seeded(generator)
        return Problem(
            oracle=oracle,
            judge=judge(self.scorers, prompt, entry),
            kernel=kernel,
            eta=eta,
            stochastic=noisy_steps(kernel, len(oracle.sigmas) - 1, self.window),
            few_steps=few is not None,
            seed=seed,
            prompt=index,
            micro_batch=self.micro_batch,
            own=own,
            preview=None if self.preview is None else previewed(self.preview, prompt),
            about={
                "metadata": told(entry),
                "rewards": [told(dict(scorer.reward)) for scorer in self.scorers.values()],
                "model": told(self.pipeline.source),
                "arguments": told(dict(arguments)),
            },
            spent=spent,
        )

    def finished(
        self,
        method: Steering,
        problem: Problem,
        outcome: Outcome,
        prompt: str,
        said: Sequence[str] = (),
        pilot: int = 0,
    ) -> Steered:
        """Selects, orders and decodes what a method found; `pilot` network forwards set lam before."""
        order = selected(method, outcome, problem)
        x = outcome.x[order.to(outcome.x.device)]
        with problem.spent.clock("decode"), torch.no_grad():
            pixels = torch.cat([problem.oracle.decode(part).float().cpu() for part in x.split(problem.micro_batch)])
        weights = outcome.log_weights[order].exp()
        # the best image alone may have no weight at all, as in a tree search
        weights = weights / weights.sum() if float(weights.sum()) > 0 else torch.full_like(weights, 1 / len(weights))
        roots: dict[int, int] = {}
        leaves = [outcome.leaves[k] for k in order.tolist()]
        spent = problem.spent
        return Steered(
            prompt=prompt,
            pixels=pixels,
            latents=x,
            rewards=outcome.rewards[order],
            weights=weights,
            log_z=outcome.log_z,
            ancestors=[roots.setdefault(outcome.lineage.root(leaf), len(roots)) for leaf in leaves],
            lineage=outcome.lineage,
            leaves=leaves,
            history=outcome.history,
            method=method,
            seed=problem.seed,
            nfe=spent.nfe + pilot,
            reward_calls=spent.reward_calls,
            seconds={**spent.clock.seconds, "total": spent.elapsed},
            warnings=[*said, *warnings(problem, outcome.history)],
        )


def bound(pipeline: Any, prompt: str, grid: int | Sequence[float], arguments: Mapping[str, Any]) -> Oracle:
    """The model bound to a prompt."""
    from diffalign.pipelines.any import AnyPipeline

    if isinstance(pipeline, AnyPipeline):
        if not isinstance(grid, int):
            raise UserError(f"a {type(pipeline.pipe).__name__} takes no timesteps; give a number of steps")
        given = "prompt_embeds" in arguments  # the text is then the rewards' alone
        return pipeline.oracle(None if given else prompt, grid, arguments)
    return Native(pipeline, prompt, grid, arguments)


def _steerable(pipeline: Any) -> Any:
    from diffusers import DiffusionPipeline

    from diffalign.pipelines.any import AnyPipeline

    return AnyPipeline(pipeline) if isinstance(pipeline, DiffusionPipeline) else pipeline
