"""What eval asks of a model before it writes anything; other families of diffusers; a reward that never answers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import any_pipelines
import pytest
import tiny_models
import tiny_pipelines
from transformers import CLIPTextConfig, CLIPTextModel

from diffalign import adapters, pipelines
from diffalign.cli import main
from diffalign.eval import gallery, making
from diffalign.eval.contestant import Wanted
from diffalign.generate import native_size
from diffalign.pipelines.any import AnyPipeline
from diffalign.types import UserError

TESTS = Path(__file__).parent
SMALL = ["--images", "1", "--steps", "2", "--device", "cpu", "--probes", "1", "--no-noise-floor"]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS))
        patch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
        yield


def sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 in small, which no file of this library's serves but any.py."""
    pipe, _ = tiny_pipelines.sd15()
    tokenizer = tiny_models.clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tiny_models.TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipe.register_modules(text_encoder=CLIPTextModel(config).eval(), tokenizer=tokenizer)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of our family, one of another, a LoRA for neither, and prompts."""
    root = tmp_path_factory.mktemp("world")
    tiny_models.sd3_folder(root / "sd3")
    sd15(root / "sd15")
    other = pipelines.load("tiny-sd3", device="cpu")
    adapters.add_lora(other, 2, 2.0)
    adapters.export_lora(other, root / "lora")
    (root / "prompts.txt").write_text("a red circle\ntwo squares\n", "utf-8")
    return root


def command(world: Path, folder: Path, models: Sequence[str], *options: str) -> list[str]:
    prompts = ["--prompts", str(world / "prompts.txt"), "--rewards", "reward_functions.redness"]
    return ["eval", "--models", *models, *prompts, "--out", str(folder), *SMALL, *options]


@pytest.mark.parametrize("name", any_pipelines.CASES)
def test_the_size_is_known_without_the_weights(name: str, tmp_path: Path) -> None:
    pipe, _ = any_pipelines.CASES[name]()
    pipe.save_pretrained(tmp_path)
    outline = making.outlined(Wanted("x", "x", "model", str(tmp_path)), "fp32")
    assert all(p.is_meta for part in (outline.network, outline.pipe.vae) for p in part.parameters())
    if name == "zimage":
        with pytest.raises(UserError, match="ZImagePipeline does not tell its image size; add --height and --width"):
            making.side(outline)
    else:
        assert making.side(outline) == making.side(AnyPipeline(pipe)) > 0
    if hasattr(pipe, "default_sample_size"):
        assert making.side(outline) == native_size(pipe)


def test_the_size_of_the_embedded_model() -> None:
    outline = making.outlined(Wanted("x", "x", "model", "tiny-sd3"), "fp32")
    assert making.side(outline) == making.side(pipelines.load("tiny-sd3", device="cpu")) == 64
    assert outline.latent_shape(64, 64) == (8, 8, 8)


def empty(world: Path, at: Path) -> str:
    at.mkdir()
    return f"x={at}"


def cut_off(world: Path, at: Path) -> str:
    shutil.copytree(world / "sd3", at)
    (weights,) = (at / "transformer").glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size - 1)
    return f"x={at}"


def without_weights(world: Path, at: Path) -> str:
    shutil.copytree(world / "sd15", at)
    for weights in (at / "unet").glob("*.safetensors"):
        weights.unlink()
    return f"x={at}"


def no_lora(world: Path, at: Path) -> str:
    at.mkdir()
    (at / LORA).write_bytes(b"not one")
    return f"x={at}@base={world / 'sd3'}"


def run_that_stopped(world: Path, at: Path) -> str:
    at.mkdir()
    settings = {
        "model": {"path": str(world / "sd3")}, "algorithm": {"name": "grpo"}, "rewards": [{"name": "geneval"}],
        "trainer": {"ema": 0.9}, "adapter": {"name": "lora"},
    }  # fmt: skip
    (at / "config.yaml").write_text(json.dumps(settings))
    return f"x={at}"


def run_without_its_lora(world: Path, at: Path) -> str:
    spec = run_that_stopped(world, at)
    (at / "lora").mkdir()
    return spec


def other_yaml(world: Path, at: Path) -> str:
    at.mkdir()
    (at / "config.yaml").write_text("{]")
    return f"x={at}"


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (lambda world, at: f"x={at}", [], "there is no '"),
        (lambda world, at: "x=no-such-owner/no-such-model", [], "cannot load model 'no-such-owner/no-such-model'"),
        (lambda world, at: "x=tiny-sd3@revision=main", [], "revision 'main' applies to hub ids only"),
        (empty, [], "cannot load model"),
        (cut_off, [], "cannot read the weights"),
        (without_weights, [], "has no weights"),
        (no_lora, [], "cannot read a LoRA from"),
        (lambda world, at: f"x={world / 'lora'}@base={world / 'sd3'}", [], "does not fit"),
        (lambda world, at: f"x={world / 'lora'}@base={world / 'sd15'}", [], "fits no part of this StableDiffusion"),
        (run_that_stopped, [], "is not there yet; let the run finish"),
        (run_without_its_lora, [], "cannot read a LoRA from"),
        (other_yaml, [], "is not that of a training run"),
        (lambda world, at: f"x={world / 'sd15'}@kernel=dpm2", [], "its pipeline's own scheduler; leave kernel out"),
        (lambda world, at: "x=tiny-sd3+fk:particles=2@kernel=dpm2", [], "steering has a kernel of its own"),
        (lambda world, at: "x=tiny-sd3", ["--height", "4096"], "must be multiples of"),
        (lambda world, at: "x=tiny-sd3", ["--device", "nothing"], "cannot compute on the device 'nothing'"),
    ],
)
def test_a_model_that_will_not_do_is_found_before_anything_is_written(
    world: Path,
    tmp_path: Path,
    spec: Callable[[Path, Path], str],
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = set(tmp_path.iterdir())
    models = [f"base={world / 'sd3'}", spec(world, tmp_path / "it")]
    assert main(command(world, tmp_path / "e", models, *options)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "it"}


def test_another_family_beside_ours(world: Path, tmp_path: Path) -> None:
    """Sampled and steered by its own pipeline, with the guidance it has by default, and scored like the others; a
    reward that never answers leaves its column empty."""
    folder, other = tmp_path / "e", world / "sd15"
    models = [
        f"base={world / 'sd3'}",
        f"other={other}",
        f"plain={other}@guidance=1",
        f"two={other}+best_of_n:particles=2",
    ]
    rewards = ["reward_functions.asleep", "reward_functions.wordy"]
    assert main(command(world, folder, models, "--rewards", *rewards)) == 0
    found = gallery.read(folder)
    assert not found.problems and (found.asked.height, found.asked.width) == (64, 64)
    nfe = {name: {m.nfe for m in entry.made.values()} for name, entry in found.entries.items()}
    assert nfe == {"base": {2}, "other": {4}, "plain": {2}, "two": {8}}
    assert {name: entry.about.guidance for name, entry in found.entries.items()} == {
        "base": 1.0, "other": 7.5, "plain": 1.0, "two": 7.5
    }  # fmt: skip
    base, own, plain, two = found.entries.values()
    for key in found.keys:
        assert len({e.made[key].digest for e in (base, own, plain)}) == 3
        assert (
            two.value("redness", key) > own.value("redness", key) - 1e-4
        )  # one of the two is its image, but for rounding
        assert not any(entry.scores["asleep"][key].valid for entry in found.entries.values())
    probes = {
        probe: score for (reward, probe), found in base.probes.items() if reward == "wordy" for score in found.values()
    }
    assert probes["shuffled"].score == 3 and probes["degraded"].score == 1
    assert not probes["unprompted"].valid and "IndexError" in probes["unprompted"].details["error"]
    page = (folder / "index.html").read_text("utf-8")
    assert "base: asleep could not score 2 of 2 images, which are left out: asleep" in page
    assert json.loads((folder / "report.json").read_text("utf-8"))["rewards"]


def test_the_size_of_another_family_as_the_baseline(world: Path, tmp_path: Path) -> None:
    assert main(command(world, tmp_path / "e", [f"base={world / 'sd15'}"])) == 0
    asked = gallery.read(tmp_path / "e").asked
    assert (asked.height, asked.width) == (32, 32)
