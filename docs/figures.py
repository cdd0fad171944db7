"""Pictures of runs for the documentation, in docs/images.

python -m docs.figures runs/shapes_demo
python -m docs.figures runs/shapes_grpo_0 runs/shapes_grpo_1 runs/shapes_grpo_2    one curve for each seed
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign import pipelines
from diffalign.eval.charts import Series, chart
from diffalign.eval.comparison import mean_score
from diffalign.eval.run_folder import Run, read
from diffalign.images import grid
from diffalign.rollout import collect, sample_seed
from diffalign.sections import Sampling
from diffalign.shapes import prompts
from diffalign.shapes.world import render

FOLDER = Path(__file__).parent / "images"
COLUMNS, SIDE, GAP, TEXT = 6, 128, 10, 46
STYLE = (
    "<style>svg{background:#fff;font-family:system-ui,sans-serif}.grid{stroke:#e4e2dc}.axis{stroke:#999}"
    ".tick{font-size:11px;fill:#555}.reference{stroke:#999;stroke-dasharray:4 4}.line{fill:none;stroke-width:2}"
    ".train{stroke:#b9c4d6;fill:none}.held{stroke:#c8502c}.dot{stroke:none}.dot.train{fill:#b9c4d6}.dot.held{fill:#c8502c}"
    ".whisker{stroke-width:1.5}</style>"
)


def wrapped(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def before_after(run: Run, metric: str, count: int = 12) -> Image.Image:
    """Two rows a block, before above after, one held-out prompt a column; a green frame where the score is 1."""
    assert run.base is not None and run.final is not None
    pictures = {e.epoch: run.images(e) for e in (run.base, run.final)}
    shown = sorted(pictures[run.base.epoch])[:count]
    blocks = -(-len(shown) // COLUMNS)
    high = 2 * (SIDE + GAP) + TEXT
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, blocks * (high + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for k, sample in enumerate(shown):
        x, y = GAP + k % COLUMNS * (SIDE + GAP), GAP + k // COLUMNS * (high + GAP)
        draw.multiline_text((x, y), wrapped(run.base.samples[sample].prompt), "#222", font, spacing=2)
        for row, evaluation in enumerate((run.base, run.final)):
            top = y + TEXT + row * (SIDE + GAP)
            picture = Image.open(pictures[evaluation.epoch][sample]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sheet.paste(picture, (x, top))
            right = evaluation.samples[sample].score(metric) == 1
            draw.rectangle(
                (x - 2, top - 2, x + SIDE + 1, top + SIDE + 1), outline="#2a9d4a" if right else "#d8d5cd", width=3
            )
    return sheet


def world(columns: int = 12) -> Image.Image:
    """Rendered scenes above, and below what the base model draws for the same prompts."""
    rng, test = random.Random(0), prompts.test_prompts()[4 : 4 + 2 * columns]
    sampling = Sampling(steps=20, kernel="ode", eta=0.0, height=64, width=64)
    seeds = torch.tensor([sample_seed(0, 0, p, 0) for p in range(len(test))])
    drawn = collect(pipelines.load("tiny-sd3"), test, torch.arange(len(test)), seeds, sampling, (), 24).images
    assert drawn is not None
    scenes = [torch.from_numpy(render(prompts.scene(rng, m["include"])).copy()).permute(2, 0, 1) / 255 for m in test]
    sheet = grid(torch.cat([torch.stack(scenes), drawn]), columns)
    picture = Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())
    return picture.resize((picture.width * 3 // 2, picture.height * 3 // 2), Image.Resampling.BICUBIC)


def curve(run: Run, metric: str) -> str:
    """Held-out score over epochs, and the training reward behind it."""
    held = Series([e.epoch for e in run.evaluations], [mean_score(e, metric) for e in run.evaluations], "held")
    train = Series([line["epoch"] for line in run.train], run.column(f"reward/{metric}"), "train")
    return styled(str(chart([train, held], label=f"{metric} over epochs", width=640, height=300)))


def seeds(runs: list[Run], metric: str) -> str:
    """Held-out score of several runs over epochs."""
    lines = [
        Series([e.epoch for e in r.evaluations], [mean_score(e, metric) for e in r.evaluations], "held") for r in runs
    ]
    return styled(str(chart(lines, label=f"{metric} over epochs", width=640, height=300)))


def styled(drawn: str) -> str:
    return drawn.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).replace(">", f">{STYLE}", 1)


if __name__ == "__main__":
    runs, name = [read(folder) for folder in sys.argv[1:]], "geneval"
    FOLDER.mkdir(exist_ok=True)
    if len(runs) > 1:
        (FOLDER / "shapes_grpo_curve.svg").write_text(seeds(runs, name), "utf-8")
        before_after(runs[0], name).save(FOLDER / "shapes_grpo_before_after.png", optimize=True)
    else:
        before_after(runs[0], name).save(FOLDER / "before_after.png", optimize=True)
        world().save(FOLDER / "shapes.png", optimize=True)
        (FOLDER / "grpo_curve.svg").write_text(curve(runs[0], name), "utf-8")
