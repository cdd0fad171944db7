"""Several rewards that share one gradient: what is back-propagated, combined, mixed, logged and refused."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign import loading, trainer
from diffalign.balancing import Meter, Work, back_propagate
from diffalign.clock import Clock
from diffalign.interrupt import Interrupt
from diffalign.judging import advantages
from diffalign.multireward.marble import Marble, due
from diffalign.multireward.pcgrad import ORDER, PCGrad
from diffalign.overlap import Early
from diffalign.rewards import score
from diffalign.rollout import sample_seed
from diffalign.run import Run, prepare
from diffalign.types import Rollout, UserError
from diffalign.update import TrainedPolicy

SETTINGS = """
model: {model}
output: {output}
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{steps: 4, kernel: dpm2, height: 32, width: 32}}
algorithm: {{name: nft, kl: 0.01, timesteps: {{choice: grid, count: 2}}}}
multireward: {{name: marble, every: 2}}
rewards:
  - {{name: reward_functions.redness}}
  - {{name: reward_functions.topness}}
  - {{name: reward_functions.sometimes}}
adapter: {{name: lora, rank: 4, alpha: 8}}
trainer: {{epochs: 4, prompts: 2, images_per_prompt: 3, micro_batch: 6, lr: 1e-3, ema: 0.9}}
evaluation: {{every: 4, prompts: 2, images_per_prompt: 2, steps: 3}}
checkpoint: {{every: 1, keep: 9}}
"""
NAMES = ["redness", "topness", "sometimes"]  # smooth: a jpeg is so many whole bytes, and rounding flips one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> Any:
    def load(name: str, *overrides: str) -> Any:
        path = tmp_path / f"{name}.yaml"
        path.write_text(SETTINGS.format(model=model, output=tmp_path / name))
        return loading.load(str(path), overrides)

    return load


def judged(run: Run) -> tuple[Rollout, TrainedPolicy]:
    """An epoch's images with their advantages."""
    with Early({}) as early, Interrupt() as interrupt:
        rollout, _, _ = trainer.sample(run, Clock(run.pipeline.device), early, interrupt)
    assert rollout.images is not None
    with torch.no_grad():
        outputs = score(run.scorers, rollout.images, rollout.prompts, rollout.metadata, 2)
    advantages(run, rollout, outputs)
    return rollout, TrainedPolicy(run.pipeline, run.config.sampling, None)


def gradient(run: Run, rollout: Rollout, policy: TrainedPolicy, micro_batch: int, meter: Meter | None = None) -> Tensor:
    """What one step back-propagates, flattened."""
    batches = [rollout[rows] for rows in torch.arange(len(rollout)).split(micro_batch)]
    work = [Work(batch, run.config.algorithm.losses(policy, batch, run.memory)) for batch in batches]
    back_propagate(run.balancer, work, rollout.separate, len(rollout), meter or Meter())
    flat = torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None])
    run.optimizer.zero_grad()
    return flat


def alone(run: Run, rollout: Rollout, policy: TrainedPolicy, name: str | None, first: int, last: int) -> Tensor:
    """Gradient of losses first to last for the advantages of one reward, over the images it applies to and no others;
    None: of the penalty."""
    rows = torch.arange(len(rollout)) if name is None else (~rollout.separate[name].isnan()).nonzero().flatten()
    batch = rollout[rows]
    for number, loss in enumerate(run.config.algorithm.losses(policy, batch, run.memory)):
        if first <= number < last:
            assert loss.penalty is not None
            value = loss.penalty if name is None else loss.policy(batch.separate[name])
            value.mean().backward()
    flat = torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None])
    run.optimizer.zero_grad()
    return flat


@pytest.fixture
def moved(settings: Any) -> Iterator[tuple[Run, Rollout, TrainedPolicy]]:
    """A run whose weights have left both the old policy and the reference."""
    run = prepare(settings("moved"), None)
    rollout, policy = judged(run)
    generator = torch.Generator().manual_seed(0)
    for p in run.parameters.values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    run.memory.after_step()
    yield run, rollout, policy
    run.tracker.close()


def with_method(run: Run, **options: Any) -> Run:
    assert run.balancer is not None
    method = Marble(name="marble", **options)
    return replace(run, balancer=replace(run.balancer, method=method, state=method.start(len(NAMES), 0)))


