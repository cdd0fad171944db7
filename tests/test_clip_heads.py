"""CLIP-type reward heads: the same scores as transformers' own processor, whatever the batch, with gradients."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.rewards import Scorer, _affine, _blip, _clip, _loading, _open_clip, build, hpsv2
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import cropped
from diffalign.shapes import aesthetic
from diffalign.types import UserError

PROMPTS = ["a red circle", "two blue squares", "a green star above a blue circle", "a red circle"]
SOURCE = Checkpoint("tiny-clip")


def pictures(height: int = 64, width: int = 64, count: int = len(PROMPTS)) -> Tensor:
    """Smooth pictures of 8-bit levels."""
    generator = torch.Generator().manual_seed(height + width)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return (nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round() / 255


def scorer(name: str, **options: Any) -> Scorer:
    (built,) = build([{"name": name, **options}]).values()
    return built


def scored(head: Scorer, images: Tensor, prompts: list[str]) -> Tensor:
    return head(images, prompts, [{}] * len(prompts)).scores


@pytest.fixture(scope="module")
def clip() -> _clip.Clip:
    return _clip.load(SOURCE, SOURCE, partial(cropped, crop="hf"), "fp32", "cpu", False)


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some affine head of tiny-clip's features, in the format of LAION's."""
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(checkpoints.filled(checkpoints.head(96, (16, 8, 4, 2, 1))), path)
    return path


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 80), (40, 131)])
def test_scores_are_those_of_transformers_own_processor(height: int, width: int) -> None:
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = pictures(height, width)
    folder = SOURCE.folder()
    pil = [Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for x in images]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pil, return_tensors="pt")
    text = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(**text, **pixels).logits_per_image.diagonal()
    cos = scored(scorer("clip_score", model="tiny-clip"), images, PROMPTS)
    torch.testing.assert_close(cos, expected / model.logit_scale.exp(), atol=1e-4, rtol=0)
    if (height, width) == (64, 64):  # nothing is resized, so no pixel is off by a level
        raw = scored(scorer("pickscore", model="tiny-clip"), images, PROMPTS)
        torch.testing.assert_close(raw, expected, atol=1e-4, rtol=1e-5)


def test_one_embedding_many_scores(clip: _clip.Clip) -> None:
    """On a picture of the encoder's own size all heads read the same cosine."""
    images = pictures()
    cos = clip.cosine(images, PROMPTS)
    assert (cos > 0).any()
    flipped = -cos
    expected = {
        ("pickscore", "raw"): clip.scale * cos,
        ("pickscore", "flow_grpo"): clip.scale * cos / 26,
        ("hpsv2", None): cos,
        ("clip_score", "cos"): cos,
        ("clip_score", "logits"): clip.scale * cos / 100,
        ("clip_score", "paper"): 2.5 * cos.clamp(min=0),
        ("clip_score", "torchmetrics"): 100 * cos.clamp(min=0),
    }
    for (name, kind), value in expected.items():
        option = {"pickscore": "scale", "clip_score": "variant"}.get(name)
        output = scorer(name, model="tiny-clip", **({option: kind} if option else {}))(images, PROMPTS, [{}] * 4)
        torch.testing.assert_close(output.scores, value, atol=1e-4, rtol=1e-5)
        if name == "pickscore":
            torch.testing.assert_close(output.extra["raw"], clip.scale * cos, atol=1e-4, rtol=1e-5)
    from diffalign.rewards.clip_score import defined

    assert defined(-flipped.abs(), "paper", clip.scale).max() == 0
    assert defined(-flipped.abs(), "cos", clip.scale).max() < 0


def test_scores_do_not_depend_on_the_batch(head_file: Path) -> None:
    images = pictures(80, 100)
    for head in (
        scorer("pickscore", model="tiny-clip"),
        scorer("hpsv2", model="tiny-clip"),
        scorer("aesthetic", model="tiny-clip", head=str(head_file)),
    ):
        together = scored(head, images, PROMPTS)
        alone = torch.cat([scored(head, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(PROMPTS))])
        fresh = scorer(head.reward.key, **head.reward.model_dump(exclude={"name"}))
        first = scored(fresh, images[2:3], PROMPTS[2:3])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(together[2:3], first, atol=2e-5, rtol=1e-5)


