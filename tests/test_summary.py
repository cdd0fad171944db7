"""What `diffalign check` says of a run: steps, forward passes, memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffalign import loading, summary
from diffalign.config import Config


def config(preset: str = "sd35_medium_grpo", *overrides: str) -> Config:
    return loading.load(preset, overrides)


def test_the_summary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    told = summary.summary(config())
    for fact in (
        "9 of them flow_sde with eta 0.7, all of those trained (numbers 0-8 of 0-9), guidance 4.5",
        "11520 to sample + 10368 to train + 10368 of the reference + 5184 of the old policy, all doubled by guidance",
        "1000 epochs, 2000 updates",
        "estimated from the known configuration",
        "fits cards of 80 GB (10% kept free)",
        "too large for 24 GB (10% kept free); needs ",
    ):
        assert fact in told, fact
    rows = {
        line[:48].strip(): float(line[48:].replace("<", ""))
        for line in told.splitlines()
        if re.search(r" [<\d.]+$", line) and line.startswith("    ")
    }
    total = re.search(r"  total +([\d.]+)", told)
    assert total is not None and rows["transformer, bf16"] == 4.6 and rows["text encoders, bf16"] == 10.4
    assert max(rows.values()) < float(total[1]) < sum(rows.values())

    fast = summary.summary(config("sd35_medium_grpo_fast"))
    assert "3 of them cps with eta 0.8, all of those trained (numbers" in fast and "in the first epoch)" in fast
    assert "2 of those trained" in summary.plan(config("sd35_medium_grpo_fast", "algorithm.trained=2"))
    assert "those to sample doubled" in summary.plan(config("sd35_medium_grpo", "algorithm.cfg=false"))
    assert "not estimated: 'someone/something' is no SD3 model" in summary.memory(
        config("sd35_medium_grpo", "model=someone/something")
    )
    assert "even with model.encoders=offload" in summary.memory(
        config("sd35_medium_grpo", "trainer.prompts=400", "trainer.images_per_prompt=64")
    )
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "on 8 processes" in summary.summary(config()) and "144 images: latents" in summary.summary(config())
    assert summary.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


NFT = "algorithm={name: nft, timesteps: {count: 4}, kl: 0, old: {rate: 0}}"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "1280 to sample + 512 to train"),
        (["algorithm.kl=0.1"], "1280 to sample + 512 to train + 512 of the reference"),
        (["algorithm.old.rate=0.1"], "1280 to sample + 512 to train + 512 of the old policy"),
        (["algorithm.old={rate: 0.1, cap: 0}"], "1280 to sample + 512 to train"),
        (["trainer.updates_per_rollout=2"], "1280 to sample + 512 to train + 256 of the old policy"),
        (["trainer.passes=2"], "1280 to sample + 1024 to train + 512 of the old policy"),
        (["algorithm.timesteps.count=null"], "1280 to sample + 1152 to train"),
        (
            ["algorithm={name: awm, slow: {rate: 0}}", "trainer.passes=3"],
            "1280 to sample + 2304 to train + 2304 of the reference + 1536 of the old policy",
        ),
        (
            ["algorithm={name: awm, kl: {weight: 0}}"],
            "1280 to sample + 768 to train + 768 of the slow copy",
        ),
        (["algorithm={name: awm, kl: {weight: 0}, anchor: 0}"], "1280 to sample + 768 to train"),
        (["algorithm=raft", "advantage=sft", "algorithm.kl=1"], "1280 to sample + 768 to train + 768 of the reference"),
        (["algorithm={name: reward_functions.ForwardProcess}"], "1280 to sample + 128 to train"),
    ],
)
def test_the_forward_passes_of_methods_without_a_trajectory(overrides: list[str], told: str) -> None:
    assert f"an epoch {told}\n" in summary.plan(config("shapes_nft", NFT, *overrides))


def test_the_summary_of_a_method_without_a_trajectory() -> None:
    told = summary.summary(config("shapes_nft", NFT))
    for fact in (
        "10 steps of dpm2, guidance 1\n",
        "each image at 4 noise levels, 1 update an epoch\n",
        "images: latents  ",
    ):
        assert fact in told, fact
    assert "eta" not in told and "transitions" not in told
    noisy = summary.plan(config("shapes_nft", NFT, "sampling.kernel=cps", "trainer.passes=2"))
    assert (
        "10 steps of cps with eta 0.7, guidance 1\n" in noisy and "4 noise levels in each of 2 passes, 2 upd" in noisy
    )
    assert ", balanced by marble\n" in summary.plan(config("shapes_marble"))


def test_the_summary_of_distillation() -> None:
    one = summary.plan(loading.load("sd35_medium_acdmd"))
    for fact in (
        "acdmd, without rewards\n",
        "4 steps, 4 of them cps with eta 0.9, up to one that each epoch draws, 1 of those trained (numbers ",
        " + 7 to train + 7 of the teacher + 203 of the fake score, the teacher's doubled by guidance\n",
        "every 1100 epochs: 60 x 1 images, 4 steps\n",
    ):
        assert fact in one, fact
    two = summary.plan(loading.load("sd35_medium_rtdmd"))
    for fact in (
        "lora adapter on top of runs/sd35_medium_acdmd/lora\n",
        "3 of them cps with eta 0.9, 2 of those and 1 other trained (numbers ",
        "4608 to sample + 3456 to train + 1152 of the teacher + 4608 of the fake score, the teacher's doubled",
    ):
        assert fact in two, fact
    klein = summary.summary(loading.load("flux2_klein_acdmd"))
    assert ", teacher black-forest-labs/FLUX.2-klein-base-4B\n" in klein and "memory:     not estimated: " in klein
