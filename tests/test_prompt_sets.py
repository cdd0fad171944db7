"""Prompt sets of an evaluation: what is embedded, every published form on a small file of it, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diffalign import prompt_sets, prompts, published_prompts
from diffalign.eval import geneval_logic
from diffalign.rewards._mask2former import COLORS
from diffalign.rewards.geneval import RELATIONS
from diffalign.rewards.ocr import quoted
from diffalign.types import UserError

HOSTILE = [
    "</script><script>alert(1)</script>",
    "a 'quoted' \"cat\", & <b>bold</b>",
    "🦊 in the snow 雪の中の狐",
    "\u202ea fox backwards",
    "ثعلب في الثلج",
    "=HYPERLINK(1)",
    "{{ 7 * 7 }} %s %(x)s \\n",
    "a fox\u2028a line separator",
]


def write(path: Path, *lines: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return str(path)


def objects(path: Path, *records: Any) -> str:
    return write(path, *(json.dumps(record) for record in records))


def complaint(source: str) -> str:
    with pytest.raises(UserError) as caught:
        prompt_sets.load(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unusual(count: int, name: str, here: int) -> str:
    return f"{name} was published with {count:,} prompts, here are {here}"


# what is embedded


def test_mini_has_eight_prompts_of_each_tag() -> None:
    entries, notes = prompt_sets.load("diffalign-mini")
    tags = ["object", "count", "colour", "position", "text", "style", "people", "dense"]
    assert Counter(e["tag"] for e in entries) == dict.fromkeys(tags, 8)
    assert len({e["prompt"].lower() for e in entries}) == 64
    assert notes == []


def test_questions_of_mini_need_earlier_ones_alone() -> None:
    for entry in prompt_sets.load("diffalign-mini")[0]:
        numbers = [q["id"] for q in entry["questions"]]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 2
        assert all(set(q["needs"]) <= set(range(1, q["id"])) for q in entry["questions"])
        asked = [q["question"] for q in entry["questions"]]
        assert all(text.startswith(("Is ", "Are ", "Does ", "Do ", "Can ")) and text.endswith("?") for text in asked)
        assert len(set(asked)) == len(asked)


def test_clauses_of_mini_can_be_met_by_what_the_prompt_says() -> None:
    """A picture with just the objects asked for is right for GenEval's logic; without the last of them it is wrong."""
    offsets = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    judged = Counter[str]()
    for entry in prompt_sets.load("diffalign-mini")[0]:
        assert ("include" in entry) == (entry["tag"] in ("object", "count", "colour", "position"))
        if "include" not in entry:
            continue
        boxes: dict[str, list[tuple[float, ...]]] = {}
        colors: dict[str, list[str]] = {}
        for k, clause in enumerate(entry["include"]):
            relation = clause.get("position", [None])[0]
            assert relation in (*RELATIONS, None) and clause.get("color", "red") in COLORS
            x, y = offsets.get(relation, (3 * k, 3 * k))
            many = range(clause["count"])
            boxes[clause["class"]] = [
                (100 + 30 * x + 2 * i, 100 + 30 * y, 110 + 30 * x + 2 * i, 110 + 30 * y, 0.99) for i in many
            ]
            colors[clause["class"]] = [clause.get("color", "grey") for _ in many]
        assert geneval_logic.geneval_correct(boxes, colors, entry)
        last = entry["include"][-1]["class"]
        fewer = {name: found[: -1 if name == last else None] for name, found in boxes.items()}
        assert not geneval_logic.geneval_correct(fewer, colors, entry)
        judged[entry["tag"]] += 1
        words = entry["prompt"].split()
        assert all(c.get("color", words[0]) in words for c in entry["include"])
    assert set(judged.values()) == {8}


def test_text_prompts_of_mini_say_what_is_to_be_written() -> None:
    for entry in prompt_sets.load("diffalign-mini")[0]:
        assert quoted(entry["prompt"]) == entry.get("text")
        assert ("text" in entry) == (entry["tag"] == "text")


@pytest.mark.parametrize("name", ["shapes-train", "shapes-test"])
def test_shapes_are_as_prompts_has_them(name: str) -> None:
    assert prompt_sets.load(name) == (prompts.load(name), [])