def test_a_prompt_is_encoded_once(clip: _clip.Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fresh = _clip.Clip(clip.model, clip.words, clip.view, clip.scale)
    hook = clip.model.text_model.register_forward_hook(lambda *seen: sizes.append(len(seen[2].pooler_output)))
    first = fresh.texts(PROMPTS)
    assert sizes == [3]
    assert torch.equal(first[0], first[3])
    again = fresh.texts([PROMPTS[1], "a blue star"])
    assert sizes == [3, 1]
    assert torch.equal(again[0], first[1])

    monkeypatch.setattr(_clip, "REMEMBERED", 2)
    torch.testing.assert_close(fresh.texts(PROMPTS), first)
    hook.remove()
    assert len(fresh.known) == 2


def test_what_exceeds_the_context_is_cut_off(clip: _clip.Clip) -> None:
    """tiny-clip reads 14 tokens, begin and end included."""
    words = "a red circle and two blue squares and a green star above a yellow triangle and an orange square".split()
    long, kept, less = " ".join(words), " ".join(words[:12]), " ".join(words[:11])
    texts = clip.texts([long, kept, less])
    torch.testing.assert_close(texts[0], texts[1], atol=1e-6, rtol=0)
    assert (texts[1] - texts[2]).abs().max() > 1e-3


def test_gradient_reaches_the_pixels(clip: _clip.Clip, head_file: Path) -> None:
    for name, options in (
        ("pickscore", {}),
        ("clip_score", {"variant": "logits"}),
        ("hpsv2", {}),
        ("aesthetic", {"head": str(head_file)}),
    ):
        head = scorer(name, model="tiny-clip", **options)
        assert type(head.reward).differentiable
        images = pictures(70, 90).requires_grad_()
        (gradient,) = torch.autograd.grad(scored(head, images, PROMPTS).sum(), images)
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_gradient_is_the_slope(clip: _clip.Clip) -> None:
    exact = _clip.Clip(clip.model, clip.words, partial(cropped, quantize=False), clip.scale)
    x = (0.2 + 0.6 * pictures(70, 90)).requires_grad_()
    (gradient,) = torch.autograd.grad(exact.cosine(x, PROMPTS).sum(), x)
    step = 0.03 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        difference = (exact.cosine(x + step, PROMPTS) - exact.cosine(x - step, PROMPTS)) / 2
    torch.testing.assert_close(difference, (gradient * step).flatten(1).sum(1), rtol=0.05, atol=1e-5)


def test_bf16_encoder_ends_in_full_precision(clip: _clip.Clip) -> None:
    half = _clip.load(SOURCE, SOURCE, clip.view, "bf16", "cpu", False)
    assert half.model.dtype == torch.bfloat16
    assert half.scale == clip.scale  # in bf16 it would be off by 1 %
    images, texts = half.images(pictures()), half.texts(PROMPTS)
    assert images.dtype == texts.dtype == torch.float32
    torch.testing.assert_close(images.norm(dim=1), torch.ones(len(PROMPTS)))
    torch.testing.assert_close((images * texts).sum(-1), clip.cosine(pictures(), PROMPTS), atol=0.02, rtol=0)


def mlp(state: dict[str, Tensor]) -> nn.Module:
    """The published heads as their authors wrote them: linear layers with dropout in between."""
    layers: list[nn.Module] = []
    for number in (0, 2, 4, 6, 7):
        layers += [nn.Dropout(0.2)] * (number - len(layers))
        linear = nn.Linear(*reversed(state[f"layers.{number}.weight"].shape))
        layers.append(linear)
    model = nn.Sequential(*layers).eval()
    model.load_state_dict({k.removeprefix("layers."): t for k, t in state.items()})
    return model


def test_linear_layers_are_one_affine_map() -> None:
    state = checkpoints.filled(checkpoints.head(768))
    w, b = _affine.collapsed(state, "head")
    e = torch.randn(5, 768, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = mlp(state)(e)[:, 0]
    torch.testing.assert_close(e @ w + b, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))

    with pytest.raises(UserError, match=r"'head' does not fit the model: it lacks layers.4.bias; "):
        _affine.collapsed({k: t for k, t in state.items() if k != "layers.4.bias"}, "head")
    with pytest.raises(UserError, match=r"has the unknown layers.9.weight"):
        _affine.collapsed(state | {"layers.9.weight": torch.zeros(1, 1)}, "head")
    with pytest.raises(UserError, match="do not make one affine map"):
        _affine.collapsed(state | {"layers.4.weight": torch.zeros(64, 5)}, "head")


def test_aesthetic_reads_unit_features(clip: _clip.Clip, head_file: Path) -> None:
    head = scorer("aesthetic", model="tiny-clip", head=str(head_file))
    with torch.no_grad():
        expected = mlp(_loading.weights(head_file))(clip.images(pictures()))[:, 0]
    torch.testing.assert_close(scored(head, pictures(), PROMPTS), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(scored(head, pictures(), PROMPTS), scored(head, pictures(), [""] * 4))


def test_aesthetic_head_must_fit_its_encoder(tmp_path: Path) -> None:
    save_file(checkpoints.filled(checkpoints.head(768)), tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="reads 768 features and 'tiny-clip' has 96"):
        scorer("aesthetic", model="tiny-clip", head=str(tmp_path), head_file="head.safetensors")


def test_fitted_aesthetic_head_tells_whole_from_broken(tmp_path: Path) -> None:
    measured = aesthetic.fit("tiny-clip", tmp_path / "tiny-aesthetic", scenes=250, held_out=60)
    assert measured["auroc"] > 0.7
    assert json.loads((tmp_path / "tiny-aesthetic" / "fit.json").read_text()) == measured
    head = scorer("aesthetic", model="tiny-clip", head=str(tmp_path / "tiny-aesthetic"))
    whole = aesthetic.draw_scenes(40, 7).images.float() / 255
    broken = aesthetic.corrupt_all(whole, 7)
    assert scored(head, whole, [""] * 40).mean() > scored(head, broken, [""] * 40).mean() + 0.1


def test_ridge_recovers_an_affine_map() -> None:
    generator = torch.Generator().manual_seed(0)
    e, w = torch.randn(200, 7, generator=generator), torch.randn(7, generator=generator)
    found, b = aesthetic.ridge(e, e @ w + 3, weight=1e-9)
    torch.testing.assert_close(found.float(), w, atol=1e-5, rtol=0)
    assert float(b) == pytest.approx(3, abs=1e-5)
    collapsed, c = _affine.collapsed(aesthetic.layered(found, b), "head")
    torch.testing.assert_close(collapsed, w, atol=1e-5, rtol=0)
    assert float(c) == pytest.approx(3, abs=1e-5)


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_vit_h_key_map_is_one_to_one() -> None:
    from transformers import CLIPModel

    theirs = checkpoints.filled(checkpoints.open_clip(checkpoints.VIT_H), "meta")
    config = _open_clip.config(theirs, hpsv2.HEADS)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1280, 32, 16)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size, vision.hidden_act) == (
        224,
        14,
        5120,
        "gelu",
    )
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (1024, 24, 16)
    assert (text.max_position_embeddings, text.vocab_size, text.eos_token_id, text.hidden_act) == (
        77,
        49408,
        49407,
        "gelu",
    )
    assert config.projection_dim == 1024
    with torch.device("meta"):
        ours = CLIPModel(config).state_dict()
    found = _open_clip.renamed(theirs)
    assert shapes_of(found) == shapes_of(ours)
    joint = sum("in_proj" in name for name in theirs)
    assert len(found) == len(theirs) + 2 * joint  # q, k and v for each; nothing overwrote anything


