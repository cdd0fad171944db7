"""A few-step generator: its folder for plain diffusers, what the folder remembers, and the commands that use it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image

from diffalign import adapters, pipelines
from diffalign.cli import main
from diffalign.few_step_export import complete_lora, scheduler_for
from diffalign.few_steps import FewSteps
from diffalign.samplers import denoise, drain
from diffalign.sections import Sampling
from diffalign.sizes import LORA_FILE
from diffalign.steer import Steer
from diffalign.types import UserError

TESTS = Path(__file__).parent
FOUR, UNEVEN = (1000.0, 750.0, 500.0, 250.0), (1000.0, 900.0, 400.0)
WALKED = [1.0, 0.9, 0.75, 0.5, 0.0]  # FOUR under shift 3
TEXTS = ["a red circle", "a star"]


def sampling(timesteps: tuple[float, ...] = FOUR, eta: float = 0.0) -> Sampling:
    return Sampling.model_validate({"timesteps": timesteps, "kernel": "cps", "eta": eta, "height": 64, "width": 64})


def exported(base: Path, target: Path, **options: Any) -> Path:
    pipe = pipelines.load(base, device="cpu")
    return adapters.export_full(pipe, target, sampling=sampling(**options))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its scheduler has shift 3, and it has no T5."""
    folder = tiny_models.sd3_folder(tmp_path_factory.mktemp("base") / "sd3")
    (folder / "diffalign.json").write_text('{"max_sequence_length": 0}')
    return folder


@pytest.fixture(scope="module")
def few(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(base, tmp_path_factory.mktemp("few") / "model", eta=0.9)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ours(folder: Path, sigmas: list[float] | None = None) -> torch.Tensor:
    """Images by our sampler without noise on the way."""
    pipe = pipelines.load(folder, device="cpu")
    grid = pipe.sigmas(pipe.few_steps.timesteps, 64, 64) if sigmas is None else torch.tensor(sigmas)
    return pipe.decode(drain(denoise(pipe.denoiser(pipe.encode(TEXTS)), noise(), grid, "cps", 0.0)))


def test_timesteps_are_shifted_once(base: Path) -> None:
    pipe = pipelines.load(base, device="cpu")
    torch.testing.assert_close(pipe.sigmas(FOUR, 64, 64), torch.tensor(WALKED), rtol=0, atol=1e-6)
    torch.testing.assert_close(pipe.sigmas((1000.0,), 64, 64), torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)
    unshifted = pipelines.load("tiny-sd3", device="cpu").sigmas(FOUR, 64, 64)
    torch.testing.assert_close(unshifted, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), rtol=0, atol=1e-6)


def test_dynamic_shift_follows_the_size() -> None:
    from diffalign.pipelines.sd3 import SD3

    pipe = SD3(tiny_models.sd3_pipe(dynamic_shift=True))
    for side in (64, 128):
        mu = 0.5 + (side**2 / 256 - 256) * 0.65 / (4096 - 256)  # tokens are 16 pixels wide
        raw = torch.tensor(FOUR, dtype=torch.float64) / 1000
        wanted = np.exp(mu) / (np.exp(mu) + 1 / raw - 1)
        torch.testing.assert_close(pipe.sigmas(FOUR, side, side)[:-1].double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 50])
def test_a_scheduler_of_diffusers_walks_even_timesteps(shift: float, count: int, tmp_path: Path) -> None:
    timesteps = tuple(1000 * (1 - i / count) for i in range(count))
    found = scheduler_for(FlowMatchEulerDiscreteScheduler(shift=shift), FewSteps(timesteps))
    found.save_pretrained(tmp_path)
    again = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    again.set_timesteps(count)
    raw = torch.tensor([*timesteps, 0.0], dtype=torch.float64) / 1000
    torch.testing.assert_close(again.sigmas.double(), shift * raw / (1 + (shift - 1) * raw), rtol=0, atol=1e-6)


def test_no_scheduler_walks_others() -> None:
    assert scheduler_for(FlowMatchEulerDiscreteScheduler(shift=3.0), FewSteps(UNEVEN)) is None
    assert scheduler_for(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), FewSteps(FOUR)) is None


PLAIN = """
import json, sys
import torch
{block}
pipe.set_progress_bar_config(disable=True)
x = torch.randn(2, pipe.transformer.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
images = pipe({texts}, {call}, latents=x, output_type="pt").images
torch.save({{"images": images, "sigmas": pipe.scheduler.sigmas, "alone": "diffalign" not in sys.modules}}, sys.argv[1])
"""


