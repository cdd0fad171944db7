"""Heads that compare with references: what D learns, that nothing but the images decides it, and resuming a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from diffalign import loading, rewards, trainer
from diffalign.eval import geneval_logic
from diffalign.rewards import Lesson, _dino, _references
from diffalign.rewards._discriminator import Head, Trained, hinge, pairwise, token_loss
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards.geneval import observe
from diffalign.shapes import prompts as shapes_prompts
from diffalign.shapes import styles
from diffalign.types import UserError

SMALL: dict[str, Any] = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = ["a cat", "a dog", "a <b>hat</b>", "a cat"]
BLANK: list[dict[str, Any]] = [{}] * 4
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SEEDS = torch.tensor([11, 12, 13, 14])


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(image_size=16, **SMALL)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two references of each prompt, dark and of various sizes, in a JSON file beside them."""
    folder = tmp_path_factory.mktemp("references")
    table: dict[str, list[str]] = {}
    for i, prompt in enumerate(dict.fromkeys(PROMPTS)):
        for k in range(2):
            paint(folder / "pictures" / f"{i}{k}.png", seed=10 * i + k, size=16 + 4 * k, top=100)
            table.setdefault(prompt, []).append(f"pictures/{i}{k}.png")
    (folder / "table.json").write_text(json.dumps(table), "utf-8")
    return str(folder / "table.json")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, paired: str) -> str:
    """A random CLIP that scores the images above the references, as an adversary must that has something to learn."""
    torch.manual_seed(0)
    words = tiny_models.clip_tokenizer()
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {key: getattr(words, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**part, **ends, "vocab_size": len(words), "max_position_embeddings": tiny_models.TOKENS}
    folder = tmp_path_factory.mktemp("clip")
    sight = {**part, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=8))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    scorer = critic("pickscore", model=str(folder))
    references = _references.load(paired).pick(PROMPTS, BLANK, SEEDS)
    real = [scorer(x[None], [p], [{}]).scores for x, p in zip(references, PROMPTS, strict=True)]
    if torch.cat(real).mean() > scorer(IMAGES, PROMPTS, BLANK).scores.mean():
        model.visual_projection.weight.data.neg_()  # and with it every score
        model.save_pretrained(folder)
    return str(folder)


def paint(path: Path, seed: int, size: int = 16, top: int = 256) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, top, (size, size, 3), dtype=np.uint8)).save(path)


def lesson(
    epoch: int = 0, rows: slice = slice(None), batch: int = 8, total: Callable[[Tensor], Tensor] | None = None
) -> Lesson:
    return Lesson(epoch, IMAGES[rows], PROMPTS[rows], BLANK[rows], SEEDS[rows], 4, batch, total or (lambda t: t))


def critic(name: str, **options: Any) -> Any:
    return rewards.resolve({"name": name, **options}).setup("cpu")


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# References


def test_paired_references_are_drawn_by_the_seed(paired: str) -> None:
    references = _references.load(paired)
    picked = references.pick(PROMPTS, BLANK, SEEDS)
    assert [p.shape for p in picked] == [q.shape for q in references.pick(PROMPTS, BLANK, SEEDS)]
    for prompt, one in zip(PROMPTS, picked, strict=True):
        own = [p.read() for p in references.of(prompt, {})]
        assert sum(one.shape == o.shape and torch.equal(one, o) for o in own) == 1
        assert one.dtype == torch.float32 and one.min() >= 0 and one.max() <= 100 / 255
    many = references.pick(["a cat"] * 40, [{}] * 40, torch.arange(40))
    assert {p.shape[1] for p in many} == {16, 20}


