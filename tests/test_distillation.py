"""AC-DMD and RTDMD end to end on small models: who is trained when, invariances, resume, gradients, and mistakes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from forward_process import Toy, perturb, trained
from safetensors.torch import load_file
from test_processes import ROOT, free_port
from torch import Tensor

from diffalign import adapters, cli, loading, pipelines, trainer
from diffalign.algorithms import Memory, Study
from diffalign.algorithms._scores import Scores
from diffalign.algorithms._steps import last_step, stored_step
from diffalign.algorithms.grpo import GRPO
from diffalign.algorithms.rtdmd import RTDMD
from diffalign.clock import Clock
from diffalign.interrupt import Interrupt
from diffalign.overlap import Early
from diffalign.rollout import collect, generators, prompt_seed, sample_seed, shared_noise_seed
from diffalign.run import Run, prepare
from diffalign.samplers import denoise, drain, randn
from diffalign.schedules import few_step_sigmas
from diffalign.sections import Sampling
from diffalign.types import Rollout
from diffalign.update import TrainedPolicy

SHARED = """
model: {{path: {model}, device: cpu}}
output: {output}
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{timesteps: [1000, 750, 500, 250], kernel: cps, eta: 0.9, height: 32, width: 32}}
adapter: {{name: lora, rank: 4, alpha: 8}}
trainer: {{epochs: 4, prompts: 2, images_per_prompt: 4, micro_batch: 8, lr: 1e-3, weight_decay: 0, ema: 0.9}}
checkpoint: {{every: 1, keep: 9}}
"""
METHODS = {
    "acdmd": "algorithm: {name: acdmd, ratio: 1, guidance: 2.0, fake: {lr: 1e-3}}",
    "rtdmd": """
algorithm:
  name: rtdmd
  guidance: 2.0
  matching: 0.1
  backpropagated: {weight: 0.1, rewards: [Greenness], margin: 100}
  fake: {lr: 1e-3}
advantage: {name: gdpo, std: global}
rewards: [reward_functions.redness, {name: smooth_rewards.Greenness}]
""",
}
TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
FULL = "adapter={name: full}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another network with the same text encoders."""
    pipe, folder = tiny_models.sd3_pipe(), tmp_path_factory.mktemp("models") / "other"
    perturb(dict(pipe.transformer.named_parameters()), 0.05, seed=7)
    pipe.save_pretrained(folder)
    return folder


