"""Pictures of a steering run: embedded in the report, and side by side on a contact sheet."""

from __future__ import annotations

import base64
import io
from pathlib import Path, PurePosixPath

from PIL import Image, ImageDraw, ImageFont

from diffalign.eval.steering_folder import SteeringRun
from diffalign.types import UserError

ROWS, CELL, ROOM = 32, 160, 8  # prompts of the contact sheet, px of a picture, and px between two
HEADING, MARGIN = 28, 40  # px above the pictures, and left of them
PAPER, INK = (255, 255, 255), (40, 40, 40)
QUALITY = 90


def embedded(folder: Path, file: str, side: int) -> str:
    """A picture as a data URI, re-encoded so that nothing but pixels enters the page; large ones as small JPEGs."""
    picture, large = opened(folder, file), False
    if max(picture.size) > side:
        large = True
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    if not large:
        return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def opened(folder: Path, file: str) -> Image.Image:
    """A picture of the run. Only those in its own images/ are read, whatever the lines say."""
    path = folder / "images" / PurePosixPath(file).name
    try:
        with Image.open(path) as image:
            picture: Image.Image = image.convert("RGB")
            return picture
    except OSError as error:
        raise UserError(f"{path} is not a readable picture; steer its prompt again in a new folder") from error


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def contact_sheet(run: SteeringRun) -> Image.Image:
    """The best picture of each arm: a row a prompt, by its number, and a column an arm."""
    lines = run.lines[:ROWS]
    step = CELL + ROOM
    size = (MARGIN + step * len(run.arms), HEADING + step * len(lines) + (ROOM if not lines else 0))
    sheet = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for k, arm in enumerate(run.arms):
        pen.text((MARGIN + k * step, ROOM), arm, INK, font)
    for row, line in enumerate(lines):
        top = HEADING + row * step
        pen.text((ROOM, top), str(line.index), INK, font)
        for k, arm in enumerate(run.arms):
            if arm in line.arms:
                picture = fitted(opened(run.path, line.arms[arm].images[0]))
                left = MARGIN + k * step + (CELL - picture.width) // 2
                sheet.paste(picture, (left, top + (CELL - picture.height) // 2))
    return sheet


def fitted(picture: Image.Image) -> Image.Image:
    """As large as a cell allows."""
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)
