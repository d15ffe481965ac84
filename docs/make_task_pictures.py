"""Make the images of docs/tasks.md: ``python docs/make_task_pictures.py GENERATED`` (default ``demo/tasks``).

``GENERATED`` has one folder per task, written by the commands of docs/tasks.md. Left: frames of generated clips, with
context frames outlined in the context color of the growth plot. Right: growth of the first clip.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from flowception.codecs.video_file import read_video
from flowception.flow import TASK_NUMBERS
from flowception.generation.growth import CONTEXT_COLOR

ROOT = Path(__file__).resolve().parent.parent
ROWS, SCALE, GAP, BORDER, GROWTH_WIDTH = 8, 2, 4, 3, 560


def strip(record: dict[str, Any], video: np.ndarray) -> Image.Image:
    """Draw one clip's frames from left to right, context frames outlined (one latent frame is one frame)."""
    side = video.shape[1] * SCALE
    cell = side + 2 * BORDER + GAP
    row = Image.new("RGB", (len(video) * cell, cell), "white")
    pen = ImageDraw.Draw(row)
    for k, frame in enumerate(video):
        left = k * cell
        if record["roles"][k].startswith("context"):
            edge = (left, 0, left + side + 2 * BORDER - 1, side + 2 * BORDER - 1)
            pen.rectangle(edge, fill=ImageColor.getrgb(CONTEXT_COLOR))
        picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
        row.paste(picture, (left + BORDER, BORDER))
    return row


def task_picture(folder: Path) -> Image.Image:
    """Draw clips of one task and the growth of the first."""
    records = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()][:ROWS]
    strips = [strip(record, read_video(folder / record["file"])) for record in records]
    growth = Image.open(folder / records[0]["file"].replace(".mp4", "_growth.png")).convert("RGB")
    growth.thumbnail((GROWTH_WIDTH, GROWTH_WIDTH))
    width = max(row.width for row in strips)
    height = sum(row.height for row in strips)
    sheet = Image.new("RGB", (width + 24 + growth.width, max(height, growth.height)), "white")
    top = (sheet.height - height) // 2
    for row in strips:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.paste(growth, (width + 24, (sheet.height - growth.height) // 2))
    return sheet


def main() -> None:
    """Write ``docs/images/task_NAME.png`` for every task."""
    generated = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo" / "tasks"
    for task in TASK_NUMBERS:
        out = ROOT / "docs" / "images" / f"task_{task}.png"
        task_picture(generated / task).save(out, optimize=True)
        print(f"wrote {out.relative_to(ROOT)}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