def test_blip_key_map_is_one_to_one() -> None:
    from transformers import BlipTextModel, BlipVisionModel

    theirs = checkpoints.filled(checkpoints.image_reward(checkpoints.BLIP_LARGE), "meta")
    vision, text, rest = _blip.divided(_loading.under(theirs, "blip."))
    assert rest == []
    vision_config, text_config = _blip.configs(vision, text, None)
    assert (vision_config.num_attention_heads, vision_config.num_hidden_layers, vision_config.image_size) == (
        16,
        24,
        224,
    )
    assert (text_config.num_attention_heads, text_config.num_hidden_layers, text_config.vocab_size) == (12, 12, 30524)
    with torch.device("meta"):
        eyes = BlipVisionModel(vision_config).state_dict()
        words = BlipTextModel(text_config, add_pooling_layer=False).state_dict()
    assert shapes_of(vision) == shapes_of(eyes)
    assert shapes_of(text) == shapes_of(words)
    unused = [k for k in theirs if k.endswith(("position_ids", "_proj.weight", "_proj.bias")) and ".attn" not in k]
    assert len(vision) + len(text) == sum(k.startswith("blip.") for k in theirs) - len(unused)


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint in the format of the official ones, under both their names."""
    folder = tmp_path_factory.mktemp("hps")
    for seed, name in enumerate(hpsv2.FILES.values()):
        state = checkpoints.filled(checkpoints.open_clip(checkpoints.TINY_OPEN_CLIP))
        state["visual.proj"] = state["visual.proj"] + seed
        torch.save({"state_dict": state, "epoch": 3}, folder / name)
    return folder


def test_hpsv2_reads_official_files(hps_folder: Path) -> None:
    images = pictures(50, 90).requires_grad_()
    by_version = {}
    for version, name in hpsv2.FILES.items():
        head = scorer("hpsv2", model=str(hps_folder), processor="tiny-clip", version=version)
        by_version[version] = scored(head, images, PROMPTS)
        same = scorer("hpsv2", model=str(hps_folder / name), processor="tiny-clip", version=version)
        assert torch.equal(scored(same, images, PROMPTS), by_version[version])
    assert not torch.allclose(by_version["v2"], by_version["v2.1"], atol=1e-3)
    (gradient,) = torch.autograd.grad(by_version["v2.1"].sum(), images)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    legacy = scorer("hpsv2", model=str(hps_folder), processor="tiny-clip", antialias=False)
    assert not torch.allclose(scored(legacy, images, PROMPTS), by_version["v2.1"], atol=1e-6)


def test_a_key_too_few_or_too_many_is_refused(hps_folder: Path, tmp_path: Path) -> None:
    state = torch.load(hps_folder / hpsv2.FILES["v2"], weights_only=True)["state_dict"]
    path = tmp_path / "weights.pt"
    torch.save({k: t for k, t in state.items() if k != "ln_final.bias"}, path)
    with pytest.raises(
        UserError, match=r"'weights.pt' does not fit the model: it lacks text_model.final_layer_norm.bias"
    ):
        hpsv2.from_file(path, hpsv2.HEADS)
    torch.save(state | {"visual.extra": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="has the unknown visual.extra"):
        hpsv2.from_file(path, hpsv2.HEADS)
    torch.save({"step": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a CLIP in open_clip's format"):
        hpsv2.from_file(path, hpsv2.HEADS)


@pytest.fixture(scope="module")
def image_reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(checkpoints.filled(checkpoints.image_reward(checkpoints.TINY_BLIP)), folder / "ImageReward.pt")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red green blue circle square squares star two above".split()
    words += [f"w{i}" for i in range(23)]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    return folder


def test_image_reward(image_reward_folder: Path) -> None:
    head = scorer("image_reward", model=str(image_reward_folder), tokenizer=str(image_reward_folder))
    images = pictures(50, 90).requires_grad_()
    together = scored(head, images, PROMPTS)
    assert together.shape == (4,) and together.isfinite().all()
    alone = torch.cat([scored(head, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(together.sum(), images)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()

    state = torch.load(image_reward_folder / "ImageReward.pt", weights_only=True)
    blip = _blip.build(_loading.under(state, "blip."), "tiny")
    from diffalign.rewards._preprocess import normalise

    # the ids by hand: [CLS] a red circle [SEP], padded to 35, which the mask hides
    ids = torch.tensor([[2, 5, 6, 9, 3]])
    with torch.no_grad():
        tokens = blip.image_tokens(normalise(cropped(images[:1], 32, "torchvision")))
        hidden = blip.hidden(tokens, ids, torch.ones_like(ids))
        by_layers = mlp(_loading.under(state, "mlp."))(hidden[:, 0])[:, 0]
    expected = (by_layers - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(together[:1].detach(), expected, atol=1e-3, rtol=1e-4)


def test_image_reward_sees_35_tokens(image_reward_folder: Path) -> None:
    head = scorer("image_reward", model=str(image_reward_folder), tokenizer=str(image_reward_folder))
    words = [f"w{i % 23}" for i in range(60)]
    prompts = [" ".join(words), " ".join(words[:33]), " ".join(words[:32])]  # [CLS] and [SEP] take two places
    scores = scored(head, pictures(count=1).expand(3, -1, -1, -1), prompts)
    torch.testing.assert_close(scores[0], scores[1])
    assert (scores[1] - scores[2]).abs() > 1e-6


def test_image_reward_refuses_another_checkpoint(image_reward_folder: Path, tmp_path: Path) -> None:
    state = torch.load(image_reward_folder / "ImageReward.pt", weights_only=True)
    path = tmp_path / "ImageReward.pt"
    for change, complaint in (
        ({"blip.visual_encoder.blocks.1.norm2.bias": None}, "lacks encoder.layers.1.layer_norm2.bias"),
        ({"blip.itm_head.weight": torch.zeros(2)}, "has the unknown itm_head.weight"),
        ({"other.weight": torch.zeros(2)}, "has the unknown other.weight"),
        ({"mlp.layers.7.bias": None}, "lacks layers.7.bias"),
    ):
        torch.save({k: t for k, t in (state | change).items() if t is not None}, path)
        with pytest.raises(UserError, match=complaint):
            scorer("image_reward", model=str(tmp_path), tokenizer=str(image_reward_folder))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model": "tiny-sd3"}, "'tiny-sd3' is no transformers checkpoint"),
        ({"model": "tiny-clip", "revision": "v1"}, "revision 'v1' applies to hub ids only"),
        ({"model": "tiny-clop"}, "model folder 'tiny-clop' does not exist.*tiny-clip"),
        (
            {"model": "nobody/nothing"},
            "'nobody/nothing' is not in the hub cache and HF_HUB_OFFLINE is set; run `hf download",
        ),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        scorer("pickscore", **options)
    assert "\n" not in str(caught.value)
