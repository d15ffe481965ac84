"""Make the toy set: real H.264 files of a disc that bounces off the walls, with a manifest of labels.

    python data_prep/make_toy.py --out DIR --clips N --seed S

Clip i depends only on the seed and i. ``manifest.jsonl`` has one line per clip, ``{path, class_label, class_name,
caption, frames}``. It is written last, so a folder that has it is complete. The rules of the toy world are in
``flowception/evaluation/toy/world.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flowception.codecs.video_file import write_video
from flowception.errors import FlowceptionError
from flowception.evaluation.toy.world import CLASS_NAMES, FPS, draw_clip
from flowception.files import write_atomically
from flowception.progress import Progress
from flowception.rng import MAX_SEED

MANIFEST_NAME = "manifest.jsonl"
H264_CRF = 4
"""Error of at most a few of 256 levels, at full color resolution."""


def make_toy(out: Path, clips: int, seed: int) -> Path:
    """Write the set.

    Args:
        out: Folder for the clips; created if missing.
        clips: Number of clips.
        seed: Seed of the set.

    Returns:
        The manifest's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / MANIFEST_NAME
    manifest.unlink(missing_ok=True)
    lines = []
    with Progress(clips, "toy clips") as progress:
        for number in range(clips):
            clip = draw_clip(seed, number)
            name = f"clip_{number:06d}.mp4"
            write_video(out / name, clip.video, fps=FPS, crf=H264_CRF)
            label = {"class_label": clip.class_label, "class_name": CLASS_NAMES[clip.class_label]}
            lines.append(json.dumps({"path": name, **label, "caption": clip.caption, "frames": len(clip.video)}) + "\n")
            progress.advance()
    write_atomically(manifest, "".join(lines))
    return manifest


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make H.264 clips of a toy world whose rules can be checked exactly.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the clips")
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="number of clips, at least 1")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the set (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.clips < 1:
        parser.error(f"--clips must be an integer >= 1, got {arguments.clips}")
    if not 0 <= arguments.seed <= MAX_SEED:
        parser.error(f"--seed must be an integer from 0 to {MAX_SEED}, got {arguments.seed}")
    try:
        manifest = make_toy(arguments.out, arguments.clips, arguments.seed)
    except (FlowceptionError, OSError) as error:
        print(f"make_toy: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.clips} clips and {manifest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
