"""The GenEval-compatible detector on tiny random models: shapes, thresholds, boxes, cut-outs and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import clip_tokenizer
from torch import Tensor, nn

from diffalign import rewards
from diffalign.rewards import _clip, _mask2former
from diffalign.rewards._mask2former import Found, Mask2Former, box_of, select
from diffalign.rewards._preprocess import cropped
from diffalign.types import UserError

NAMES = ("person", "mouse", "dog")


def clip_model() -> Any:
    from transformers import CLIPConfig, CLIPModel

    words = clip_tokenizer()
    torch.manual_seed(0)
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
    }
    vision = {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval(), words


def clip() -> _clip.Clip:
    model, words = clip_model()
    return _clip.Clip(model, words, partial(cropped, crop="torchvision"), 1.0)


def save(folder: Path, names: tuple[str, ...] = NAMES) -> tuple[Path, Path]:
    """(folder of a tiny random Mask2Former, folder of a tiny random CLIP)."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    stored = load_file(folder / "detector" / "model.safetensors")
    # like the published file: with a buffer that is computed today, without a norm that today's Swin has and skips
    encoder = "model.pixel_level_module.encoder."
    older = {key: t for key, t in stored.items() if not key.startswith(f"{encoder}swin.layernorm")}
    assert len(older) == len(stored) - 2
    index = f"{encoder}encoder.layers.0.blocks.0.attention.self.relative_position_index"
    save_file(older | {index: torch.zeros(16, 16)}, folder / "detector" / "model.safetensors")
    model, words = clip_model()
    model.save_pretrained(folder / "clip")
    words.save_pretrained(folder / "clip")
    return folder / "detector", folder / "clip"