def test_mistakes_in_references_are_named(paired: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no picture for the prompt 'a bird'"):
        _references.load(paired).pick(["a cat", "a bird", "a fish"], BLANK[:3], SEEDS[:3])
    cases = {
        "[]": "at least one prompt",
        '{"a": []}': "prompt 'a' a list of at least one file",
        '{"a": ["gone.png"]}': "gone.png' of the prompt 'a' .* does not exist",
        "{": "are not JSON",
    }
    for text, message in cases.items():
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(UserError, match=message):
            _references.load(str(tmp_path / "table.json"))
    with pytest.raises(UserError, match=r"holds no picture \(.png"):
        _references.load(str(tmp_path))
    with pytest.raises(UserError, match="no style 'crayon'; take one of shapes-outline"):
        _references.load("shapes-crayon")
    with pytest.raises(UserError, match="neither a .json file"):
        _references.load("nowhere")
    with pytest.raises(UserError, match="cannot draw the prompt 'a cat', which has no GenEval metadata"):
        _references.load("shapes-outline").of("a cat", {})
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken.png' cannot be read as a picture"):
        _references.load(str(tmp_path)).pick(["a"], [{}], SEEDS[:1])


def test_the_hash_of_references_follows_their_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        paint(folder / "x.png", 1)
        paint(folder / "y.png", 2)
    assert _references.load(str(first)).digest == _references.load(str(second)).digest
    size = (second / "y.png").stat().st_size
    changed = bytearray((second / "y.png").read_bytes())
    changed[-20] ^= 1
    (second / "y.png").write_bytes(bytes(changed))
    assert (second / "y.png").stat().st_size == size
    assert _references.load(str(first)).digest != _references.load(str(second)).digest
    assert len({_references.load(f"shapes-{name}").digest for name in styles.STYLES}) == len(styles.STYLES)


def test_styles_draw_what_the_prompt_asks_for() -> None:
    """The detector reads deep and dusk in full; outlines it does not take for shapes, but a filled outline is the shape."""
    strict: dict[str, list[float]] = {name: [] for name in styles.STYLES}
    for meta in shapes_prompts.train_prompts()[:60]:
        for name, scores in strict.items():
            picture = styles.picture(name, meta, 1)
            assert picture.shape == (64, 64, 3) and (picture == styles.picture(name, meta, 1)).all()
            assert (picture != styles.picture(name, meta, 2)).any()
            scores.append(float(geneval_logic.geneval_strict(*observe(picture), meta)))
    assert np.mean(strict["dusk"]) == np.mean(strict["deep"]) == 1
    assert np.mean(strict["outline"]) < 0.2


# Backbone and likeness


def test_tokens_are_cls_and_patches_without_registers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=16, num_register_tokens=3, **SMALL)).eval()
    model.save_pretrained(tmp_path)
    backbone = _dino.load(Checkpoint(str(tmp_path)), None, "fp32", "cpu", False)
    images = IMAGES.clone().requires_grad_()
    tokens = backbone.tokens(images)
    whole = model(pixel_values=backbone.pixels(IMAGES)).last_hidden_state
    assert tokens.shape == (4, 1, 5, 16) and whole.shape == (4, 8, 16)
    torch.testing.assert_close(tokens[:, 0], whole[:, [0, 4, 5, 6, 7]])
    tokens.square().sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and (images.grad != 0).any()
    deep = backbone.tokens(IMAGES, [0, 1])
    torch.testing.assert_close(model.layernorm(deep[:, 1]), tokens[:, 0])
    assert deep.shape == (4, 2, 5, 16) and not deep[:, 0].allclose(deep[:, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 20}, "size 20 is no multiple of the 8 pixels of a patch"),
        ({"multi_layer": {"layers": [2]}}, r"layers must be among 0 to 1 of .*, got \[2\]"),
        ({"generator_every": 10}, "no effect with reuse_rollouts"),
        ({"multi_layer": {"layers": [1]}, "cls_weight": 0.5}, "no effect with multi_layer"),
        ({"model": "/nowhere"}, "does not exist"),
    ],
)
def test_mistakes_in_the_options(dino: str, paired: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        critic("dino_adversarial", **{"references": paired, "model": dino, **options})


def test_another_kind_of_model_is_refused(clip: str, paired: str) -> None:
    with pytest.raises(UserError, match="is a model of type 'clip'; use one of dinov2"):
        critic("dino_adversarial", references=paired, model=clip)


def test_likeness_is_the_best_cosine_among_own_references(dino: str, paired: str) -> None:
    head = critic("dino", references=paired, model=dino)
    table = json.loads(Path(paired).read_text())
    backbone = _dino.load(Checkpoint(dino), None, "fp32", "cpu", False)
    every = {
        prompt: torch.nn.functional.normalize(
            backbone.tokens([_references.read(Path(paired).parent / f) for f in files])[:, 0, 0], dim=-1
        )
        for prompt, files in table.items()
    }
    own = torch.nn.functional.normalize(backbone.tokens(IMAGES)[:, 0, 0], dim=-1)
    expected = torch.stack([(every[p] @ v).max() for p, v in zip(PROMPTS, own, strict=True)])
    torch.testing.assert_close(head(IMAGES, PROMPTS, BLANK).scores, expected)
    picture = _references.read(Path(paired).parent / table["a dog"][0])[None]
    assert head(picture, ["a dog"], [{}]).scores.item() == pytest.approx(1, abs=1e-5)
    assert head(picture, ["a cat"], [{}]).scores.item() < 1 - 1e-4
    images = IMAGES.clone().requires_grad_()
    head(images, PROMPTS, BLANK).scores.sum().backward()
    assert images.grad is not None and (images.grad != 0).any()


# Discriminators


def test_losses_where_they_are_known() -> None:
    logits = torch.zeros(3, 5, requires_grad=True)
    alike = token_loss(logits, logits, 0.3)
    torch.testing.assert_close(alike, torch.full((3,), 1.3))
    alike.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(3, 5))
    assert hinge(torch.tensor(1.5), torch.tensor(-1.0)) == 0
    scores = torch.tensor([0.3, -40.0])
    torch.testing.assert_close(pairwise(scores, scores), torch.full((2,), math.log(2)))