def test_each_reward_has_its_own_advantages(moved: Any) -> None:
    run, rollout, _ = moved
    assert list(rollout.separate) == NAMES
    applies = ~rollout.separate["sometimes"].isnan()
    assert applies.any() and not applies.all()
    for name in NAMES:
        own, raw = rollout.separate[name], rollout.rewards[name].double()
        valid = ~raw.isnan()
        assert torch.equal(valid, ~own.isnan())
        for prompt in rollout.group[valid].unique():
            rows = valid & (rollout.group == prompt)
            expected = (raw[rows] - raw[rows].mean()) / (raw[valid].std(correction=0) + 1e-4)
            torch.testing.assert_close(own[rows].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_a_full_solve_is_the_shortest_mixture_of_the_gradients(moved: Any, micro_batch: int) -> None:
    run, rollout, policy = moved
    run, meter = with_method(run, every=1, losses=None), Meter()
    actual = gradient(run, rollout, policy, micro_batch, meter)
    own = torch.stack([alone(run, rollout, policy, name, 0, 2) for name in NAMES]).double()
    unit = own / own.norm(dim=1, keepdim=True)
    direction = (actual.double() - alone(run, rollout, policy, None, 0, 2).double()) / own.norm(dim=1).mean()
    inner = unit @ direction
    assert inner.min() > 0, "no reward is traded for another"
    torch.testing.assert_close(inner.min(), direction @ direction, rtol=1e-3, atol=0)  # the optimum's own condition
    cosines = [meter.step[f"cosine/{name}"] for name in NAMES]
    torch.testing.assert_close(torch.tensor(cosines).double(), inner / direction.norm(), rtol=1e-4, atol=1e-4)
    assert meter.step["worst_cosine"] == min(cosines)
    alphas = torch.tensor([meter.step[f"alpha/{name}"] for name in NAMES], dtype=torch.float64)
    assert float(alphas.sum()) == pytest.approx(1)
    torch.testing.assert_close(alphas @ unit, direction, rtol=0, atol=1e-3 * float(direction.norm()))


def test_between_solves_one_backward_is_the_mixture_of_all(moved: Any) -> None:
    """Exactly, as far as every reward applies: the loss is affine in the advantages."""
    run, rollout, policy = moved
    rollout.separate = {name: a.nan_to_num(0.0) for name, a in rollout.separate.items()}
    run = with_method(run)
    run.balancer.state.update(alphas=torch.tensor([0.2, 0.5, 0.3]).double(), solved=torch.tensor(3))
    run.balancer.state["step"] = torch.tensor(5)
    meter = Meter()
    actual = gradient(run, rollout, policy, 4, meter)
    own = torch.stack([alone(run, rollout, policy, name, 0, 2) for name in NAMES])
    expected = torch.tensor([0.2, 0.5, 0.3]) @ own + alone(run, rollout, policy, None, 0, 2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert "worst_cosine" not in meter.step, "nothing was solved"


def test_a_solve_on_the_first_noise_level_mixes_the_second(moved: Any) -> None:
    run, rollout, policy = moved
    run = with_method(run, warmup=0, losses=1)
    actual = gradient(run, rollout, policy, 4)
    alphas = run.balancer.state["alphas"]
    assert int(run.balancer.state["solved"]) == 0 and int(run.balancer.state["step"]) == 1
    first = torch.stack([alone(run, rollout, policy, name, 0, 1) for name in NAMES]).double()
    norms = first.norm(dim=1)
    solved = (alphas / norms) @ first * norms.mean()
    rollout.advantages = (
        alphas.float()[:, None] * torch.stack([rollout.separate[n].nan_to_num(0.0) for n in NAMES])
    ).sum(0)
    *_, last = run.config.algorithm.losses(policy, rollout, run.memory)
    last.policy(rollout.advantages).mean().backward()
    rest = torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None])
    run.optimizer.zero_grad()
    expected = solved.float() + rest + alone(run, rollout, policy, None, 0, 2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class Saved:
    """Bytes that autograd holds for a backward pass, at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        held, size = [tensor], tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        handle = Handle(held)
        weakref.finalize(handle, self.free, size)
        return handle

    def free(self, size: int) -> None:
        self.now -= size


class Handle:
    def __init__(self, held: list[Tensor]) -> None:
        self.held = held


@pytest.mark.parametrize("losses", [1, None])
def test_the_micro_batch_bounds_the_memory_of_a_solve(moved: Any, losses: int | None) -> None:
    """Also while the losses that a solve leaves wait for the other micro-batches."""
    run, rollout, policy = moved
    most = {}
    for micro_batch in (6, 1):
        saved = Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda handle: handle.held[0]):
            gradient(with_method(run, warmup=0, losses=losses), rollout, policy, micro_batch)
        most[micro_batch] = saved.most
    assert most[1] < most[6] / 3, most


def test_a_solve_with_a_gradient_that_is_not_finite_stops_the_run(settings: Any) -> None:
    exploding = [
        "algorithm={name: reward_functions.Exploding}",
        "sampling={steps: 4, kernel: cps, height: 32, width: 32}",
    ]
    with pytest.raises(UserError, match="gradients of epoch 1 are not finite"):
        trainer.train(settings("wild", *exploding, "multireward={name: marble, every: 1, losses: null}"))


def test_rescaled_mixtures_point_where_the_solve_did(moved: Any) -> None:
    run, rollout, policy = moved
    run.memory.after_epoch()  # at the old policy only advantages make a gradient
    rollout.separate["topness"] /= 30  # gradients of very different length, nothing clipped
    bare = run.config.algorithm.model_copy(update={"kl": 0.0})
    run = replace(run, config=run.config.model_copy(update={"algorithm": bare}))
    cosines = {}
    for rescale in (False, True):
        run = with_method(run, warmup=0, losses=None, rescale=rescale)
        solved = gradient(run, rollout, policy, 6)
        cosines[rescale] = float(torch.cosine_similarity(gradient(run, rollout, policy, 6), solved, 0))
    assert 1 - cosines[True] < 1e-5 < 1e-4 < 1 - cosines[False], cosines


def test_schedule() -> None:
    method = Marble(name="marble", every=10, warmup=1, losses=1)
    state = method.start(2, 0)
    importance, applies, leads = torch.ones(2).double(), torch.ones(2).double(), []
    for _ in range(25):
        leads.append(method.lead(state))
        if leads[-1] != 0:
            method.coefficients(torch.eye(2).double(), importance, state)
        method.mixture(importance, applies, state)
    assert [i for i, lead in enumerate(leads) if lead != 0] == [0, 10, 20]
    assert leads[0] is None and leads[10] == 1
    assert due(7, 7, 1, 0) is False and due(8, 7, 1, 0) is True


def test_dropout_leaves_a_reward_out_of_a_solve_but_never_all() -> None:
    method = Marble(name="marble", dropout=0.5)
    every = torch.ones(3, dtype=torch.bool)
    kept = torch.stack([method.kept(every, 0, step) for step in range(400)])
    assert bool(kept.any(1).all()) and torch.equal(kept[7], method.kept(every, 0, 7))
    assert not torch.equal(kept, torch.stack([method.kept(every, 1, step) for step in range(400)])), "seeds differ"
    with_gradient = torch.tensor([False, True, False])
    assert all(bool(method.kept(with_gradient, 0, step)[1]) for step in range(50))
    assert 0.5 < float(kept.double().mean()) < 0.6  # 1/2, and what keeping one at least adds: 1/24
    state = method.start(3, 0)
    step = next(i for i in range(400) if kept[i].tolist() == [True, False, True])
    state["step"] = torch.tensor(step)
    coefficients = method.coefficients(torch.eye(3).double(), torch.ones(3).double(), state)
    torch.testing.assert_close(coefficients, torch.tensor([0.5, 0.0, 0.5]).double())


def test_weights_ask_for_cosines() -> None:
    """With orthogonal gradients, a reward of twice the weight gets twice the cosine."""
    method = Marble(name="marble")
    c = method.coefficients(torch.eye(2).double(), torch.tensor([2.0, 1.0]).double(), method.start(2, 0))
    assert float(c[0] / c[1]) == pytest.approx(2, rel=1e-5)


def test_fixed_alphas_are_the_weights() -> None:
    method = Marble(name="marble", alphas="fixed")
    state = method.start(3, 0)
    assert method.lead(state) == 0
    mixture = method.mixture(torch.tensor([1.0, 2.0, 1.0]).double(), torch.ones(3).double(), state)
    assert mixture.tolist() == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("rewards", [2, 3, 5])
def test_pcgrad_is_the_projection_of_vectors(rewards: int) -> None:
    generator = torch.Generator().manual_seed(rewards)
    gradients = torch.randn(rewards, 4, generator=generator, dtype=torch.float64)
    method = PCGrad(name="pcgrad")
    state = method.start(rewards, 0)
    actual = method.coefficients(gradients @ gradients.T, torch.ones(rewards).double(), state) @ gradients
    order = torch.Generator().manual_seed(sample_seed(0, 0, rewards, ORDER))
    total = torch.zeros(4, dtype=torch.float64)
    for i in range(rewards):
        own = gradients[i].clone()
        for j in torch.randperm(rewards, generator=order).tolist():
            if j != i and own @ gradients[j] < 0:
                own -= (own @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        total += own / rewards
    torch.testing.assert_close(actual, total)
    if rewards == 2:
        assert (gradients @ actual).min() >= -1e-12


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "train"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / "0004" / "weights.safetensors")


def test_a_run_resumes_exactly_whatever_the_micro_batch(settings: Any) -> None:
    whole = trainer.train(settings("whole"))
    trainer.train(settings("parts", "trainer.epochs=3"))
    parts = trainer.train(settings("parts", "trainer.epochs=4"), resume="auto")
    small = trainer.train(settings("small", "trainer.micro_batch=2"))
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[name])
        torch.testing.assert_close(weight, weights(small)[name], rtol=0, atol=2e-5)
    lines = metrics(whole)
    assert ["worst_cosine" in line for line in lines] == [True, False, True, False]
    assert all(sum(line[f"alpha/{name}"] for name in NAMES) == pytest.approx(1, abs=1e-4) for line in lines)
    assert lines[1]["alpha/topness"] == lines[0]["alpha/topness"] != lines[2]["alpha/topness"]


@pytest.mark.parametrize(
    "method",
    ["{name: pcgrad}", "{name: marble, alphas: fixed}", "{name: marble, groups: {style: [redness, topness]}}"],
)
def test_other_ways_run(settings: Any, method: str) -> None:
    folder = trainer.train(settings("other", f"multireward={method}", "trainer.epochs=2"))
    last = metrics(folder)[-1]
    assert ("alpha/style" in last) == ("groups" in method)
    assert all(torch.isfinite(torch.tensor(v)) for v in last.values() if isinstance(v, float))


def test_grpo_can_split_all_its_losses(settings: Any) -> None:
    grpo = ["algorithm={name: grpo}", "sampling={steps: 4, kernel: cps, eta: 0.7, height: 32, width: 32}"]
    two = [*grpo, "trainer.updates_per_rollout=2"]
    with pytest.raises(UserError, match="must be affine"):
        settings("grpo", *two)
    folder = trainer.train(
        settings("grpo", *two, "multireward={name: marble, every: 1, losses: null}", "trainer.epochs=2")
    )
    assert all("worst_cosine" in line for line in metrics(folder))
    settings("once", *grpo)  # with one update the ratio is 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards=[jpeg]", "needs two or more rewards"),
        ("rewards=[{name: jpeg, weight: 0}, geneval]", "must be above 0"),
        ("multireward={name: marble, groups: {a: [nothing]}}", "there is no reward 'nothing'"),
        ("multireward={name: marble, groups: {a: [topness], b: [topness]}}", "in a group twice"),
        ("multireward={name: marble, groups: {topness: [redness]}}", "name of a reward outside it"),
        ("multireward={name: marble, groups: {a: []}}", "a group is empty"),
        ("multireward={name: marble, alphas: fixed, every: 3}", "every has no effect"),
        ("multireward={name: marble, every: 1, losses: null, momentum: 0.5}", "momentum has no effect"),
        ("multireward={name: marble, losses: 3}", "3 asked for, but each image has 2 losses"),
        ("advantage={name: group, combine: min}", "combine: has no effect"),
        ("multireward={name: marble, rescale: true, normalize: false}", "rescale has no effect"),
        ("multireward={name: marbel}", "did you mean 'marble'"),
        ("algorithm={name: nft, mode: binary}", "must be affine"),
    ],
)
def test_mistakes_are_one_sentence(settings: Any, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings("wrong", override)
