"""The table and the picture of docs/rtdmd.md from an evaluation of teacher and generators.

    python -m docs.few_step_table EVALUATION [NAME LABEL ...]

With names, their first images of eight prompts go to docs/images/few_steps.png, a row each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from docs.figures import FOLDER, GAP, SIDE, wrapped

LEFT, TOP, SHOWN = 150, 46, 8  # pixels for the labels and the prompts, prompts shown


def interval(found: dict[str, Any], digits: int) -> str:
    """The mean and half the width of its 95 % interval; bold where the difference from the baseline holds by Holm."""
    mean = f"{found['mean']:.{digits}f} ± {found['half']:.{digits}f}"
    delta = found.get("delta")
    return f"**{mean}**" if delta and delta["holds"] and delta["direction"] == "up" else mean


def table(report: dict[str, Any]) -> str:
    rewards = list(report["rewards"])
    lines = [
        "| | forwards | " + " | ".join(rewards) + " | diversity (DINO distance) |",
        "|" + "---|" * (len(rewards) + 3),
    ]
    for contestant in report["contestants"]:
        name = contestant["name"]
        cost, distance = report["cost"][name], report["diversity"]["models"][name]["distance"]["mean"]
        scores = [interval(report["rewards"][r]["models"][name], 3 if r == "geneval" else 2) for r in rewards]
        lines.append(f"| {name} | {cost['nfe']:g} | {' | '.join(scores)} | {distance:.3f} |")
    return "\n".join(lines)


def picture(folder: Path, rows: list[tuple[str, str]]) -> Image.Image:
    """Rows of (contestant, label), columns of prompts: every image from the same noise."""
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text("utf-8").splitlines()][:SHOWN]
    sheet = Image.new("RGB", (LEFT + SHOWN * (SIDE + GAP), TOP + len(rows) * (SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, prompt in enumerate(prompts):
        draw.multiline_text((LEFT + column * (SIDE + GAP), 4), wrapped(prompt["prompt"], 18), "#222", font, spacing=2)
    for row, (name, label) in enumerate(rows):
        top = TOP + row * (SIDE + GAP)
        draw.multiline_text((8, top + SIDE // 2 - 16), wrapped(label, 18), "#222", font, spacing=2)
        for column, prompt in enumerate(prompts):
            image = Image.open(folder / name / "images" / f"{prompt['id']}_00.png")
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (LEFT + column * (SIDE + GAP), top))
    return sheet


if __name__ == "__main__":
    root, named = Path(sys.argv[1]), sys.argv[2:]
    print(table(json.loads((root / "report.json").read_text("utf-8"))))
    if named:
        picture(root, list(zip(named[::2], named[1::2], strict=True))).save(FOLDER / "few_steps.png")
