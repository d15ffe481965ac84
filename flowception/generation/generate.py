"""The ``flowception generate`` job: a run directory and a few wishes become clips on disk.

Writes ``clip_0000.mp4``, ``clip_0000.gif`` and ``clip_0000_growth.png`` ... , ``contact.png`` and ``clips.jsonl``
(``generation.outputs``, also for one set made by several jobs). What a clip is asked to show and its seed follow from
its number (``generation.requests``), so it comes out the same whatever the batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowception.errors import ConfigError
from flowception.flow import (
    Context,
    Role,
    SamplerConfig,
    SampleResult,
    SamplerState,
    sample,
    task_number,
)
from flowception.flow.delays import build_delay_law
from flowception.generation.context import ContextReader, check_files, untrained
from flowception.generation.growth import draw_growth
from flowception.generation.kv_cache import FrozenFramePredictor
from flowception.generation.load import LoadedRun, data_fps, load_run
from flowception.generation.outputs import begin_lists, check_part, condition_of, first_clips, write_lists
from flowception.generation.predictor import NetworkPredictor
from flowception.generation.prompt import Prompt, encode_prompts, read_prompts
from flowception.generation.requests import clip_requests
from flowception.generation.video import Video, write_mp4, write_preview
from flowception.nn.dit import FlowceptionDiT
from flowception.progress import Progress
from flowception.shards.schema import NO_CLASS

logger = logging.getLogger(__name__)

DEFAULT_FPS = 16.0
"""Of the written files, where neither the options nor the training clips say."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What to generate."""

    run_dir: Path
    out_dir: Path
    num_clips: int
    """Of each prompt, with ``prompts_file``."""
    task: str = "t2v"
    context_files: tuple[Path, ...] = ()
    """Images or videos, as the task takes them (``context``); clips cycle over them."""
    keep: tuple[int, ...] | None = None
    """Latent frames of a context video that are given; None takes the task's default."""
    class_label: str | None = None
    """Number or name of a class, or ``null`` for none; None cycles over the classes for t2v, and is none for the other
    tasks, where the context says what is seen."""
    prompt: str | None = None
    prompts_file: Path | None = None
    """A prompt a line (``generation.prompt``); clips cycle over them."""
    text_encoder: str | None = None
    """Folder or hub id of the T5 encoder for prompts; None takes the one that made the shards."""
    seed: int = 0
    """Clip i has seed ``seed + i``, unless the prompts file names its own."""
    checkpoint_step: int | None = None
    """None takes the newest valid checkpoint."""
    guidance: float | None = None
    rate_guidance: float | None = None
    insertion: str = "thinning"
    num_inference_steps: int = 50
    cache_refresh_steps: int | None = None
    """Once the clock has ended, keep the keys and values of finished frames and compute them anew every so many steps
    only (``generation.kv_cache``); None computes every frame in every step."""
    max_frames: int = 64
    """Cap on latent frames of a clip, those of its context included."""
    num_frames: int | None = None
    """Latent frames of a clip, given ones included, for a run whose delay law is prescribed; None otherwise."""
    batch_size: int = 16
    part: int = 0
    """Which task this is of the ``num_parts`` that together make the set (``generation.outputs``)."""
    num_parts: int = 1
    size_pixels: tuple[int, int] | None = None
    """Height and width; None takes the training clips'."""
    fps: float | None = None
    """None takes the training clips'."""
    device: str | None = None
    """None takes CUDA where there is one."""


def generate(options: GenerateOptions) -> list[dict[str, Any]]:
    """Generate clips and write them.

    Args:
        options: What to generate.

    Returns:
        The lines of ``clips.jsonl``.

    Raises:
        FlowceptionError: If the run or the options do not allow it; nothing is written then.
    """
    check_options(options)
    device = choose_device(options.device)
    run = load_run(options.run_dir, step=options.checkpoint_step, device=device)
    batches = GenerationBatches(run, options, device)
    _make_folder(options.out_dir)
    begin_lists(options.out_dir, options.part, options.num_parts)
    fps = options.fps or batches.data_fps or DEFAULT_FPS
    where = f"{options.run_dir} at step {run.step} on {device}"
    share = f", batches {options.part}, {options.part + options.num_parts} ..." if options.num_parts > 1 else ""
    logger.info(
        "generating %d clips (%s)%s from %s into %s", len(batches.wishes), options.task, share, where, options.out_dir
    )
    records: list[dict[str, Any]] = []
    videos: list[Video] = []
    evaluations = batches.most_evaluations * len(batches.first_clips)
    with Progress(evaluations, "generating") as progress:
        for first, result in batches.results(progress):
            for record, video in _write_batch(run, options, batches, first, result, fps):
                records.append(record)
                videos.append(video)
    sheet = write_lists(options.out_dir, options.part, options.num_parts, records, videos)
    logger.info("wrote %d clips%s", len(records), f"; overview: {sheet}" if records else "")
    return records


