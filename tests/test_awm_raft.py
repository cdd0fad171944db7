"""AWM and RAFT: their gradients, the old policy that AWM compares with, its penalties, and what RAFT leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny_models
import torch
from forward_process import Model, differences, gradient, images, perturb, roll, small, total, trained
from pydantic import ValidationError

from diffalign import adapters, loading, pipelines
from diffalign.algorithms import Memory
from diffalign.algorithms._forward import squared
from diffalign.algorithms._shadow import Shadow
from diffalign.algorithms._weighted_matching import Weighting
from diffalign.algorithms.awm import AWM
from diffalign.algorithms.raft import RAFT
from diffalign.types import UserError

LEVELS = {"choice": "stratified", "count": 3, "range": (0.1, 0.9)}
PLAIN = {"anchor": 0, "kl": {"weight": 0}, "timesteps": LEVELS}
ADVANTAGES = [1.5, -0.4, 0.0, -9.0]


def awm(**options: Any) -> AWM:
    return AWM.model_validate({"name": "awm", **PLAIN, **options})


def raft(**options: Any) -> RAFT:
    return RAFT.model_validate({"name": "raft", "timesteps": LEVELS, **options})


@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("c", [5.0, 1.0])
def test_the_first_update_follows_the_weighted_matching_loss(weighting: Any, c: float) -> None:
    """A grad w(l, t), A = clip(A, -c, c) / c, at a ratio of exactly 1; w as the paper writes it."""
    batch, model = images(ADVANTAGES), small()
    own = {"power": 0.5} if weighting == "ghuber" else {}
    method = awm(weighting=weighting, advantage_clip=c, **own)
    losses = list(method.losses(model, batch, Memory()))
    assert len(losses) == 3 and all((3 * loss.metrics["ratio"] == 1).all() for loss in losses)
    assert batch.advantages is not None and all(loss.penalty is None for loss in losses)
    a, expected = batch.advantages.clamp(-c, c) / c, []
    for at in method.noised(model, batch):
        t, error = at.s, squared(model.velocity(model.parameters, at.x, at.s), at.eps - at.x0)
        roots = {"huber": t * (error + 1e-10).sqrt(), "ghuber": t / 0.5 * (error + 1e-10).sqrt()}
        w = {"uniform": error, "t": t * error, "t2": t**2 * error, **roots}[weighting]
        expected.append((a * w).sum() / 3)
    slope = torch.autograd.grad(torch.stack(expected).sum(), list(model.parameters.values()))
    found = gradient(method, model, batch, Memory(), model.parameters)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in slope]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["velocity", "elbo"])
@pytest.mark.parametrize("clip", [1.0, 0.02])
def test_the_gradient_against_finite_differences(norm: str, clip: float) -> None:
    """Ratio, clip and both penalties, in a later update, with old policy, slow copy and reference apart from theta."""
    batch, model = images(ADVANTAGES), small()
    method = awm(clip=clip, kl={"weight": 0.3, "norm": norm}, anchor=0.7)
    memory = method.start(None, model.parameters)
    assert isinstance(memory, Shadow)
    with torch.no_grad():
        model.move(0.05, seed=1)
        batch.old = method.behaviour(model, batch)
        model.move(0.02, seed=2)
        perturb(memory.old, 0.05, seed=3)  # type: ignore[arg-type]
    memory.after_step()
    losses = list(method.losses(model, batch, memory))
    ratio = 3 * torch.stack([loss.metrics["ratio"] for loss in losses])
    assert ((ratio - 1).abs() > 1e-4).all() and ((ratio - 1).abs() > clip).any() == (clip < 1)

    assert batch.advantages is not None
    for loss, at, k in zip(losses, method.noised(model, batch), range(3), strict=True):
        v, slow, start = (model.velocity(p, at.x, at.s) for p in (model.parameters, memory.old, model.initial))
        scale = 2 * 0.49 * at.s / (1 - at.s) if norm == "elbo" else 1
        penalty = 0.3 * squared(v, start) / scale + 0.7 * squared(v, slow)
        w = at.s / 0.25 * (squared(v, at.eps - at.x0) + 1e-10) ** 0.25
        a, rho = batch.advantages.clamp(-5, 5) / 5, (at.s / 0.25 * 1e-10**0.25 - w - batch.old["log_prob"][:, k]).exp()
        policy = torch.maximum(-a * rho, -a * rho.clamp(1 - clip, 1 + clip))
        torch.testing.assert_close(loss.per_sample, (policy + penalty) / 3, rtol=1e-9, atol=1e-12)

    slope = torch.autograd.grad(total(method, model, batch, memory).sum(), list(model.parameters.values()))
    chosen = torch.cat([g.flatten()[:3] for g in slope])
    found = differences(lambda: total(method, model, batch, memory).sum(), model.parameters)
    torch.testing.assert_close(chosen, found, rtol=1e-5, atol=1e-7)


def test_the_old_policy_is_scored_at_the_noise_that_is_trained() -> None:
    """Every pass has noise of its own; the ratio is 1 to the last bit until the weights move, in each of them."""
    batch, model, method = images(ADVANTAGES), small(), awm()
    for turn in (0, 1):
        seen = replace(batch, turn=turn)
        with torch.no_grad():
            seen.old = method.behaviour(model, seen)
        assert seen.old["log_prob"].shape == (4, 3)
        assert all((3 * loss.metrics["ratio"] == 1).all() for loss in method.losses(model, seen, Memory()))
        elsewhere = replace(seen, turn=1 - turn)
        assert all((3 * loss.metrics["ratio"] != 1).all() for loss in method.losses(model, elsewhere, Memory()))
    order = torch.tensor([3, 1])
    for loss in method.losses(model, seen[order], Memory()):
        torch.testing.assert_close(3 * loss.metrics["ratio"], torch.ones(2).double(), rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")
    loaded = pipelines.load(folder, device="cpu", max_sequence_length=4)
    torch.manual_seed(0)
    adapters.add_lora(loaded, 4, 8)
    perturb(trained(loaded))
    return loaded


def test_the_ratio_is_exactly_one_on_a_real_network(pipeline: Any) -> None:
    batch, method = roll(pipeline, [1.0, -1.0, 0.5, -0.5]), awm()
    with torch.no_grad():
        batch.old = method.behaviour(Model(pipeline), batch)
    for loss in method.losses(Model(pipeline), batch, Memory()):
        assert (3 * loss.metrics["ratio"]).tolist() == [1.0] * 4


def test_no_slow_copy_without_an_anchor() -> None:
    assert type(awm().start(None, small().parameters)) is Memory
    assert isinstance(awm(anchor=0.1).start(None, small().parameters), Shadow)


def test_the_anchor_costs_nothing_until_the_weights_move() -> None:
    """Its distance is then 0, with gradient 0: the loss without it is the same."""
    batch, model, method = images(ADVANTAGES), small(), awm(anchor=1.0, slow={"rate": 0.5, "cap": 0.5})
    memory = method.start(None, model.parameters)
    assert isinstance(memory, Shadow) and memory.equal
    calls: list[int] = []
    velocity = model.velocity

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return velocity(*arguments)

    model.velocity = counted
    short = gradient(method, model, batch, memory, model.parameters)
    assert len(calls) == 3
    memory.equal = False
    assert torch.equal(gradient(method, model, batch, memory, model.parameters), short) and len(calls) == 3 + 6
    model.move(0.1)
    memory.after_step()
    assert memory.steps == 1 and not memory.equal  # half of the old weights are left
    losses = list(method.losses(model, batch, memory))
    assert all((loss.metrics["anchor"] > 0).all() for loss in losses)


def test_every_image_with_a_penalty_is_trained() -> None:
    batch = images([1.0, -1.0, 0.0, 0.0])
    assert awm().trains_on(batch, Memory(), 0).tolist() == [True, True, False, False]
    model = small()
    assert gradient(awm(), model, batch[torch.tensor([2, 3])], Memory(), model.parameters).abs().max() == 0
    assert awm(anchor=0.1).trains_on(batch, Memory(), 0).all()
    assert awm(kl={"weight": 0.1}).trains_on(batch, Memory(), 0).all()


def test_raft_is_flow_matching_on_the_images_that_are_kept(pipeline: Any) -> None:
    batch, method, policy = roll(pipeline, [0.0, 1.0, 1.0, 0.0]), raft(), Model(pipeline)
    parameters = trained(pipeline)
    assert method.trains_on(batch, Memory(), 0).tolist() == [False, True, True, False]
    kept = batch[torch.tensor([1, 2])]
    denoiser, errors = policy.denoiser(kept.cond), []
    for at in method.noised(denoiser, kept):
        x0, eps = denoiser.predict(at.x, at.s)
        errors.append(((eps - x0) - (at.eps - at.x0)).square().flatten(1).mean(1))
    assert len(errors) == 3
    expected = torch.autograd.grad(torch.stack(errors).sum() / 3, list(parameters.values()))
    found = gradient(method, policy, kept, Memory(), parameters)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-7)
    rest = batch[torch.tensor([0, 3])]
    assert gradient(raft(kl=0.5), policy, rest, Memory(), parameters).abs().max() == 0  # so nothing is left out
    for loss in method.losses(policy, batch, Memory()):
        assert (loss.per_sample == 0).tolist() == [True, False, False, True]


def test_raft_may_stay_near_the_model_before_training() -> None:
    batch, model = images([1.0, 0.0, 1.0, 1.0]), small()
    model.move(0.1)
    plain, near = (list(raft(kl=kl).losses(model, batch, Memory())) for kl in (0.0, 0.3))
    for one, other, at in zip(plain, near, raft().noised(model, batch), strict=True):
        drift = squared(*(model.velocity(p, at.x, at.s) for p in (model.parameters, model.initial)))
        expected = one.per_sample + 0.1 * drift * batch.advantages
        torch.testing.assert_close(other.per_sample, expected, rtol=1e-9, atol=1e-12)
    value = lambda: total(raft(kl=0.3), model, batch, Memory()).sum()  # noqa: E731
    slope = torch.autograd.grad(value(), list(model.parameters.values()))
    torch.testing.assert_close(
        torch.cat([g.flatten()[:3] for g in slope]), differences(value, model.parameters), rtol=1e-5, atol=1e-7
    )


def test_raft_is_trained_on_the_best_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        loading.load("shapes_nft", ["algorithm=raft", "evaluation.every=0"])
    said = str(caught.value)
    assert said.endswith("'raft' does not train on 'group'; take sft") and said.count("\n") == 0
    assert loading.load("shapes_nft", ["algorithm=raft", "advantage=sft"]).algorithm.name == "raft"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weighting": "huber", "power": 0.5}, "power has no effect"),
        ({"anchor": 0.0, "slow": {"cap": 0.5}}, "slow has no effect"),
        ({"slow": {"rate": 0.0, "start": 3}}, "start has no effect"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AWM(name="awm", **options)