def test_a_generator_moves_to_the_references() -> None:
    """N(mu, 1) against N(2, 1): D learns, mu follows its scores by group-normalised policy gradients, and stays."""
    torch.manual_seed(0)
    head = Head(1, 16)
    student = Trained(dict(head.named_parameters()), 1e-2, (0.5, 0.999), bytes(32))
    mu, path = 0.0, []
    for _ in range(250):
        real, fake = 2 + torch.randn(64, 1), mu + torch.randn(64, 1)

        def compare(real: Tensor = real, fake: Tensor = fake) -> tuple[Tensor, dict[str, Tensor]]:
            return hinge(head(real), head(fake)), {}

        student.step(Lesson(0, real, [], [], SEEDS, 64, 64, lambda t: t), [compare], (), lambda means: True)
        score = head(fake)
        advantages = (score - score.mean()) / score.std()
        mu += 0.05 * float((advantages * (fake - mu)[:, 0]).mean())
        path.append(mu)
    assert abs(np.mean(path[-50:]) - 2) < 0.5


@pytest.mark.parametrize("patches", ["all", 3])
@pytest.mark.parametrize("norm", ["scaled", "raw", "published"])
def test_it_learns_to_tell_references_from_images(dino: str, paired: str, patches: Any, norm: str) -> None:
    options = {"patches": patches, "feature_norm": norm, "lr": 1e-2, "d_steps": 1}
    head = critic("dino_adversarial", references=paired, model=dino, **options)
    first = head.learn(lesson(0))[1]
    for epoch in range(1, 20):
        trains, last = head.learn(lesson(epoch))
    assert trains and last["loss"] < 0.1 < first["loss"] and last["logit_real"] > 0.5 > -0.5 > last["logit_fake"]
    assert last["accuracy"] == last["accuracy_real"] == last["accuracy_fake"] == 1
    output = head(IMAGES, PROMPTS, BLANK)
    assert output.scores.shape == (4,) and output.extra["patches"].shape == (4, 4)
    assert torch.equal(output.scores, head(IMAGES, PROMPTS, BLANK).scores)  # also where patches are drawn
    torch.testing.assert_close(output.scores[1:2], head(IMAGES[1:2], PROMPTS[1:2], BLANK[1:2]).scores)


def test_scores_carry_gradients_to_images_and_leave_none_on_d(dino: str, clip: str, paired: str) -> None:
    for name, model in (("dino_adversarial", dino), ("pickscore_adversarial", clip)):
        head = critic(name, references=paired, model=model)
        images = IMAGES.clone().requires_grad_()
        head(images, PROMPTS, BLANK).scores.sum().backward()
        assert images.grad is not None and images.grad.isfinite().all() and (images.grad != 0).any()
        assert all(p.grad is None and not p.requires_grad for p in head.trained.parameters.values())