# files


def test_text_and_json_lines(tmp_path: Path) -> None:
    assert prompt_sets.load(write(tmp_path / "a.txt", " a cat ", "", "a dog")) == (
        [{"prompt": "a cat"}, {"prompt": "a dog"}],
        [],
    )
    record = {"prompt": "a cat", "tag": "x", "seen": [1]}
    assert prompt_sets.load(objects(tmp_path / "b.jsonl", record)) == ([record], [])


def test_repeated_prompts_are_left_out_with_a_note(tmp_path: Path) -> None:
    lines = [f"prompt {n}" for n in range(200) for _ in range(5)]
    entries, notes = prompt_sets.load(write(tmp_path / "test.txt", *lines))
    assert [e["prompt"] for e in entries] == [f"prompt {n}" for n in range(200)]
    assert notes == ["800 repeated prompts were left out: 1,000 lines, 200 prompts"]
    assert prompt_sets.load(write(tmp_path / "b.txt", "a", "b", "a"))[1] == [
        "1 repeated prompt was left out: 3 lines, 2 prompts"
    ]


def test_a_note_says_when_metadata_is_lost(tmp_path: Path) -> None:
    source = objects(
        tmp_path / "a.jsonl", {"prompt": "a", "tag": "x"}, {"prompt": "a ", "tag": "y"}, {"prompt": "a", "tag": "x"}
    )
    assert prompt_sets.load(source) == (
        [{"prompt": "a", "tag": "x"}],
        [
            "2 repeated prompts were left out: 3 lines, 1 prompt; the metadata of 1 of them differed from that of the "
            "first, which is kept"
        ],
    )


