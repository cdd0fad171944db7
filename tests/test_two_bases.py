"""Distillation runs on a frozen LoRA, and with a teacher that is another model than the generator's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from diffalign import adapters, loading, pipelines, trainer
from diffalign.algorithms import Study
from diffalign.algorithms._fakes import Exchanged
from diffalign.algorithms.acdmd import ACDMD
from diffalign.pipelines.sd3 import SD3
from diffalign.rollout import collect
from diffalign.sections import Sampling
from diffalign.types import Rollout, UserError
from diffalign.update import TrainedPolicy

SETTINGS = """
model: {{path: {model}, device: cpu, max_sequence_length: 0}}
output: {output}
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{timesteps: [1000, 750, 500, 250], kernel: cps, eta: 0.9, height: 32, width: 32}}
algorithm: {{name: acdmd, ratio: 1, guidance: 2.0, fake: {{lr: 1e-2}}}}
adapter: {{name: lora, rank: 2, alpha: 4}}
trainer: {{epochs: 2, prompts: 3, images_per_prompt: 1, micro_batch: 3, lr: 1e-2, ema: 0.9}}
checkpoint: {{every: 1}}
"""
SAMPLING = Sampling.model_validate({"timesteps": [1000, 750, 500, 250], "eta": 0.9, "height": 32, "width": 32})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape with other weights."""
    root = tmp_path_factory.mktemp("models")
    first = tiny_models.sd3_folder(root / "distilled")
    other = load(first)
    adapters.add_full(other)
    return first, adapters.export_full(moved(other, 0.05), root / "base")


@pytest.fixture
def run(tmp_path: Path, models: tuple[Path, Path]) -> Any:
    def start(name: str, *overrides: str, resume: str | None = None) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(SETTINGS.format(model=models[0], output=tmp_path / name))
        return trainer.train(loading.load(str(path), overrides), resume)

    return start


def load(folder: Path, dtype: str = "fp32") -> SD3:
    return pipelines.load(folder, dtype=dtype, device="cpu", max_sequence_length=0)


def moved(pipe: SD3, by: float) -> SD3:
    generator = torch.Generator().manual_seed(1)
    for p in adapters.trainable_parameters(pipe):
        p.data += by * torch.randn(p.shape, generator=generator)
    return pipe


@torch.no_grad()
def predict(pipe: SD3) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe.denoiser(pipe.encode(["a red circle", "a star"]), 2.0).predict(x, 0.7)[0]


def rolled(pipe: SD3, method: ACDMD, epoch: int) -> Rollout:
    prompts = [{"prompt": p} for p in ("a red circle", "a star")]
    kept, until = method.kept(4, 0, epoch), method.until(4, 0, epoch)
    rollout = collect(
        pipe, prompts, torch.arange(2), torch.arange(2), SAMPLING, kept, 2, None, range(4), until=until, decode=False
    )
    rollout.advantages = torch.zeros(2)
    return rollout


def trained(folder: Path, part: str, epoch: int = 2) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{epoch:04d}" / f"{part}.safetensors")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("matching", ["ambient", "clean"])
def test_a_fake_score_on_the_teachers_network(models: tuple[Path, Path], dtype: str, matching: str) -> None:
    distilled, base = models
    pipe, teacher = load(distilled, dtype), predict(load(base, dtype))
    assert not torch.equal(predict(pipe), teacher)
    adapters.add_lora(pipe, rank=2, alpha=4, targets=["attn.to_q", "attn.to_v"])
    pipe.network.enable_gradient_checkpointing()
    moved(pipe, 0.1)
    own = {name: p for name, p in pipe.network.named_parameters() if p.requires_grad}
    before, generator = {name: p.detach().clone() for name, p in own.items()}, predict(pipe)
    method = ACDMD(name="acdmd", matching=matching, teacher=str(base), fake={"lr": 1e-2, "base": "teacher"})
    memory = method.start(pipe, own)
    policy = TrainedPolicy(pipe, SAMPLING, None, {})
    assert isinstance(pipe.frozen, torch.nn.Module) and pipe.frozen.is_gradient_checkpointing
    assert memory.fake.keys() == own.keys() and {p.dtype for p in memory.fake.values()} == {torch.float32}

    def of_fake() -> torch.Tensor:
        with memory.faked():
            return predict(pipe)

    def of_teacher() -> torch.Tensor:
        with policy.reference():
            return predict(pipe)

    assert torch.equal(of_teacher(), teacher) and torch.equal(of_fake(), teacher)  # the LoRA begins at zero
    for epoch in (0, 2):
        rollout = rolled(pipe, method, epoch)
        generates, values = memory.learn(Study(0, epoch, policy, rollout, 2, 1, lambda t: t))
        assert values["fake_grad_norm"] > 0
    assert not torch.equal(of_fake(), teacher) and torch.equal(of_teacher(), teacher)
    assert torch.equal(predict(pipe), generator)
    assert all(torch.equal(p, before[name]) and p.grad is None and p.requires_grad for name, p in own.items())
    learnt, weights = of_fake(), {name: p.detach().clone() for name, p in memory.fake.items()}

    [loss] = method.losses(policy, rolled(pipe, method, 1), memory)
    loss.per_sample.mean().backward()
    assert all(p.grad is None for p in memory.fake.values()) and any(p.grad.any() for p in own.values())
    assert torch.equal(of_fake(), learnt) and all(torch.equal(p, weights[n]) for n, p in memory.fake.items())
    assert torch.equal(of_teacher(), teacher)

    state = {name: t.clone() for name, t in memory.state_dict().items()}
    fresh = load(distilled, dtype)
    adapters.add_lora(fresh, rank=2, alpha=4, targets=["attn.to_q", "attn.to_v"])
    again = method.start(fresh, dict(fresh.network.named_parameters()))
    again.load_state_dict(state)
    with again.faked():
        assert torch.equal(predict(fresh), learnt)


