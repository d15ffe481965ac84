"""Measure prompt adherence: generate toy clips for every caption and score color and direction.

    python benchmarks/score_prompts.py RUN --num N --out DIR [--seed S] [--guidance G] [--checkpoint STEP] [--json FILE]

Generates N clips for each of the 16 captions of the toy world (4 colors, 4 directions). Color is scored by
``flowception/evaluation/toy/score.py`` (chance is 1/4). Direction is correct if the disc's first step has the prompted
sign along both axes (chance is 1/4). Real clips that hit a wall in the first step fail this too, so the same number of
real clips is scored for reference. So is the same number of clips generated without a prompt, as if they had one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowception.codecs.video_file import read_video
from flowception.errors import FlowceptionError
from flowception.evaluation.toy.score import score_clip, score_frame
from flowception.evaluation.toy.world import CLASS_NAMES, caption_of, draw_clip
from flowception.generation.generate import GenerateOptions, generate

REAL_SEED = 12345
"""Seed of the real clips; no data set uses it."""


Requested = tuple[NDArray[np.uint8], int, bool, bool]
"""A clip with its requested class, and whether it should start to the left and upward."""


@dataclass(frozen=True)
class PromptScore:
    """Fractions over all clips."""

    clips: int
    color_right: float
    direction_right: float
    single_shape: float
    mean_frames: float


def score(clips: list[Requested]) -> PromptScore:
    """Score clips against their requests."""
    scores = [score_clip(video, label) for video, label, _, _ in clips]
    return PromptScore(
        clips=len(clips),
        color_right=float(np.mean([found.color_right for found in scores])),
        direction_right=float(np.mean([direction_right(video, left, up) for video, _, left, up in clips])),
        single_shape=float(np.mean([found.single_shape for found in scores])),
        mean_frames=float(np.mean([found.frames for found in scores])),
    )


def direction_right(video: NDArray[np.uint8], left: bool, up: bool) -> bool:
    """Whether the disc's first step has the requested sign along both axes; False if a disc is not found twice."""
    if len(video) < 2:
        return False
    first, second = (np.array(score_frame(image).position) for image in video[:2])
    step = second - first  # nan compares as False
    return bool((step[0] < 0 if left else step[0] > 0) and (step[1] < 0 if up else step[1] > 0))


def generate_and_score(arguments: argparse.Namespace) -> dict[str, PromptScore]:
    """Generate clips for every caption, with and without the prompt."""
    combinations = list(product(range(len(CLASS_NAMES)), (False, True), (False, True)))
    prompted, unprompted, real = list[Requested](), list[Requested](), list[Requested]()
    for number, (label, left, up) in enumerate(combinations):
        caption = caption_of(label, left, up)
        for prompt, clips in ((caption, prompted), (None, unprompted)):
            out = arguments.out / f"{caption.replace(' ', '_')}{'' if prompt else '_unprompted'}"
            records = generate(
                GenerateOptions(
                    run_dir=arguments.run,
                    out_dir=out,
                    num=arguments.num,
                    prompt=prompt,
                    seed=arguments.seed + number * arguments.num,
                    checkpoint_step=arguments.checkpoint,
                    guidance=arguments.guidance if prompt else None,
                    max_frames=16,
                )
            )
            clips += [(read_video(out / record["file"]), label, left, up) for record in records]
    for number in range(arguments.num * len(combinations)):
        clip = draw_clip(REAL_SEED, number)
        left, up = bool(clip.velocity[0] < 0), bool(clip.velocity[1] < 0)
        real.append((clip.video, clip.class_label, left, up))
    return {"real": score(real), "prompted": score(prompted), "unprompted": score(unprompted)}


def main() -> int:
    """Parse the command line, generate clips and print the table."""
    parser = argparse.ArgumentParser(description="Score how often generated toy clips match their prompt.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of a model with text")
    parser.add_argument("--num", type=int, default=6, metavar="N", help="clips per caption (default: 6)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the clips")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first clip (default: 0)")
    parser.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance (default: off)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest valid one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to FILE")
    arguments = parser.parse_args()
    if arguments.num < 1:
        parser.error(f"--num must be >= 1, got {arguments.num}")
    try:
        scores = generate_and_score(arguments)
    except FlowceptionError as error:
        print(f"score_prompts: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps({name: asdict(found) for name, found in scores.items()}, indent=1) + "\n")
    print("| | clips | color right | direction right | one single shape | mean frames |\n|---|---|---|---|---|---|")
    for name, found in scores.items():
        print(
            f"| {name} | {found.clips} | {found.color_right:.0%} | {found.direction_right:.0%} | "
            f"{found.single_shape:.0%} | {found.mean_frames:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
