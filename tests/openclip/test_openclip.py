"""The openclip reward and our readers of open_clip's format against open_clip itself, on random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.rewards import Scorer, _open_clip_library, build, hpsv2, resolve
from diffalign.rewards._hub import Hosted
from diffalign.types import UserError

PROMPTS = ["a red circle", "Two BLUE squares, below", "a green star above a blue circle", "a red circle"]
NAME = "diffalign-tiny"
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
LOOKS: list[dict[str, Any]] = [
    {},
    {"interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]},
    {"resize_mode": "squash"},
    {"resize_mode": "longest", "fill_color": 128},
]
SIZES = [(32, 32), (97, 80), (40, 131), (33, 62), (20, 25)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model under a name of open_clip's list, and its weights in a file."""
    folder = tmp_path_factory.mktemp("model")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    with torch.no_grad():
        for p in model.parameters():  # as initialised, every picture looks alike
            p.add_(0.05 * torch.randn_like(p))
    torch.save({"state_dict": model.state_dict()}, folder / "weights.pt")
    return folder / "weights.pt"


def described(weights: Path, look: dict[str, Any]) -> Path:
    """The model as a folder that states how it looks at pictures."""
    folder = weights.parent / "-".join(["look", *map(str, look.values())]).replace(" ", "")
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": look}))
    (folder / "open_clip_pytorch_model.bin").write_bytes(weights.read_bytes())
    return folder


def pictures(height: int, width: int) -> Tensor:
    """Sharp edges on smooth ground, in 8-bit levels."""
    generator = torch.Generator().manual_seed(height * width)
    smooth = nn.functional.interpolate(torch.rand(4, 3, 5, 5, generator=generator), (height, width), mode="bicubic")
    edges = torch.rand(4, 1, height, width, generator=generator) > 0.9
    return (torch.where(edges, 1 - smooth, smooth).clamp(0, 1) * 255).round() / 255


def theirs(name: str, pretrained: str | None, images: Tensor) -> Tensor:
    """cos by open_clip's own transform of PIL images, tokenizer and encoders."""
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained)
    pil = [Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for x in images]
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([transform(p) for p in pil]), normalize=True)
        read = model.encode_text(open_clip.get_tokenizer(name)(PROMPTS), normalize=True)
    return (seen * read).sum(-1)


def scorer(**options: Any) -> Scorer:
    (built,) = build([{"name": "openclip", **options}]).values()
    return built


