"""The artifact head: what it computes, that it learns faults, calibrates them, is differentiable and comes back."""

from __future__ import annotations

import errno
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign import artifact_training, cli, rewards, writing
from diffalign.images import save_png
from diffalign.rewards import _artifact
from diffalign.types import RewardOutput, UserError

C, N = 6, 16


def features(folder: Path, width: int = 16, seed: int = 0) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        image_size=16, patch_size=4, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def pictures(folder: Path, n: int, broken: bool, seed: int = 0) -> Path:
    """Plain colours; broken ones have a square of black and white."""
    folder.mkdir()
    rng = random.Random(seed)
    for i in range(n):
        image = torch.tensor([rng.random() for _ in range(3)]).view(3, 1, 1).repeat(1, 16, 16)
        if broken:
            y, x = rng.randrange(3) * 4, rng.randrange(3) * 4
            image[:, y : y + 8, x : x + 8] = (torch.arange(8)[:, None] + torch.arange(8)[None]) % 2
        save_png(image, folder / f"{i}.png")
    return folder


def head(folder: Path, **options: Any) -> rewards.Scorer:
    return rewards.build([{"name": "artifact_head", "model": str(folder), **options}])["artifact_head"]


def score(scorer: rewards.Scorer, images: Tensor) -> RewardOutput:
    return scorer(images, [""] * len(images), [{}] * len(images))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder of a head trained by the command, what the command said)."""
    import contextlib
    import io

    root = tmp_path_factory.mktemp("artifact")
    clean, broken = pictures(root / "clean", 60, False), pictures(root / "broken", 40, True, 1)
    said = io.StringIO()
    model = ["--features", str(features(root / "dino")), "--device", "cpu"]
    args = ["--clean", str(clean), "--artifact", str(broken), *model]
    with contextlib.redirect_stdout(said):
        assert cli.main(["train-artifact", *args, "--steps", "150", "--output", str(root / "head")]) == 0
    return root / "head", said.getvalue()


def test_logits_are_those_of_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = _artifact.initial(C, 5, generator)
    assert {k: t.shape for k, t in weights.items()} == _artifact.shapes(C, 5)
    tokens = torch.randn(3, 1 + 40, C, generator=generator)
    assert all(not logit.any() for logit in _artifact.logits(weights, tokens))
    weights = {k: torch.rand(t.shape, generator=generator) for k, t in weights.items()}
    whole, highest, each = _artifact.logits(weights, tokens)

    def mlp(name: str, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"])
        return (hidden @ weights[f"{name}.1.weight"].T + weights[f"{name}.1.bias"]).squeeze(-1)

    cls = (tokens[:, 0] - weights["mean"][0]) / weights["std"][0]
    patches = (tokens[:, 1:] - weights["mean"][1]) / weights["std"][1]
    torch.testing.assert_close(each, torch.stack([mlp("patch", patches[:, i]) for i in range(40)], 1))
    torch.testing.assert_close(highest, each.sort(1).values[:, -3:].mean(1))  # ceil(40 / 16) = 3
    torch.testing.assert_close(whole, mlp("whole", torch.cat([cls, patches.mean(1)], 1)) + highest)


def test_faults_are_learnt_and_their_place_though_only_pictures_were_labelled() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(400, 1 + N, C, generator=generator)
    artifact = torch.arange(400) % 5 == 0  # one in five
    place = torch.randint(N, (400,), generator=generator)
    tokens[torch.arange(400), 1 + place, 2] += 5.0 * artifact
    plan = artifact_training.Plan(steps=400, hidden=16)
    weights = artifact_training.fit(tokens[:300], artifact[:300], plan, "cpu")
    logits = artifact_training.applied(weights, tokens[300:])
    found = artifact_training.measured(logits, artifact[300:])
    assert found["auroc"] > 0.95 and found["balanced_accuracy"] > 0.85
    assert (found["clean"], found["artifact"]) == (80, 20)
    _, _, each = _artifact.logits(weights, tokens[300:])
    right = (each.argmax(1) == place[300:])[artifact[300:]]
    assert right.float().mean() > 0.8


def test_classes_weigh_the_same() -> None:
    artifact = torch.tensor([True, False, False, False])
    weights = artifact_training.class_weights(artifact)
    assert weights[artifact].sum() == weights[~artifact].sum() == 2 and weights.mean() == 1


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_the_temperature_undoes_a_scale_of_calibrated_logits(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, generator=generator) * 2
    artifact = torch.rand(20_000, generator=generator) < z.sigmoid()  # half of them, so weights do not matter
    assert artifact_training.temperature(z * scale, artifact) == pytest.approx(scale, rel=0.05)
    apart = torch.tensor([-3.0, -2.0, 2.0, 3.0])
    assert 0 < artifact_training.temperature(apart, apart > 0) < 10


def test_measures() -> None:
    scores, positive = torch.tensor([0.1, 0.4, 0.4, 0.8, -1.0]), torch.tensor([False, True, False, True, False])
    pairs = [(a, b) for a in scores[positive] for b in scores[~positive]]
    assert artifact_training.auroc(scores, positive) == pytest.approx(
        sum((a > b) + 0.5 * (a == b) for a, b in pairs) / 6
    )
    assert artifact_training.balanced_accuracy(scores, positive) == pytest.approx((1 + 1 / 3) / 2)


def test_states_of_one_picture_are_held_out_together() -> None:
    clean, artifact = [f"{i}.png" for i in range(100)], [f"{i}.jpg" for i in range(50, 200)]
    held = artifact_training.held_out(clean, artifact, 0.2, 0)
    assert len(held) == 40  # names without their endings
    assert sum(int(s) < 50 for s in held) == 10 and sum(50 <= int(s) < 100 for s in held) == 10
    assert (
        held
        == artifact_training.held_out(clean[::-1], artifact, 0.2, 0)
        != artifact_training.held_out(clean, artifact, 0.2, 1)
    )


def test_the_command_trains_saves_and_reports(trained: tuple[Path, str]) -> None:
    folder, said = trained
    report = json.loads((folder / "artifact_head.json").read_text())["report"]
    assert report["validation"]["clean"] == 12 and report["validation"]["artifact"] == 8
    assert report["training"]["clean"] == 48 and report["training"]["artifact"] == 32
    assert report["validation"]["auroc"] > 0.9
    assert f"AUROC {report['validation']['auroc']:.3f}" in said and "12 clean and 8 artifact" in said
    assert sorted(p.name for p in folder.iterdir()) == ["artifact_head.json", "artifact_head.safetensors"]


def test_scores_are_one_minus_the_probability_with_a_map(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = trained
    from diffalign import image_lists

    names = [image_lists.find(str(pictures(tmp_path / kind, 6, kind == "bad", 9))) for kind in ("good", "bad")]
    images = torch.stack([image_lists.read(i) for kind in names for i in kind])
    output, logit = score(head(folder), images), score(head(folder, scale="logit"), images)
    torch.testing.assert_close(output.scores, logit.scores.sigmoid())
    assert output.scores[:6].mean() > 0.5 > output.scores[6:].mean()
    found = output.extra["map"]
    assert found.shape == (12, 4, 4) and ((found > 0) & (found < 1)).all()
    alone = score(head(folder), images[3:4])
    torch.testing.assert_close(alone.scores, output.scores[3:4])


def test_the_gradient_is_that_of_the_score(trained: tuple[Path, str]) -> None:
    scorer = head(trained[0], scale="logit")
    # between 8-bit levels, so that the rounding of the preprocessing does not hide a small step
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    score(scorer, images).scores.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.abs().max() > 0
    step = 0.05 * images.grad.sign()
    with torch.no_grad():
        better = score(scorer, (images + step).clamp(0, 1)).scores
        assert better > score(scorer, (images - step).clamp(0, 1)).scores


def test_a_clip_tower_serves_as_well(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        image_size=16, patch_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    backbone = _artifact.Features(str(tmp_path / "clip")).load("fp32", "cpu", True)
    assert backbone.tokens(torch.rand(2, 3, 20, 12)).shape == (2, 1, 17, 16)
    with pytest.raises(UserError, match="sees 16 x 16 pixels alone"):
        _artifact.Features(str(tmp_path / "clip"), None, 32).load("fp32", "cpu", True)


def test_folders_that_are_no_head_are_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no artifact head: it has no artifact_head.json; make one with diffalign train"
    ):
        head(tmp_path)
    note = json.loads((trained[0] / "artifact_head.json").read_text())
    weights = load_file(trained[0] / "artifact_head.safetensors")

    def variant(note: Any, weights: dict[str, Tensor]) -> Path:
        (tmp_path / "artifact_head.json").write_text(json.dumps(note))
        save_file(weights, tmp_path / "artifact_head.safetensors")
        return tmp_path

    with pytest.raises(UserError, match="cannot be read; train the head again"):
        head(variant({"report": {}}, weights))
    lacking = {k: t for k, t in weights.items() if k != "patch.1.bias"}
    with pytest.raises(UserError, match="lacks patch.1.bias"):
        head(variant(note, lacking))
    with pytest.raises(UserError, match="has another shape of mean"):
        head(variant(note, {**weights, "mean": torch.zeros(2, 3)}))
    for seed, width in ((0, 32), (1, 16)):  # of the same name, as when a model is published anew
        other = note | {"features": {"model": str(features(tmp_path / f"dino{seed}", width, seed))}}
        with pytest.raises(UserError, match="was trained on other features than those of .*dino.* as it is now"):
            head(variant(other, weights))


@pytest.mark.parametrize(
    ("clean", "output", "more", "said"),
    [
        (9, "new", [], "9 clean pictures are too few, at least 10"),
        (12, "full", [], "is not empty; name a new folder"),
        (12, "full/x/head", ["--features", "nowhere"], "give another --output"),  # before anything loads
        (12, "new", ["--steps", "0"], "--steps must be at least 1"),
        (12, "new", ["--size", "0"], "--size must be at least 1, got 0"),
        (12, "new", ["--size=-16"], "--size must be at least 1, got -16"),
        (12, "new", ["--features", "nowhere"], "'nowhere' does not exist"),
        (12, "new", ["--size", "10"], "size 10 is no multiple of the 4 pixels"),
    ],
)
def test_mistakes_are_one_sentence(
    clean: int, output: str, more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    folders = [str(pictures(tmp_path / "clean", clean, False)), str(pictures(tmp_path / "bad", 12, True))]
    model = ["--features", str(features(tmp_path / "dino")), "--device", "cpu"]
    args = ["--clean", folders[0], "--artifact", folders[1], "--output", str(tmp_path / output), *model, *more]
    assert cli.main(["train-artifact", *args]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_temperature_is_not_a_matter_of_taste() -> None:
    z, artifact = torch.tensor([-4.0, -1.0, 1.0, 4.0, 2.0, -2.0]), torch.tensor([False, True, False, True, True, False])
    t = artifact_training.temperature(z, artifact)
    target = torch.where(artifact, 4 / 5, 1 / 5).double()

    def loss(t: float) -> float:
        return float(F.binary_cross_entropy_with_logits(z.double() / t, target))

    assert loss(t) <= min(loss(t * 1.01), loss(t / 1.01)) and math.isfinite(t)


@pytest.mark.parametrize("size", [0, -8])
def test_sizes_that_are_none_are_refused(size: int, tmp_path: Path) -> None:
    for name in ("dino", "dino_adversarial"):
        with pytest.raises(UserError, match=f"reward '{name}', size: input should be greater than or equal to 1"):
            rewards.resolve({"name": name, "references": "shapes-dusk", "size": size})
    with pytest.raises(UserError, match=f"size {size} is no multiple of the 4 pixels"):  # of a head's own note
        _artifact.Features(str(features(tmp_path / "dino")), None, size).load("fp32", "cpu", True)


def test_a_head_that_learnt_nothing_is_called_so(trained: tuple[Path, str], tmp_path: Path) -> None:
    useless = "little better than chance: do not use it as a reward"
    assert useless not in trained[1]
    measures = {"auroc": 0.59, "balanced_accuracy": 0.5, "clean": 12, "artifact": 8}
    report = {"validation": measures, "training": measures, "temperature": 2981.0}
    assert useless in artifact_training.sentence(report)
    assert useless not in artifact_training.sentence(report | {"validation": measures | {"auroc": 0.61}})


def test_a_full_disk_leaves_nothing_in_the_way_of_the_next_run(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(pictures(tmp_path / "clean", 12, False)), str(pictures(tmp_path / "bad", 12, True))]
    model = ["--features", str(features(tmp_path / "dino")), "--device", "cpu", "--steps", "1"]
    args = ["--clean", folders[0], "--artifact", folders[1], "--output", str(tmp_path / "head"), *model]
    synced: list[Path] = []

    def full(path: Path) -> None:
        synced.append(path)
        if len(synced) == 2:  # the weights are there, the note is not
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writing, "sync", full)
        assert cli.main(["train-artifact", *args]) == 2
    assert "could not write" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "head").iterdir()] == ["artifact_head.safetensors"]
    assert cli.main(["train-artifact", *args]) == 0
    assert cli.main(["train-artifact", *args]) == 2  # a whole head stays
    assert "is not empty; name a new folder" in capsys.readouterr().err
