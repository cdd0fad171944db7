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
from diffalign.images import to_pixels
from diffalign.rewards import FunctionReward, Reward, Scorer, build, shaped
from diffalign.rewards import resolve as resolve_reward
from diffalign.steering import Lineage, Oracle, Outcome, Steering, parse_kernel, resolve
from diffalign.steering._native import Native
from diffalign.steering._problem import Judge, Problem, Spent, Watched
from diffalign.steering._resampling import normalised
from diffalign.steering._tuning import PILOTED, default_kernel, noisy_steps, selected, tuned, warnings
from diffalign.types import UserError

Preview = Callable[[Tensor, Sequence[str], float], Tensor]
RewardLike = str | Reward | Mapping[str, Any] | Callable[..., Any]


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
        pipeline: any text-to-image pipeline of diffusers, or one that :func:`diffalign.pipelines.load` returned.
        reward: 'pickscore', a section such as {name: pickscore, model: tiny-clip}, a Reward, a function (images
            [n, 3, H, W] in [0, 1], prompts, metadata) -> n scores, or a list of them, whose weighted sum counts.
        method: a name ('fk'), a section ({name: fk, particles: 8}) or a Steering.
        kernel: 'flow_sde:0.7', KERNEL:ETA; by default ode for methods that need no noise, else flow_sde of eta 0.7 (1
            from 28 steps on) for flow models and ddim of eta 1 for the others.
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
        self.micro_batch = micro_batch
        self.preview = preview
        wanted = rewards_of(reward)
        _suit(self.method, wanted)
        self.scorers = build(wanted, self.pipeline.device)

    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = 28,
        generator: int | torch.Generator | Sequence[torch.Generator] | None = None,
        metadata: Mapping[str, Any] | None = None,
        index: int = 0,
        callback_on_step_end: Callable[[Steer, int, float, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        **arguments: Any,
    ) -> Steered:
        """Steered images of one prompt.

        Args:
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
            problem.watch = _watching(self, problem, callback_on_step_end)
        method, said = tuned(self.method, [problem])
        outcome = method.run(problem)
        return self.finished(method, problem, outcome, prompt, said)

    def using(self, method: Steering, kernel: str | None = None) -> Steer:
        """The same model and rewards with another method, and its default kernel if none is given."""
        other = copy.copy(self)
        other.method = method
        if kernel is not None or method.stochastic != self.method.stochastic:
            other.kernel = None if kernel is None else parse_kernel(kernel)
        return other

    def calibrated(
        self, prompts: Sequence[Mapping[str, Any]], steps: int, seed: int, arguments: Mapping[str, Any]
    ) -> tuple[Steering, int]:
        """The method with lam set for a list of prompts, and the network forwards that took; see `tuned`."""
        if dict(self.method).get("lam") != "auto":
            return self.method, 0
        problems = [
            self.problem(str(m["prompt"]), steps, seed, m, index, arguments)
            for index, m in enumerate(prompts[:PILOTED])
        ]
        method, said = tuned(self.method, problems)
        return method, sum(p.spent.nfe for p in problems)

    def problem(
        self,
        prompt: str,
        steps: int,
        generator: int | torch.Generator | Sequence[torch.Generator] | None,
        metadata: Mapping[str, Any] | None,
        index: int,
        arguments: Mapping[str, Any],
    ) -> Problem:
        """What the method will work on; encodes the prompt."""
        if not prompt.strip():
            raise UserError("the prompt is empty; write what the image should show")
        if steps < 1:
            raise UserError(f"sampling needs at least one step, got {steps}")
        spent = Spent(Clock(self.pipeline.device))
        oracle = bound(self.pipeline, prompt, steps, arguments)
        kernel, eta = self.kernel or default_kernel(self.method, oracle)
        entry = {**(metadata or {}), "prompt": prompt}
        seed, own = _seeded(generator)
        return Problem(
            oracle=oracle,
            judge=judge(self.scorers, prompt, entry),
            kernel=kernel,
            eta=eta,
            stochastic=noisy_steps(kernel, steps, self.window),
            seed=seed,
            prompt=index,
            micro_batch=self.micro_batch,
            own=own,
            preview=None if self.preview is None else _previewed(self.preview, prompt),
            spent=spent,
        )

    def finished(
        self, method: Steering, problem: Problem, outcome: Outcome, prompt: str, said: Sequence[str] = ()
    ) -> Steered:
        """Selects, orders and decodes what a method found."""
        order = selected(method, outcome, problem)
        x = outcome.x[order.to(outcome.x.device)]
        with problem.spent.clock("decode"), torch.no_grad():
            pixels = torch.cat([problem.oracle.decode(part).float().cpu() for part in x.split(problem.micro_batch)])
        roots: dict[int, int] = {}
        leaves = [outcome.leaves[k] for k in order.tolist()]
        spent = problem.spent
        return Steered(
            prompt=prompt,
            pixels=pixels,
            latents=x,
            rewards=outcome.rewards[order],
            weights=normalised(outcome.log_weights[order]).exp(),
            log_z=outcome.log_z,
            ancestors=[roots.setdefault(outcome.lineage.root(leaf), len(roots)) for leaf in leaves],
            lineage=outcome.lineage,
            leaves=leaves,
            history=outcome.history,
            method=method,
            seed=problem.seed,
            nfe=spent.nfe,
            reward_calls=spent.reward_calls,
            seconds={**spent.clock.seconds, "total": spent.elapsed},
            warnings=[*said, *warnings(outcome.history, problem.steps)],
        )


def rewards_of(reward: RewardLike | Sequence[RewardLike]) -> list[Reward]:
    """The configuration of each reward; loads no weights."""
    entries = reward if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
    if not entries:
        raise UserError("steering needs at least one reward")
    return [_function(e) if callable(e) and not isinstance(e, Reward) else resolve_reward(e) for e in entries]


def _function(function: Any) -> Reward:
    reward = FunctionReward(name=function.__name__)
    reward._function = function
    return reward


def _suit(method: Steering, rewards: Sequence[Reward]) -> None:
    for reward in rewards:
        if reward.learns:
            raise UserError(f"'{reward.key}' is trained during a run and scores nothing without one; leave it out")
        unknown = isinstance(reward, FunctionReward)  # its first gradient tells
        if method.differentiates and not (reward.differentiable or unknown):
            raise UserError(
                f"steering '{method.name}' follows the reward's gradient, and '{reward.key}' has none; take fk, or a "
                "differentiable reward such as pickscore"
            )


def judge(scorers: Mapping[str, Scorer], prompt: str, metadata: Mapping[str, Any]) -> Judge:
    """Weighted scores [n, R] of images of one prompt."""

    def judged(images: Tensor, sigma: float) -> Tensor:
        prompts, entries = [prompt] * len(images), [metadata] * len(images)
        columns = []
        for scorer in scorers.values():
            scores = scorer(images, prompts, entries).scores
            columns.append(scorer.reward.weight * shaped(scorer.reward, scores))
        return torch.stack(columns, 1)

    return judged


def _previewed(preview: Preview, prompt: str) -> Judge:
    return lambda images, sigma: preview(images, [prompt] * len(images), sigma)


def bound(pipeline: Any, prompt: str, steps: int, arguments: Mapping[str, Any]) -> Oracle:
    """The model bound to a prompt."""
    from diffalign.pipelines.any import AnyPipeline

    if isinstance(pipeline, AnyPipeline):
        given = "prompt_embeds" in arguments  # the text is then the rewards' alone
        return pipeline.oracle(None if given else prompt, steps, arguments)
    return Native(pipeline, prompt, steps, arguments)


def _steerable(pipeline: Any) -> Any:
    from diffusers import DiffusionPipeline

    from diffalign.pipelines.any import AnyPipeline

    return AnyPipeline(pipeline) if isinstance(pipeline, DiffusionPipeline) else pipeline


def _seeded(
    generator: int | torch.Generator | Sequence[torch.Generator] | None,
) -> tuple[int, Sequence[torch.Generator] | None]:
    """(seed, generators of the particles if the caller brings them)."""
    if isinstance(generator, int):
        return generator, None
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(1 << 31, (), generator=generator, device=device)), None
    return 0, generator


def _watching(steer: Steer, problem: Problem, callback: Callable[..., Any]) -> Callable[[Watched], Tensor | None]:
    def watch(seen: Watched) -> Tensor | None:
        told = {"latents": seen.x, "x0": seen.x0, "rewards": None, "log_weights": None, "ess": None, **seen.row}
        answer = callback(steer, seen.step, float(problem.oracle.sigmas[seen.step]), told)
        return None if answer is None else answer.get("latents")

    return watch
