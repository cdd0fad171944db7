"""`diffalign score`: images and prompts find each other, the numbers are the heads' own, mistakes are one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scored_pictures import grey, here, lines, truncated

import diffalign
from diffalign import cli, image_lists, reward_entries
from diffalign.images import save_png
from diffalign.rewards.geneval import Geneval
from diffalign.rewards.jpeg import Jpeg
from diffalign.shapes.world import Object, render
from diffalign.types import UserError

ROOT = Path(diffalign.__file__).parent.parent


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["jpeg,geneval"], [{"name": "jpeg"}, {"name": "geneval"}]),
        (["jpeg:quality=80,mode=incompress,geneval:mode=dense"], [{"name": "jpeg", "quality": 80, "mode": "incompress"}, {"name": "geneval", "mode": "dense"}]),
        (["jpeg", "jpeg:label=fine,quality=99"], [{"name": "jpeg"}, {"name": "jpeg", "label": "fine", "quality": 99}]),
        (["{name: jpeg, label: 'a,b:c=d'}"], [{"name": "jpeg", "label": "a,b:c=d"}]),
        (["jpeg:1,geneval:.5,mode=dense"], [{"name": "jpeg", "weight": 1.0}, {"name": "geneval", "weight": 0.5, "mode": "dense"}]),
        (["jpeg:1e-1"], [{"name": "jpeg", "weight": 0.1}]),
        ([" jpeg , geneval:mode = dense,"], [{"name": "jpeg"}, {"name": "geneval", "mode": "dense"}]),
    ],
)  # fmt: skip
def test_rewards_are_written_in_one_line(texts: list[str], expected: list[dict[str, Any]]) -> None:
    assert [r.model_dump(exclude_unset=True) for r in reward_entries.parse(texts)] == expected


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([","], "names no reward"),
        (["jpg"], "unknown reward 'jpg'; did you mean 'jpeg'"),
        (["jpeg:fast"], "'fast' is no option; write OPTION=VALUE"),
        (["quality=80"], "'quality=80' belongs to no reward; write NAME:quality=80"),
        (["jpeg:quality=best"], "reward 'jpeg', quality: "),
        (["jpeg:quality=[1"], "is no YAML value"),
        (["jpeg,jpeg"], "two rewards are called 'jpeg'; add label=NAME"),
        (["{jpeg"], "is no YAML value"),
    ],
)
def test_rewards_that_cannot_be_read(texts: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        reward_entries.parse(texts)


def test_a_folder_of_generate_keeps_prompts_and_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circle = {"include": [{"class": "circle", "count": 1, "color": "red"}], "tag": "colors"}
    pictures = [render([Object("circle", color, 30, 30, 14)]) for color in ("red", "blue")]
    with (tmp_path / "metadata.jsonl").open("w") as file:
        for i, picture in enumerate(pictures):
            save_png(torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255, tmp_path / f"{i}.png")
            file.write(
                json.dumps({"prompt": "a red\u2028circle", **circle, "file_name": f"{i}.png"}, ensure_ascii=False)
                + "\n"
            )
    save_png(torch.zeros(3, 9, 9), tmp_path / "grid.png")  # not listed
    output = tmp_path / "out" / "scores.jsonl"
    asked = [
        "--reward",
        "geneval,jpeg:quality=80",
        "--images",
        str(tmp_path),
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    assert cli.main(["score", *asked]) == 0
    pixels = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in pictures])
    sizes = Jpeg(name="jpeg", quality=80)(pixels, ["", ""], [{}, {}]).scores.tolist()
    assert Geneval(name="geneval")(pixels, ["", ""], [circle, circle]).scores.tolist() == [1, 0]
    assert [line["scores"]["geneval"] for line in lines(output)] == [1, 0]
    assert [line["scores"]["jpeg"] for line in lines(output)] == sizes
    assert [(line["image"], line["prompt"]) for line in lines(output)] == [
        (f"{i}.png", "a red\u2028circle") for i in (0, 1)
    ]
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["reward", "images", "mean", "std", "min", "max", "n/a", "invalid"]
    assert rows[1].split() == ["geneval", "2", "0.5", "0.7071", "0", "1", "0", "0"]
    assert rows[2].split()[:2] == ["jpeg", "2"] and len(rows[2].split()) == 8


def test_sizes_are_never_mixed_and_the_order_is_kept(tmp_path: Path) -> None:
    for i in range(7):  # 2.png comes before 10.png
        Image.new("RGB", (8, 8) if i % 2 else (6, 9), (i * 20,) * 3).save(tmp_path / f"{i * 2}.png")
    images = image_lists.find(str(tmp_path))
    assert [i.name for i in images] == [f"{2 * i}.png" for i in range(7)]
    parts = image_lists.batches(images, 2)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert all(len(part) <= 2 and len({images[i].size for i in part}) == 1 for part in parts)
    output = tmp_path / "scores.jsonl"
    rewards = f"{here('together')},{here('moody')}"
    (tmp_path / "prompts.txt").write_text("x\n" * 7)
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert (
        cli.main(
            [
                "score",
                "--reward",
                rewards,
                "--images",
                str(tmp_path),
                *prompts,
                "--batch",
                "2",
                "--output",
                str(output),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert [line["scores"]["moody"] for line in lines(output)] == [pytest.approx(i * 20 / 255) for i in range(7)]
    assert sum(line["scores"]["together"] for line in lines(output)) == 4 * 2 / 2 * 2 + 2 * 2 + 1


def test_a_list_takes_paths_beside_it_and_metadata_of_equal_prompts(tmp_path: Path) -> None:
    grey(tmp_path / "pictures", a=0, b=255)
    entries = [{"image": "pictures/b.png", "prompt": "q"}, {"image": "pictures/a.png", "prompt": "p"}]
    (tmp_path / "grid.json").write_text(json.dumps(entries))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p", "tag": 1}\n{"prompt": "q", "tag": 2}\n')
    images = image_lists.find(str(tmp_path / "grid.json"), str(tmp_path / "prompts.jsonl"))
    assert [(i.name, i.metadata["prompt"], i.metadata["tag"]) for i in images] == [
        ("pictures/b.png", "q", 2),
        ("pictures/a.png", "p", 1),
    ]
    assert image_lists.read(images[0]).mean() == 1
    (tmp_path / "named.jsonl").write_text(
        '{"prompt": "bright", "file_name": "b.png"}\n{"prompt": "dark", "file_name": "a.png"}\n'
    )
    named = image_lists.find(str(tmp_path / "pictures"), str(tmp_path / "named.jsonl"))
    assert [(i.name, i.metadata["prompt"]) for i in named] == [("a.png", "dark"), ("b.png", "bright")]


def test_pixels_are_those_that_a_viewer_shows(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 32), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    (image,) = image_lists.find(str(tmp_path))
    pixels = image_lists.read(image)
    assert image.size == tuple(pixels.shape[1:]) == (64, 32)
    assert pixels[0, 4, 28] > 0.9 and pixels[2, 4, 28] < 0.1  # red is at the upper right
    assert pixels[2, 4, 4] > 0.9 and pixels[2, 60, 28] > 0.9


def mistakes(folder: Path) -> list[tuple[list[str], str]]:
    good, empty = str(grey(folder / "good", a=1, b=2)), folder / "empty"
    empty.mkdir()
    (folder / "bad").mkdir()
    (folder / "bad/x.png").write_bytes(b"no image")
    (folder / "deep").mkdir()
    Image.new("I;16", (2, 2)).save(folder / "deep/x.png")
    for name, text in {
        "three.txt": "p\nq\nr\n",
        "gone.json": '[{"image": "no.png", "prompt": "p"}]',
        "broken.json": "[{",
        "object.json": "{}",
        "nameless.json": '[{"prompt": "p"}]',
        "number.json": '[{"image": "good/a.png", "prompt": 3}]',
        "one.json": '[{"image": "good/a.png", "prompt": "p"}]',
        "other.txt": "q",
        "named.jsonl": '{"prompt": "p", "file_name": "a.png"}',
        "half.json": r'[{"image": "good/a.png", "prompt": "\ud800"}]',
        "half.jsonl": r'{"prompt": "p", "tag": "\ud800"}',
        "digits.json": '[{"image": "good/a.png", "n": %s}]' % ("9" * 5000),
        "digits.jsonl": '{"prompt": "p", "n": %s}' % ("9" * 5000),
        "deep.json": "[" * 100_000,
    }.items():
        (folder / name).write_text(text)

    def at(name: str) -> str:
        return str(folder / name)

    return [
        (["jpeg", at("nowhere")], "no folder or file"),
        (["jpeg", str(empty)], "holds no image"),
        (["jpeg", at("bad")], "cannot read the image"),
        (["jpeg", at("deep")], "more than 8 bits a channel"),
        (["jpeg", at("gone.json")], "there is no image file"),
        (["jpeg", at("broken.json")], "is not valid JSON"),
        (["jpeg", at("half.json")], "is not valid JSON: half of a surrogate pair"),
        (["jpeg", at("digits.json")], "is not valid JSON: a number has thousands of digits"),
        (["jpeg", at("deep.json")], "is not valid JSON: it nests too deeply"),
        (["jpeg", good, "--prompts", at("half.jsonl")], "half.jsonl:1: not valid JSON: half of a surrogate pair"),
        (["jpeg", good, "--prompts", at("digits.jsonl")], "digits.jsonl:1: not valid JSON: a number has thousands"),
        (["jpeg", at("object.json")], "must hold a list"),
        (["jpeg", at("nameless.json")], 'entry 1: expected an object with a path under "image"'),
        (["jpeg", at("number.json")], 'entry 1: the "prompt" must be text, got 3'),
        (["jpeg", good, "--prompts", at("three.txt")], "2 images, but 3 prompts in"),
        (["jpeg", good, "--prompts", at("named.jsonl")], "has no line with the \"file_name\" 'b.png'"),
        (["jpeg", at("one.json"), "--prompts", at("other.txt")], "lacks the prompt 'p'"),
        (["geneval", good], "'geneval' needs prompts, and the image 'a.png' has none; add --prompts FILE"),
        (["dino_adversarial:references=shapes-outline", good], "'dino_adversarial' is trained during a run"),
        (["jpeg", good, "--batch", "0"], "--batch must be at least 1"),
        (["jpeg", good, "--device", "warp"], "cannot compute on the device 'warp'"),
        (["jpeg", good, "--output", at("good/a.png/x.jsonl")], "could not write"),
        (["pickscore:model=nowhere", at("one.json"), "--output", at("good")], "could not write"),  # before it loads
    ]


def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for (reward, images, *rest), said in mistakes(tmp_path):
        assert cli.main(["score", "--reward", reward, "--images", images, *rest]) == 2, said
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


def test_mistakes_are_found_without_torch(tmp_path: Path) -> None:
    code = "import sys; from diffalign.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    args = ["score", "--reward", "jpeg", "--images", "nowhere"]
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "False 2\n"


def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    truncated(tmp_path / "a.png")
    (image,) = image_lists.find(str(tmp_path))
    with pytest.raises(UserError, match="cannot read the image"):
        image_lists.read(image)


@pytest.mark.parametrize(
    "tag", [b"\x02\0\x04\0\0\0abc\0", b"\x03\0\x02\0\0\0\x01\0\x01\0", b"\x03\0\x01"], ids=["text", "two", "cut"]
)
def test_odd_orientations_are_none_and_nothing_is_said(tmp_path: Path, tag: bytes) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01" + tag
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif + b"\0\0\0\0" * (len(tag) > 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (image,) = image_lists.find(str(tmp_path))
        assert image.size == tuple(image_lists.read(image).shape[1:]) == (8, 16)
