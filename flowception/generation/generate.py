"""The ``flowception generate`` job: sample clips with the code of ``Run.sample`` and write them to disk.

Writes ``clip_0000.mp4``, ``clip_0000.gif`` and ``clip_0000_growth.png`` ... , ``contact.png`` and ``clips.jsonl``
(``generation.outputs``, which also handles a set split over several jobs).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowception.errors import ConfigError
from flowception.flow import SamplerState
from flowception.generation.clip import Clip
from flowception.generation.options import SampleOptions
from flowception.generation.outputs import begin_lists, check_part, write_lists
from flowception.generation.prompt import read_prompts
from flowception.generation.run import load
from flowception.generation.sampling import ClipSampler
from flowception.generation.video import Video
from flowception.progress import Progress
from flowception.ranges import number

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SampleOptions):
    """What to generate, and where to write it."""

    run_dir: Path
    out_dir: Path
    prompts_file: Path | None = None
    """File with one prompt per line (``generation.prompt``), instead of ``prompt``."""
    checkpoint_step: int | None = None
    """None uses the newest valid checkpoint."""
    part: int = 0
    """Index of this job among the ``num_parts`` jobs of the set (``generation.outputs``)."""
    num_parts: int = 1
    fps: float | None = None
    """Frame rate of the files written; None uses that of the training clips."""
    device: str | None = None
    """None uses CUDA if available."""

    def __post_init__(self) -> None:
        """Check options against each other, before anything is loaded."""
        super().__post_init__()
        check_part(self.part, self.num_parts)
        number(above=0).or_null("that of the training clips").check("`fps`", self.fps)
        if self.prompt is not None and self.prompts_file is not None:
            raise ConfigError("`prompt` and `prompts` cannot be combined; drop one of them")
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise ConfigError(f"`out` must be a folder, got the file {self.out_dir}")


def generate(options: GenerateOptions) -> list[dict[str, Any]]:
    """Generate clips and write them.

    Args:
        options: What to generate.

    Returns:
        Records of ``clips.jsonl``.

    Raises:
        FlowceptionError: If the run does not support the options; nothing is written in that case.
    """
    if options.prompts_file is not None:
        options = replace(options, prompt=read_prompts(options.prompts_file), prompts_file=None)
    run = load(options.run_dir, step=options.checkpoint_step, device=options.device)
    sampler = ClipSampler(run.loaded, options, part=options.part, num_parts=options.num_parts)
    _make_folder(options.out_dir)
    begin_lists(options.out_dir, options.part, options.num_parts)
    where = f"{options.run_dir} at step {run.step} on {run.device}"
    share = f", batches {options.part}, {options.part + options.num_parts} ..." if options.num_parts > 1 else ""
    logger.info(
        "generating %d clips (%s)%s from %s into %s", len(sampler.requests), options.task, share, where, options.out_dir
    )
    records: list[dict[str, Any]] = []
    videos: list[Video] = []
    with Progress(sampler.most_evaluations * len(sampler.batches), "generating") as progress:
        for numbers in sampler.batches:
            for number, clip in zip(numbers, _sample(sampler, numbers, progress), strict=True):
                records.append(_write(options, number, clip))
                videos.append(clip.frames)
    sheet = write_lists(options.out_dir, options.part, options.num_parts, records, videos)
    logger.info("wrote %d clips%s", len(records), f"; overview: {sheet}" if records else "")
    return records


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create `out` {path} ({error.strerror}); choose another folder") from error


def _sample(sampler: ClipSampler, numbers: range, progress: Progress) -> list[Clip]:
    """Sample a batch, always counted as ``most_evaluations`` units of progress."""
    start = progress.done

    def watch(state: SamplerState) -> None:
        if state.step:
            progress.advance(note=f"{len(state.frames)} frames in {len(state.cu_frames) - 1} clips")

    clips = sampler.sample(numbers, watch)
    progress.advance(sampler.most_evaluations - (progress.done - start))
    return clips


def _write(options: GenerateOptions, number: int, clip: Clip) -> dict[str, Any]:
    """Write a clip's files and return its record for ``clips.jsonl``."""
    path = options.out_dir / f"clip_{number:04d}.mp4"
    clip.save(path, fps=options.fps)
    clip.save(path.with_suffix(".gif"), fps=options.fps)
    clip.growth().save(path.with_name(f"{path.stem}_growth.png"))
    return {
        "file": path.name,
        "task": clip.task,
        "class_label": clip.class_label,
        "class_name": clip.class_name,
        "prompt": clip.prompt,
        "frames": len(clip.frames),
        "latent_frames": len(clip.latents),
        "roles": [role.name.lower() for role in clip.roles],
        "seed": clip.seed,
        "evaluations": clip.evaluations,
        "flops": clip.flops,
        "checkpoint_step": clip.step,
        "capped": clip.capped,
    }
