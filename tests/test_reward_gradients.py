"""ReFL, DRaFT and SRPO: their gradients in closed form and by finite differences, and training end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_models
import torch
from diffusers import SD3Transformer2DModel
from forward_process import PROMPTS, SHAPE, Toy, differences, free, gradient, images, small, total
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffalign import estimate, loading, pipelines, sizes, summary, trainer
from diffalign.algorithms import Algorithm, Memory, _pairs
from diffalign.algorithms._reward_gradient import ALIGNED
from diffalign.algorithms._scores import Draws
from diffalign.algorithms.draft import DRaFT
from diffalign.algorithms.refl import Pictures, ReFL
from diffalign.algorithms.srpo import SRPO
from diffalign.rewards import Reward
from diffalign.rollout import collect
from diffalign.samplers import denoise, drain
from diffalign.schedules import noised, per_sample
from diffalign.sections import ModelRef, Sampling
from diffalign.types import Conditioning, Rollout, UserError


class Redness(Reward):
    """Red less blue."""

    differentiable: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return (images[:, 0] - images[:, 2]).mean((1, 2))


class Worded(Reward):
    """Red less blue for prompts that begin with "red", the other way round for others."""

    differentiable: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        sign = torch.tensor([1.0 if p.startswith("red") else -1.0 for p in prompts])
        return sign * (images[:, 0] - images[:, 2]).mean((1, 2))


Score = Callable[[Tensor, Sequence[str]], Tensor]
A = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def linear(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """a . x, twice as much for longer prompts."""
    return torch.tensor([len(p) for p in prompts]) * (images * A).flatten(1).sum(1)


def curved(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return linear(images.tanh(), prompts) - images.square().flatten(1).mean(1)


def partly(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Applies to every other image."""
    apply = torch.arange(len(images)) % 2 == 0
    return linear(images, prompts).where(apply, torch.nan)


