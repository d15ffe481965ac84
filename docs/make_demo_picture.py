"""Make the README image from the output of ``make demo``: ``python docs/make_demo_picture.py``.

Left: frames of generated clips. Right: growth of one of them. Unedited output.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from flowception.codecs.video_file import read_video

ROOT = Path(__file__).resolve().parent.parent
SCALE, GAP, LABEL_WIDTH = 3, 4, 96
ROWS = (("t2v", 8), ("i2v", 4))


def clip_rows(folder: Path, count: int) -> list[tuple[str, np.ndarray]]:
    """Label and frames of the first ``count`` clips of a generated folder."""
    records = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()][:count]
    return [(f"{r['task']} {r['class_name'] or ''}".strip(), read_video(folder / r["file"])) for r in records]


def contact(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Draw one row per clip, with its label on the left."""
    side = rows[0][1].shape[1] * SCALE
    longest = max(len(video) for _, video in rows)
    sheet = Image.new("RGB", (LABEL_WIDTH + longest * (side + GAP), len(rows) * (side + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (label, video) in enumerate(rows):
        top = number * (side + GAP)
        pen.text((4, top + side // 2 - 6), label, fill="black")
        for k, frame in enumerate(video):
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (LABEL_WIDTH + k * (side + GAP), top))
    return sheet


def main() -> None:
    """Write ``docs/images/demo.png``."""
    demo = ROOT / "demo"
    left = contact([row for task, count in ROWS for row in clip_rows(demo / task, count)])
    growth = Image.open(demo / "t2v" / "clip_0001_growth.png").convert("RGB")
    sheet = Image.new("RGB", (left.width + 24 + growth.width, max(left.height, growth.height)), "white")
    sheet.paste(left, (0, (sheet.height - left.height) // 2))
    sheet.paste(growth, (left.width + 24, (sheet.height - growth.height) // 2))
    out = ROOT / "docs" / "images" / "demo.png"
    out.parent.mkdir(exist_ok=True)
    sheet.save(out, optimize=True)
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