def by_diffusers(folder: Path, ours_too: bool = False) -> dict[str, Any]:
    """What the README's program gives in a Python that knows nothing of ours, or that does; its call is repeated with
    our noise."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    call = re.search(r'pipe\("a red circle", (.*)\)\.images', block)
    assert call is not None
    program, result = PLAIN.format(block=block, texts=TEXTS, call=call[1]), folder.parent / "result.pt"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(TESTS.parent)} if ours_too else {}
    done = subprocess.run(
        [sys.executable, "-c", program, str(result)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(result)
    return found


@pytest.mark.parametrize("timesteps", [FOUR, UNEVEN])
def test_plain_diffusers_gives_our_images(base: Path, tmp_path: Path, timesteps: tuple[float, ...]) -> None:
    folder = exported(base, tmp_path / "model", timesteps=timesteps)
    theirs = by_diffusers(folder)
    raw = torch.tensor([*timesteps, 0.0]) / 1000
    torch.testing.assert_close(theirs["sigmas"], 3 * raw / (1 + 2 * raw), rtol=0, atol=1e-6)
    assert theirs["alone"]
    torch.testing.assert_close(theirs["images"], ours(folder), rtol=0, atol=2e-5)


@pytest.mark.parametrize("with_t5", [False, True])
def test_text_encoders_are_those_of_the_folder(with_t5: bool, tmp_path: Path) -> None:
    """Prompts of 24 tokens of T5, whether there is one or not."""
    folder = tiny_models.sd3_folder(tmp_path / "base", with_t5)
    pipe = pipelines.load(folder, device="cpu", max_sequence_length=24)
    model = adapters.export_full(pipe, tmp_path / "model", sampling=sampling())
    said = (model / "README.md").read_text("utf-8")
    assert ("text_encoder_3=None, tokenizer_3=None" in said) is not with_t5 and "max_sequence_length=24" in said
    torch.testing.assert_close(by_diffusers(model)["images"], ours(model), rtol=0, atol=2e-5)
    pipe.release_encoders()  # that of a LoRA says the same, whether the encoders are still there or not
    (tmp_path / "lora").mkdir()
    complete_lora(tmp_path / "lora", pipe, sampling())
    said = (tmp_path / "lora" / "README.md").read_text("utf-8")
    assert ("text_encoder_3=None, tokenizer_3=None" in said) is not with_t5


def test_the_folder_needs_no_more_than_the_number_of_steps(few: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(few, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    pipe("a star", num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(WALKED), rtol=0, atol=1e-6)
    assert pipe.scheduler.config.stochastic_sampling  # eta 0.9 is nearer to 1 than to 0


def test_a_folder_remembers_its_steps_and_its_familys_scheduler(base: Path, few: Path, tmp_path: Path) -> None:
    pipe, before = (pipelines.load(f, device="cpu") for f in (few, base))
    assert pipe.few_steps == FewSteps(FOUR, 0.9) and before.few_steps is None
    for steps in (4, 7, FOUR, UNEVEN):
        assert torch.equal(pipe.sigmas(steps, 64, 64), before.sigmas(steps, 64, 64))
    pipe.release_encoders()  # what is exported once more is read from a folder with the scheduler of few steps
    adapters.export_full(pipe, tmp_path / "again", sampling=sampling((1000.0, 500.0)))
    again = pipelines.load(tmp_path / "again", device="cpu")
    assert again.few_steps == FewSteps((1000.0, 500.0), 0.0)
    torch.testing.assert_close(again.sigmas(FOUR, 64, 64), torch.tensor(WALKED), rtol=0, atol=1e-6)
    (tmp_path / "again" / "diffalign.json").write_text('{"few_steps": 4}')
    with pytest.raises(UserError, match="diffalign.json' is damaged"):
        pipelines.load(tmp_path / "again", device="cpu")


def lora_of(model: Path | str, folder: Path, **options: Any) -> Path:
    """As a run writes it."""
    pipe = pipelines.load(model, device="cpu")
    adapters.add_lora(pipe, 2, 2.0)
    adapters.export_lora(pipe, folder)
    complete_lora(folder, pipe, sampling(**options))
    return folder


def test_a_lora_remembers_and_tells_the_call(base: Path, tmp_path: Path) -> None:
    folder = lora_of(base, tmp_path / "lora", eta=0.9)
    for lora in (folder, folder / LORA_FILE):
        assert pipelines.few_steps(base, lora) == FewSteps(FOUR, 0.9)
    assert pipelines.few_steps(base) is None
    said = (folder / "README.md").read_text("utf-8")
    assert "sigmas=[1, 0.75, 0.5, 0.25]" in said and "from_config(pipe.scheduler.config, stochastic_s" in said
    theirs = by_diffusers(folder)
    assert theirs["alone"]
    torch.testing.assert_close(theirs["sigmas"], torch.tensor(WALKED), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("timesteps", "eta", "changed"),
    [
        (FOUR, 0.9, ()),
        (FOUR, 0.0, ("stochastic_sampling",)),
        (UNEVEN, 0.0, ("shift", "shift_terminal", "stochastic_sampling")),
    ],
)
def test_a_lora_of_a_few_step_model(
    few: Path, tmp_path: Path, timesteps: tuple[float, ...], eta: float, changed: tuple[str, ...]
) -> None:
    """Its scheduler walks FOUR with eta 0.9: the README uses it for these steps, and undoes it for others."""
    folder = lora_of(few, tmp_path / "lora", timesteps=timesteps, eta=eta)
    said = (folder / "README.md").read_text("utf-8")
    assert f'from_pretrained("{few}", ' in said and ("num_inference_steps=4" in said) is (timesteps == FOUR)
    assert set(re.findall(r"(\w+)=", "".join(re.findall(r"from_config\((.*)\)", said)))) == set(changed)
    theirs, raw = by_diffusers(folder), torch.tensor([*timesteps, 0.0]) / 1000
    torch.testing.assert_close(theirs["sigmas"], 3 * raw / (1 + 2 * raw), rtol=0, atol=1e-6)
    if not eta:  # the LoRA, as it begins, changes nothing
        torch.testing.assert_close(theirs["images"], ours(few, theirs["sigmas"].tolist()), rtol=0, atol=2e-5)


def test_a_lora_of_an_embedded_model(tmp_path: Path) -> None:
    folder = lora_of("tiny-sd3", tmp_path / "lora")
    assert 'from_pretrained(embedded_path("tiny-sd3"), ' in (folder / "README.md").read_text("utf-8")
    sigmas = by_diffusers(folder, ours_too=True)["sigmas"]
    torch.testing.assert_close(sigmas, torch.tensor([1, 0.75, 0.5, 0.25, 0]), rtol=0, atol=1e-6)


def test_hub_ids_remember_too(few: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the hub with a few-step model on a branch, beside the family's own on main."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--owner--name"
    for branch, source, commit in [("main", base, "a" * 40), ("distilled", few, "b" * 40)]:
        shutil.copytree(source, stored / "snapshots" / commit)
        (stored / "refs").mkdir(exist_ok=True)
        (stored / "refs" / branch).write_text(commit)
    assert pipelines.few_steps("owner/name") is None and pipelines.few_steps("nobody/nothing") is None
    assert pipelines.few_steps("owner/name", revision="distilled") == FewSteps(FOUR, 0.9)
    pipe = pipelines.load("owner/name", "distilled", device="cpu")
    assert pipe.few_steps == FewSteps(FOUR, 0.9) and pipe.max_sequence_length == 0
    torch.testing.assert_close(pipe.sigmas(FOUR, 64, 64), torch.tensor(WALKED), rtol=0, atol=1e-6)
    (tmp_path / "lora").mkdir()
    complete_lora(tmp_path / "lora", pipe, sampling())
    said = (tmp_path / "lora" / "README.md").read_text("utf-8")
    assert 'from_pretrained("owner/name", revision="distilled", text' in said and "num_inference_steps=4" in said


def generated(model: Path, folder: Path, *options: str) -> list[Any]:
    asked = [word for text in TEXTS for word in ("--prompt", text)]
    assert main(["generate", "--model", str(model), *asked, "--output", str(folder), "--device", "cpu", *options]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def alike(a: Any, b: Any) -> bool:
    """But for the rounding of another batch."""
    return int(np.abs(a.astype(int) - b).max()) <= 1


def test_generation_by_default_and_otherwise(base: Path, few: Path, tmp_path: Path) -> None:
    by_default = generated(few, tmp_path / "default")
    assert same(by_default, generated(base, tmp_path / "told", "--timesteps", "1000,750,500,250", "--eta", "0.9"))
    alone = generated(few, tmp_path / "alone", "--micro-batch", "1")  # each image has noise of its own
    assert all(alike(a, b) for a, b in zip(by_default, alone, strict=True))
    quiet = generated(few, tmp_path / "quiet", "--eta", "0")
    assert not same(quiet, by_default)
    assert same(quiet, generated(base, tmp_path / "euler", "--timesteps", "1000,750,500,250"))
    assert same(
        generated(few, tmp_path / "plain", "--steps", "4"), generated(base, tmp_path / "plainer", "--steps", "4")
    )


STEER = ["steer", "--reward", "steer_rewards.redness", "--prompt", TEXTS[0], "--device", "cpu", "--compare", "base"]


@pytest.mark.parametrize(
    ("method", "forwards"),
    [("best_of_n:particles=3", 12), ("noise_search:repeats=2,particles=2", 20), ("fk:particles=3,lam=20", 12)],
)
def test_steering_by_the_models_own_steps(
    few: Path, tmp_path: Path, method: str, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    folder = tmp_path / "out"
    assert main([*STEER, "--model", str(few), "--method", method, "--out", str(folder)]) == 0
    settings = json.loads((folder / "steer.json").read_text())
    assert (settings["steps"], settings["timesteps"], settings["kernel"]) == (4, list(FOUR), "cps:0.9")
    (line,) = [json.loads(text) for text in (folder / "run.jsonl").read_text("utf-8").splitlines()]
    found, plain = line["arms"].values()
    assert (found["nfe"], plain["nfe"]) == (forwards, 4)
    assert found["rewards"][0] >= plain["rewards"][0] and not found["warnings"]
    image = generated(few, tmp_path / "plain")[0]
    assert alike(np.asarray(Image.open(folder / plain["images"][0])), image)
    assert not alike(image, generated(few, tmp_path / "quiet", "--eta", "0")[0])


def test_a_search_over_the_start_keeps_the_noise_of_the_way(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With neighbours at no distance, all images of a zero-order search are one; plain ones differ."""
    monkeypatch.syspath_prepend(str(TESTS))
    pipe = pipelines.load(few, device="cpu")
    options = {"name": "noise_search", "particles": 2, "repeats": 1}
    near = Steer(pipe, "steer_rewards.redness", {**options, "similarity": 1 - 1e-12})(TEXTS[0], generator=0)
    torch.testing.assert_close(near.pixels, near.pixels[:1].expand(3, -1, -1, -1), rtol=0, atol=1e-4)
    free = Steer(pipe, "steer_rewards.redness", {**options, "algorithm": "random"})(TEXTS[0], generator=0)
    assert float((free.pixels[0] - free.pixels[1]).abs().max()) > 0.01


