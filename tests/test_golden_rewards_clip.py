"""Golden vectors of the CLIP-type reward heads: pixels, scores, and checkpoints in other formats."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import ROOT, load
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffalign.rewards import _blip, _clip, _loading, _open_clip, clip_score
from diffalign.rewards._preprocess import cropped, normalise, padded

AREA = ROOT / "rewards"
SIDE = 224
LEVEL = 0.0152  # one of 255 grey levels, normalised
VIEWS = {
    "hf_clip_pil": partial(cropped, crop="hf"),
    "hf_clip_torchvision": partial(cropped, crop="hf"),
    "open_clip": partial(cropped, crop="torchvision"),
    "imagereward": partial(cropped, crop="torchvision"),
    "nft_clip_bilinear_tensor": partial(cropped, crop="torchvision", quantize=False, method="bilinear"),
    "hpsv2_official_antialias_true": partial(padded, antialias=True),
    "hpsv2_official_antialias_false": partial(padded, antialias=False),
}
ROUGH = "hf_clip_torchvision"  # whose resampling of 8-bit tensors is not Pillow's; the rest is ours exactly


def picture(name: str) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    pixels = np.asarray(Image.open(AREA / f"{name}.png").convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


def arrays(name: str) -> dict[str, Tensor]:
    held = np.load(AREA / f"{name}.npz")
    return {key: torch.from_numpy(held[key]) for key in held.files}


PREPROCESS = load("rewards", "preprocess_224")["cases"]
assert PREPROCESS


@pytest.mark.parametrize("case", PREPROCESS, ids=lambda c: c["name"])
def test_preprocessing(case: dict[str, Any]) -> None:
    assert set(case) == {"name", "size", "max_abs_diff", *VIEWS}
    image = picture(case["name"])
    assert list(image.shape[2:]) == case["size"]
    sampled = {k.removeprefix(f"{case['name']}/"): t for k, t in SAMPLES.items() if k.startswith(f"{case['name']}/")}
    assert set(sampled) == {"idx", *VIEWS}
    where = sampled["idx"].long().unbind(1)
    for name, view in VIEWS.items():
        ours = normalise(view(image, SIDE))[0]
        off = (ours[where] - sampled[name]).abs()
        pixels = ours[0].numel() * 3
        slack = 0.05 * LEVEL if name == ROUGH else 1e-5
        assert off.max() <= (case["max_abs_diff"]["pil_vs_tvbackend"] if name == ROUGH else 0) + 1e-6, name
        if name == ROUGH:
            assert (off > 1e-6).float().mean() <= 0.05
        stated = case[name]
        assert set(stated) == {"mean", "std", "sum"}
        # the stated mean and std were summed up in fp32, in another order
        torch.testing.assert_close(ours.double().mean((1, 2)), f64(stated["mean"]), atol=slack + 5e-4, rtol=0)
        torch.testing.assert_close(ours.double().std((1, 2)), f64(stated["std"]), atol=slack + 5e-4, rtol=0)
        assert float(ours.double().sum()) == pytest.approx(stated["sum"], abs=slack * pixels)


@pytest.mark.parametrize("case", PREPROCESS, ids=lambda c: c["name"])
def test_how_far_libraries_differ(case: dict[str, Any]) -> None:
    """Pillow, run here through transformers, is the reference to 1e-6; of the crops only the offset differs."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(case["name"])
    pil = Image.open(AREA / f"{case['name']}.png").convert("RGB")
    reference = CLIPImageProcessorPil()(pil, return_tensors="pt").pixel_values[0]
    where = SAMPLES[f"{case['name']}/idx"].long().unbind(1)
    torch.testing.assert_close(reference[where], SAMPLES[f"{case['name']}/hf_clip_pil"], atol=1e-6, rtol=0)
    torch.testing.assert_close(normalise(VIEWS["hf_clip_pil"](image, SIDE))[0], reference, atol=1e-6, rtol=0)
    stored = AREA / f"{case['name']}.hf_clip_pil_224.png"
    if stored.is_file():
        levels = torch.from_numpy(np.array(Image.open(stored))).permute(2, 0, 1) / 255
        torch.testing.assert_close(reference, normalise(levels), atol=1e-6, rtol=0)

    stated = case["max_abs_diff"]
    assert set(stated) == {"pil_vs_tvbackend", "pil_vs_openclip", "openclip_vs_imagereward"}
    ours = {name: normalise(view(image, SIDE))[0] for name, view in VIEWS.items()}
    crops = float((ours["hf_clip_pil"] - ours["open_clip"]).abs().max())
    assert crops == pytest.approx(stated["pil_vs_openclip"], abs=1e-5)
    same = float((ours["open_clip"] - ours["imagereward"]).abs().max())
    assert same == pytest.approx(stated["openclip_vs_imagereward"], abs=1e-6)
    sampled = (reference[where] - SAMPLES[f"{case['name']}/hf_clip_torchvision"]).abs().max()
    assert float(sampled) <= stated["pil_vs_tvbackend"] + 1e-6


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SAMPLES = arrays("preprocess_224")


