"""Discriminator losses and rewards against Adv-GRPO's official code (golden vectors, float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_data import cases, close, f64
from torch import Tensor

from diffalign.rewards._clip_critic import UNIT
from diffalign.rewards._discriminator import (
    Head,
    layered_reward,
    pairwise,
    token_loss,
    token_reward,
    top_patches,
    unit,
)


def head(weights: dict[str, Any]) -> Head:
    hidden, width = torch.tensor(weights["layers.0.weight"]).shape
    made = Head(width, hidden).double()
    made.load_state_dict({name: f64(values) for name, values in weights.items()})
    return made


@pytest.mark.parametrize("case", cases("distill", "adv_dino_discriminator"))
def test_discriminator_loss(case: dict[str, Any]) -> None:
    made = head(case["head"])
    pairs = min(len(case["feat_real"]), len(case["feat_fake"]))
    real, fake = (made(f64(case[key])[:pairs]) for key in ("feat_real", "feat_fake"))
    rows = [torch.tensor(case[key])[:pairs] for key in ("idx_real", "idx_fake")]
    assert rows[0].shape[1] == min(case["n_patches"], real.shape[1] - 1)
    loss = token_loss(real, fake, case["patch_weight"], (rows[0], rows[1])).mean()
    close(loss, case["d_loss"])
    close(torch.cat([real[:, 0] > 0, fake[:, 0] < 0]).double().mean(), case["acc"])
    loss.backward()
    assert case["grads"].keys() == dict(made.named_parameters()).keys()
    for name, p in made.named_parameters():
        close(p.grad, case["grads"][name])


@pytest.mark.parametrize("case", cases("distill", "adv_dino_reward"))
def test_reward(case: dict[str, Any]) -> None:
    logits = head(case["head"])(unit(f64(case["feat"])))
    rows = torch.tensor(case["idx"])
    assert rows.shape[1] == min(case["n_patches"], logits.shape[1] - 1)
    close(logits[:, 0], case["cls_score"])
    close(logits[:, 1:].gather(1, rows), case["patch_scores"])
    close(token_reward(logits, case["cls_weight"], rows), case["reward"])


@pytest.mark.parametrize("case", cases("distill", "adv_dino_multi_reward"))
def test_multi_layer_reward(case: dict[str, Any]) -> None:
    assert case["fusion"] == "mean over layers"
    layers = zip(case["heads"], case["layer_feats"], strict=True)
    logits = torch.stack([head(weights)(f64(tokens)) for weights, tokens in layers], 1)
    close(top_patches(logits, case["topk_tau"]), case["per_layer"])
    close(layered_reward(logits, case["topk_tau"], case["temperature"]), case["reward"])


@pytest.mark.parametrize("case", cases("distill", "adv_pickscore_discriminator"))
def test_pickscore_discriminator(case: dict[str, Any]) -> None:
    text, scale = f64(case["text"]), case["logit_scale"]
    real, fake = (f64(case[key]).requires_grad_() for key in ("real", "fake"))
    s_real, s_fake = (scale * (text * x).sum(1) for x in (real, fake))
    close(s_real / UNIT, case["reward_real"])
    close(s_fake / UNIT, case["reward_fake"])
    labels = case["label_0"], case["label_1"]
    if case["in_batch_negatives"]:
        losses = in_batch(scale, text, real, fake, labels)
    else:
        losses = weighted(labels, pairwise(s_real, s_fake), pairwise(s_fake, s_real)) + tie(labels)
    total = losses.mean()
    close(total, case["loss"])
    total.backward()
    close(real.grad, case["grad_real"])
    close(fake.grad, case["grad_fake"])


def weighted(labels: tuple[float, float], real: Tensor, fake: Tensor) -> Tensor:
    return labels[0] * real + labels[1] * fake


def tie(labels: tuple[float, float]) -> float:
    """What makes the least loss 0 where neither image is preferred; in fp32, as the official code takes it."""
    return float(torch.tensor(0.5).log()) if labels[0] == labels[1] else 0.0


def in_batch(scale: float, text: Tensor, real: Tensor, fake: Tensor, labels: tuple[float, float]) -> Tensor:
    """PickScore's other loss, which compares with all images of a batch and so depends on the batch: no head here
    offers it. It is the mean of both directions, images to texts and texts to all images, of each pair [b]."""
    own = torch.arange(len(text))
    to_images = scale * text @ torch.cat([real, fake]).T
    of_images = [F.cross_entropy(scale * x @ text.T, own, reduction="none") for x in (real, fake)]
    of_texts = [F.cross_entropy(to_images, own + first, reduction="none") for first in (0, len(text))]
    return (weighted(labels, *of_images) + weighted(labels, *of_texts) + tie(labels)) / 2
