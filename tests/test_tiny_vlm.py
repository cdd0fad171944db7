"""The embedded Qwen3-VL: it loads in plain transformers, and it knows what pictures of shapes show."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from diffalign.shapes import chat, prompts, questions, vlm, world
from diffalign.shapes.chat import Chat

WEIGHTS = Path(str(files("diffalign.shapes"))) / "weights"
FOLDER = WEIGHTS / vlm.NAME


@pytest.fixture(scope="module")
def model() -> Any:
    return chat.load(FOLDER)


@pytest.fixture(scope="module")
def talk() -> Chat:
    return Chat(AutoTokenizer.from_pretrained(FOLDER))


def test_the_folder_is_small_and_complete(model: Any, talk: Chat) -> None:
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 7e6
    assert (FOLDER / "generation_config.json").exists()
    stated = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
    images = torch.rand(2, 3, world.SIZE, world.SIZE).mul(255).round() / 255
    theirs = stated([(i.permute(1, 2, 0) * 255).numpy().astype(np.uint8) for i in images], return_tensors="pt")
    assert torch.allclose(theirs["pixel_values"].float(), chat.patchify(images), atol=1e-6)
    assert theirs["image_grid_thw"].tolist() == [[1, chat.GRID, chat.GRID]] * 2
    assert len(talk.image) * chat.MERGE**2 == chat.GRID**2
    assert model.config.image_token_id == chat.IMAGE == talk.encode("<|image_pad|>")[0]


@pytest.mark.parametrize("text", ["an unheard-of zèbra", "", "a red  circle\n", "日本", "<b>1+1</b>"])
def test_any_text_has_tokens_and_comes_back(talk: Chat, text: str) -> None:
    words = AutoTokenizer.from_pretrained(FOLDER)
    assert words.decode(list(talk.encode(text))) == text
    assert words.unk_token is None


def test_words_of_the_world_and_answers_are_single_tokens(talk: Chat) -> None:
    for word in (
        *chat.SPECIAL,
        *chat.YES,
        *chat.NO,
        *(f" {c}" for c in world.COLORS),
        *(f" {s}s" for s in world.SHAPES),
    ):
        assert len(talk.encode(word)) == 1
    assert len(talk.encode("a picture of a purple circle left of an orange star")) == 11
    assert talk.encode("user\n") + talk.encode("a") == talk.encode("user\na")  # no merges across the seam


def test_a_tree_computes_what_plain_sequences_do(model: Any, talk: Chat) -> None:
    rng, query = random.Random(5), "Is this a red star?"
    catalogue = prompts.catalogue()
    images, trees, texts = [], [], []
    for _ in range(3):
        meta, objects = prompts.sample(rng, catalogue)
        images.append(vlm.picture(objects))
        texts.append(meta["prompt"])
        trees.append(talk.tree(["two blue squares", meta["prompt"]], [(query, True), ("Is it?", False)], rng))
    batch = chat.pack(trees, len(talk.head))
    label, other = batch.pop("label"), batch.pop("other")
    grid = torch.tensor([[1, chat.GRID, chat.GRID]]).expand(3, -1)
    pixels = chat.patchify(torch.stack(images))
    with torch.no_grad():
        logp = model(**batch, pixel_values=pixels, image_grid_thw=grid, use_cache=False).logits.log_softmax(-1)
    echo = chat.echo(model, talk, torch.stack(images), texts)
    answer = chat.log_probs(model, talk, torch.stack(images), [query] * 3, [""] * 3)[:, 0]
    for i, tree in enumerate(trees):
        at = torch.tensor([b == 3 for b in tree.branch] + [False] * (label.shape[1] - len(tree.branch)))
        said = logp[i, at].gather(1, label[i, at][:, None])[:-1].mean()  # the last label ends the turn
        assert torch.isclose(said, echo[i], atol=1e-4)
        ask = ((label[i] != other[i]).nonzero()[0]).item()
        assert torch.allclose(logp[i, ask], answer[i], atol=1e-4)


def test_near_misses_are_false_and_truths_are_true() -> None:
    from diffalign.eval.geneval_logic import geneval_strict
    from diffalign.rewards.geneval import observe

    rng, catalogue = random.Random(1), prompts.catalogue()
    known = {p: i for tag in prompts.TAGS for p, i in catalogue[tag]}
    for _ in range(80):
        meta, objects = prompts.sample(rng, catalogue)
        seen = observe(world.render(objects))
        for truth in questions.truths(objects):
            assert geneval_strict(*seen, {"include": known[questions.caption(truth)], "exclude": []})
        misses = questions.near_misses(meta["include"], objects)
        assert len(questions.choose(rng, misses, 7)) == 7
        for text in (t for texts in misses.values() for t in texts):
            assert not geneval_strict(*seen, {"include": known[text], "exclude": []}), (text, objects)


def test_it_sees_what_is_shown_and_what_is_broken(model: Any, talk: Chat) -> None:
    right = vlm.measure(model, talk, per_tag=12, seed=77)
    assert right["echo"]["mean"] > 0.8
    assert right["match"]["mean"] > 0.8
    assert right["broken"]["mean"] > 0.8


def test_it_captions_when_asked(model: Any, talk: Chat) -> None:
    """Greedy decoding by transformers ends its turn with a caption of the picture."""
    rng, words = random.Random(3), AutoTokenizer.from_pretrained(FOLDER)
    right = 0
    for _ in range(16):
        objects = prompts.scene(rng, rng.choice(prompts.catalogue()["colors"])[1])
        ids = torch.tensor([talk.prefix(questions.DESCRIBE)])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == chat.IMAGE).int(),
            pixel_values=chat.patchify(vlm.picture(objects)[None]),
            image_grid_thw=torch.tensor([[1, chat.GRID, chat.GRID]]),
            max_new_tokens=16,
            do_sample=False,
        )[0, ids.shape[1] :]
        assert chat.END in out
        text = words.decode(out, skip_special_tokens=True)
        right += any(text.endswith(questions.caption(t)) for t in questions.truths(objects))
    assert right >= 14


def test_the_log_holds_its_training_and_its_scores() -> None:
    log = [json.loads(line) for line in (WEIGHTS / "pretrain_log.jsonl").read_text().splitlines()]
    mine = [line for line in log if line["stage"] == "vlm"]
    assert mine[-2]["step"] == vlm.PLAN.steps
    assert set(mine[-1]["held_out"]) == {"echo", "match", "broken"}
