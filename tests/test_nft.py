"""DiffusionNFT: the identities of its loss, and whose weights are used when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from forward_process import Model, Toy, differences, free, gradient, images, perturb, roll, small, total, trained
from torch import Tensor

from diffalign import adapters, pipelines
from diffalign.algorithms._forward import Noised, squared
from diffalign.algorithms._shadow import Decay, Shadow
from diffalign.algorithms.nft import NFT, implicit, nft_loss

MODES = ("all", "positive_only", "negative_only", "one_only", "binary")
ONE = {"timesteps": {"choice": "grid", "count": 1}, "kl": 0}


def nft(**options: Any) -> NFT:
    return NFT.model_validate({"name": "nft", **options})


def shadow(model: Toy, method: NFT) -> Shadow:
    memory = method.start(None, model.parameters)
    assert isinstance(memory, Shadow)
    return memory


def only(method: NFT, model: Toy, batch: Any) -> Noised:
    (at,) = method.noised(model, batch)
    return at


def unfolded(at: Noised) -> tuple[Tensor, Tensor]:
    """t, shaped to multiply images, and v* = eps - x0."""
    return at.s.view(-1, 1, 1, 1), at.eps - at.x0


def mean_abs(x: Tensor) -> Tensor:
    return x.abs().flatten(1).mean(1)


@pytest.mark.parametrize("clip", [5.0, 0.7])
@pytest.mark.parametrize("beta", [1.0, 0.1, 2.5])
def test_the_first_step_is_advantage_weighted_flow_matching(beta: float, clip: float) -> None:
    """dL/dv = -2 t^2 A (v* - v_old) / (w D) at v = v_old, A cut to the clip; beta and clip are not in it."""
    batch = images([1.5, -0.4, 0.0, -9.0])
    model, method = Toy(free, {"v": images([0.0] * 4, seed=7).x0}), nft(beta=beta, clip=clip, **ONE)
    assert batch.advantages is not None
    at = only(method, model, batch)
    t, target = unfolded(at)
    gap = target - model.parameters["v"].detach()
    a = batch.advantages.clamp(-clip, clip) / mean_abs(t * gap)
    expected = -2 * t.square() * a.view(-1, 1, 1, 1) * gap / gap[0].numel()
    found = gradient(method, model, batch, shadow(model, method), model.parameters)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [5.0, 0.7])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_loss_is_affine_in_the_advantages_up_to_the_clip(beta: float, clip: float) -> None:
    """c (L+ + L-) / (2 beta) + A (L+ - L-) / (2 beta), and as at the clip beyond it."""
    batch = images([0.0] * 4)
    model, method = Toy(free, {"v": images([0.0] * 4, seed=7).x0}), nft(beta=beta, clip=clip, **ONE)
    memory, old = shadow(model, method), model.initial["v"]
    model.move(0.3)
    memory.after_step()
    (loss,) = method.losses(model, batch, memory)
    at = only(method, model, batch)
    t, target = unfolded(at)
    v = model.parameters["v"].detach()
    errors = [t * (side - target) for side in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v)]
    plus, minus = (error.square().flatten(1).mean(1) / mean_abs(error) for error in errors)

    def closed_form(a: Tensor) -> Tensor:
        return (clip * (plus + minus) + a * (plus - minus)) / (2 * beta)

    inside = torch.tensor([-1.0, -0.3, 0.2, 1.0], dtype=torch.float64) * clip
    torch.testing.assert_close(loss.policy(inside), closed_form(inside), rtol=1e-9, atol=0)
    for far in (2.0, -3.0):
        beyond = torch.full((4,), far * clip, dtype=torch.float64)
        torch.testing.assert_close(loss.policy(beyond), closed_form(beyond / abs(far)), rtol=1e-9, atol=0)
        assert ((loss.policy(beyond) - closed_form(beyond)).abs() > 1e-5).all()


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_other_advantages(mode: str) -> None:
    a = torch.tensor([-7.0, -0.2, 0.0, 3.0], dtype=torch.float64)
    used = {
        "all": a,
        "positive_only": [0.0, 0.0, 0.0, 3.0],
        "negative_only": [-5.0, -0.2, 0.0, 0.0],
        "one_only": [0.0, 0.0, 0.0, 1.0],
        "binary": [-1.0, -1.0, 0.0, 1.0],
    }[mode]
    batch = images(a.tolist())
    model, method = small(), nft(mode=mode, **ONE)
    memory = shadow(model, method)
    model.move(0.1)
    memory.after_step()
    expected = replace(batch, advantages=torch.as_tensor(used, dtype=torch.float64))
    torch.testing.assert_close(total(method, model, batch, memory), total(nft(**ONE), model, expected, memory))
    assert method.affine(1) == (mode == "all")


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_where_the_unweighted_loss_leads(beta: float) -> None:
    """v = v_old + E[(2r - 1)(v* - v_old) | x_t] / beta.

    For x0 ~ N(m, q^2), v_old the best velocity and 2r - 1 = a (x0 - m), the shift is a Cov(x0, v* | x_t) / beta =
    -a Var(x0 | x_t) / (beta t), whatever x_t is. The fit is a linear model of x_t: the loss is quadratic in its two
    coefficients, so that one step of Newton's method solves it.
    """
    n, t, m, q, a, clip = 100_000, 0.6, 0.5, 0.8, 0.25, 5.0
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, n, 1, generator=generator, dtype=torch.float64)
    x0 = m + q * x0
    x, target = (1 - t) * x0 + t * eps, eps - x0
    variance = (1 - t) ** 2 * q**2 + t**2
    gain = (1 - t) * q**2 / variance
    posterior = q**2 * t**2 / variance
    best = m + gain * (x - (1 - t) * m)
    old = (x - best) / t
    advantages = clip * a * (x0 - m).flatten()
    features = torch.cat([torch.ones_like(x), x], 1)

    def loss(coefficients: Tensor) -> Tensor:
        v = (features @ coefficients)[:, None]
        sides = implicit(x - t * v, x - t * old, beta)
        return nft_loss(*(squared(side, x0) for side in sides), beta, "all", clip, advantages).mean()

    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    slope, curvature = torch.autograd.grad(loss(zero), zero)[0], torch.autograd.functional.hessian(loss, zero)
    found = features @ -torch.linalg.solve(curvature, slope)
    moved = (2 * 0.5 * a * (x0 - m) * (target - old))[:, 0]
    on_samples = features @ torch.linalg.lstsq(features, moved[:, None]).solution
    torch.testing.assert_close(found, (old + on_samples / beta)[:, 0], rtol=1e-9, atol=1e-9)
    shift = -a * posterior / (beta * t)
    torch.testing.assert_close(found, (old + shift)[:, 0], rtol=0, atol=0.05 * abs(shift))


def test_without_a_preference_the_old_policy_attracts() -> None:
    """r = 1/2 is no loss at the old policy; elsewhere it pulls back, except along v* - v_old as far as that reaches."""
    batch = images([0.0] * 4)
    model, method = Toy(free, {"v": images([0.0] * 4, seed=7).x0}), nft(**ONE)
    memory = shadow(model, method)
    assert gradient(method, model, batch, memory, model.parameters).abs().max() == 0
    memory.after_step()
    old = model.initial["v"]
    _, target = unfolded(only(method, model, batch))
    model.move(0.5)
    pull = -gradient(method, model, batch, memory, model.parameters).view_as(old)
    home = old - model.parameters["v"].detach()
    assert torch.nn.functional.cosine_similarity(pull.flatten(1), home.flatten(1)).min() > 0.8
    model.put({"v": old + 0.9 * (target - old)})
    assert gradient(method, model, batch, memory, model.parameters).abs().max() < 1e-12
    model.put({"v": old + 1.1 * (target - old)})
    pull = -gradient(method, model, batch, memory, model.parameters).view_as(old)
    assert ((pull * (old - target)).flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_against_finite_differences(mode: str) -> None:
    """The whole method, written once more in velocities, the weights w of the base point held."""
    batch, model = images([1.2, -0.7, 0.0, 6.0]), small()
    method = nft(beta=0.4, mode=mode, kl=0.3)
    memory = shadow(model, method)
    model.move(0.1, seed=1)
    perturb(memory.old, 0.1, seed=2)  # type: ignore[arg-type]
    memory.after_step()
    levels = list(method.noised(model, batch))
    assert len(levels) == 5 and batch.advantages is not None

    def velocity(parameters: Any, at: Noised) -> Tensor:
        return model.velocity(parameters, at.x, at.s)

    def sides(at: Noised) -> tuple[Tensor, Tensor]:
        v, old, beta = velocity(model.parameters, at), velocity(memory.old, at), method.beta
        return beta * v + (1 - beta) * old, (1 + beta) * old - beta * v

    divisors = [[mean_abs(unfolded(at)[0] * (side - unfolded(at)[1])).detach() for side in sides(at)] for at in levels]
    a = batch.advantages.clamp(-5, 5)
    kinds = {"positive_only": a.clamp(min=0), "negative_only": a.clamp(max=0), "binary": a.sign()}
    r = {**kinds, "all": a, "one_only": (a > 0).double()}[mode] / 10 + 0.5

    def value() -> Tensor:
        summed = torch.zeros((), dtype=torch.float64)
        for at, held in zip(levels, divisors, strict=True):
            t, target = unfolded(at)
            plus, minus = (
                (t * (side - target)).square().flatten(1).mean(1) / w for side, w in zip(sides(at), held, strict=True)
            )
            kl = squared(velocity(model.parameters, at), velocity(model.initial, at))
            summed = summed + (5 * (r * plus + (1 - r) * minus) / method.beta + method.kl * kl).sum()
        return summed / len(levels)

    torch.testing.assert_close(total(method, model, batch, memory).sum(), value(), rtol=1e-9, atol=0)
    found = torch.autograd.grad(total(method, model, batch, memory).sum(), list(model.parameters.values()))
    chosen = torch.cat([g.flatten()[:3] for g in found])
    torch.testing.assert_close(chosen, differences(value, model.parameters), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


def loaded(folder: Path, adapter: str, dtype: str = "fp32") -> Any:
    pipeline = pipelines.load(folder, dtype=dtype, device="cpu", max_sequence_length=4)
    torch.manual_seed(0)
    if adapter == "lora":
        adapters.add_lora(pipeline, 4, 8)
        perturb(trained(pipeline), seed=5)  # a fresh LoRA changes nothing
    else:
        adapters.add_full(pipeline)
    return pipeline


@pytest.mark.parametrize(("adapter", "dtype"), [("lora", "fp32"), ("full", "fp32"), ("full", "bf16")])
def test_the_old_policy_is_the_model_with_the_old_weights(folder: Path, adapter: str, dtype: str) -> None:
    now, before = loaded(folder, adapter, dtype), loaded(folder, adapter, dtype)
    batch, method = roll(before, [1.0, -1.0, 0.5, -0.5]), nft(**ONE)
    memory = method.start(now, trained(now))
    assert isinstance(memory, Shadow)
    perturb(trained(now))
    memory.after_step()
    live = {name: p.detach().clone() for name, p in trained(now).items()}
    with torch.no_grad():
        (loss,) = method.losses(Model(now), batch, memory)
        at = only(method, now, batch)
        predictions = [p.denoiser(batch.cond).predict(at.x, at.s)[0] for p in (now, before)]
        assert torch.equal(loss.metrics["old_gap"], squared(*predictions)) and (loss.metrics["old_gap"] > 1e-6).all()
        with memory.acting():
            again = roll(now, [0.0] * 4)
            assert torch.equal(again.x0, batch.x0)  # images come from the old weights
            for name, p in trained(before).items():
                assert torch.equal(trained(now)[name], p)
    for name, p in trained(now).items():
        assert torch.equal(p, live[name])
    assert not torch.equal(roll(now, [0.0] * 4).x0, batch.x0)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_trained_weights(folder: Path, adapter: str, checkpointing: bool) -> None:
    """The old weights are in the network after the forward pass and before the backward one; nothing of them is left."""
    now, before = loaded(folder, adapter), loaded(folder, adapter)
    batch, method = roll(before, [1.0, -1.0, 0.5, -0.5]), nft(**ONE)
    memory = method.start(now, trained(now))
    perturb(trained(now))
    memory.after_step()
    at = only(method, now, batch)
    with torch.no_grad():
        old, _ = before.denoiser(batch.cond).predict(at.x, at.s)
    x0, _ = now.denoiser(batch.cond).predict(at.x, at.s)
    sides = [squared(side, at.x0) / mean_abs(side.detach() - at.x0) for side in implicit(x0, old, method.beta)]
    assert batch.advantages is not None
    loss = nft_loss(*sides, method.beta, "all", method.clip, batch.advantages)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(trained(now).values()))])
    if checkpointing:
        now.network.enable_gradient_checkpointing()
    found = gradient(method, Model(now), batch, memory, trained(now))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_trained_weights_come_back_after_a_failure(folder: Path, adapter: str) -> None:
    pipeline = loaded(folder, adapter)
    memory = Shadow(trained(pipeline), Decay(), "epoch", acts=True)
    perturb(trained(pipeline))
    live = {name: p.detach().clone() for name, p in trained(pipeline).items()}
    old = {name: p.clone() for name, p in memory.old.items()}
    with pytest.raises(KeyError), memory.acting():
        raise KeyError
    for name, p in trained(pipeline).items():
        assert torch.equal(p, live[name]) and torch.equal(memory.old[name], old[name])


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_a_forward_pass_less_while_the_policies_are_equal(folder: Path, beta: float) -> None:
    """The same bits as with the old policy's own; and images without advantage have no gradient, so are left out."""
    pipeline = loaded(folder, "lora")
    batch, method, parameters = roll(pipeline, [1.0, -1.0, 0.0, 0.0]), nft(kl=0, beta=beta), trained(pipeline)
    memory = method.start(pipeline, parameters)
    assert isinstance(memory, Shadow) and memory.equal
    short = [fn(method, Model(pipeline), batch, memory) for fn in (total, lambda *a: gradient(*a, parameters))]
    memory.equal = False
    whole = [fn(method, Model(pipeline), batch, memory) for fn in (total, lambda *a: gradient(*a, parameters))]
    assert all(map(torch.equal, short, whole)) and short[1].abs().max() > 1e-4

    memory.equal = True
    assert method.trains_on(batch, memory, 0).tolist() == [True, True, False, False]
    idle = gradient(method, Model(pipeline), batch[torch.tensor([2, 3])], memory, parameters)
    assert idle.abs().max() == 0