def check_options(options: GenerateOptions) -> None:
    """Refuse wishes that contradict each other, before anything is loaded."""
    task_number(options.task)
    check_part(options.part, options.num_parts)
    check_files(options.task, options.context_files, options.keep)
    if options.prompt is not None and options.prompts_file is not None:
        raise ConfigError("--prompt and --prompts were both given; give one of the two")
    _prompts(options)
    if options.out_dir.exists() and not options.out_dir.is_dir():
        raise ConfigError(f"--out is {options.out_dir}, which is a file; give a folder")


def choose_device(wish: str | None) -> torch.device:
    """The device that was asked for, or CUDA where there is one.

    Raises:
        ConfigError: If this machine does not have it.
    """
    try:
        device = torch.device(wish or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device is {wish}, which torch does not know; give cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"--device is {wish} and this machine has {count} CUDA devices; give cpu, or leave it out")
    return device


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be made ({error.strerror}); give another folder") from error


def _prompts(options: GenerateOptions) -> list[Prompt]:
    """What clips cycle over; none for clips without prompt."""
    if options.prompts_file is not None:
        return read_prompts(options.prompts_file)
    return [] if options.prompt is None else [Prompt(text=options.prompt)]


class GenerationBatches:
    """Samples the clips of a job batch by batch."""

    def __init__(self, run: LoadedRun, options: GenerateOptions, device: torch.device) -> None:
        """Prepare conditions and context; every error of the options is raised here."""
        self.run, self.options, self.device = run, options, device
        self.wishes = clip_requests(
            options.num_clips,
            _prompts(options),
            seed=options.seed,
            class_label=options.class_label or ("null" if options.context_files else None),
            class_names=run.meta.class_names,
            num_classes=run.config.model.num_classes,
        )
        self.height, self.width = _choose_size(run, options)
        self.law = build_delay_law(run.config.process.delay_law)
        self.data_fps = data_fps(run.config.data)
        self.config = self._sampler_config()
        self.contexts = self._read_contexts() if options.context_files else []
        if warning := untrained(options.task, self.contexts, run.config.process, options.max_frames):
            logger.warning("%s", warning)
        prompts = [self.wishes[number].prompt for first in self.first_clips for number in self.numbers(first)]
        self.texts = encode_prompts(run, prompts, options.text_encoder, device)

    @property
    def first_clips(self) -> range:
        """Number of each batch's first clip."""
        options = self.options
        return first_clips(len(self.wishes), options.batch_size, options.part, options.num_parts)

    def numbers(self, first: int) -> range:
        """Numbers of a batch's clips."""
        return range(first, min(first + self.options.batch_size, len(self.wishes)))

    @property
    def most_evaluations(self) -> int:
        """Evaluations that a batch can take: N for each unit of its clock."""
        generated = torch.full((1, self.options.num_frames or 1), int(Role.FREE))
        return round(float(self.law.clock_end(generated))) * self.options.num_inference_steps

    def class_name(self, label: int) -> str | None:
        """Name of a class, if it has one."""
        names = self.run.meta.class_names
        return names[label] if 0 <= label < len(names) else None

    def _sampler_config(self) -> SamplerConfig:
        process, options = self.run.config.process, self.options
        if not self.law.inserts and options.num_frames is None:
            raise ConfigError(
                f"the run was trained with delay_law {process.delay_law}, which is given the length; give --num-frames"
            )
        if self.law.inserts and options.num_frames is not None:
            raise ConfigError(
                "--num-frames is for runs of a prescribed delay law; this model chooses the length itself"
            )
        if not self.law.inserts and options.task == "completion":
            raise ConfigError(
                f"--task completion leaves open how many frames fill a gap and the run was trained with delay_law "
                f"{process.delay_law}, which is given where frames lie; use a run of delay_law uniform"
            )
        return SamplerConfig(
            num_inference_steps=options.num_inference_steps,
            num_start_frames=process.num_start_frames,
            insertion=options.insertion,
            order="learned" if self.law.inserts else process.delay_law,
            num_frames=options.num_frames,
            insertion_schedule=process.insertion_schedule,
            insertion_exponent=process.insertion_exponent,
            max_frames=options.max_frames,
            time_shift=process.time_shift,
        )

    def _read_contexts(self) -> list[Context]:
        run, options = self.run, self.options
        reader = ContextReader(
            task=options.task,
            codec=run.codec,
            height=self.height,
            width=self.width,
            fps=self.data_fps,
            max_context_frames=run.config.process.max_context_frames,
            keep=options.keep,
        )
        contexts = reader.read(options.context_files)
        if options.num_frames is None:
            return contexts
        given = max(len(context.frames) for context in contexts)
        if given >= options.num_frames:
            raise ConfigError(f"--num-frames is {options.num_frames} and the context has {given}; give more")
        if options.task != "interpolation":
            return contexts
        last = options.num_frames - 1
        return [replace(item, places=_spread(len(item.frames), last)) for item in contexts]

    def results(self, progress: Progress) -> Iterator[tuple[int, SampleResult]]:
        """Number of a batch's first clip, and the batch's sample."""
        stride = self.run.codec.spatial_stride
        frame_shape = (self.run.codec.latent_channels, self.height // stride, self.width // stride)
        budget = self.most_evaluations
        for first in self.first_clips:
            numbers = self.numbers(first)
            begun = progress.done

            def watch(state: SamplerState) -> None:
                if state.step:
                    progress.advance(note=f"{len(state.frames)} frames in {len(state.cu_frames) - 1} clips")

            result = sample(
                self.predictor(numbers),
                frame_shape=frame_shape,
                batch_size=len(numbers),
                config=self.config,
                context=self._contexts(numbers),
                seed=[self.wishes[number].seed for number in numbers],
                device=self.device,
                watch=watch,
            )
            progress.advance(budget - (progress.done - begun))
            yield first, result

    def predictor(self, numbers: Sequence[int]) -> NetworkPredictor:
        """The network for clips of the given numbers."""
        wishes = [self.wishes[number] for number in numbers]
        class_labels, null_text = [wish.class_label for wish in wishes], self.run.null_text
        half = self.device.type == "cuda" and self.run.config.precision == "bf16"
        settings: dict[str, Any] = {
            "texts": None if null_text is None else [self.texts[wish.prompt] for wish in wishes],
            "null_text": null_text,
            "guidance": self.options.guidance,
            "rate_guidance": self.options.rate_guidance,
            "autocast_dtype": torch.bfloat16 if half else None,
        }
        if self.options.cache_refresh_steps is None:
            return NetworkPredictor(self.run.model, class_labels, **settings)
        if not isinstance(self.run.model, FlowceptionDiT):
            raise ConfigError(f"--cache-refresh works with FlowceptionDiT only, the run has {type(self.run.model)}")
        refresh_steps = self.options.cache_refresh_steps
        return FrozenFramePredictor(self.run.model, class_labels, refresh_steps=refresh_steps, **settings)

    def _contexts(self, numbers: Sequence[int]) -> list[Context] | None:
        if not self.contexts:
            return None
        return [self.contexts[number % len(self.contexts)] for number in numbers]


def _spread(count: int, last: int) -> list[int]:
    """Places of keyframes from 0 to ``last``, evenly apart: they name no places, and a prescribed law needs some."""
    return [round(k * last / (count - 1)) for k in range(count)]


def _choose_size(run: LoadedRun, options: GenerateOptions) -> tuple[int, int]:
    """Height and width in pixels: the one asked for, or the only one of the training set."""
    stride = run.codec.spatial_stride
    known = run.sizes_pixels
    named = ", ".join(f"{height}x{width}" for height, width in known) or "unknown"
    if options.size_pixels is None:
        if len(known) != 1:
            raise ConfigError(f"the run was trained at {len(known)} sizes ({named}); choose one with --size HxW")
        return known[0]
    if any(side % stride for side in options.size_pixels):
        raise ConfigError(
            f"--size is {options.size_pixels[0]}x{options.size_pixels[1]}; the codec {run.codec.name} needs multiples "
            f"of {stride} pixels (trained sizes: {named})"
        )
    return options.size_pixels


def _write_batch(
    run: LoadedRun, options: GenerateOptions, batches: GenerationBatches, first: int, result: SampleResult, fps: float
) -> Iterator[tuple[dict[str, Any], Video]]:
    """Decode and write the clips of a batch, giving each one's line of ``clips.jsonl`` and its pixels."""
    edges = result.cu_frames.tolist()
    videos = run.codec.decode_many([latents.cpu() for latents in result.clips()])
    for slot, video_pixels in enumerate(videos):
        number, here = first + slot, slice(edges[slot], edges[slot + 1])
        born_at = result.born_at[here].tolist()
        wish = batches.wishes[number]
        video = np.asarray(video_pixels)
        name = f"clip_{number:04d}"
        record = {
            "file": f"{name}.mp4",
            "task": options.task,
            "class_label": None if wish.class_label == NO_CLASS else wish.class_label,
            "class_name": batches.class_name(wish.class_label),
            "prompt": wish.prompt,
            "frames": len(video),
            "latent_frames": len(born_at),
            "roles": [Role(role).name.lower() for role in result.roles[here].tolist()],
            "seed": wish.seed,
            "evaluations": round(options.num_inference_steps * (1 + max(born_at))),
            "flops": None if result.clip_flops is None else float(result.clip_flops[slot]),
            "checkpoint_step": run.step,
            "capped": bool(result.capped[slot]),
        }
        write_mp4(options.out_dir / f"{name}.mp4", video, fps=fps)
        write_preview(options.out_dir / f"{name}.gif", video, fps=fps)
        draw_growth(
            options.out_dir / f"{name}_growth.png",
            born_at,
            result.roles[here].tolist(),
            num_inference_steps=options.num_inference_steps,
            time_shift=run.config.process.time_shift,
            title=_growth_title(record),
        )
        yield record, video


def _growth_title(record: dict[str, Any]) -> str:
    condition = condition_of(record)
    parts = [record["task"], condition, f"seed {record['seed']}", f"{record['latent_frames']} latent frames"]
    return ", ".join(part for part in parts if part) + f", {record['evaluations']} evaluations"