def test_several_layers(dino: str, paired: str) -> None:
    head = critic(
        "dino_adversarial", references=paired, model=dino, multi_layer={"layers": [0, 1], "top": 0.5}, lr=1e-2
    )
    before = head(IMAGES, PROMPTS, BLANK).scores
    for epoch in range(3):
        means = head.learn(lesson(epoch))[1]
    after = head(IMAGES, PROMPTS, BLANK).scores
    assert ((after > 0) & (after < before)).all() and means["accuracy"] == 1
    assert sum(name.startswith("weights/1.") for name in head.state_dict()) == 4


HEADS = ["dino_adversarial", "dino_adversarial drawn", "pickscore_adversarial"]


def made(which: str, dino: str, clip: str, paired: str) -> Any:
    name, *drawn = which.split()
    options: dict[str, Any] = {"patches": 3} if drawn else {}
    options |= {"lr": 1e-4} if "pickscore" in name else {}
    return critic(name, references=paired, model=clip if "pickscore" in name else dino, **options)


@pytest.mark.parametrize("which", HEADS)
def test_neither_batches_nor_processes_change_what_is_learnt(which: str, dino: str, clip: str, paired: str) -> None:
    whole, small = (made(which, dino, clip, paired) for _ in range(2))
    seen: list[Tensor] = []

    def record(t: Tensor) -> Tensor:
        seen.append(t.clone())
        return t

    logged = whole.learn(lesson(total=record))
    assert logged[1].get("steps", 1) == 1
    assert small.learn(lesson(batch=1))[1] == pytest.approx(logged[1], abs=1e-5)
    assert differs(whole.state_dict(), small.state_dict()) < 1e-5

    def shares(rows: slice) -> tuple[Any, list[Tensor]]:
        """A process with these images, which is told the sums of all; and what it brought itself."""
        own, brought, told = made(which, dino, clip, paired), [], iter(seen)

        def total(t: Tensor) -> Tensor:
            brought.append(t.clone())
            return next(told)

        assert own.learn(lesson(rows=rows, total=total))[1] == pytest.approx(logged[1], abs=1e-6)
        return own, brought

    one, two, none = shares(slice(0, 3)), shares(slice(3, 4)), shares(slice(0, 0))
    for sums in zip(seen, one[1], two[1], none[1], strict=True):  # strict: all of them sum equally often
        torch.testing.assert_close(sums[1] + sums[2], sums[0], atol=1e-5, rtol=1e-4)
        assert (sums[3] == 0).all()
    assert all(differs(whole.state_dict(), share[0].state_dict()) == 0 for share in (one, two, none))


@pytest.mark.parametrize("which", HEADS)
def test_its_state_brings_it_back_exactly(which: str, dino: str, clip: str, paired: str, tmp_path: Path) -> None:
    whole, second = (made(which, dino, clip, paired) for _ in range(2))
    whole.learn(lesson(0))
    second.load_state_dict(whole.state_dict())
    assert torch.equal(whole(IMAGES, PROMPTS, BLANK).scores, second(IMAGES, PROMPTS, BLANK).scores)
    assert whole.learn(lesson(1)) == second.learn(lesson(1))
    assert differs(whole.state_dict(), second.state_dict()) == 0

    paint(tmp_path / "other.png", 1)
    with pytest.raises(ValueError, match="the references are not those it was trained with"):
        made(which, dino, clip, str(tmp_path)).load_state_dict(whole.state_dict())


def test_the_weights_of_another_discriminator_do_not_fit(dino: str, paired: str) -> None:
    wide, narrow = (critic("dino_adversarial", references=paired, model=dino, hidden=n) for n in (64, 32))
    with pytest.raises(ValueError, match="of another discriminator"):
        narrow.load_state_dict(wide.state_dict())


def test_taking_turns(dino: str, paired: str) -> None:
    """Published: of ten epochs nine train D and discard the images, the tenth trains the generator."""
    head = critic("dino_adversarial", references=paired, model=dino, reuse_rollouts=False, generator_every=3)
    turns, moved = [], []
    for epoch in range(6):
        before = head.state_dict()
        generator, logged = head.learn(lesson(epoch))
        assert 0 <= logged["accuracy"] <= 1
        turns.append(generator)
        moved.append(
            any(not torch.equal(t, before[n]) for n, t in head.state_dict().items() if n.startswith("weights"))
        )
    assert turns == [False, False, True] * 2 and moved == [True, True, False] * 2
    assert critic("dino_adversarial", references=paired, model=dino, reuse_rollouts=False).options.schedule == (10, 1)
    assert critic("dino_adversarial", references=paired, model=dino).options.schedule == (1, 9)