class Sees(nn.Module):
    """A network that finds what it is told to: (query, class, probability, quarter of the picture, sureness)."""

    dtype = torch.float32

    def __init__(self, objects: list[tuple[int, int, float, tuple[int, int], float]]) -> None:
        super().__init__()
        self.objects = objects

    def forward(self, pixel_values: Tensor) -> Any:
        n, (height, width) = len(pixel_values), pixel_values.shape[2:]
        classes = torch.full((n, 6, len(NAMES) + 1), -20.0)
        classes[..., -1] = 20
        masks = torch.full((n, 6, height // 4, width // 4), -20.0)
        for query, label, probability, (row, column), sureness in self.objects:
            classes[:, query] = -20
            classes[:, query, label] = torch.tensor(probability).log()
            classes[:, query, -1] = torch.tensor(1 - probability).log()
            half = (height // 8, width // 8)
            part = masks[:, query, row * half[0] : (row + 1) * half[0], column * half[1] : (column + 1) * half[1]]
            part[:] = torch.tensor(sureness).logit()
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def detector(*objects: tuple[int, int, float, tuple[int, int], float]) -> Mask2Former:
    return Mask2Former(Sees(list(objects)), clip(), NAMES, size=(64, 64))


def head(found: Mask2Former, mode: str, metadata: dict[str, Any], images: Tensor | None = None) -> float:
    reward = rewards.resolve({"name": "geneval", "detector": "mask2former", "mode": mode})
    pictures = torch.rand(1, 3, 48, 48) if images is None else images
    output = reward.judge(found, pictures, ["a prompt"], [metadata])  # type: ignore[attr-defined]
    return float(output.scores)


def test_boxes_surround_their_masks() -> None:
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[2:4, 5] = mask[3, 7] = True
    assert box_of(mask) == (5, 2, 8, 4)


def test_scores_are_class_probability_times_sureness_and_boxes_are_of_the_picture() -> None:
    (found,) = detector((0, 2, 0.9, (0, 1), 0.8), (3, 1, 0.5, (1, 0), 0.99)).detect(torch.rand(1, 3, 48, 48))
    by_name = {f.name: f.box for f in found}
    assert by_name.keys() == {"dog", "mouse"}
    assert by_name["dog"][4] == pytest.approx(0.9 * 0.8, abs=0.03)  # the rim of the mask is less sure
    assert by_name["dog"][:4] == pytest.approx((24, 0, 48, 24), abs=1)
    assert by_name["mouse"][:4] == pytest.approx((0, 24, 24, 48), abs=1)
    assert all(f.mask.shape == (48, 48) and f.mask.dtype == torch.bool for f in found)


def test_faint_objects_are_not_there() -> None:
    assert detector((0, 2, 0.29, (0, 0), 0.99)).detect(torch.rand(1, 3, 48, 48)) == [[]]
    assert detector((0, 2, 0.4, (0, 0), 0.6)).detect(torch.rand(1, 3, 48, 48)) == [[]]  # 0.24 together


def test_counting_wants_to_be_sure() -> None:
    one_dog = {"include": [{"class": "dog", "count": 1}]}
    unsure = detector((0, 2, 0.8, (0, 0), 0.999))
    assert head(unsure, "correct", {"tag": "single_object", **one_dog}) == 1
    assert head(unsure, "correct", {"tag": "counting", **one_dog}) == 0
    sure = detector((0, 2, 0.99, (0, 0), 0.999), (1, 2, 0.8, (1, 1), 0.999))
    assert head(sure, "strict", {"tag": "counting", **one_dog}) == 1  # the second is not counted
    assert head(sure, "strict", {"tag": "single_object", **one_dog}) == 0


def test_positions_are_read_off_the_boxes() -> None:
    found = detector((0, 2, 0.99, (0, 1), 0.99), (1, 1, 0.99, (0, 0), 0.99))

    def asks(relation: str) -> dict[str, Any]:
        return {
            "tag": "position",
            "include": [{"class": "dog", "count": 1}, {"class": "mouse", "count": 1, "position": [relation, 0]}],
        }

    assert [head(found, "correct", asks(r)) for r in ("left of", "right of", "above")] == [1, 0, 0]


def test_at_most_16_of_a_class_the_most_confident_first() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = [Found("dog", (0, 0, 1, 1, k / 100), mask) for k in range(31, 61)] + [
        Found("mouse", (0, 0, 1, 1, 0.3), mask)
    ]
    kept = select(found, 0.3)
    assert kept.keys() == {"dog"} and [f.box[4] for f in kept["dog"]] == [k / 100 for k in range(60, 44, -1)]
    assert select(found, 0.9) == {}


def test_colours_are_told_from_the_object_alone() -> None:
    found = detector((0, 2, 0.99, (0, 1), 0.999))
    images = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    elsewhere = images.clone()
    elsewhere[:, :, 26:] = 0  # below the dog
    asked: dict[str, Any] = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    (_, colors), (_, others) = (found.find(x, [asked])[0] for x in (images, elsewhere))
    assert colors.keys() == {"dog"} and colors == others
    told = colors["dog"][0]
    assert head(found, "correct", asked | {"include": [asked["include"][0] | {"color": told}]}, images) == 1
    assert (
        head(
            found,
            "correct",
            asked | {"include": [asked["include"][0] | {"color": "red" if told != "red" else "blue"}]},
            images,
        )
        == 0
    )
    uncoloured = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    assert found.find(images, [uncoloured])[0][1] == {}


def test_the_colour_is_the_nearest_of_the_averaged_captions() -> None:
    found = detector((0, 2, 0.99, (0, 1), 0.999))
    image = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(48, 48, dtype=torch.bool)
    mask[4:20, 10:40] = True
    mask[4, 10] = False
    told = found._colours(image, [Found("dog", (10, 4, 40, 20, 0.9), mask)])
    cut = image.clone()
    cut[:, ~mask] = 0.6
    seen = found.clip.images(cut[None, :, 4:20, 10:40])[0]
    likeness = {}
    for color in _mask2former.COLORS:
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        mean = found.clip.texts(texts).mean(0)
        likeness[color] = float((seen @ mean / mean.norm()).detach())
    assert told == [max(likeness, key=likeness.__getitem__)]


@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
def test_a_real_network_runs_end_to_end(size: tuple[int, int], tmp_path: Path) -> None:
    folders = save(tmp_path)
    options = {"model": str(folders[0]), "clip": str(folders[1]), "mode": "dense"}
    scorer = rewards.build([{"name": "geneval", "detector": "mask2former", **options}])["geneval"]
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    asked = {"tag": "colors", "include": [{"class": "computer mouse", "count": 1, "color": "pink"}]}
    output = scorer(images, ["p", "q", "r"], [asked, {"prompt": "q"}, asked])
    assert output.scores.isnan().tolist() == [False, True, False]
    assert (output.scores[[0, 2]] <= 1).all()
    network = scorer.head.args[0]  # type: ignore[attr-defined]
    assert network.names == ["person", "computer mouse", "dog"]
    small = replace(network, size=(64, 96))
    for found in small.detect(images):
        for one in found:
            x0, y0, x1, y1, confidence = one.box
            assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0] and 0.3 < confidence <= 1


def test_what_is_no_such_detector_is_refused(tmp_path: Path) -> None:
    folders = save(tmp_path, ("cat", "wall", "sky"))
    options = {"detector": "mask2former", "model": str(folders[0]), "clip": str(folders[1])}
    with pytest.raises(UserError, match="knows cat, wall, sky and so on; give a detector of COCO's classes"):
        rewards.build([{"name": "geneval", **options}])
    with pytest.raises(UserError, match="does not fit the model: it lacks class_predictor"):
        rewards.build([{"name": "geneval", **options, "model": str(folders[1])}])


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ({"class": "circle", "count": 1}, "asks for 'circle'; the mask2former detector knows person, mouse, dog"),
        ({"class": "dog", "count": 1, "color": "teal"}, "asks for 'teal'; the mask2former detector knows red, orange"),
    ],
)
def test_impossible_metadata_is_a_user_error(clause: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        head(detector(), "correct", {"include": [clause]})


def test_options_of_the_other_detector_are_refused() -> None:
    for option, value in {"model": "owner/other", "clip": "tiny-clip", "local_files_only": True}.items():
        with pytest.raises(UserError, match=f"{option} does not apply to the detector of shapes; leave it out"):
            rewards.resolve({"name": "geneval", option: value})
        assert rewards.resolve({"name": "geneval", "detector": "mask2former", option: value})
    saved = rewards.resolve("geneval").model_dump()  # names every option
    assert rewards.resolve(saved) == rewards.resolve("geneval")