def written(folder: Path, model: Path, method: str, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(SHARED.format(model=model, output=folder / name) + METHODS[method])
    return path


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Any:
    def start(method: str, name: str, *overrides: str, resume: str | None = None) -> Path:
        return trainer.train(loading.load(str(written(tmp_path, model, method, name)), overrides), resume)

    return start


@pytest.fixture
def prepared(tmp_path: Path, model: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def start(method: str, *overrides: str) -> Run:
        path = written(tmp_path, model, method, f"run{len(runs)}")
        runs.append(prepare(loading.load(str(path), overrides), None))
        return runs[-1]

    yield start
    for made in runs:
        made.tracker.close()


def stored(folder: Path, epoch: int, part: str = "weights") -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"{epoch:04d}" / f"{part}.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "train"]


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and len(a)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def sampled(run: Run) -> Rollout:
    interrupt = Interrupt()
    with Early(run.scorers) as early:
        return trainer.sample(run, Clock(run.pipeline.device), early, interrupt)[0]


def train_epochs(run: Run, count: int) -> None:
    for _ in range(count):
        assert trainer.epoch(run, Interrupt())


@torch.no_grad()
def predicted(pipeline: Any, guidance: float = 2.0) -> Tensor:
    cond = pipeline.encode(["a red circle", "two dogs"])
    x = torch.randn(2, *pipeline.latent_shape(32, 32), generator=torch.Generator().manual_seed(3))
    x0, eps = pipeline.denoiser(cond, guidance).predict(x, torch.tensor([0.9, 0.4]))
    return torch.stack([x0, eps])


@pytest.mark.parametrize("own", [False, True], ids=["the model itself", "another model"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_the_teacher_as_it_was(
    prepared: Any, model: Path, other: Path, method: str, adapter: str, own: bool
) -> None:
    settings = [FULL] if adapter == "full" else []
    run = prepared(method, *settings, *([f"algorithm.teacher={other}"] if own else []))
    expected = predicted(pipelines.load(other if own else model, device="cpu"))
    before = predicted(run.pipeline)
    train_epochs(run, 2)
    with adapters.reference(run.pipeline):
        assert torch.equal(predicted(run.pipeline), expected)
    assert not torch.equal(predicted(run.pipeline), before)
    fakes = {n.removeprefix("fake/"): t for n, t in run.memory.state_dict().items() if n.startswith("fake/")}
    assert len(fakes) == len(run.parameters)


def test_epochs_train_the_fake_score_or_the_generator(run: Any) -> None:
    folder = run("acdmd", "turns", "algorithm.ratio=2", "trainer.epochs=6")
    moves = [
        tuple(apart(stored(folder, epoch, part), stored(folder, epoch + 1, part)) > 0 for part in ("weights", "memory"))
        for epoch in range(1, 6)
    ]
    fake, generator = (False, True), (True, False)
    assert moves == [fake, generator, fake, fake, generator]
    assert all(t.abs().max() == 0 for name, t in stored(folder, 2).items() if "lora_B" in name)
    lines = metrics(folder)
    assert ["fake_loss" in line for line in lines] == [True, True, False] * 2
    assert ["matching" in line for line in lines] == [False, False, True] * 2
    assert not list((folder / "images").glob("train_*"))  # nothing was decoded


@pytest.mark.parametrize("matching", ["ambient", "clean"])
def test_the_fake_score_sees_what_the_generator_made(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, matching: str
) -> None:
    """The noisy state of AC-DMD, or the clean prediction of DMD2, at its level; the fake score itself predicts others."""
    run = prepared("acdmd", f"algorithm.matching={matching}", "algorithm.fake={lr: 1e-2}")
    train_epochs(run, 2)
    rollout, policy, seen = sampled(run), TrainedPolicy.of(run), []
    losses = Scores.losses
    monkeypatch.setattr(
        Scores, "losses", lambda self, p, b, sample, turn: seen.append(sample) or losses(self, p, b, sample, turn)
    )
    with torch.no_grad():
        taken, level, _ = last_step(policy, rollout)
    assert run.memory.learn(Study(0, 2, policy, rollout, len(rollout), len(rollout), run.sum))[0] is False
    (sample,) = seen
    assert not sample.x.requires_grad
    if matching == "ambient":
        assert torch.equal(sample.x, rollout.x0) and torch.equal(sample.s, level)
    else:
        assert torch.equal(sample.x, taken.x0) and sample.s.tolist() == [0.0] * len(rollout)


def test_an_epoch_of_rtdmd_trains_both(run: Any) -> None:
    folder = run("rtdmd", "both", "trainer.epochs=2")
    for part in ("weights", "memory"):
        assert apart(stored(folder, 1, part), stored(folder, 2, part)) > 0
    for line in metrics(folder):
        assert {"fake_loss", "matching", "backpropagated", "ratio", "consistency", "grad_norm"} <= line.keys()
        assert line["ratio"] == 1.0 and line["trained_images"] == 8
        assert line["backpropagated"] == pytest.approx(line["reward/Greenness"], abs=1e-4)


@pytest.mark.parametrize(("method", "adapter"), [("acdmd", "full"), ("acdmd", "lora"), ("rtdmd", "lora")])
def test_micro_batches_change_nothing(run: Any, method: str, adapter: str) -> None:
    settings = ["trainer.lr=1e-4", "algorithm.fake.lr=1e-4", *([FULL] if adapter == "full" else [])]
    whole, parts = (run(method, f"by {n}", *settings, f"trainer.micro_batch={n}") for n in (8, 2))
    for part in ("weights", "memory"):
        assert apart(stored(whole, 4, part), stored(parts, 4, part)) < 1e-5
        assert apart(stored(whole, 1, part), stored(whole, 4, part)) > 1e-4
    for one, two in zip(metrics(whole), metrics(parts), strict=True):
        assert one.keys() == two.keys()
        for name in {"fake_loss", "matching", "consistency"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(run: Any, method: str) -> None:
    whole = run(method, "whole")
    run(method, "parts", "trainer.epochs=2")
    run(method, "parts", "trainer.epochs=3", resume="auto")
    parts = run(method, "parts", resume="auto")
    for part in ("weights", "optimizer", "memory", "ema"):
        assert apart(stored(whole, 4, part), stored(parts, 4, part)) == 0
    assert any(name.startswith("adam/") for name in stored(whole, 4, "memory"))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(tmp_path: Path, model: Path, method: str) -> None:
    """Five images of a prompt over two processes: the shares are uneven, and one prompt's tied noise spans both."""
    sizes = "trainer: {epochs: 4, prompts: 1, images_per_prompt: 5, micro_batch: 2, lr: 1e-4}"
    for number in ("one", "two"):
        path = written(tmp_path, model, method, number)
        lines = [sizes if line.startswith("trainer:") else line for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines))
    trainer.train(loading.load(str(tmp_path / "one.yaml")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    launch += ["--config_file", str(ROOT / "configs/accelerate/cpu.yaml"), "-m", "diffalign", "train", "two.yaml"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for part in ("weights", "memory"):
        one, two = (stored(tmp_path / number, 4, part) for number in ("one", "two"))
        assert apart(one, two) < 1e-5
        assert apart(one, stored(tmp_path / "one", 1, part)) > 1e-4


def loaded(model: Path) -> Any:
    pipeline = pipelines.load(model, device="cpu", max_sequence_length=4)
    torch.manual_seed(0)
    adapters.add_lora(pipeline, 4, 8)
    perturb(trained(pipeline), seed=5)  # a fresh LoRA changes nothing
    return pipeline


SAMPLING = Sampling(timesteps=TIMESTEPS, kernel="cps", eta=0.9, height=32, width=32)
PROMPTS = [{"prompt": p} for p in ("a cat", "a cat", "two dogs", "two dogs")]
GROUP = torch.tensor([0, 0, 1, 1])
SEEDS = torch.tensor([sample_seed(0, 0, 0, j) for j in range(4)])


@pytest.mark.parametrize("k", range(4))
def test_the_last_step_has_its_gradient(model: Path, k: int) -> None:
    """Value and gradient of the sampler's own step k, had it been differentiated."""
    pipeline = loaded(model)
    policy = TrainedPolicy(pipeline, SAMPLING, None, {})
    batch = collect(pipeline, PROMPTS, GROUP, SEEDS, SAMPLING, [k], until=k + 1, stochastic=range(4), decode=False)
    taken, level, eta = last_step(policy, batch)
    assert eta == 0.9 and torch.equal(level, batch.sigmas[k + 1].expand(4))

    noise = generators(SEEDS)
    x = randn((4, *pipeline.latent_shape(32, 32)), noise, "cpu")
    walk = denoise(pipeline.denoiser(batch.cond), x, batch.sigmas, "cps", 0.9, range(4), noise)
    with torch.no_grad():
        for _ in range(k):
            next(walk)
    expected = next(walk)
    torch.testing.assert_close(taken.next, expected.next, rtol=0, atol=1e-6)
    assert torch.equal(taken.x0.detach(), expected.x0.detach())
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(trained(pipeline).values())
    gradients = [torch.autograd.grad((weight * step.next).sum(), parameters) for step in (taken, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3

    alone, _, _ = last_step(policy, batch, again=False)
    assert torch.equal(alone.next, expected.next.detach())  # what was sampled, without running the model


def noises(pipeline: Any, batch: Rollout) -> Tensor:
    """[B, K, ...] what each kept step drew; of the deterministic one 0."""
    policy = TrainedPolicy(pipeline, SAMPLING, None, {})
    with torch.no_grad():
        steps = [stored_step(policy.denoiser(batch.cond), policy, batch, k) for k in range(len(batch.kept))]
    return torch.stack([(s.next - s.mean) / s.std.clamp(min=1e-3) for s in steps], 1)


def test_steps_outside_the_subset_share_their_noise(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the images of a prompt, not between prompts, and another in each epoch and step; the start is an image's
    own."""
    kept = RTDMD.kept
    monkeypatch.setattr(RTDMD, "kept", lambda self, steps, seed, epoch: list(range(steps)))
    run = prepared("rtdmd", "algorithm.subset=1")
    method, seen = run.config.algorithm, []
    for epoch in range(3):
        run.epoch = epoch
        batch = sampled(run)
        drawn = noises(run.pipeline, batch)
        chosen = method.chosen(4, run.config.seed, epoch)
        assert sorted([*chosen, *method.tied(4, run.config.seed, epoch)]) == [0, 1, 2]
        assert kept(method, 4, run.config.seed, epoch) == [*chosen, 3]
        assert drawn[:, 3].abs().max() < 1e-3  # deterministic
        first, second = (drawn[batch.group == g] for g in batch.group.unique())
        assert batch.states is not None and (batch.states[0, 0, 0] - batch.states[1, 0, 0]).abs().max() > 0.1
        for k in range(3):
            own = k in chosen
            assert ((first[1:, k] - first[:1, k]).abs().amax((1, 2, 3)) > 0.1).tolist() == [own] * 3
            if not own:
                torch.testing.assert_close(first[1:, k], first[:1, k].expand_as(first[1:, k]), rtol=0, atol=1e-4)
                seed = shared_noise_seed(
                    batch.prompts[int((batch.group == batch.group.unique()[0]).nonzero()[0])], k, 0, epoch
                )
                expected = randn((1, *first.shape[2:]), generators([seed]), "cpu")[0]
                torch.testing.assert_close(first[0, k], expected, rtol=0, atol=1e-4)
                seen.append(first[0, k])
            assert (first[0, k] - second[0, k]).abs().max() > 0.1
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(seen, 2))


def test_where_all_steps_are_trained_nothing_is_shared(prepared: Any) -> None:
    for subset in (3, None):
        run = prepared("rtdmd", f"algorithm.subset={'null' if subset is None else subset}")
        method = run.config.algorithm
        assert method.tied(4, 0, 0) == [] and method.kept(4, 0, 0) == [0, 1, 2, 3]
        drawn = noises(run.pipeline, sampled(run))
        for a, b in itertools.combinations(drawn[:, :3].flatten(0, 1), 2):
            assert (a - b).abs().max() > 0.1


def test_fewer_free_steps_leave_less_variance_within_a_group() -> None:
    sigmas, groups, images = few_step_sigmas(TIMESTEPS, 3.0), 200, 8
    toy = Toy(lambda p, x, s: p["w"] * x, {"w": torch.tensor(0.2)})
    seeds = [sample_seed(0, 0, g, j) for g in range(groups) for j in range(images)]
    variances = []
    for free in ([0, 1, 2], [1, 2], [2], []):
        noise = generators(seeds)
        x = randn((len(seeds), 1, 2, 2), noise, "cpu")
        tied = {
            i: generators([prompt_seed(f"prompt {g}", i, 0) for g in range(groups) for _ in range(images)])
            for i in {0, 1, 2} - set(free)
        }
        with torch.no_grad():
            x0 = drain(denoise(toy, x, sigmas, "cps", 0.5, range(3), noise, tied))
        variances.append(float(x0.mean((1, 2, 3)).view(groups, images).var(1).mean()))
    assert all(a > 1.05 * b for a, b in itertools.pairwise(variances))
    assert variances[-1] > 0  # images of a prompt start from noise of their own


@pytest.mark.parametrize("later", [False, True])
def test_without_its_other_terms_it_is_grpo(model: Path, later: bool) -> None:
    """On the same steps, up to the share of the last step: |S| / (|S| + 1)."""
    pipeline = loaded(model)
    policy = TrainedPolicy(pipeline, SAMPLING, None, {})
    options: dict[str, Any] = {"matching": 0, "backpropagated": {"weight": 0}, "clip": 1e-5}
    hybrid, plain = RTDMD.model_validate({"name": "rtdmd", **options}), GRPO(name="grpo", clip=1e-5)
    memory = hybrid.start(pipeline, trained(pipeline))
    kept = hybrid.kept(4, 0, 0)
    batch = collect(pipeline, PROMPTS, GROUP, SEEDS, SAMPLING, kept, stochastic=range(3), decode=False)
    batch.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    assert batch.states is not None and batch.log_probs is not None
    short = replace(batch, kept=batch.kept[:-1], states=batch.states[:, :-1], log_probs=batch.log_probs[:, :-1])
    if later:
        with torch.no_grad():
            batch.old, short.old = hybrid.behaviour(policy, batch), plain.behaviour(policy, short)
        assert torch.equal(batch.old["log_prob"], short.old["log_prob"])
        perturb(trained(pipeline), 0.01, seed=9)
    parameters = list(trained(pipeline).values())
    values, gradients = [], []
    for method, of, own in ((hybrid, batch, memory), (plain, short, Memory())):
        total = torch.stack([loss.per_sample for loss in method.losses(policy, of, own)]).sum(0)
        values.append(total.detach())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total.sum(), parameters)]))
    share = (len(kept) - 1) / len(kept)
    torch.testing.assert_close(values[0], share * values[1])
    torch.testing.assert_close(gradients[0], share * gradients[1], rtol=1e-5, atol=1e-7)
    assert gradients[0].abs().max() > 0


CPS = "{timesteps: [1000, 750, 500, 250], kernel: cps, eta: 0.9, height: 32, width: 32"


@pytest.mark.parametrize(
    ("method", "overrides", "said"),
    [
        ("acdmd", [f"sampling={CPS.replace('cps', 'flow_sde')}}}"], "'acdmd' is derived for cps, not 'flow_sde'"),
        ("acdmd", ["sampling={timesteps: [1000, 500], kernel: ode}"], "is derived for cps, not 'ode'"),
        ("acdmd", ["sampling.guidance=3"], "sampling.guidance: the generator learns what guidance adds; set it to 1"),
        ("acdmd", ["sampling={steps: 4}"], "sampling.timesteps: name the generator's steps"),
        ("acdmd", ["sampling.steps=5"], "steps 5 contradicts the 4 timesteps; leave steps out"),
        ("acdmd", ["sampling.timesteps=[1000, 500, 500]"], "must fall from 1000"),
        ("acdmd", ["sampling.shared_noise=true"], "sampling.shared_noise: has no use with 'acdmd'"),
        ("acdmd", ["rewards=[jpeg]"], "'acdmd' trains on none; put them under evaluation.rewards"),
        ("acdmd", ["evaluation={every: 1, steps: 8, rewards: [jpeg]}"], "evaluation.steps: has no effect with"),
        ("rtdmd", ["sampling.kernel=flow_sde"], "'rtdmd' is derived for cps, not 'flow_sde'"),
        ("rtdmd", ["sampling.guidance=2"], "the generator learns what guidance adds"),
        ("rtdmd", ["sampling={steps: 4}"], "name the generator's steps"),
        ("rtdmd", ["algorithm.subset=4"], "algorithm.subset: 4 exceeds the 3 stochastic steps"),
        ("rtdmd", ["algorithm.backpropagated.rewards=[]"], "algorithm.backpropagated.rewards: name differentiable"),
        ("rtdmd", ["algorithm.backpropagated.rewards=[clip_score]"], "'clip_score' is not one of the run's rewards"),
        ("rtdmd", ["algorithm.backpropagated.rewards=[redness]"], "reward 'redness' has no gradient"),
        ("rtdmd", ["rewards=[]", "algorithm.backpropagated.weight=0"], "name at least one reward"),
        ("rtdmd", ["sampling.eta=0"], "0 makes every step deterministic; 'rtdmd' needs eta above 0"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, overrides: list[str], said: str
) -> None:
    path = written(tmp_path, tmp_path / "none", method, "run")
    assert cli.main(["train", str(path), *overrides]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_the_fake_score_learns_what_the_generator_makes(run: Any) -> None:
    """The embedded model begins as its own fake score, and one step of it makes blurs that it does not expect. The
    generator stands still, so that a fake score which does not learn sees the same samples and the same noise."""
    settings = (
        "model={path: tiny-sd3, device: cpu}",
        "sampling={timesteps: [1000], kernel: cps, eta: 0.9, height: 64, width: 64}",
        "trainer={epochs: 20, prompts: 6, images_per_prompt: 1, micro_batch: 6, lr: 1e-3}",
        "checkpoint.every=0",
    )
    learning, still = (
        torch.tensor([line["fake_loss"] for line in metrics(run("acdmd", f"rate {rate}", *settings, algorithm(rate)))])
        for rate in (3e-3, 1e-12)
    )
    assert len(learning) == 20 and learning[0] == still[0]
    assert (learning[10:] < still[10:]).all() and learning[10:].mean() < 0.7 * still[10:].mean()


def algorithm(rate: float) -> str:
    """Nothing but steps of the fake score."""
    return f"algorithm={{name: acdmd, ratio: 100, fake: {{lr: {rate}, consistency: {{weight: 0}}}}}}"