def test_clip_scores() -> None:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_dict(load("rewards", "clip_tiny_config"))
    model = _loading.pretrained(CLIPModel, "clip_tiny", config=config, state=load_file(AREA / "clip_tiny.safetensors"))
    given, expected = arrays("clip_inputs"), load("rewards", "clip_scores")
    assert set(given) == {"pixel_values", "input_ids", "attention_mask"}
    images = _clip.embed_images(model, given["pixel_values"])
    texts = _clip.embed_texts(model, given["input_ids"])  # needs no mask, for attention is causal
    cos, scale = (images * texts).sum(-1), float(model.logit_scale.exp())
    ours = {
        "image_embeds": images,
        "text_embeds": texts,
        "cos": clip_score.defined(cos, "cos", scale),
        "hps": cos,
        "pick_raw": scale * cos,
        "pickscore_flow_grpo": scale * cos / 26,
        "clipscore_torchmetrics": clip_score.defined(cos, "torchmetrics", scale),
        "clipscore_paper": clip_score.defined(cos, "paper", scale),
        "nft_clip": clip_score.defined(cos, "logits", scale),
        "probs_text0": (scale * images @ texts[0]).softmax(0),
    }
    assert set(expected) - {"about"} == set(ours)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), f64(expected[name]), atol=1e-4, rtol=0, msg=name)


def test_open_clip_checkpoint() -> None:
    from transformers import CLIPModel

    state, given = load_file(AREA / "openclip_tiny.safetensors"), arrays("openclip_tiny_io")
    assert set(given) == {"image", "text", "image_features", "text_features", "hps"}
    config = _open_clip.config(state, heads=(2, 2))
    model = _loading.pretrained(CLIPModel, "openclip_tiny", config=config, state=_open_clip.renamed(state))
    images, texts = _clip.embed_images(model, given["image"]), _clip.embed_texts(model, given["text"])
    torch.testing.assert_close(images, given["image_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, given["text_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close((images * texts).sum(-1), given["hps"], atol=1e-5, rtol=0)


def test_image_reward_encoders() -> None:
    state, given = load_file(AREA / "imagereward_tiny.safetensors"), arrays("imagereward_tiny_io")
    assert set(given) == {"image", "input_ids", "attention_mask", "image_embeds", "text_last_hidden", "cls"}
    blip = _blip.build(state, "imagereward_tiny", heads=(2, 2))
    tokens = blip.image_tokens(given["image"])
    hidden = blip.hidden(tokens, given["input_ids"], given["attention_mask"])
    torch.testing.assert_close(tokens, given["image_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden, given["text_last_hidden"], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[:, 0], given["cls"], atol=1e-5, rtol=0)