class Seen(Toy):
    """A toy policy whose images are its latents and whose reward is a function of them."""

    judge: Score = staticmethod(linear)

    def predict(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return super().predict(x, per_sample(s, x))

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def guided(self, cond: Conditioning, guidance: float) -> Seen:
        stronger = Seen(lambda p, x, s: guidance * self.velocity(p, x, s), {})
        stronger.parameters = self.parameters
        return stronger

    def score(self, reward: str, images: Tensor, batch: Rollout, prompts: Sequence[str] | None = None) -> Tensor:
        return self.judge(images, batch.prompts if prompts is None else prompts)


def seen(judge: Score, velocity: Any = None, parameters: Any = None) -> Seen:
    toy = small()
    made = Seen(velocity or toy.velocity, parameters or toy.parameters)
    made.judge = judge  # type: ignore[method-assign]
    return made


def batch_at(i: int, steps: int = 6) -> Rollout:
    """Four random images of a trajectory whose state before step i is kept."""
    batch = images([0.0] * 4, steps)
    states = torch.randn(4, 1, 2, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return replace(batch, kept=torch.tensor([i]), states=states)


def refl(**options: Any) -> ReFL:
    return ReFL.model_validate({"name": "refl", "rewards": {"r": 1.0}, **options})


def draft(**options: Any) -> DRaFT:
    return DRaFT.model_validate({"name": "draft", "rewards": {"r": 1.0}, **options})


def srpo(**options: Any) -> SRPO:
    words = {"positive": "red ", "negative": "a very blue ", "range": (0.1, 0.9)}
    return SRPO.model_validate({"name": "srpo", "rewards": {"r": 1.0}, **words, **options})


def test_refl_of_a_linear_reward_is_minus_s_a() -> None:
    """dr/dv = -s a, times the weight, and none for images whose reward is above the margin or does not apply."""
    batch = batch_at(4)
    model = seen(linear, free, {"v": torch.randn(4, *SHAPE)})
    s = batch.sigmas[4]
    found = gradient(refl(rewards={"r": 0.5}), model, batch, Memory(), model.parameters).view(4, *SHAPE)
    torch.testing.assert_close(found, (0.5 * s * A).expand(4, *SHAPE))

    r = linear(model.predict(batch.states[:, 0, 0], s)[0], batch.prompts).detach()  # type: ignore[index]
    margin = float(r.sort().values[1:3].mean())
    method = refl(margin=margin)
    (loss,) = method.losses(model, batch, Memory())
    torch.testing.assert_close(loss.per_sample, (margin - r).clamp(min=0))
    assert torch.equal(loss.metrics["below/r"], (r < margin).float())
    hinged = gradient(method, model, batch, Memory(), model.parameters).view(4, *SHAPE)
    torch.testing.assert_close(hinged, (s * A) * (r < margin).view(-1, 1, 1, 1))
    saturated = refl(margin=float(r.min()) - 1)
    assert not gradient(saturated, model, batch, Memory(), model.parameters).any()
    assert "raise the margin" in saturated.warnings({"below/r": 0.0})["below/r"]

    model.judge = partly  # type: ignore[method-assign]
    half = gradient(refl(), model, batch, Memory(), model.parameters).view(4, *SHAPE)
    torch.testing.assert_close(half[::2], (s * A).expand(2, *SHAPE))
    assert not half[1::2].any()


METHODS = {
    "refl": refl(),
    "refl with a margin": refl(margin=2.0, rewards={"r": 0.3}),
    "draft": draft(),
    "draft of three steps": draft(steps=3),
    "draft with a margin": draft(steps=2, margin=1.0),
    "draft again": draft(steps=6, checkpoint=True),
    "draft of noised copies": draft(steps=2, renoised=2),
    "srpo": srpo(),
    "srpo with guidance": srpo(guidance=1.5, span=2, margin=0.7),
    "srpo inversion": srpo(branches="inversion"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_gradient_against_finite_differences(method: Algorithm) -> None:
    batch, model = batch_at(6 - method.steps if isinstance(method, DRaFT) else 4), seen(curved)
    slopes = torch.autograd.grad(total(method, model, batch, Memory()).sum(), list(model.parameters.values()))  # type: ignore[arg-type]
    chosen = torch.cat([slope.flatten()[:3] for slope in slopes])
    found = differences(lambda: total(method, model, batch, Memory()).sum(), model.parameters)  # type: ignore[arg-type]
    assert chosen.abs().max() > 1e-4
    torch.testing.assert_close(chosen, found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_draft_through_all_steps_is_full_backpropagation(checkpoint: bool) -> None:
    batch, model = batch_at(0), seen(curved)
    assert batch.states is not None
    whole = curved(drain(denoise(model, batch.states[:, 0, 0], batch.sigmas)), batch.prompts)
    slopes = torch.autograd.grad(-whole.sum(), list(model.parameters.values()))
    expected = torch.cat([slope.flatten() for slope in slopes])
    method = draft(steps=6, checkpoint=checkpoint)
    torch.testing.assert_close(gradient(method, model, batch, Memory(), model.parameters), expected)  # type: ignore[arg-type]
    short = gradient(draft(steps=6), model, batch_at(5), Memory(), model.parameters)  # type: ignore[arg-type]
    assert not torch.allclose(short, expected)


@pytest.mark.parametrize(("kernel", "steps"), [("ode", 3), ("dpm2", 1), ("cps", 4)])
def test_the_steps_taken_again_lead_to_the_same_image(model: Path, kernel: str, steps: int) -> None:
    pipeline = pipelines.load(model, device="cpu", max_sequence_length=4)
    sampling = Sampling(steps=4, kernel=kernel, eta=0, guidance=2, height=32, width=32)  # type: ignore[arg-type]
    method = draft(steps=steps)
    seeds, kept, noisy = torch.arange(4), method.kept(4, 0, 0), method.stochastic(4, 0, 0)
    batch = collect(pipeline, PROMPTS, torch.tensor([0, 0, 1, 1]), seeds, sampling, kept, stochastic=noisy)
    with torch.no_grad():
        (again,) = method.images(pipeline.denoiser(batch.cond, 2.0), batch)
    torch.testing.assert_close(again, batch.x0, rtol=0, atol=1e-5)


def test_noised_copies_are_averaged() -> None:
    """They start from the image, at the level of the last K steps."""
    batch, model = batch_at(4), seen(linear, free, {"v": torch.randn(4, *SHAPE)})
    found = [loss.per_sample for loss in draft(steps=2, renoised=3).losses(model, batch, Memory())]
    assert len(found) == 3 and not torch.equal(found[0], found[1])
    s = batch.sigmas[4]
    slope = gradient(draft(steps=2, renoised=3), model, batch, Memory(), model.parameters)  # type: ignore[arg-type]
    torch.testing.assert_close(slope, (s * A).expand(4, *SHAPE).flatten())
    elsewhere = [loss.per_sample for loss in draft(steps=2, renoised=3).losses(model, replace(batch, turn=1), Memory())]
    assert not torch.equal(found[0], elsewhere[0])


def test_alignprop_draws_how_far_back() -> None:
    method = draft(randomised=True)
    drawn = [method.trained(4, 0, epoch) for epoch in range(300)]
    assert set(drawn) == {1, 2, 3, 4} and drawn == [method.trained(4, 0, epoch) for epoch in range(300)]
    assert 0.3 < drawn.count(1) / 300 < 0.5  # 0 counts as 1
    assert [method.kept(4, 0, e) for e in range(300)] == [[4 - k] for k in drawn]
    assert abs(method.forwards(4, 1, 1)["to train"] - sum(drawn) / 300) < 0.2


def test_refl_draws_a_late_step() -> None:
    kept = [refl().kept(40, 0, epoch)[0] for epoch in range(300)]
    assert set(kept) == set(range(30, 40))
    assert refl().until(40, 0, 5) is None and refl(finish=False).until(40, 0, 5) == kept[5] + 1


def test_direct_align_in_closed_form() -> None:
    """Where v is right x0hat = x0; the slope is (t - s) / (1 - t) of what the branch prefers."""
    batch = images([0.0] * 4, steps=6)
    noise_of = Draws(batch.seeds, 0, ALIGNED)
    method = srpo(range=(0.3, 0.7))
    assert method.starts(6) == [2, 3]
    nth = (noise_of.uniform(batch.x0) * 2).long()
    noise, high, low = noise_of.normal(batch.x0), batch.sigmas[2 + nth], batch.sigmas[3 + nth]
    model = seen(linear, free, {"v": noise - batch.x0})
    plus, minus = len("red a"), len("a very blue a")  # by how much `linear` multiplies a
    k_plus, k_minus = 0.1 + 0.15 * nth, 0.3 - 0.29 * nth
    once = linear(batch.x0, ["x"] * 4)
    down, up = ((1 + k_plus) * plus - minus), ((1 + k_minus) * minus - plus)
    first, second = method.losses(model, batch, Memory())
    torch.testing.assert_close(first.per_sample, -down * once / 2)
    torch.testing.assert_close(second.per_sample, -up * once / 2)
    found = gradient(method, model, batch, Memory(), model.parameters).view(4, *SHAPE)  # type: ignore[arg-type]
    slope = -down * (low - high) / (1 - low) / 2 - up * (high - low) / (1 - high) / 2
    torch.testing.assert_close(found, slope.view(-1, 1, 1, 1) * A)
    alone = gradient(srpo(range=(0.3, 0.7), branches="denoising"), model, batch, Memory(), model.parameters)  # type: ignore[arg-type]
    torch.testing.assert_close(alone.view(4, *SHAPE), (-down * (low - high) / (1 - low)).view(-1, 1, 1, 1) * A)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_image_does_not_depend_on_its_batch(method: Algorithm) -> None:
    batch, model = batch_at(3), seen(curved)
    whole = total(method, model, batch, Memory())  # type: ignore[arg-type]
    order = torch.tensor([2, 0])
    torch.testing.assert_close(total(method, model, batch[order], Memory()), whole[order])  # type: ignore[arg-type]


RED = "{test_reward_gradients.Redness: 1}"
SETTINGS = """
model: {{path: {model}, device: cpu}}
output: {output}
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{steps: 4, kernel: ode, height: 32, width: 32}}
algorithm: {algorithm}
rewards: [{{name: test_reward_gradients.Redness, label: red}}, {{name: test_reward_gradients.Worded, label: worded}}]
adapter: {{name: lora, rank: 4, alpha: 8}}
trainer: {{epochs: 2, prompts: 2, images_per_prompt: 3, micro_batch: 6, lr: 3e-3}}
"""
TRAINED = {
    "refl": "{name: refl, rewards: {red: 1}, range: [0.25, 1], pretraining: {weight: 0.1, pairs: shapes-train}}",
    "draft": "{name: draft, rewards: {red: 1}, steps: 3}",
    "alignprop": "{name: draft, rewards: {red: 1}, randomised: true, checkpoint: true}",
    "draft lv": "{name: draft, rewards: {red: 1}, steps: 3, renoised: 2}",
    "srpo": "{name: srpo, rewards: {worded: 1}, positive: 'red ', negative: 'blue ', range: [0.25, 1], inversion: [0.2, 0.1]}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def start(tmp_path: Path, model: Path) -> Any:
    def run(method: str, name: str, *overrides: str, resume: str | None = None) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(SETTINGS.format(model=model, output=tmp_path / name, algorithm=TRAINED[method]))
        return trainer.train(loading.load(str(path), overrides), resume)

    return run


def weights(folder: Path, epoch: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"{epoch:04d}" / "weights.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["refl", "draft", "draft lv", "srpo"])
def test_the_reward_rises(start: Any, method: str) -> None:
    lines = metrics(start(method, "run", "trainer.epochs=6", "trainer.lr=1e-2", "trainer.prompts=4"))
    red = [line["reward/red"] for line in lines]
    assert sum(red[-2:]) / 2 > red[0] + 0.01, red
    assert all(line["grad_norm"] > 0 for line in lines)
    assert ("pretraining" in lines[0]) == (method == "refl")


@pytest.mark.parametrize("method", ["refl", "alignprop", "srpo"])
def test_the_micro_batch_changes_nothing_and_resume_is_exact(start: Any, method: str) -> None:
    settings = ("trainer.updates_per_rollout=2", "checkpoint.every=1", "trainer.lr=3e-4")
    whole, two = start(method, "six", *settings), start(method, "two", *settings, "trainer.micro_batch=2")
    start(method, "parts", *settings, "trainer.epochs=1")
    parts = start(method, "parts", *settings, resume="auto")
    expected, split, again = (weights(folder, 2) for folder in (whole, two, parts))
    assert any(t.abs().max() > 0 for name, t in expected.items() if "lora_B" in name)
    for name, value in expected.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=1e-5)
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("method", [m for m in TRAINED if m != "alignprop"])
def test_forward_passes_are_those_that_check_tells(
    start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    forward, counts = SD3Transformer2DModel.forward, []

    def counted(self: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        counts.append(len(hidden_states))
        return forward(self, hidden_states, *args, **named)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted)
    start(method, "run", "trainer.epochs=1")
    told = summary.forwards(loading.load(str(tmp_path / "run.yaml"), ()))
    assert sum(counts) == sum(int(n) for n in re.findall(r"\d+", told)), told


def test_refl_may_stop_at_its_step(start: Any) -> None:
    """The same gradient, and other images: of noise not yet taken out."""
    fixed = ("algorithm.range=[0.5, 0.75]", "trainer.epochs=1", "algorithm.pretraining={weight: 0}")
    whole, stopped = start("refl", "whole", *fixed), start("refl", "stopped", *fixed, "algorithm.finish=false")
    (a,), (b,) = metrics(whole), metrics(stopped)
    assert a["grad_norm"] == b["grad_norm"] and a["loss"] == b["loss"] and a["level"] == b["level"]
    assert a["reward/red"] != b["reward/red"]


def test_stochastic_rollouts_of_what_takes_no_step_again(start: Any) -> None:
    for method in ("refl", "draft lv", "srpo"):
        (line,) = metrics(start(method, method, "sampling.kernel=cps", "sampling.eta=0.7", "trainer.epochs=1"))
        assert line["grad_norm"] > 0


@pytest.mark.parametrize("preset", ["shapes_refl", "shapes_draft", "shapes_srpo"])
def test_presets(preset: str, tmp_path: Path) -> None:
    few = ("trainer.epochs=1", "trainer.prompts=2", "evaluation.every=0", f"output={tmp_path / preset}")
    config = loading.load(preset, few)
    assert config.algorithm.ascends() == ("pickscore",)
    (line,) = metrics(trainer.train(config))
    assert line["grad_norm"] > 0 and line["reward/pickscore"] > 0


CONFLICTS = [
    ("refl", "algorithm.rewards={blue: 1}", "'blue' is not one of the run's rewards (red, worded)"),
    ("refl", "rewards=[{name: jpeg, label: red}]", "reward 'red' has no gradient"),
    ("refl", "algorithm.rewards={}", "algorithm.rewards: name at least one of the run's rewards with its weight"),
    ("refl", "algorithm.rewards={red: -1}", "must be greater than 0"),
    ("refl", "algorithm.range=[0.8, 0.9]", "no step of 4 lies within 0.8 to 0.9; widen it, or sample more steps"),
    ("refl", "algorithm.range=[0.9, 0.1]", "must rise within 0 to 1, got 0.9 to 0.1"),
    ("refl", "algorithm.pretraining={weight: 1}", "needs pictures: name them under pretraining.pairs"),
    ("refl", "algorithm.pretraining={pairs: p.json}", "has no effect at weight 0"),
    ("draft", "algorithm.steps=5", "5 exceeds the 4 sampling steps"),
    ("draft", "sampling.kernel=cps", "takes the last steps again, which must then be deterministic"),
    ("draft", "sampling.kernel=dpm2", "dpm2 looks back at the step before the first one trained"),
    ("alignprop", "sampling.kernel=dpm2", "dpm2 looks back at the step before the first one trained"),
    ("alignprop", "algorithm.steps=2", "has no effect with randomised, which draws it; remove it"),
    ("draft lv", "algorithm.checkpoint=true", "has no effect on a single step; remove it"),
    ("srpo", "algorithm.negative='red '", "is what positive is"),
    ("srpo", "algorithm.span=4", "no 4 of the 4 sampling steps lie within 0.25 to 1"),
    ("srpo", "algorithm.range=[0, 1]", "must rise within 0 to 1 and begin above 0"),
    ("srpo", "algorithm.guidance=1", "is that of sampling, which is the default; remove it"),
    ("srpo", "algorithm.branches=denoising", "algorithm.inversion: has no effect with branches: denoising; remove it"),
]


@pytest.mark.parametrize(("method", "override", "said"), CONFLICTS, ids=[f"{m} {o}" for m, o, _ in CONFLICTS])
def test_conflicts(tmp_path: Path, method: str, override: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS.format(model="tiny-sd3", output="out", algorithm=TRAINED[method]))
    loading.load(str(path), ())
    with pytest.raises(UserError) as caught:
        loading.load(str(path), (override,))
    assert said in str(caught.value)


def test_the_estimate_of_memory_counts_the_calls_kept_at_once() -> None:
    """K of them, as many as may be drawn, or one."""
    options: list[dict[str, Any]] = [
        {"steps": 3},
        {"randomised": True},
        {"steps": 3, "checkpoint": True},
        {"renoised": 2},
    ]
    assert [draft(**chosen).graphs(8)["training"] for chosen in options] == [3, 8, 1, 1]
    sized = sizes.find(ModelRef(path="tiny-sd3"))
    assert sized is not None
    phases = [estimate.estimate(loading.load("shapes_draft", (f"algorithm.steps={k}",)), sized).phases for k in (1, 8)]
    few, many = (next(n for name, n in found.items() if name.startswith("training")) for found in phases)
    assert many > 2 * few


def test_a_level_too_clean_is_told() -> None:
    assert "raise algorithm.steps" in draft().warnings({"level": 0.001})["level"]
    assert "end before 1" in refl().warnings({"level": 0.001})["level"]
    assert not draft().warnings({"level": 0.3}) and not refl().warnings({"level": 0.3})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 8), (0, 0, 255)).save(tmp_path / "b.png")
    return tmp_path


def test_pairs_of_files(pictures: Path) -> None:
    (pictures / "p.jsonl").write_text('{"prompt": "red", "file": "a.png"}\n\n{"prompt": "blue", "file": "b.png"}\n')
    (pictures / "p.json").write_text('{"red": ["a.png"], "blue": ["b.png", "a.png"]}')
    lines, table = (_pairs.load(str(pictures / name)) for name in ("p.jsonl", "p.json"))
    assert lines.texts == ["red", "blue"] and table.texts == ["red", "blue", "blue"]
    assert lines.read[0]().shape == (3, 4, 8) and table.read[1]()[2].min() == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "a", "is neither a .jsonl nor a .json file of prompts and pictures nor shapes-train"),
        ("p.jsonl", "", "holds no pair"),
        ("p.jsonl", '{"prompt": "a"}', 'p.jsonl:1: expected {"prompt": text, "file": picture}'),
        ("p.jsonl", "{", "p.jsonl:1: not valid JSON"),
        ("p.jsonl", '{"prompt": "a", "file": "no.png"}', "no.png' that"),
        ("p.json", "[1]", "must be {prompt: [file, ...]}"),
        ("p.json", '{"a": [1]}', "must be {prompt: [file, ...]}"),
        ("p.json", "{", "is not JSON"),
        ("p.json", "caf\xe9", "is not UTF-8 text"),
    ],
)
def test_mistakes_in_pairs(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(said)):
        _pairs.load(str(tmp_path / name))


def test_a_picture_is_cut_from_the_middle() -> None:
    ramp = torch.linspace(0, 1, 12).expand(3, 4, 12)
    cut = _pairs.covering(ramp, 8, 8)
    assert cut.shape == (3, 8, 8)
    row = cut[0, 0].tolist()
    assert all(a <= b for a, b in pairwise(row)) and abs(row[0] + row[-1] - 1) < 0.02 and 0.3 < row[0] < 0.45


def test_the_embedded_scenes_are_encoded_as_the_model_knows_them() -> None:
    """They come back from the decoder; the model predicts their velocity far better than chance."""
    pipeline = pipelines.load("tiny-sd3", device="cpu")
    pairs = _pairs.load("shapes-train")
    nth = [0, 900, 1800]
    with torch.no_grad():
        y = pairs.latents(pipeline, nth, pipeline.latent_shape(64, 64))
        back, there = pipeline.decode(y), torch.stack([pairs.read[i]() for i in nth])
        assert (back - there).abs().mean() < 0.03
        cond = pipeline.encode([pairs.texts[i] for i in nth])
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        x0, eps = pipeline.denoiser(cond).predict(noised(pipeline.schedule, y, noise, 0.5), 0.5)
    assert (eps - x0 - (noise - y)).square().mean() < 0.5 * (noise - y).square().mean()


def test_the_pictures_loss_is_flow_matching(model: Path) -> None:
    """At each sample's own picture, level and noise, whatever batch it is in."""
    pipeline = pipelines.load(model, device="cpu", max_sequence_length=4)
    memory = Pictures(_pairs.load("shapes-train"), pipeline)
    batch = replace(images([0.0] * 4), x0=torch.zeros(4, *pipeline.latent_shape(32, 32)))

    class Real:
        def denoiser(self, cond: Conditioning, guided: bool = True) -> Any:
            assert not guided
            return pipeline.denoiser(cond)

    with torch.no_grad():
        whole = memory.denoising(Real(), batch)  # type: ignore[arg-type]
        some = memory.denoising(Real(), batch[torch.tensor([3, 1])])  # type: ignore[arg-type]
    torch.testing.assert_close(some, whole[[3, 1]], rtol=1e-4, atol=1e-4)
    assert whole.shape == (4,) and len(set(whole.tolist())) == 4