def test_several_sources_are_told_apart(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.txt", "a", "b"), objects(tmp_path / "two.jsonl", {"prompt": "b"}, {"prompt": "c"})
    three = write(tmp_path / "three.csv", "Prompts,Category", "d,Colors")
    entries, notes = prompt_sets.load(f"{one}, {two},drawbench:{three}, diffalign-mini")
    assert [(e["prompt"], e["source"]) for e in entries[:4]] == [
        ("a", "one"),
        ("b", "one"),
        ("c", "two"),
        ("d", "drawbench"),
    ]
    assert len(entries) == 68 and entries[-1]["source"] == "diffalign-mini"
    assert notes == [
        "drawbench: " + unusual(200, "drawbench", 1),
        "1 repeated prompt was left out: 69 lines, 68 prompts",
    ]


def test_a_path_may_hold_commas_and_colons(tmp_path: Path) -> None:
    assert len(prompt_sets.load(write(tmp_path / "a,b.txt", "a cat"))[0]) == 1
    assert len(prompt_sets.load("drawbench:" + write(tmp_path / "a,b:c.csv", "Prompts,Category", "a,b"))[0]) == 1


@pytest.mark.parametrize(
    "form", ["plain.txt", "plain.jsonl", "ocr.txt", "drawbench.csv", "parti.tsv", "densealign.json"]
)
def test_hostile_text_arrives_whole(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    kind = form.partition(".")[0]
    if form.endswith(".csv"):
        quote = [text.replace('"', '""') for text in HOSTILE]
        write(path, "Prompts,Category", *(f'"{text}",Colors' for text in quote))
    elif form.endswith(".tsv"):
        write(path, "Prompt\tCategory\tChallenge\tNote", *(f"{text}\tArts\tBasic\t" for text in HOSTILE))
    elif form.endswith(".jsonl"):
        objects(path, *({"prompt": text} for text in HOSTILE))
    elif form.endswith(".json"):
        write(path, json.dumps([{"caption": text} for text in HOSTILE], ensure_ascii=False))
    else:
        write(path, *HOSTILE)
    entries, _ = prompt_sets.load(str(path) if kind == "plain" else f"{kind}:{path}")
    assert [e["prompt"] for e in entries] == HOSTILE


# published sets


def geneval(tag: str, n: int) -> dict[str, Any]:
    return {"tag": tag, "include": [{"class": "dog", "count": n}], "prompt": f"a photo of {tag} {n}"}


def test_geneval_of_full_size_needs_no_note(tmp_path: Path) -> None:
    counts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    records = [geneval(tag, n) for tag, count in counts.items() for n in range(count)]
    entries, notes = prompt_sets.load("geneval:" + objects(tmp_path / "evaluation_metadata.jsonl", *records))
    assert entries == records and notes == []
    four_times = "geneval:" + objects(tmp_path / "test_metadata.jsonl", *records * 4)
    assert prompt_sets.load(four_times) == (
        records,
        ["1,659 repeated prompts were left out: 2,212 lines, 553 prompts"],
    )


def test_geneval_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    assert prompt_sets.load("geneval:" + objects(path, geneval("colors", 1)))[1] == [unusual(553, "geneval", 1)]
    for wrong in ({"tag": "hue"}, {"tag": "colors", "include": []}, {"tag": "colors", "include": "dog"}):
        said = complaint("geneval:" + objects(path, geneval("colors", 1), {"prompt": "a", **wrong}))
        assert "prompt 2 is not GenEval's" in said and "evaluation_metadata.jsonl" in said


def test_ocr_tells_what_is_to_be_written(tmp_path: Path) -> None:
    source = write(tmp_path / "test.txt", 'a sign "Eat Here", "now"', "a sign “Eat”")
    assert prompt_sets.load(f"ocr:{source}") == (
        [
            {"tag": "text", "text": "Eat Here", "prompt": 'a sign "Eat Here", "now"'},
            {"tag": "text", "text": None, "prompt": "a sign “Eat”"},
        ],
        [
            "prompts that quote nothing between straight double quotes, which the reward 'ocr' leaves out: 1",
            unusual(1018, "ocr", 2),
        ],
    )


def test_drawbench_as_a_table_and_as_lines(tmp_path: Path) -> None:
    few = unusual(200, "drawbench", 2)
    table = write(
        tmp_path / "a.csv", "\ufeffPrompts,Category", '"A cat, a dog.",Gary Marcus et al. ', "", 'A "B".,Text'
    )
    expected = [{"prompt": "A cat, a dog.", "tag": "Gary Marcus et al."}, {"prompt": 'A "B".', "tag": "Text"}]
    assert prompt_sets.load(f"drawbench:{table}") == (expected, [few])
    table = write(tmp_path / "b.csv", "category,prompt", 'Gary Marcus et al.,"A cat, a dog."', 'Text,A "B".')
    assert prompt_sets.load(f"drawbench:{table}") == (expected, [few])
    lines = [f"prompt {n}" for n in range(200) for _ in range(5)]
    entries, notes = prompt_sets.load("drawbench:" + write(tmp_path / "test.txt", *lines))
    assert len(entries) == 200 and notes == ["800 repeated prompts were left out: 1,000 lines, 200 prompts"]


def test_parti_keeps_the_quotation_marks_of_its_prompts(tmp_path: Path) -> None:
    source = write(
        tmp_path / "PartiPrompts.tsv",
        "Prompt\tCategory\tChallenge\tNote",
        '"G I G" on a wall, in paint\tIllustrations\tWriting & Symbols\t',
        "bond\tAbstract\tBasic\tof several meanings",
    )
    assert prompt_sets.load(f"parti:{source}")[0] == [
        {"prompt": '"G I G" on a wall, in paint', "tag": "Illustrations", "challenge": "Writing & Symbols"},
        {"prompt": "bond", "tag": "Abstract", "challenge": "Basic"},
    ]


DPG = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"


def test_dpg_joins_prompts_and_questions(tmp_path: Path) -> None:
    table = tmp_path / "dpg_bench.csv"
    write(
        table,
        DPG,
        '12,x,,1,0,entity,whole,"entity - whole (fox)",Is there a fox?',
        '12,x,,2,"1, 3",attribute,color,"attribute - color (fox, red)","Is it red, then?"',
        "gone,x,,1,0,entity,whole,t,Is there a cat?",
    )
    write(tmp_path / "prompts" / "12.txt", "A red fox.", "It sleeps.")
    write(tmp_path / "prompts" / "whoops7.txt", "A blue fox.")
    write(tmp_path / "prompts" / "notes.md", "not a prompt")
    entries, notes = prompt_sets.load(f"dpg:{tmp_path}")
    assert entries == [
        {
            "prompt": "A red fox.\nIt sleeps.",
            "item": "12",
            "questions": [
                {"id": 1, "question": "Is there a fox?", "needs": [], "category": "entity"},
                {"id": 2, "question": "Is it red, then?", "needs": [1, 3], "category": "attribute"},
            ],
        },
        {"prompt": "A blue fox.", "item": "whoops7", "tag": "whoops", "questions": []},
    ]
    assert notes == [
        "prompts without a question in dpg_bench.csv: 1",
        "prompts of dpg_bench.csv without a text file, left out: 1",
        unusual(1065, "dpg", 2),
    ]
    write(table, DPG, "12,x,,one,0,entity,whole,t,Is there a fox?")
    assert "entry 1: expected whole numbers" in complaint(f"dpg:{tmp_path}")
    table.unlink()
    assert "dpg_bench.csv' cannot be read" in complaint(f"dpg:{tmp_path}")


def test_dpg_with_the_text_files_beside_the_table(tmp_path: Path) -> None:
    write(tmp_path / "dpg_bench.csv", DPG, "vrd1,x,,1,0,entity,whole,t,Is there a fox?")
    write(tmp_path / "vrd1.txt", "A fox.")
    assert [(e["item"], e["tag"], len(e["questions"])) for e in prompt_sets.load(f"dpg:{tmp_path}")[0]] == [
        ("vrd1", "vrd", 1)
    ]
    write(tmp_path / "vrd2.txt", "  ")
    assert "'vrd2.txt' holds no prompt" in complaint(f"dpg:{tmp_path}")


def test_t2i_compbench_takes_the_test_prompts(tmp_path: Path) -> None:
    write(tmp_path / "color_val.txt", "a red book", "a blue cup")
    write(tmp_path / "3d_spatial_val.txt", "a dog behind a car", "a red book")
    for name in ("color.txt", "color_train.txt", "color_val_seen.txt"):
        write(tmp_path / name, "a green car")
    entries, notes = prompt_sets.load(f"t2i-compbench:{tmp_path}")
    assert [(e["prompt"], e["tag"]) for e in entries] == [
        ("a dog behind a car", "3d_spatial"),
        ("a red book", "3d_spatial"),
        ("a blue cup", "color"),
    ]
    assert notes[0] == "text files left out, since the test prompts are those in *_val.txt: 3"
    for name in ("color_val.txt", "3d_spatial_val.txt"):
        (tmp_path / name).unlink()
    assert {e["tag"] for e in prompt_sets.load(f"t2i-compbench:{tmp_path}")[0]} == {"color"}


def test_hpdv2_has_a_list_for_each_style(tmp_path: Path) -> None:
    for style in published_prompts.STYLES:
        write(tmp_path / f"{style}.json", json.dumps([f"{style} one", "the same everywhere"]))
    entries, notes = prompt_sets.load(f"hpdv2:{tmp_path}")
    assert Counter(e["tag"] for e in entries) == {"anime": 2, "concept-art": 1, "paintings": 1, "photo": 1}
    assert notes[0] == unusual(3200, "hpdv2", 8) and notes[1].startswith("3 repeated prompts were left out: 8 lines")
    write(tmp_path / "photo.json", '["a", 3]')
    assert "photo.json: entry 2: expected a text" in complaint(f"hpdv2:{tmp_path}")
    write(tmp_path / "photo.json", '{"a": "b"}')
    assert "photo.json: expected a JSON list" in complaint(f"hpdv2:{tmp_path}")
    (tmp_path / "photo.json").unlink()
    assert "photo.json' cannot be read" in complaint(f"hpdv2:{tmp_path}")


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_densealign_has_captions(tmp_path: Path, ending: str) -> None:
    records = [{"caption": "A long scene.", "index": 7}, {"caption": "Another."}]
    path = tmp_path / f"metadata.{ending}"
    source = objects(path, records) if ending == "json" else objects(path, *records)
    entries, notes = prompt_sets.load(f"densealign:{source}")
    assert entries == [{"index": 7, "prompt": "A long scene."}, {"prompt": "Another."}]
    assert notes == [unusual(2000, "densealign", 2)]


def test_divgen_has_axes(tmp_path: Path) -> None:
    records = [{"prompt": f"p {axis}", "axis": axis.title(), "n": 3} for axis in published_prompts.AXES]
    entries, notes = prompt_sets.load("divgen:" + objects(tmp_path / "axes.jsonl", *records))
    assert [e["tag"] for e in entries] == list(published_prompts.AXES) and notes == []
    assert entries[0] == {"prompt": "p identity", "axis": "Identity", "n": 3, "tag": "identity"}
    table = write(tmp_path / "axes.csv", "Prompt,Axis", "a fox,tonal")
    assert prompt_sets.load(f"divgen:{table}")[0] == [{"prompt": "a fox", "axis": "tonal", "tag": "tonal"}]
    wrong = objects(tmp_path / "wrong.jsonl", {"prompt": "a", "axis": "mood"})
    assert "the axis 'mood' is unknown; use one of identity, style, layout, tonal" in complaint(f"divgen:{wrong}")


# what is refused


def test_missing_sources_say_what_there_is(tmp_path: Path) -> None:
    for source in ("nothing.txt", "shapes", "", "word:thing", "~nobody-here/x.txt", "a\0b", "x" * 5000, str(tmp_path)):
        said = complaint(source)
        assert "no prompt set or file" in said and "diffalign-mini" in said and "t2i-compbench" in said
    assert "no prompt set or file ''" in complaint("shapes-test,,diffalign-mini")
    assert "both called 'shapes-test'" in complaint("shapes-test,shapes-test")
    assert "both called 'drawbench'" in complaint("drawbench:a.csv,drawbench:b.csv")


@pytest.mark.parametrize("name", list(published_prompts.FORMATS))
def test_a_published_set_is_not_embedded(name: str, tmp_path: Path) -> None:
    kind = published_prompts.FORMATS[name]
    for source in (name, f"{name}:"):
        said = complaint(source)
        assert "not part of diffalign" in said and kind.takes in said and f"write {name}:PATH" in said
    assert f"; {name}:PATH takes {kind.takes}" in complaint(f"{name}:{tmp_path / 'missing'}")
    other = write(tmp_path / "file.txt", "a") if kind.folder else str(tmp_path)
    assert f"no {'folder' if kind.folder else 'file'} '{other}'" in complaint(f"{name}:{other}")
    assert name in prompt_sets.HELP


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", 'Prompts,Category\n"a"b,Colors\n', "a.csv:2: ',' expected after '\"'"),
        ("a.csv", 'Prompts,Category\n"a,Colors\n', "a.csv:2: unexpected end of data"),
        ("a.csv", "Prompts,Category\na, b,Colors\n", "entry 1 has 3 columns, the heading 2; quote cells with commas"),
        ("a.csv", "Text,Category\na,Colors\n", "entry 1: expected a text under 'prompt'"),
        ("a.csv", "Prompts,Category\na\n", "entry 1: expected a text under 'category'"),
        ("a.csv", "Prompts,Category\n", "holds no prompt"),
        ("a.csv", "", "holds no prompt"),
        ("a.csv", f"Prompts,Category\n{'x' * 200_000},Colors\n", "field larger than field limit"),
        ("a.json", "[1]", "prompt 1: expected a JSON object"),
        ("a.jsonl", '{"prompt": "a"\n', "a.jsonl: prompt 1: not valid JSON"),
        ("a.jsonl", '{"prompts": "\\ud800", "category": "x"}\n', "half of a surrogate pair"),
        ("a.json", "[" * 200_000, "not valid JSON"),
        ("a.xlsx", "PK", "must end in .jsonl, .json, .csv or .tsv"),
        ("a.csv", b"\xff\xfe", "is not UTF-8 text"),
        ("a.txt", "\n \n", "holds no prompt"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in complaint(f"drawbench:{path}")


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))).write_text("a cat")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    assert "unprintable name" in complaint(f"t2i-compbench:{tmp_path}")


def test_no_torch_is_loaded() -> None:
    script = "import sys; from diffalign import prompt_sets; prompt_sets.load('diffalign-mini,shapes-test'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
