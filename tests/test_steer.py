"""Steering from Python: what every method promises, on the embedded model."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign import pipelines
from diffalign.listing import available
from diffalign.rollout import collect, sample_seed
from diffalign.sections import Sampling
from diffalign.steer import Steer, Steered
from diffalign.steering import Lineage, Outcome, Steering, resolve
from diffalign.steering._rehearsal import rehearse
from diffalign.steering._tuning import selected
from diffalign.types import UserError

STEPS, PROMPT = 6, "a red circle"
SMALL: dict[str, dict[str, Any]] = {
    "best_of_n": {"particles": 3},
    "fk": {"particles": 4, "lam": 30.0},
    "das": {"particles": 2, "lam": 3.0},
    "svdd": {"particles": 3},
    "dts": {"rollouts": 4, "lam": 30.0},
    "dts_star": {"rollouts": 4, "lam": 30.0},
    "noise_search": {"particles": 2, "repeats": 1},
    "prune": {"particles": 6},
}
MORE: list[dict[str, Any]] = [
    {"name": "noise_search", "algorithm": "paths", "particles": 2, "paths": 2, "back": 3, "forth": 1},
    {"name": "noise_search", "algorithm": "random", "particles": 2, "repeats": 1},
    {"name": "svdd", "particles": 2, "alpha": 0.1},
    {"name": "fk", "particles": 4, "lam": 30.0, "temper": "adaptive", "resample": "ssp"},
    {"name": "fk", "particles": 4, "lam": 30.0, "compat": "fkd-official"},
]
EVERY = [{"name": name, **options} for name, options in SMALL.items()] + MORE


def redness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return pipelines.load("tiny-sd3", device="cpu")


def method(name: str, **options: Any) -> Steering:
    return resolve({"name": name, **options})


def run(pipe: Any, options: dict[str, Any], micro_batch: int = 8, **call: Any) -> Steered:
    return Steer(pipe, redness, options, micro_batch=micro_batch)(PROMPT, STEPS, 0, **call)


def test_every_method_is_tried_here() -> None:
    assert set(SMALL) == set(available("diffalign.steering"))


@pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(map(str, o.values())))
def test_images_are_best_first_and_the_cost_is_what_was_spent(tiny: Any, options: dict[str, Any]) -> None:
    forwards, scored = [], []
    hook = tiny.network.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(len(kwargs["hidden_states"])), with_kwargs=True
    )

    def counted(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        scored.append(len(images))
        return redness(images, prompts, metadata)

    try:
        out = Steer(tiny, counted, options)(PROMPT, STEPS, 0, guidance_scale=2.0)
    finally:
        hook.remove()
    assert out.nfe == sum(forwards) > 0
    assert out.reward_calls == sum(scored)
    assert out.rewards.tolist() == sorted(out.rewards.tolist(), reverse=True)
    torch.testing.assert_close(redness(out.pixels, None, None).double(), out.rewards, atol=1e-6, rtol=0)
    assert float(out.weights.sum()) == pytest.approx(1)
    assert [image.size for image in out.images] == [(64, 64)] * len(out.pixels)
    assert len(out.pixels) == len(out.leaves) == len(out.ancestors) == len(out.latents)
    assert all(parent is None or parent < node for node, parent in enumerate(out.lineage.parent))
    assert sum(s for phase, s in out.seconds.items() if phase != "total") <= out.seconds["total"]
    told = rehearse(resolve(options), STEPS, 2)
    if not options["name"].startswith("dts"):  # whose way depends on the rewards
        assert (told.nfe, told.reward_calls) == (out.nfe, out.reward_calls)
    assert resolve(options).forwards(STEPS, 2) >= out.nfe


@pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(map(str, o.values())))
def test_micro_batch_changes_nothing(tiny: Any, options: dict[str, Any]) -> None:
    one, many = run(tiny, options, micro_batch=1), run(tiny, options, micro_batch=64)
    torch.testing.assert_close(one.pixels, many.pixels, atol=1e-4, rtol=0)
    assert one.leaves == many.leaves


@pytest.mark.parametrize("options", [o for o in EVERY if not o["name"].startswith("dts")], ids=str)
def test_budget_of_forwards(tiny: Any, options: dict[str, Any]) -> None:
    once = resolve(options).forwards(STEPS, 1)
    out = run(tiny, {**options, "budget_nfe": 2 * once + 1})
    assert once < out.nfe <= 2 * once + 1
    with pytest.raises(UserError, match=r"budget_nfe 3 is less than .* forwards.*; raise it"):
        run(tiny, {**options, "budget_nfe": 3})


def test_a_spent_budget_of_seconds_ends_after_a_round(tiny: Any) -> None:
    out = run(tiny, {"name": "fk", "particles": 2, "lam": 1.0, "budget_seconds": 1e-3})
    assert out.nfe == 2 * STEPS


def test_rounds_are_joined_by_their_evidence(tiny: Any) -> None:
    """Two rounds of 2 particles that are only weighed at the end are importance sampling with 4."""
    method = {"name": "fk", "particles": 2, "lam": 20.0, "resample_at": []}
    both = run(tiny, {**method, "budget_nfe": 4 * STEPS})
    torch.testing.assert_close(both.weights, (20.0 * both.rewards).softmax(0))
    assert both.log_z == pytest.approx(float((20.0 * both.rewards).exp().mean().log()))
    assert both.ancestors == [0, 1, 2, 3]


def test_plain_sampling_is_that_of_generate(tiny: Any) -> None:
    out = run(tiny, {"name": "best_of_n", "particles": 2}, index=3)
    seeds = torch.tensor([sample_seed(0, 0, 3, j) for j in range(2)])
    sampling = Sampling(steps=STEPS, kernel="ode", eta=0.0, height=64, width=64)
    made = collect(tiny, [{"prompt": PROMPT}] * 2, torch.zeros(2, dtype=torch.long), seeds, sampling)
    assert made.images is not None
    order = redness(made.images, None, None).argsort(descending=True)
    torch.testing.assert_close(out.pixels, made.images[order], atol=0, rtol=0)


def test_strength_nought_is_plain_sampling(tiny: Any) -> None:
    fk = run(tiny, {"name": "fk", "particles": 3, "lam": 0.0, "resample_at": "all"})
    plain = Steer(tiny, redness, {"name": "best_of_n", "particles": 3}, kernel="flow_sde:0.7")(PROMPT, STEPS, 0)
    assert torch.equal(fk.pixels, plain.pixels)
    assert fk.weights.tolist() == pytest.approx([1 / 3] * 3) and fk.log_z == 0


def test_steering_helps(tiny: Any) -> None:
    """Over five seeds, FK's mean particle beats plain samples by more than half their deviation, DAS's by more yet."""
    plain = torch.cat([_rewards(tiny, {"name": "best_of_n", "particles": 8}, seed) for seed in range(5)])
    fk = torch.cat([_rewards(tiny, {"name": "fk", "particles": 8}, seed) for seed in range(5)])
    gain = float((fk.mean() - plain.mean()) / plain.std())
    assert gain > 0.5
    svdd = torch.cat([_rewards(tiny, {"name": "svdd", "particles": 6}, seed) for seed in range(5)])
    assert float((svdd.mean() - plain.mean()) / plain.std()) > 0.5


def _rewards(pipe: Any, options: dict[str, Any], seed: int) -> Tensor:
    return Steer(pipe, redness, options)("a star", STEPS, seed).rewards


def test_the_images_that_are_returned(tiny: Any) -> None:
    every = run(tiny, {"name": "fk", "particles": 4, "lam": 30.0})
    best = run(tiny, {"name": "fk", "particles": 4, "lam": 30.0, "select": "best"})
    drawn = run(tiny, {"name": "fk", "particles": 4, "lam": 30.0, "select": "sample"})
    torch.testing.assert_close(best.pixels, every.pixels[:1], atol=1e-5, rtol=0)  # decoded alone, not with three others
    assert len(drawn.pixels) == 1 and torch.isclose(drawn.pixels, every.pixels, atol=1e-5).flatten(1).all(1).any()


def test_the_draw_follows_the_weights(tiny: Any) -> None:
    """One image has all the weight: the draw must be that one, though another has the highest reward."""
    rewards = torch.tensor([0.0, 5.0, 4.0])
    outcome = Outcome(torch.zeros(3, 1), rewards, torch.tensor([-torch.inf, -torch.inf, 0.0]), [0, 1, 2], Lineage())
    problem = Steer(tiny, redness).problem(PROMPT, STEPS, 0, None, 0, {})
    assert selected(method("fk", select="sample"), outcome, problem).tolist() == [2]
    assert selected(method("fk", select="best"), outcome, problem).tolist() == [1]
    assert selected(method("fk"), outcome, problem).tolist() == [1, 2, 0]


def test_generators(tiny: Any) -> None:
    steer = Steer(tiny, redness, {"name": "best_of_n", "particles": 2})
    seeded = [steer(PROMPT, STEPS, torch.Generator().manual_seed(s)).pixels for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    own = [torch.Generator().manual_seed(sample_seed(0, 0, 0, j)) for j in range(2)]
    assert torch.equal(steer(PROMPT, STEPS, own).pixels, steer(PROMPT, STEPS, 0).pixels)
    with pytest.raises(UserError, match="2 particles need as many generators, got 1; or give one seed"):
        steer(PROMPT, STEPS, own[:1])


def test_the_callback_sees_every_step_and_may_redirect(tiny: Any) -> None:
    seen: list[tuple[int, float, bool]] = []

    def watch(steer: Steer, step: int, sigma: float, told: dict[str, Any]) -> dict[str, Any] | None:
        seen.append((step, sigma, told["ess"] is not None))
        return {"latents": torch.zeros_like(told["latents"])} if step == STEPS - 1 else None

    method = {"name": "fk", "particles": 2, "lam": 1.0, "resample_at": [2, 4]}
    out = Steer(tiny, redness, method)(PROMPT, STEPS, 0, callback_on_step_end=watch)
    assert [s[0] for s in seen] == list(range(STEPS)) and seen[0][1] == 1.0
    assert [s[0] for s in seen if s[2]] == [2, 4]
    assert not out.latents.any()


def test_several_rewards_are_weighed(tiny: Any) -> None:
    """Weights scale each reward; the sum is what counts."""
    jpeg, red = {"name": "jpeg", "weight": 0.01}, redness
    out = Steer(tiny, [jpeg, red], {"name": "best_of_n", "particles": 4})(PROMPT, STEPS, 0)
    each = [Steer(tiny, r, {"name": "best_of_n", "particles": 4})(PROMPT, STEPS, 0) for r in (jpeg, red)]
    together = {float(i.sum()): r for e in each for i, r in zip(e.pixels, e.rewards, strict=True)}
    assert len(together) == 4
    sums: dict[float, float] = {}
    for e in each:
        for image, reward in zip(e.pixels, e.rewards.tolist(), strict=True):
            sums[float(image.sum())] = sums.get(float(image.sum()), 0.0) + reward
    assert [sums[float(i.sum())] for i in out.pixels] == pytest.approx(out.rewards.tolist())


def test_a_preview_scores_what_is_unfinished(tiny: Any) -> None:
    levels: list[float] = []

    def preview(images: Tensor, prompts: Any, sigma: float) -> Tensor:
        levels.append(sigma)
        return -redness(images, prompts, None)

    method = {"name": "prune", "particles": 6, "keep": [0.34], "at": [3]}
    misled = Steer(tiny, redness, method, preview=preview)(PROMPT, STEPS, 0)
    led = Steer(tiny, redness, method)(PROMPT, STEPS, 0)
    assert len(levels) == 1 and 0 < levels[0] < 1
    assert float(misled.rewards[0]) < float(led.rewards[0])


def test_any_diffusers_pipeline_is_steered_alike(tiny: Any) -> None:
    """The same model as a plain diffusers pipeline: the same images, and the pipeline is left as it was."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(str(pipelines.embedded_path("tiny-sd3")))
    scheduler, kind = pipe.scheduler, type(pipe)
    method = {"name": "fk", "particles": 3, "lam": 30.0}
    call = {"guidance_scale": 2.0, "height": 64, "width": 64, "max_sequence_length": 1}
    through = Steer(pipe, redness, method)(PROMPT, STEPS, 0, **call)
    native = Steer(tiny, redness, method)(PROMPT, STEPS, 0, guidance_scale=2.0)
    assert pipe.scheduler is scheduler and type(pipe) is kind
    assert through.nfe == native.nfe
    torch.testing.assert_close(through.rewards, native.rewards, atol=2e-3, rtol=0)


