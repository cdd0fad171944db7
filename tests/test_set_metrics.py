"""Diversity and distances of sets against their limits and closed forms; embeddings do not depend on their batch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffalign.eval.features import Embedder
from diffalign.eval.set_metrics import fid, kid, pairwise_distance, vendi
from diffalign.types import UserError

RNG = np.random.default_rng(3)
ORDERS = (0.0, 0.5, 1.0, 2.0, math.inf)


@pytest.mark.parametrize("q", ORDERS)
def test_vendi_counts(q: float) -> None:
    one = RNG.normal(size=(1, 6))
    lengths = RNG.uniform(0.1, 9, size=(4, 1))
    assert vendi(one * lengths, q) == pytest.approx(1)
    assert vendi(np.eye(6)[:4] * lengths, q) == pytest.approx(4)
    assert vendi(one, q) == pytest.approx(1)
    # two kinds, three of one and one of the other
    two, share = np.eye(6)[[0, 0, 0, 1]], np.array([0.75, 0.25])
    expected = {0.0: 2, 1.0: math.exp(-(share * np.log(share)).sum()), math.inf: 4 / 3}
    assert vendi(two, q) == pytest.approx(expected.get(q) or (share**q).sum() ** (1 / (1 - q)))


@pytest.mark.parametrize("q", ORDERS)
def test_vendi_of_many_rows_is_that_of_the_kernel(q: float) -> None:
    x = RNG.normal(size=(40, 5))
    rows = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(rows @ rows.T / 40)[-5:]
    expected = {0.0: 5, 1.0: math.exp(-(values * np.log(values)).sum()), math.inf: 1 / values[-1]}
    assert vendi(x, q) == pytest.approx(expected.get(q) or (values**q).sum() ** (1 / (1 - q)))
    rotation = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    assert vendi(RNG.permutation(x) @ rotation, q) == pytest.approx(vendi(x, q))


def test_vendi_falls_with_its_order_and_is_smooth_at_one() -> None:
    x = RNG.normal(size=(12, 8))
    scores = [vendi(x, q) for q in ORDERS]
    assert scores == sorted(scores, reverse=True)
    assert vendi(x, 1 + 1e-6) == pytest.approx(vendi(x), rel=1e-5)


def test_pairwise_distance_is_the_mean_over_pairs() -> None:
    x = RNG.normal(size=(7, 4))
    rows = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert pairwise_distance(x) == pytest.approx(np.mean([1 - a @ b for a, b in itertools.combinations(rows, 2)]))
    assert pairwise_distance(np.eye(5)) == pytest.approx(1)
    assert pairwise_distance(np.array([[1.0, 0], [-2, 0]])) == pytest.approx(2)
    assert 0 <= pairwise_distance(np.repeat(x[:1], 9, 0)) < 1e-12
    assert math.isnan(pairwise_distance(x[:1])) and math.isnan(vendi(x[:0]))


def gaussian(mean: np.ndarray, covariance: np.ndarray, n: int) -> np.ndarray:
    """n rows with exactly this mean and covariance (of divisor n - 1)."""
    z = RNG.normal(size=(n, len(mean)))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
    return mean + z @ np.linalg.cholesky(covariance).T


def test_fid_of_known_gaussians() -> None:
    mean, shift = np.array([1.0, -2, 0.5]), np.array([3.0, 0, 4])
    a = gaussian(mean, np.diag([1.0, 4, 9]), 50)
    assert fid(a, a) == pytest.approx(0, abs=1e-9)
    assert fid(a, a + shift) == pytest.approx(25)
    # of commuting covariances: the squared differences of the standard deviations
    assert fid(a, gaussian(mean + shift, np.diag([4.0, 4, 1]), 80)) == pytest.approx(25 + 1 + 0 + 4)
    s, t = (m @ m.T + np.eye(3) for m in RNG.normal(size=(2, 3, 3)))
    expected = np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert fid(gaussian(mean, s, 30), gaussian(mean, t, 40)) == pytest.approx(expected)


def test_fid_of_fewer_rows_than_columns() -> None:
    a, b = RNG.normal(size=(4, 9)), RNG.normal(1, 2, size=(6, 9))
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.clip(np.linalg.eigvals(s @ t).real, 0, None)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * root
    assert fid(a, b) == pytest.approx(expected, rel=1e-6)
    assert fid(b, a) == pytest.approx(fid(a, b))
    assert math.isnan(fid(a[:1], b)) and math.isnan(kid(a[:1], b))


def test_kid_is_its_definition() -> None:
    a, b = RNG.normal(size=(5, 3)), RNG.normal(1, size=(4, 3))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [np.mean([k(x, y) for x, y in itertools.permutations(rows, 2)]) for rows in (a, b)]
    across = np.mean([k(x, y) for x, y in itertools.product(a, b)])
    assert kid(a, b) == pytest.approx(sum(within) - 2 * across)
    assert kid(b, a) == pytest.approx(kid(a, b))


def test_kid_is_zero_on_average_and_grows_with_a_shift() -> None:
    same = [kid(RNG.normal(size=(20, 4)), RNG.normal(size=(30, 4))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(300)
    assert min(same) < 0  # unbiased, so it must
    rows = RNG.normal(size=(1500, 4))  # more than are multiplied at once
    shifts = [kid(rows, RNG.normal(shift, 1, size=(1400, 4))) for shift in (0.0, 0.3, 0.6)]
    assert abs(shifts[0]) < 0.1 < shifts[1] < shifts[2]


def test_bad_features_are_user_errors() -> None:
    good = np.eye(3)
    for measure in (vendi, pairwise_distance):
        with pytest.raises(UserError, match="feature 1"):
            measure(np.array([[1.0, 0], [0, 0]]))
        with pytest.raises(UserError, match="feature 2"):
            measure(np.array([[1.0], [1], [math.nan]]))
    for distance in (fid, kid):
        with pytest.raises(UserError, match="encoders"):
            distance(good, np.ones((3, 2)))
    with pytest.raises(UserError, match="order"):
        vendi(good, -1)


@pytest.mark.parametrize(("text", "width"), [("dino:model=tiny-dino", 128), ("clip:model=tiny-clip", None)])
def test_embeddings_do_not_depend_on_the_batch(text: str, width: int | None) -> None:
    embed = Embedder.of(text, "cpu")
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = embed(images)
    assert found.dtype == torch.float32 and found.shape[0] == 5 and not found.requires_grad
    assert width is None or found.shape[1] == width
    scale = found.norm(dim=1).max().item()
    torch.testing.assert_close(embed(images[[3]]), found[[3]], rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(embed(images.flip(0)), found.flip(0), rtol=0, atol=1e-5 * scale)
    # identical images are one, others are more
    assert vendi(embed(images[:1].expand(4, -1, -1, -1)).numpy()) == pytest.approx(1, abs=1e-6)
    assert vendi(found.numpy()) > 1.001


def test_embeddings_are_those_that_transformers_computes() -> None:
    from importlib.resources import files
    from pathlib import Path

    from transformers import CLIPModel, Dinov2Model

    from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD, normalise
    from diffalign.shapes import dino_network

    weights = Path(str(files("diffalign.shapes"))) / "weights"
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1)) / 255
    dino = Dinov2Model.from_pretrained(weights / "tiny-dino", dtype=torch.float32).eval()
    clip = CLIPModel.from_pretrained(weights / "tiny-clip", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = dino(pixel_values=dino_network.normalise(images)).pooler_output
        torch.testing.assert_close(Embedder.of("dino:model=tiny-dino", "cpu")(images), expected, rtol=0, atol=1e-4)
        assert clip.config.vision_config.image_size == 64
        expected = clip.get_image_features(pixel_values=normalise(images, CLIP_MEAN, CLIP_STD)).pooler_output
        torch.testing.assert_close(Embedder.of("clip:model=tiny-clip", "cpu")(images), expected, rtol=0, atol=1e-4)


def test_wrong_features_are_user_errors() -> None:
    for text, said in {
        "vgg": "dino or clip", "dino:tiny-dino": "OPTION=VALUE", "dino:sise=3": "size", "clip:size=64": "size",
        "dino:size=0": "size", "dino:model=[": "YAML",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=said):
            Embedder.parse(text)
    with pytest.raises(UserError, match="patch"):
        Embedder.of("dino:model=tiny-dino,size=63", "cpu")
    with pytest.raises(UserError, match="does not exist"):
        Embedder.of("clip:model=./nowhere", "cpu")
