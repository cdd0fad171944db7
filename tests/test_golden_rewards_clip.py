"""Golden vectors of the CLIP-type reward heads: pixels, scores, and checkpoints in other formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import ROOT, load
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffalign.rewards import _blip, _clip, _loading, _open_clip, clip_score
from diffalign.rewards._preprocess import centre_crop, cropped, normalise, padded, shortest

AREA = ROOT / "rewards"
SIDE = 224
LOOSE = 1e-6  # of values, and of their mean and std; their sum may be off by as much for every value
VIEWS = {
    "hf_clip_pil": partial(cropped, crop="hf"),
    "open_clip": partial(cropped, crop="torchvision"),
    "imagereward": partial(cropped, crop="torchvision"),
    "nft_clip_bilinear_tensor": partial(cropped, crop="torchvision", quantize=False, method="bilinear"),
    "hpsv2_official_antialias_true": partial(padded, antialias=True),
    "hpsv2_official_antialias_false": partial(padded, antialias=False),
}
ROUGH = "hf_clip_torchvision"  # resamples 8-bit tensors its own way, which no head here offers


def picture(name: str) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    pixels = np.asarray(Image.open(AREA / f"{name}.png").convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


def arrays(name: str) -> dict[str, Tensor]:
    held = np.load(AREA / f"{name}.npz")
    return {key: torch.from_numpy(held[key]) for key in held.files}


PREPROCESS = load("rewards", "preprocess_224")["cases"]
assert PREPROCESS


def torchvision_view(image: Tensor) -> Tensor:
    """What transformers' processor makes with torchvision, which leaves 8-bit tensors to this function of torch."""
    size = shortest(image.shape[2], image.shape[3], SIDE)
    levels = (image * 255).round().to(torch.uint8)
    return centre_crop(F.interpolate(levels, size, mode="bicubic", antialias=True), SIDE, "hf") / 255


def sampled(case: dict[str, Any]) -> dict[str, Tensor]:
    stem = f"{case['name']}/"
    return {key.removeprefix(stem): values for key, values in SAMPLES.items() if key.startswith(stem)}


def agree(ours: Tensor, where: Sequence[Tensor], values: Tensor, stated: dict[str, Any], name: str) -> None:
    """[3, S, S] has these values there, and these statistics."""
    assert set(stated) == {"mean", "std", "sum"}
    torch.testing.assert_close(ours[where], values, atol=LOOSE, rtol=0, msg=name)
    ours = ours.double()
    torch.testing.assert_close(ours.mean((1, 2)), f64(stated["mean"]), atol=LOOSE, rtol=LOOSE, msg=name)
    torch.testing.assert_close(ours.std((1, 2)), f64(stated["std"]), atol=LOOSE, rtol=LOOSE, msg=name)
    assert float(ours.sum()) == pytest.approx(stated["sum"], abs=LOOSE * ours.numel()), name


@pytest.mark.parametrize("case", PREPROCESS, ids=lambda c: c["name"])
def test_preprocessing(case: dict[str, Any]) -> None:
    assert set(case) == {"name", "size", "max_abs_diff", ROUGH, *VIEWS}
    image, values = picture(case["name"]), sampled(case)
    assert list(image.shape[2:]) == case["size"]
    assert set(values) == {"idx", ROUGH, *VIEWS}
    where = values["idx"].long().unbind(1)
    for name, view in VIEWS.items():
        agree(normalise(view(image, SIDE))[0], where, values[name], case[name], name)


@pytest.mark.parametrize("case", PREPROCESS, ids=lambda c: c["name"])
def test_how_far_libraries_differ(case: dict[str, Any]) -> None:
    """Pillow, run here through transformers, is the reference; torchvision's own resampling is some levels off."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image, values, stated = picture(case["name"]), sampled(case), case["max_abs_diff"]
    where = values["idx"].long().unbind(1)
    pil = Image.open(AREA / f"{case['name']}.png").convert("RGB")
    reference = CLIPImageProcessorPil()(pil, return_tensors="pt").pixel_values[0]
    agree(reference, where, values["hf_clip_pil"], case["hf_clip_pil"], "Pillow")
    ours = {name: normalise(view(image, SIDE))[0] for name, view in VIEWS.items()}
    torch.testing.assert_close(ours["hf_clip_pil"], reference, atol=LOOSE, rtol=0)
    stored = AREA / f"{case['name']}.hf_clip_pil_224.png"
    if stored.is_file():
        levels = torch.from_numpy(np.array(Image.open(stored))).permute(2, 0, 1) / 255
        torch.testing.assert_close(reference, normalise(levels), atol=LOOSE, rtol=0)

    rough = normalise(torchvision_view(image))[0]
    agree(rough, where, values[ROUGH], case[ROUGH], ROUGH)
    pairs = {
        "pil_vs_tvbackend": (reference, rough),
        "pil_vs_openclip": (ours["hf_clip_pil"], ours["open_clip"]),
        "openclip_vs_imagereward": (ours["open_clip"], ours["imagereward"]),
    }
    assert set(stated) == set(pairs)
    for name, (one, other) in pairs.items():
        assert float((one - other).abs().max()) == pytest.approx(stated[name], abs=LOOSE), name


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
    texts = _clip.embed_texts(model, given["input_ids"])
    masked = model.get_text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).pooler_output
    torch.testing.assert_close(texts, F.normalize(masked, dim=-1))  # attention is causal, so it needs no mask
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


def attention_heads(name: str) -> tuple[int, int]:
    """Of the vision and the text tower: the one size that no tensor shows, so the file says it in words."""
    vision, text = (int(a or b) for a, b in re.findall(r"heads (\d+)|(\d+) heads", load("rewards", name)["about"]))
    return vision, text


def test_open_clip_checkpoint() -> None:
    from transformers import CLIPModel

    state, given = load_file(AREA / "openclip_tiny.safetensors"), arrays("openclip_tiny_io")
    assert set(given) == {"image", "text", "image_features", "text_features", "hps"}
    config = _open_clip.config(state, heads=attention_heads("openclip_tiny"))
    model = _loading.pretrained(CLIPModel, "openclip_tiny", config=config, state=_open_clip.renamed(state))
    images, texts = _clip.embed_images(model, given["image"]), _clip.embed_texts(model, given["text"])
    torch.testing.assert_close(images, given["image_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, given["text_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close((images * texts).sum(-1), given["hps"], atol=1e-5, rtol=0)


def test_image_reward_encoders() -> None:
    state, given = load_file(AREA / "imagereward_tiny.safetensors"), arrays("imagereward_tiny_io")
    assert set(given) == {"image", "input_ids", "attention_mask", "image_embeds", "text_last_hidden", "cls"}
    blip = _blip.build(state, "imagereward_tiny", heads=attention_heads("imagereward_tiny"))
    tokens = blip.image_tokens(given["image"])
    hidden = blip.hidden(tokens, given["input_ids"], given["attention_mask"])
    torch.testing.assert_close(tokens, given["image_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden, given["text_last_hidden"], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[:, 0], given["cls"], atol=1e-5, rtol=0)