def test_lam_comes_from_plain_samples(tiny: Any) -> None:
    steer = Steer(tiny, redness, {"name": "fk", "particles": 2})
    out = steer(PROMPT, STEPS, 0)
    assert out.nfe == (8 + 2) * STEPS
    lam = dict(out.method)["lam"]
    many = Steer(tiny, redness, {"name": "best_of_n", "particles": 64}, kernel="flow_sde:0.7")(PROMPT, STEPS, 5)
    assert 0.5 < lam * float(many.rewards.std()) / 3 < 2.5
    alike = Steer(tiny, lambda images, *_: torch.ones(len(images)), {"name": "fk", "particles": 2})(PROMPT, STEPS, 0)
    assert dict(alike.method)["lam"] == 10 and "score alike" in alike.warnings[0]


def test_a_method_of_ones_own(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the user's, no edit here: the last of three plain images."""
    (tmp_path / "mine.py").write_text(
        "from diffalign.steering import Steering\n"
        "from diffalign.steering.best_of_n import BestOfN\n"
        "class Worst(Steering):\n"
        "    particles: int = 3\n"
        "    def run(self, problem):\n"
        "        from dataclasses import replace\n"
        "        found = BestOfN(particles=self.particles).run(problem)\n"
        "        worst = found.rewards.argmin()[None]\n"
        "        return replace(found, x=found.x[worst], rewards=found.rewards[worst],\n"
        "                       log_weights=found.log_weights[worst], leaves=[found.leaves[int(worst)]])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    out = Steer(tiny, redness, "mine.Worst", kernel="ode")(PROMPT, STEPS, 0)
    plain = Steer(tiny, redness, {"name": "best_of_n", "particles": 3})(PROMPT, STEPS, 0)
    torch.testing.assert_close(out.pixels[0], plain.pixels[-1], atol=1e-5, rtol=0)
    sys.modules.pop("mine")


def test_bad_input(tiny: Any) -> None:
    def refused(match: str, method: Any = "fk", reward: Any = redness, steps: int = STEPS, **options: Any) -> None:
        call = options.pop("call", {})
        prompt = options.pop("prompt", PROMPT)
        with pytest.raises(UserError, match=match):
            Steer(tiny, reward, method, **options)(prompt, steps, 0, **call)

    fk = {"name": "fk", "particles": 2, "lam": 1.0}
    refused("unknown steering 'fkk'; did you mean 'fk'", "fkk")
    refused("steering 'fk', particle: there is no such option; did you mean 'particles'", {"name": "fk", "particle": 3})
    refused("unknown reward 'picksore'; did you mean 'pickscore'", reward="picksore")
    refused("steering 'das' follows the reward's gradient, and 'jpeg' has none", "das", "jpeg")
    refused("the reward gives no gradient", {"name": "das", "lam": 1.0}, lambda i, *_: redness(i, 0, 0).detach())
    refused("scores nothing without one", reward={"name": "dino_adversarial", "references": "shapes-outline"})
    refused("steering 'fk' needs noise", fk, kernel="ode")
    refused("steering 'fk' needs noise", fk, kernel="flow_sde:0")
    refused("unknown kernel 'dpm2'", fk, kernel="dpm2:1")
    refused("kernel 'ddim' needs a noise level; write ddim:0.7", fk, kernel="ddim")
    refused("eta 2.0 does not suit kernel 'ddim'", fk, kernel="ddim:2")
    refused("7 resampling points for 6 steps", {**fk, "resample_at": [1, 2, 3, 4, 5, 6, 7]})
    refused("cannot resample at step 6: give steps 1 to 4", {**fk, "resample_at": [6]})
    refused("the prompt is empty", fk, prompt=" ")
    refused("at least one step, got 0", fk, steps=0)
    refused("no argument 'guidance'; did you mean 'guidance_scale'", fk, call={"guidance": 2.0})
    refused(
        "the reward is NaN for all 2 images at step 2",
        {**fk, "resample_at": [2]},
        lambda i, *_: [float("nan")] * len(i),
    )
    refused("no span of steps 0 to 5", fk, window=(50, 60))
    refused("no span of steps 0 to 5", fk, window=(2, 0))
    refused("a window has no effect", {"name": "best_of_n"}, window=(0, 2))
    refused("micro_batch must be at least 1, got 0", fk, micro_batch=0)
    refused("give one prompt at a time", fk, prompt=[PROMPT])
    refused("is no text; write it in UTF-8", fk, prompt="caf\udce9")
    refused("negative_prompt has no effect at guidance 1", fk, call={"negative_prompt": "blue"})
    refused("similarity does not apply to random", {"name": "noise_search", "algorithm": "random", "similarity": 0.5})
    refused("repeats does not apply to paths", {"name": "noise_search", "algorithm": "paths", "repeats": 2})
    refused("gave an infinite score", {**fk, "resample_at": [2]}, lambda i, *_: [float("inf")] * len(i))
    with pytest.raises(UserError, match="a seed must be 0 or more, got -1"):
        Steer(tiny, redness, fk)(PROMPT, STEPS, -1)
    for answer in (torch.zeros(1), {"latents": torch.zeros(1, 2)}, {"x0": None}):
        with pytest.raises(UserError, match=r"callback_on_step_end must return None or"):
            Steer(tiny, redness, fk)(PROMPT, STEPS, 0, callback_on_step_end=lambda *_, a=answer: a)
    refused("prune keeps 1 times; say at which steps", {"name": "prune", "keep": [0.5]})
    refused("must be 2 rising steps", {"name": "prune", "keep": [0.5, 0.5], "at": [3, 2]})
    refused("take forth below back", {"name": "noise_search", "algorithm": "paths", "back": 2, "forth": 2})


def test_a_nan_costs_its_particle_alone(tiny: Any) -> None:
    def partly(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        scores = redness(images, prompts, metadata)
        scores[0] = float("nan")
        return scores

    out = Steer(tiny, partly, {"name": "fk", "particles": 4, "lam": 30.0, "ess": 0.0})(PROMPT, STEPS, 0)
    assert out.rewards[-1] == -torch.inf and float(out.weights[-1]) == 0
    assert float(out.weights.sum()) == pytest.approx(1) and out.log_z is not None


def test_any_callable_is_a_reward(tiny: Any) -> None:
    partial = functools.partial(redness, metadata=None)
    out = Steer(tiny, [lambda i, p, m: redness(i, p, m), lambda i, p, m: partial(i, p)], {"name": "best_of_n"})
    plain = run(tiny, {"name": "best_of_n"})
    torch.testing.assert_close(out(PROMPT, STEPS, np.int64(0)).rewards, 2 * plain.rewards)


def test_ranks_decide_when_asked_to(tiny: Any) -> None:
    """One reward is a thousand times the other: their sum follows it alone, ranks follow both."""
    rewards = [{"name": "jpeg", "weight": 1000.0}, redness]
    method = {"name": "prune", "particles": 8, "keep": [1.0], "at": [3], "select": "best"}
    ranked = Steer(tiny, rewards, {**method, "combine": "rank"})(PROMPT, STEPS, 0)
    columns = [
        Steer(tiny, reward, {"name": "best_of_n", "particles": 8})(PROMPT, STEPS, 0) for reward in ("jpeg", redness)
    ]
    place = {float(image.sum()): [0, 0] for image in columns[0].pixels}
    for k, column in enumerate(columns):
        for rank, image in enumerate(column.pixels.flip(0)):
            place[min(place, key=lambda s: abs(s - float(image.sum())))][k] = rank
    best = max(sum(ranks) for ranks in place.values())
    chosen = place[min(place, key=lambda s: abs(s - float(ranked.pixels[0].sum())))]
    assert sum(chosen) == best


def test_the_best_image_alone_has_all_the_weight(tiny: Any) -> None:
    """Also where the tree's greedy walk ends at another leaf."""
    method = {"name": "dts_star", "rollouts": 6, "lam": 30.0, "select": "best"}
    for seed in range(4):
        assert Steer(tiny, redness, method)(PROMPT, 4, seed).weights.tolist() == [1.0]


def test_best_of_n_fills_a_budget(tiny: Any) -> None:
    assert len(run(tiny, {"name": "best_of_n", "budget_nfe": 3 * STEPS + 1}).pixels) == 3
    both = run(tiny, {"name": "best_of_n", "budget_nfe": 2 * STEPS, "budget_seconds": 600.0})
    assert len(both.pixels) == 2 and both.nfe == 2 * STEPS


def test_warnings(tiny: Any) -> None:
    out = run(tiny, {"name": "fk", "particles": 8, "lam": 1e5, "resample_at": [1, 2], "temper": "none"})
    assert "fewer than 1.5 particles were effective at step 1" in out.warnings[0]
    assert "all particles descend from one noise at step 1, before half way" in out.warnings[1]
