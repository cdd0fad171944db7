"""Heads that ask a vision-language model on this machine: one of each family, and the embedded one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import BLANK, IMAGES, PROMPTS, echo, tiny
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from diffalign import rewards
from diffalign.rewards import _asking, _vlm
from diffalign.rewards._asking import NO, YES, Local
from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD
from diffalign.rewards._vlm import FAMILIES, Look, Row, Vlm
from diffalign.rewards.artifact_vlm import ArtifactVlm
from diffalign.rewards.vlm_echo import VlmEcho, word_weights
from diffalign.rewards.yes_probability import YesProbability
from diffalign.shapes import chat, prompts, questions, world
from diffalign.types import UserError

GENERATOR = torch.Generator().manual_seed(4)


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return tiny("qwen3_vl")


@pytest.fixture(scope="module")
def asked(vlm: Vlm) -> Local:
    return _asking.local(vlm, YES, NO)


def test_configuration_imports_no_torch() -> None:
    code = (
        "import sys, diffalign.rewards as r; r.resolve({'name': 'vlm_echo', 'server': 'http://localhost:1'});"
        "r.resolve('yes_probability'); r.resolve('artifact_vlm'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


@pytest.mark.parametrize(("patch", "mean", "std"), [(14, CLIP_MEAN, CLIP_STD), (16, (0.5,) * 3, (0.5,) * 3)])
def test_pictures_are_those_of_transformers(patch: int, mean: Any, std: Any) -> None:
    low, high = 20 * patch * patch, 90 * patch * patch
    look = Look(patch, 2, 2, mean, std, low, high)
    theirs = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, temporal_patch_size=2, image_mean=list(mean), image_std=list(std),
        size={"shortest_edge": low, "longest_edge": high},
    )  # fmt: skip
    # sizes for which Pillow resizes the width first; newer versions take the other order where that is less work
    for height, width in [(2 * patch, 4 * patch), (30, 41), (200, 211), (9, 64), (300, 40)]:
        pixels = torch.randint(0, 256, (3, height, width), generator=GENERATOR, dtype=torch.uint8)
        given = theirs([pixels.permute(1, 2, 0).numpy()], return_tensors="pt")
        image = look.fit(pixels[None] / 255)[0]
        assert [look.grid(image)] == given["image_grid_thw"].tolist()
        assert look.tokens(image) * 4 == given["image_grid_thw"].prod()
        off = (look.patches(image) - given["pixel_values"]).abs() * min(std) * 255
        assert off.max() < 1.01
        assert (off > 0.5).float().mean() < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_echoes_what_its_own_forward_says(family: str) -> None:
    """Also that the one row of a larger batch, padded, with two pictures, is what it is alone."""
    vlm = tiny(family)
    a, b = (vlm.look.fit(image[None])[0] for image in (IMAGES[0], torch.rand(3, 60, 60, generator=GENERATOR)))
    rows = [
        Row([a, b], vlm.prefix([a, b], "Which?"), vlm.encode("red")),
        Row([a], vlm.prefix([a], "Is it?"), [7, 9, 8]),
    ]
    together, following = vlm.echo(rows), vlm.next(rows)
    for row, logp, answer in zip(rows, together, following, strict=True):
        ids = torch.tensor([[*row.prefix, *row.label]])
        logits = vlm.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == chat.IMAGE).int(),
            pixel_values=torch.cat([vlm.look.patches(i) for i in row.images]),
            image_grid_thw=torch.tensor([vlm.look.grid(i) for i in row.images]),
        ).logits[0].log_softmax(-1)  # fmt: skip
        n = len(row.prefix)
        for t, token in enumerate(row.label):
            assert logp[t] == pytest.approx(logits[n - 1 + t, token].item(), abs=1e-4)
        torch.testing.assert_close(answer, logits[n - 1], atol=1e-4, rtol=0)
    seen = vlm.echo([Row([vlm.look.fit(IMAGES[1:2])[0]], rows[1].prefix, [7, 9, 8])])[0]
    assert (seen - together[1]).abs().max() > 1e-3  # it looks at the picture


def test_batches_of_any_lengths_score_as_one_by_one(asked: Local) -> None:
    whole = echo(asked).scores
    for i, prompt in enumerate(PROMPTS):
        one = VlmEcho(name="vlm_echo").score(asked, IMAGES[i : i + 1], [prompt]).scores
        torch.testing.assert_close(one, whole[i : i + 1], atol=2e-5, rtol=0)
    assert whole.unique().numel() == 4


def test_prefix_and_prompt_are_tokenised_apart_and_prompts_are_plain_text(vlm: Vlm) -> None:
    image = vlm.look.fit(IMAGES[:1])[0]
    config, prefix = vlm.model.config, vlm.prefix([image], "Look. <|im_end|><|image_pad|>")
    assert prefix.count(config.image_token_id) == vlm.look.tokens(image)
    assert prefix.count(vlm.end) == 1
    shown = vlm.words.decode(prefix)
    assert shown.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert shown.endswith("<|vision_end|>Look. <|im_end|><|image_pad|><|im_end|>\n<|im_start|>assistant\n")
    assert "system" not in shown


def test_the_question_about_faults_comes_before_the_picture(vlm: Vlm, asked: Local) -> None:
    head = ArtifactVlm(name="artifact_vlm", model="another", instruction="Is a circle broken?", bias=0.3)
    images = [vlm.look.fit(image[None])[0] for image in IMAGES]
    rows = [Row([image], vlm.prefix([image], "Is a circle broken?", text_first=True)) for image in images]
    shown = vlm.words.decode(rows[0].prefix)
    assert shown.startswith("<|im_start|>user\nIs a circle broken?<|vision_start|><|image_pad|>")
    assert shown.endswith("<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
    logp = vlm.next(rows)
    odds = logp[:, asked.yes].logsumexp(1) - logp[:, asked.no].logsumexp(1)
    torch.testing.assert_close(head.score(asked, IMAGES).scores, 1 - (odds + 0.3).sigmoid())
    embedded = ArtifactVlm(name="artifact_vlm", instruction="Is a circle broken?", bias=0.3)  # which learnt otherwise
    assert (embedded.score(asked, IMAGES).scores - head.score(asked, IMAGES).scores).abs().max() > 1e-4


def test_gradients_are_those_of_finite_differences() -> None:
    vlm = tiny("qwen3_vl", torch.float64)
    image = IMAGES[0].double().mul(0.8).add(0.1).requires_grad_()

    def score(x: Tensor) -> Tensor:
        return vlm.echo([Row([x], vlm.prefix([x], "Describe."), vlm.encode("a red circle"))])[0].mean()

    (gradient,) = torch.autograd.grad(score(image), image)
    direction = gradient / gradient.norm()
    h = 1e-2  # the norms inside compute in fp32
    with torch.no_grad():
        slope = (score(image + h * direction) - score(image - h * direction)) / (2 * h)
    assert slope == pytest.approx(gradient.norm().item(), rel=0.02)


def test_heads_pass_gradients_to_pictures_they_resize(asked: Local) -> None:
    images = torch.rand(2, 3, 50, 90, generator=GENERATOR, requires_grad=True)
    heads = [VlmEcho(name="vlm_echo", pmi=True), YesProbability(name="yes_probability")]
    for head in heads:
        assert head.differentiable and not head.remote
    scores = heads[0].score(asked, images, PROMPTS[:2]).scores  # type: ignore[attr-defined]
    scores = scores + heads[1].score(asked, images, PROMPTS[:2], BLANK[:2]).scores  # type: ignore[attr-defined]
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


def test_pmi_changes_no_centred_advantage_and_sum_only_their_scale(asked: Local) -> None:
    prompts, images = [PROMPTS[2]] * 4, IMAGES

    def centred(**options: Any) -> Tensor:
        scores = echo(asked, prompts, images, **options).scores
        return scores - scores.mean()

    plain = centred()
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(centred(pmi=True), plain, atol=1e-5, rtol=0)
    assert (echo(asked, prompts, pmi=True).scores - echo(asked, prompts).scores).abs().min() > 1e-3
    length = len(asked.vlm.encode(prompts[0]))
    torch.testing.assert_close(centred(aggregate="sum"), plain * length, atol=1e-4, rtol=0)


def test_details_say_what_the_score_is_made_of(asked: Local) -> None:
    output = echo(asked, gain=True)
    alone = echo(asked, pmi=True).scores
    for i, prompt in enumerate(PROMPTS):
        extra = {name: values[i] for name, values in output.extra.items()}
        assert "".join(extra["tokens"]) == prompt
        assert np.mean(extra["log_probs"]) == pytest.approx(output.scores[i].item(), abs=1e-5)
        assert np.mean(extra["gain"]) == pytest.approx(alone[i].item(), abs=1e-5)
        assert extra["error"] is None


def test_weights_of_words() -> None:
    tokens = ["A", " red", " cir", "cle", ",", " a", " st", "ar", ".", "<|im_end|>"]
    expected = [0, 1, 3, 3, 1, 0, 1, 1, 1, 1]
    assert word_weights(tokens, {"a": 0, "Circle": 3}) == expected
    assert word_weights([], {"a": 0}) == []


def test_weighted_tokens_and_prompts_that_have_no_score(asked: Local) -> None:
    weights = {"a": 0.0, "above": 0.0, "red": 3.0}
    output = echo(asked, token_weights=weights)
    for i in range(4):
        w, logp = word_weights(output.extra["tokens"][i], weights), output.extra["log_probs"][i]
        assert output.scores[i].item() == pytest.approx(np.average(logp, weights=w), abs=1e-5)
    some = echo(asked, ["a", " \n", "a red circle", ""], token_weights={"a": 0.0}, gain=True)
    assert some.scores.isnan().tolist() == [True, True, False, True]
    assert some.valid.all()
    assert [t is None for t in some.extra["tokens"]] == [False, True, False, True]
    assert echo(asked, ["", ""]).scores.isnan().all()


def test_yes_compares_with_a_reference_in_both_orders(asked: Local, tmp_path: Path) -> None:
    for name, image in (("a", IMAGES[0]), ("b", IMAGES[1])):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")

    def against(images: Tensor, reference: str, *metadata: dict[str, Any]) -> Any:
        head = YesProbability(name="yes_probability", reference=reference, normalise="yes_no")
        return head.score(asked, images, PROMPTS[:1] * len(images), metadata or BLANK[: len(images)])

    ab = against(IMAGES[:1], str(tmp_path / "b.png"))
    ba = against(IMAGES[1:2], str(tmp_path / "a.png"))
    torch.testing.assert_close(ab.scores + ba.scores, torch.ones(1), atol=1e-5, rtol=0)
    assert ab.extra["orders"][0] == pytest.approx(ba.extra["orders"][0][::-1], abs=1e-5)
    assert ab.extra["orders"][0][0] + ab.extra["orders"][0][1] != pytest.approx(1, abs=1e-5)  # place matters to it
    same = against(IMAGES[1:2], str(tmp_path / "b.png")).scores
    torch.testing.assert_close(same, torch.full((1,), 0.5), atol=1e-5, rtol=0)
    by_prompt = against(IMAGES[:3], "metadata.other", {"other": str(tmp_path / "b.png")}, {}, {"other": None})
    assert by_prompt.scores[0].item() == pytest.approx(ab.scores.item(), abs=1e-5)
    assert by_prompt.scores.isnan().tolist() == [False, True, True] and by_prompt.valid.all()
    with pytest.raises(UserError, match="cannot be read as a picture"):
        against(IMAGES[:1], str(tmp_path / "c.png"))
    with pytest.raises(UserError, match="metadata 'other' must be the path of a picture, not 3"):
        against(IMAGES[:1], "metadata.other", {"other": 3})


def test_yes_sums_the_first_tokens_of_all_spellings_once(vlm: Vlm) -> None:
    image = vlm.look.fit(IMAGES[:1])[0]
    logp = vlm.next([Row([image], vlm.prefix([image], "Is it?"))])[0]
    several = _asking.local(vlm, ("yes", "Yes", "yes", "yes yes"), ("no", " no"))
    assert several.yes == [vlm.encode("yes")[0], vlm.encode("Yes")[0]]
    (answer,) = several.answer([_asking.Question([IMAGES[0]], "Is it?")])
    assert isinstance(answer, _asking.Answer)
    assert answer.yes.exp().item() == pytest.approx(logp[several.yes].exp().sum().item(), abs=1e-6)
    assert answer.no.exp().item() == pytest.approx(logp[several.no].exp().sum().item(), abs=1e-6)
    with pytest.raises(UserError, match="begins yes and no with the same token"):
        _asking.local(vlm, ("no", "yes"), ("no",))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "vlm_echo", "server": "localhost:8000"}, "no address of a server; write it as http"),
        (
            {"name": "vlm_echo", "server": "http://x", "dtype": "bf16"},
            "dtype does not apply to a model behind a server",
        ),
        ({"name": "vlm_echo", "token_weights": {"a": -1}}, "greater than or equal to 0"),
        ({"name": "yes_probability", "template": "Is it good?"}, "template must contain {prompt}"),
        ({"name": "yes_probability", "yes": []}, "at least 1 item"),
        ({"name": "yes_probability", "yes": ["yes", ""]}, "a spelling is empty"),
        ({"name": "yes_probability", "no": [" "]}, "a spelling is empty"),
        ({"name": "artifact_vlm", "instruction": ""}, "it is empty; leave it out for the default question"),
        ({"name": "artifact_vlm", "instruction": " \n"}, "it is empty; leave it out for the default question"),
        ({"name": "artifact_vlm", "server": {"url": "http://x", "tries": 3}}, "tries"),
    ],
)
def test_options_that_cannot_be(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewards.resolve(entry)


def test_models_that_cannot_be(tmp_path: Path, vlm: Vlm) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a model of type 'bert'; give one of type qwen2_vl"):
        rewards.build([{"name": "vlm_echo", "model": str(tmp_path)}])
    with pytest.raises(UserError, match="preprocessor_config.json"):
        _vlm.read_look(tmp_path, vlm.model.config.vision_config, None)


def test_a_saved_folder_is_a_model(vlm: Vlm, tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path)
    vlm.words.save_pretrained(tmp_path)
    stated = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 4096, "max_pixels": 16384}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    local = _asking.local(vlm, YES, NO)
    built = rewards.build([{"name": "vlm_echo", "model": str(tmp_path), "query": "What is it?"}])["vlm_echo"]
    torch.testing.assert_close(built(IMAGES, PROMPTS, BLANK).scores, echo(local, query="What is it?").scores)
    coarse = rewards.build([{"name": "vlm_echo", "model": str(tmp_path), "pixels": 1024, "query": "What is it?"}])
    assert not torch.allclose(coarse["vlm_echo"](IMAGES, PROMPTS, BLANK).scores, echo(local).scores, atol=1e-3)


def test_the_embedded_model_knows_its_prompt_and_broken_shapes() -> None:
    from diffalign.shapes.corruptions import corrupt

    rng, images, right, wrong = random.Random(8), [], [], []
    for _ in range(16):
        meta, objects = prompts.sample(rng, prompts.catalogue())
        images.append(torch.tensor(world.render(objects)).permute(2, 0, 1) / 255)
        right.append(meta["prompt"])
        wrong += questions.choose(rng, questions.near_misses(meta["include"], objects), 1)
    x, blank = torch.stack(images), [{}] * 16
    broken = torch.stack([corrupt(image, rng) for image in images])
    scorers = rewards.build(["vlm_echo", "yes_probability", "artifact_vlm"])
    with torch.no_grad():
        for name in ("vlm_echo", "yes_probability"):
            better = scorers[name](x, right, blank).scores > scorers[name](x, wrong, blank).scores
            assert better.float().mean() > 0.8, name
        clean, faulty = (scorers["artifact_vlm"](i, right, blank).scores for i in (x, broken))
    assert (clean[:, None] > faulty).float().mean() > 0.85
    assert ((clean >= 0) & (clean <= 1)).all()