@pytest.mark.parametrize("command", ["generate", "steer"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--timesteps", "750,500"], "timesteps: must fall from 1000, pure noise, such as [1000, 750, 500, 250]"),
        (["--timesteps", "1000,500,500"], "timesteps: must fall from 1000"),
        (["--timesteps", "1000,0"], "must be greater than 0, got 0.0"),
        (["--timesteps", "1000;500"], "--timesteps '1000;500' is no list of numbers, such as 1000,500"),
        (
            ["--timesteps", "1000,500", "--steps", "2"],
            "steps are those of the plain grid, so they contradict timesteps",
        ),
        (["--timesteps", "1000,500", "--eta", "1.5"], "eta 1.5 does not suit kernel 'cps'; use 0 to 1"),
        (["--eta", "-0.5"], "must be greater than or equal to 0, got -0.5"),
    ],
)
def test_mistakes(
    command: str, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = {"generate": "--output", "steer": "--out"}[command]
    more = ["--reward", "jpeg"] if command == "steer" else []
    asked = [command, "--model", "tiny-sd3", "--prompt", "a star", out, str(tmp_path / "x"), *more]
    assert main([*asked, *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_noise_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tiny-sd3", "--kernel", "cps:0.5", "--eta", "0.9", "--out", str(tmp_path / "x")]
    assert main([*STEER, *options]) == 2
    assert "--kernel has an eta of its own, as in cps:0.9; leave --eta out" in capsys.readouterr().err