def cosines(head: Scorer, images: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    return head(images, prompts, [{}] * len(prompts)).scores


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("look", LOOKS)
def test_scores_are_open_clips_own(weights: Path, look: dict[str, Any], size: tuple[int, int]) -> None:
    source = f"local-dir:{described(weights, look)}"
    images = pictures(*size)
    expected = theirs(source, None, images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(cosines(scorer(model=source), images), expected, atol=1e-4, rtol=0)


def test_the_picture_is_the_transforms_own_also_where_the_model_is_not_square() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    for mode in ("shortest", "longest", "squash"):
        for size in ((24, 40), (40, 24), (32, 32)):
            cfg = PreprocessCfg(size=size, resize_mode=mode, fill_color=9, mean=(0, 0, 0), std=(1, 1, 1))
            for height, width in SIZES:
                if mode == "squash" and height / size[0] > width / size[1]:
                    continue  # Pillow 13 shrinks the height first here, earlier ones the width
                x = pictures(height, width)[:1]
                pil = Image.fromarray((x[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
                seen = _open_clip_library.view(x, vars(cfg))[0]
                torch.testing.assert_close(seen, image_transform_v2(cfg, is_train=False)(pil), atol=1e-6, rtol=0)


def test_a_file_of_weights_for_a_model_of_the_list(weights: Path) -> None:
    images = pictures(50, 70)
    head = scorer(model=NAME, pretrained=str(weights))
    torch.testing.assert_close(cosines(head, images), theirs(NAME, str(weights), images), atol=1e-4, rtol=0)
    cos = head(images, PROMPTS, [{}] * 4)
    paper = scorer(model=NAME, pretrained=str(weights), variant="paper")(images, PROMPTS, [{}] * 4)
    torch.testing.assert_close(paper.scores, 2.5 * cos.scores.clamp(min=0))
    assert torch.equal(paper.extra["cos"], cos.extra["cos"])
    alone = torch.cat([cosines(head, images[i : i + 1], [PROMPTS[i]]) for i in range(4)])
    torch.testing.assert_close(alone, cos.scores, atol=2e-6, rtol=0)
    half = cosines(scorer(model=NAME, pretrained=str(weights), dtype="bf16"), images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, cos.scores, atol=0.03, rtol=0)


def test_each_prompt_is_encoded_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = _open_clip_library.load(NAME, str(weights), None, "fp32", "cpu", False)
    sizes: list[int] = []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda ids: sizes.append(len(ids)) or encode(ids))
    first, again = clip.texts(PROMPTS), clip.texts([PROMPTS[1], "a new one"])
    assert sizes == [3, 1]
    assert torch.equal(first[0], first[3]) and torch.equal(first[1], again[0])


def test_gradients_reach_the_pictures_and_raise_the_score(weights: Path) -> None:
    head = scorer(model=NAME, pretrained=str(weights))
    images = pictures(40, 48).requires_grad_()
    before = cosines(head, images)
    (slope,) = torch.autograd.grad(before.sum(), images)
    assert slope.isfinite().all() and (slope.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        after = cosines(head, images + 0.05 * slope.sign())
    assert (after > before).all()


def test_hpsv2_reads_such_files_to_the_same_numbers(weights: Path) -> None:
    ours = hpsv2.from_file(weights, (2, 2))
    model = open_clip.create_model(NAME, str(weights)).eval()
    ids, pixels = open_clip.get_tokenizer(NAME)(PROMPTS), pictures(32, 32)
    with torch.no_grad():
        seen = ours.get_image_features(pixel_values=pixels).pooler_output
        read = ours.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(seen, model.encode_image(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(read, model.encode_text(ids), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.logit_scale, model.logit_scale.detach())


def test_mistakes_are_told_in_a_sentence(weights: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "other.pt"
    torch.save({"state_dict": {"visual.proj": torch.zeros(3, 3)}}, wrong)
    (tmp_path / "empty").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "no-model", "pretrained": str(weights)}, "'no-model'"),
        ({"model": "ViT-H14", "pretrained": "x"}, "did you mean 'ViT-H-14'"),
        ({"model": "ViT-H-14", "pretrained": "laion2b_s32b_b79"}, "did you mean 'laion2b_s32b_b79k'"),
        ({"model": NAME, "pretrained": str(wrong)}, "give weights that were made for it"),
        ({"model": f"local-dir:{tmp_path / 'empty'}"}, "config file missing"),
        ({"model": "ViT-B-32", "pretrained": "openai", "local_files_only": True}, "not in the hub cache"),
        ({"model": "hf-hub:nobody/nothing", "local_files_only": True}, "not in the hub cache"),
    ]
    for options, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            scorer(**options)


def test_it_says_what_it_would_load(weights: Path) -> None:
    def places(**options: Any) -> list[tuple[str, str | None, str]]:
        reward = resolve({"name": "openclip", **options})
        assert isinstance(reward, Hosted)
        return [(c.model, c.revision, c.only[-1] if c.only else "") for c in reward.checkpoints()]

    first = _open_clip_library.NAMES[0]
    listed = places(model="ViT-H-14", pretrained="laion2b_s32b_b79k")
    assert listed == [("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None, first)]
    assert places(model="hf-hub:owner/name", revision="abc") == [("owner/name", "abc", first)]
    assert places(model=NAME, pretrained=str(weights)) == [(str(weights), None, "")]