@pytest.mark.parametrize("reason", ["a later update", "the weights have moved", "the penalty"])
def test_images_without_advantage_are_trained_where_they_have_a_gradient(reason: str) -> None:
    batch, model = images([1.0, -1.0, 0.0, 0.0]), small()
    method = nft(kl=0.1 if reason == "the penalty" else 0)
    memory = shadow(model, method)
    model.move(0.1)
    if reason == "the weights have moved":
        memory.after_step()
    assert method.trains_on(batch, memory, int(reason == "a later update")).all()
    if reason == "a later update":  # which is asked before the first
        memory.after_step()
    idle = batch[torch.tensor([2, 3])]
    assert gradient(method, model, idle, memory, model.parameters).abs().max() > 1e-4


def test_an_advantage_of_any_reward_counts() -> None:
    batch, method = images([0.0] * 4), nft(kl=0)
    nan = float("nan")
    batch.separate = {"a": torch.tensor([1.0, 0.0, nan, 0.0]), "b": torch.tensor([-1.0, 0.0, 0.0, nan])}
    memory = shadow(small(), method)
    assert method.trains_on(batch, memory, 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    "decay", [Decay(rate=0), Decay(rate=0.3, cap=0.5), Decay(rate=0.2, start=2, cap=0.9)], ids=lambda d: str(d.rate)
)
@pytest.mark.parametrize("every", ["epoch", "step"])
def test_the_copy_follows_its_schedule(decay: Decay, every: Any) -> None:
    """Two optimizer steps an epoch."""
    model = small()
    memory = Shadow(model.parameters, decay, every, acts=False)
    expected = {name: p.clone() for name, p in model.initial.items()}
    for step in range(1, 7):
        model.move(0.1, seed=step)
        memory.after_step()
        if step % 2 == 0:
            memory.after_epoch()
        if every == "step" or step % 2 == 0:
            eta = min(decay.rate * max(step - decay.start, 0), decay.cap)
            for name, p in model.parameters.items():
                expected[name] = eta * expected[name] + (1 - eta) * p.detach()
            assert memory.equal == (eta == 0)
        else:
            assert not memory.equal
        for name, old in memory.old.items():
            torch.testing.assert_close(old, expected[name], rtol=1e-12, atol=1e-12)