@pytest.mark.parametrize("reuse", [True, False])
def test_pickscore_learns_only_while_it_prefers_the_images(clip: str, paired: str, reuse: bool) -> None:
    options = {"references": paired, "model": clip}
    head = critic("pickscore_adversarial", **options, lr=2e-3, reuse_rollouts=reuse, d_steps=3)
    untrained = critic("pickscore", model=clip, scale="flow_grpo")(IMAGES, PROMPTS, BLANK).scores
    torch.testing.assert_close(head(IMAGES, PROMPTS, BLANK).scores, untrained)
    took, losses = [], []
    for epoch in range(12):
        generator, logged = head.learn(lesson(epoch))
        took.append(logged["steps"])
        losses.append(logged["loss"])
        assert generator == (reuse or not logged["steps"])
        assert (logged["steps"] < 3) == (logged["score_real"] >= logged["score"])
    assert took[0] == 3 and took[-1] == 0 and losses[-1] < losses[0]


# In a run

SETTINGS = """
model: {{path: {model}, device: cpu}}
output: {output}
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{steps: 3, kernel: cps, eta: 0.7, height: 32, width: 32}}
algorithm: {{name: grpo, window: {{size: 1, range: [0, 2]}}}}
rewards:
  - {{name: dino_adversarial, model: {dino}, references: shapes-outline, lr: 1e-3, d_steps: 2, hidden: 16}}
adapter: {{name: lora, rank: 4, alpha: 8}}
trainer: {{epochs: 3, prompts: 2, images_per_prompt: 3, micro_batch: 6, lr: 1e-3}}
evaluation:
  every: 3
  prompts: 2
  images_per_prompt: 1
  steps: 2
  rewards: [dino_adversarial, {{name: dino, model: {dino}, references: shapes-outline}}]
checkpoint: {{every: 1, keep: 3}}
"""


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


def test_a_run_trains_both_and_resumes_exactly(sd3: Path, dino: str, tmp_path: Path) -> None:
    def run(name: str, *overrides: str, resume: str | None = None) -> Path:
        (tmp_path / f"{name}.yaml").write_text(SETTINGS.format(model=sd3, dino=dino, output=tmp_path / name))
        return trainer.train(loading.load(str(tmp_path / f"{name}.yaml"), overrides), resume)

    whole = run("whole")
    run("parts", "trainer.epochs=2")
    parts = run("parts", resume="auto")
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["phase"] == "train"]
    assert [line["epoch"] for line in train] == [1, 2, 3]
    for line in train:
        for metric in ("accuracy", "accuracy_real", "accuracy_fake"):
            assert 0 <= line[f"dino_adversarial/{metric}"] <= 1
        assert line["dino_adversarial/score_std"] > 0 and line["reward/dino_adversarial_std"] > 0
        assert line["trained_images"] == 6
    assert train[-1]["dino_adversarial/loss"] < train[0]["dino_adversarial/loss"]
    for part in ("weights", "optimizer", "learner_0"):
        states = [load_file(folder / "checkpoints" / "0003" / f"{part}.safetensors") for folder in (whole, parts)]
        assert differs(*states) == 0
    assert differs(*(load_file(whole / "checkpoints" / n / "learner_0.safetensors") for n in ("0001", "0003"))) > 0
    scores = [line for line in lines if line["phase"] == "eval"][-1]
    again = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()][-1]
    assert all(again[key] == scores[key] for key in ("reward/dino", "reward/dino_adversarial"))

    with pytest.raises(UserError, match="learner_0 of checkpoint .* the references are not those"):
        run("parts", "rewards.0.references=shapes-dusk", "evaluation.rewards=[]", "trainer.epochs=4", resume="auto")

    taking_turns = run(
        "turns", "rewards.0.reuse_rollouts=false", "rewards.0.generator_every=2", "evaluation.rewards=[]"
    )
    lines = [json.loads(line) for line in (taking_turns / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["phase"] == "train"]
    assert ["grad_norm" in line for line in train] == [False, True, False]
    assert all("dino_adversarial/accuracy" in line for line in train)