def test_a_fake_score_of_all_weights_begins_as_the_teacher(models: tuple[Path, Path]) -> None:
    distilled, base = models
    pipe, teacher = load(distilled), predict(load(base))
    adapters.add_full(pipe)
    method = ACDMD(name="acdmd", teacher=str(base), fake={"base": "teacher"})
    memory = method.start(pipe, dict(pipe.network.named_parameters()))
    with memory.faked():
        assert torch.equal(predict(pipe), teacher)
    assert torch.equal(predict(pipe), predict(load(distilled)))


def test_a_fake_score_over_a_frozen_lora_begins_as_the_teacher(models: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = load(models[0])
    adapters.add_lora(pipe, rank=2, alpha=4, targets=["attn.to_q"])
    adapters.export_lora(moved(pipe, 0.1), tmp_path)
    pipe, teacher = load(models[0]), predict(load(models[0]))
    adapters.load_lora(pipe, tmp_path, "start")
    adapters.add_lora(pipe, rank=2, alpha=4, targets=["attn.to_q"])
    own = {name: p for name, p in pipe.network.named_parameters() if p.requires_grad}
    generator = predict(pipe)
    memory = ACDMD(name="acdmd", fake={"base": "teacher"}).start(pipe, own)
    with memory.faked():
        assert torch.equal(predict(pipe), teacher)
    assert torch.equal(predict(pipe), generator) and not torch.equal(generator, teacher)
    assert memory.fake.keys() == own.keys()


def test_a_teacher_with_other_encoders_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = load(models[1])
    for p in other.pipe.text_encoder.parameters():
        p.data.mul_(1.5)
    other.pipe.save_pretrained(tmp_path / "other")
    pipe = load(models[0])
    adapters.add_full(pipe)
    with pytest.raises(UserError, match="has other text encoders than the generator"):
        ACDMD(name="acdmd", teacher=str(tmp_path / "other")).start(pipe, dict(pipe.network.named_parameters()))


def test_exchanged_values_take_their_gradients_along() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    fake = Exchanged({"w": p}, {})
    (3 * p).sum().backward()
    with fake.applied():
        assert p.grad is None
        (5 * p).sum().backward()
        p.data.mul_(2)
    assert torch.equal(p.grad, torch.full((2,), 3.0)) and torch.equal(p.detach(), torch.ones(2))
    [q] = fake.parameters.values()
    assert torch.equal(q.grad, torch.full((2,), 5.0)) and torch.equal(q.detach(), torch.full((2,), 2.0))


def test_a_run_with_a_second_base_and_its_resumption(run: Any, models: tuple[Path, Path]) -> None:
    two = [f"algorithm.teacher={models[1]}", "algorithm.fake.base=teacher"]
    whole = run("whole", *two)
    run("parts", *two, "trainer.epochs=1")
    parts = run("parts", *two, resume="auto")
    for part in ("weights", "memory", "ema"):
        ours, theirs = trained(parts, part), trained(whole, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), part
    first = trained(whole, "weights", 1), trained(whole, "weights")
    assert any(not torch.equal(first[0][k], first[1][k]) for k in first[0])  # epoch 2 is the generator's
    for part in ("fake/", "adam/"):
        assert any(k.startswith(part) for k in trained(whole, "memory"))
    assert not torch.equal(predict(load(models[0])), predict(load(models[1])))


TWO = ["rewards=[jpeg]", "trainer.images_per_prompt=2"]  # what a method with advantages needs


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.ratio=2", "trainer.epochs=3"],
        ["algorithm.ratio=1", "algorithm.matching=clean", "algorithm.fake.consistency={weight: 0}"],
        ["algorithm.ratio=1", "algorithm.fake.consistency={paths: 1, moves: 2}", "algorithm.guidance=1"],
        ["algorithm={name: rtdmd, subset: 2, guidance: 2.0, backpropagated: {weight: 0}}", *TWO],
        ["algorithm={name: rtdmd, subset: null, matching: 0, backpropagated: {weight: 0}}", *TWO],
    ],
)
def test_forward_passes_add_up(run: Any, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    """What `diffalign check` tells of an epoch, times the epochs, is what the network is asked for."""
    asked, load_model = [0], pipelines.load

    def counting(*args: Any) -> Any:
        pipe = load_model(*args)
        pipe.network.register_forward_pre_hook(
            lambda module, inputs, given: asked.__setitem__(0, asked[0] + len(given["hidden_states"])), with_kwargs=True
        )
        return pipe

    monkeypatch.setattr(pipelines, "load", counting)
    folder = run("counted", *overrides)
    c = loading.load(str(folder.with_suffix(".yaml")), overrides)
    images, a, told = c.trainer.prompts * c.trainer.images_per_prompt, c.algorithm, c.algorithm.forwards(4, 1, 1)
    told["of the teacher"] = told.get("of the teacher", 0) * (1 if a.model_dump()["guidance"] == 1 else 2)
    sampled = sum(a.until(4, c.seed, epoch) or 4 for epoch in range(c.trainer.epochs))
    assert asked[0] == pytest.approx(images * (sampled + c.trainer.epochs * sum(told.values())))


def test_settings_of_two_bases_that_do_not_fit(run: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    for name, adapter in (("a", "lora"), ("b", "full")):
        with pytest.raises(UserError, match="fake.base: teacher has no effect where training starts from the teacher"):
            run(name, "algorithm.fake.base=teacher", f"adapter={adapter}")
    for guidance in ("0.5", "[5, 3]"):
        with pytest.raises(UserError, match="algorithm.guidance: must be at least 1, or a range from such a number up"):
            run("g", f"algorithm.guidance={guidance}")
    with pytest.raises(UserError, match="model folder 'nowhere' does not exist"):
        run("c", "algorithm.teacher=nowhere")
    with pytest.raises(UserError, match="reads .*'joint_attention_dim': .*; take a teacher of its family"):
        run("d", "algorithm.teacher=tiny-sd3")


def test_a_run_on_a_frozen_lora(run: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    cold = run("cold")
    start = f"adapter={{name: lora, rank: 3, alpha: 3, start: {cold / 'lora'}}}"
    test = ["evaluation={every: 2, prompts: 2, images_per_prompt: 1, rewards: [jpeg]}"]
    whole = run("whole", start, *test)
    run("parts", start, *test, "trainer.epochs=1")
    parts = run("parts", start, *test, resume="auto")
    weights = trained(whole, "weights")
    assert weights and all(".default." in name for name in weights)  # the new one alone
    assert all(torch.equal(t, trained(parts, "weights")[name]) for name, t in weights.items())

    ranks = {t.shape[0] for name, t in load_file(whole / "lora" / adapters.LORA_FILE).items() if ".lora_A." in name}
    assert ranks == {2 + 3}
    pipe = load(models[0])
    adapters.load_frozen(pipe, cold / "lora")
    begun = predict(pipe)
    adapters.add_lora(pipe, rank=3, alpha=3)
    average = trained(whole, "ema")
    for name, p in pipe.network.named_parameters():
        if p.requires_grad:
            p.data = average[name]
    exported = load(models[0])
    adapters.load_lora(exported, whole / "lora")
    torch.testing.assert_close(predict(exported), predict(pipe), atol=1e-5, rtol=0)
    assert (predict(exported) - begun).abs().max() > 1e-3

    with pytest.raises(UserError, match="was trained with adapter "):
        run("parts", "adapter={name: lora, rank: 3, alpha: 3}", *test, resume="auto")
    other = load(models[0])
    adapters.add_lora(other, rank=2, alpha=4)
    adapters.export_lora(moved(other, 0.1), cold / "lora")  # another one in its place
    with pytest.raises(UserError, match="frozen_weights of .*'.*' does not hold the LoRA that the run began with"):
        run("parts", start, *test, "trainer.epochs=3", resume="auto")
    with pytest.raises(UserError, match="LoRA folder '.*gone' does not exist"):
        run("missing", f"adapter.start={tmp_path / 'gone'}")