def test_the_optimizer_does_not_see_the_exchanges() -> None:
    def run(exchanges: bool) -> dict[str, Tensor]:
        model, batch, method = small(), images([1.0, -1.0, 0.5, 0.2]), nft(**ONE)
        memory = shadow(model, method)
        optimizer = torch.optim.AdamW(model.parameters.values(), 0.01)
        for _ in range(4):
            if exchanges:
                with memory.acting():
                    pass
            total(method, model, batch, memory).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            memory.after_step()
            memory.after_epoch()
        return {name: p.detach() for name, p in model.parameters.items()}

    assert all(torch.equal(a, b) for a, b in zip(run(True).values(), run(False).values(), strict=True))


def test_the_copy_is_kept_in_checkpoints() -> None:
    model = small()
    memory = Shadow(model.parameters, Decay(rate=0.3), "epoch", acts=True)
    model.move(0.1)
    memory.after_step()
    memory.after_epoch()
    kept = {name: t.clone() for name, t in memory.state_dict().items()}
    other = small(seed=3)
    other.put(model.parameters)
    restored = Shadow(other.parameters, Decay(rate=0.3), "epoch", acts=True)
    restored.load_state_dict(kept)
    assert restored.steps == 1 and not restored.equal
    assert all(torch.equal(restored.old[name], old) for name, old in memory.old.items())
    for one, own in ((memory, model), (restored, other)):
        own.move(0.1, seed=9)
        one.after_step()
        one.after_epoch()
    assert all(torch.equal(restored.old[name], old) for name, old in memory.old.items())
    same = Shadow(other.parameters, Decay(rate=0), "epoch", acts=True)
    restored.load_state_dict(same.state_dict())
    assert restored.equal and restored.steps == 0
