"""Heads that ask a vision-language model, against numbers made with transformers and the official parsers."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import ROOT, cases, close, load
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from diffalign.rewards import _asking
from diffalign.rewards._asking import Local, heard, probability
from diffalign.rewards._server import Failed
from diffalign.rewards._vlm import TURN, Look, Vlm
from diffalign.rewards.artifact_vlm import published
from diffalign.rewards.vlm_echo import VlmEcho
from diffalign.rewards.yes_probability import YesProbability

QUERY, PROMPT = "query", "prompt"
FP32 = 1e-4
ECHO, YES = load("rewards", "vlm_echo"), load("rewards", "vlm_yes")
PIXELS = np.load(ROOT / "rewards" / "vlm_echo.npz")
EXACT = 1e-12


@pytest.fixture(scope="module")
def model() -> Any:
    stated = json.loads((ROOT / "rewards" / "vlm_tiny_config.json").read_text())
    config = AutoConfig.for_model(stated.pop("model_type"), **stated)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.load_state_dict(load_file(ROOT / "rewards" / "vlm_tiny.safetensors"))
    return model.eval().requires_grad_(False)


def asked(model: Any, case: dict[str, Any]) -> Local:
    """The model with the case's ids in place of a tokenizer, of which the golden file has none."""
    query, prefix = ECHO["query_ids"], case["prefix_ids"]
    head = prefix.index(model.config.vision_start_token_id)
    tail = prefix[prefix.index(model.config.vision_end_token_id) + 1 + len(query) :]
    ids = {"<|im_start|>user\n": prefix[:head], TURN: tail, "<|im_end|>": [case["eos_id"]]}
    ids |= {QUERY: query, PROMPT: case["prompt_ids"]}

    class Words:
        def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool = False) -> Any:
            return SimpleNamespace(input_ids=ids[text])

        def decode(self, ids: list[int]) -> str:
            return f"{ids[0]} "

    vision = model.config.vision_config
    half = (0.5, 0.5, 0.5)
    look = Look(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, half, half, low=1, high=10**9)
    return Local(Vlm(model, Words(), look), [YES["yes_id"]], [YES["no_id"]])


def picture(i: int) -> Tensor:
    return torch.from_numpy(PIXELS[f"image{i}"]).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("i", range(len(ECHO["cases"])))
def test_pixels_and_ids(model: Any, i: int) -> None:
    case = cases("rewards", "vlm_echo")[i]
    vlm, image = asked(model, case).vlm, picture(i)
    assert list(image.shape[2:]) == case["size"]
    fitted = vlm.look.fit(image)[0]
    torch.testing.assert_close(
        vlm.look.patches(fitted), torch.from_numpy(PIXELS[f"pixel_values{i}"]), atol=1e-6, rtol=0
    )
    assert [vlm.look.grid(fitted)] == case["image_grid_thw"]
    assert vlm.prefix([fitted], QUERY) == case["prefix_ids"]


@pytest.mark.parametrize("i", range(len(ECHO["cases"])))
def test_echo(model: Any, i: int) -> None:
    case = cases("rewards", "vlm_echo")[i]
    assert set(case) == {
        "size", "prefix_ids", "prompt_ids", "eos_id", "image_grid_thw", "reward_mean", "reward_sum", "token_logprobs",
        "mean_with_eos", "token_logprobs_with_eos", "text_only_mean",
    }  # fmt: skip

    def scored(**options: Any) -> Any:
        head = VlmEcho(name="vlm_echo", query=QUERY, **options)
        return head.score(asked(model, case), picture(i), [PROMPT])

    mean = scored()
    close(mean.scores, [case["reward_mean"]], FP32)
    close(mean.extra["log_probs"][0], case["token_logprobs"], FP32)
    close(scored(aggregate="sum").scores, [case["reward_sum"]], FP32)
    ended = scored(end_token=True)
    close(ended.scores, [case["mean_with_eos"]], FP32)
    close(ended.extra["log_probs"][0], case["token_logprobs_with_eos"], FP32)
    close(mean.scores - scored(pmi=True).scores, [case["text_only_mean"]], FP32)


@pytest.mark.parametrize("case", cases("rewards", "vlm_yes"))
def test_yes(model: Any, case: dict[str, Any]) -> None:
    assert set(case) == {"case", "p_yes", "p_yes_given_yes_no"}
    model_and_ids = asked(model, ECHO["cases"][case["case"]])
    for normalise, key in (("full", "p_yes"), ("yes_no", "p_yes_given_yes_no")):
        head = YesProbability(name="yes_probability", template="{prompt}", normalise=normalise)  # type: ignore[arg-type]
        close(head.score(model_and_ids, picture(case["case"]), [QUERY], [{}]).scores, [case[key]], 0, FP32)


def read(top: dict[str, float], yes: Any = _asking.YES, no: Any = _asking.NO) -> float | None:
    """None where the answer is not valid."""
    try:
        return probability(heard(top, yes, no), "yes_no").item()
    except Failed:
        return None


@pytest.mark.parametrize("case", load("rewards", "judge_parsers")["yesno"])
def test_yes_among_the_likeliest(case: dict[str, Any]) -> None:
    assert set(case) == {"logprobs", "plain", "canonical"}
    exact = {token: logp for token, logp in case["logprobs"].items() if token in ("Yes", "No")}
    for top, expected in ((exact, case["plain"]), (case["logprobs"], case["canonical"])):
        found = read(top)
        if found is None:  # the official parser makes it a 0
            assert expected == 0 and not {t.strip().lower() for t in top} & {"yes", "no"}
        else:
            assert found == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("case", cases("distill", "artifact_yes_no"))
def test_artifacts(case: dict[str, Any]) -> None:
    assert set(case) == {"top_logprobs", "ref_p_artifact", "ref_reward", "robust_p_artifact"}
    top = [(token, logp) for token, logp in case["top_logprobs"]]
    assert published(top) == pytest.approx(case["ref_p_artifact"], abs=1e-9)
    assert 1 - published(top) == pytest.approx(case["ref_reward"], abs=1e-9)
    found = read(dict(top))
    if found is None:  # here it is left out instead of being undecided
        assert case["robust_p_artifact"] == 0.5
        assert not {token.strip().lower() for token, _ in top} & {"yes", "no"}
    else:
        assert found == pytest.approx(case["robust_p_artifact"], abs=1e-9)
