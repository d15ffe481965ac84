"""Batch-by-batch sampling of one run, shared by ``Run.sample``, ``Run.stream`` and the command line.

A clip's class, prompt and seed follow from its number (``generation.requests``), so clips do not depend on the batch
size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flowception.errors import ConfigError
from flowception.flow import Context, Role, SamplerConfig, SampleResult, SamplerState, sample_states
from flowception.flow.delays import build_delay_law
from flowception.flow.sampler_state import initial_state
from flowception.generation.clip import Clip
from flowception.generation.context import ContextReader, untrained
from flowception.generation.kv_cache import CachedPredictor
from flowception.generation.load import LoadedRun
from flowception.generation.options import SampleOptions
from flowception.generation.outputs import first_clips
from flowception.generation.predictor import NetworkPredictor
from flowception.generation.prompt import encode_prompts
from flowception.generation.requests import clip_requests
from flowception.generation.video import DEFAULT_FPS
from flowception.nn.dit import FlowceptionDiT
from flowception.shards.schema import NO_CLASS

logger = logging.getLogger(__name__)


class ClipSampler:
    """Samples the clips that the options describe."""

    def __init__(self, run: LoadedRun, options: SampleOptions, *, part: int = 0, num_parts: int = 1) -> None:
        """Check the options against the run, read the context and encode the prompts.

        Args:
            run: The run.
            options: What to sample.
            part: Index of this job among the jobs that share the batches.
            num_parts: Number of jobs.

        Raises:
            FlowceptionError: If the run does not support the options.
        """
        self.run, self.options = run, options
        self.process = run.config.process
        self.law = build_delay_law(self.process.delay_law)
        self.device = next(run.model.parameters()).device
        self.requests = clip_requests(
            options.num,
            options.prompts(),
            seed=options.seed,
            class_label=options.class_word(),
            class_names=run.meta.class_names,
            num_classes=run.config.model.num_classes,
        )
        count = len(self.requests)
        firsts = first_clips(count, options.batch_size, part, num_parts)
        self.batches = [range(first, min(first + options.batch_size, count)) for first in firsts]
        """Numbers of the clips of each batch."""
        self.height, self.width = choose_size(run, options.size)
        self.config = self._sampler_config()
        self.contexts = self._read_contexts()
        if warning := untrained(options.task, self.contexts, self.process, options.max_frames):
            logger.warning("%s", warning)
        prompts = [self.requests[number].prompt for batch in self.batches for number in batch]
        self.texts = encode_prompts(run, prompts, options.text_encoder, self.device)
        self._check_start()

    def _check_start(self) -> None:
        """Raise now what the first state of any clip, or the predictor, would raise in the middle of the work."""
        contexts = self.contexts or None
        initial_state(self._frame_shape, len(self.contexts) or 1, self.config, contexts)
        if self.batches:
            self._predictor(self.batches[0])

    @property
    def _frame_shape(self) -> tuple[int, int, int]:
        """C, h, w of a latent frame."""
        stride = self.run.codec.spatial_stride
        return self.run.codec.latent_channels, self.height // stride, self.width // stride

    @property
    def most_evaluations(self) -> int:
        """Upper bound on the evaluations of a batch: N per unit of its clock."""
        generated = torch.full((1, self.options.num_frames or 1), int(Role.FREE))
        return round(float(self.law.clock_end(generated))) * self.options.num_inference_steps

    def sample(self, numbers: Sequence[int], watch: Callable[[SamplerState], None] | None = None) -> list[Clip]:
        """Sample and decode a batch.

        Args:
            numbers: Clip numbers of the batch.
            watch: Called with every state, to report progress.

        Returns:
            One clip per number.
        """
        for state in self.states(numbers):
            if watch is not None:
                watch(state)
        return self._clips(numbers, SampleResult.of(state))

    def states(self, numbers: Sequence[int]) -> Iterator[SamplerState]:
        """Yield the sampler states of a batch, from clock 0 to the final one."""
        return sample_states(
            self._predictor(numbers),
            frame_shape=self._frame_shape,
            batch_size=len(numbers),
            config=self.config,
            context=[self.contexts[number % len(self.contexts)] for number in numbers] if self.contexts else None,
            seed=[self.requests[number].seed for number in numbers],
            device=self.device,
        )

    def _sampler_config(self) -> SamplerConfig:
        process, options = self.process, self.options
        if not self.law.inserts and options.num_frames is None:
            raise ConfigError(f"delay_law {process.delay_law} of this run needs a clip length; set `num_frames`")
        if self.law.inserts and options.num_frames is not None:
            raise ConfigError(
                "`num_frames` applies only to prescribed delay laws; this model chooses the length itself, so drop it"
            )
        if not self.law.inserts and options.task == "completion":
            raise ConfigError(
                "`task` completion needs a run with delay_law uniform, which chooses how many frames fill a gap, got "
                f"delay_law {process.delay_law}"
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
        """Contexts that clips cycle over; empty for a task without context."""
        sources, num_frames = self.options.sources(), self.options.num_frames
        if not sources:
            return []
        reader = ContextReader(
            task=self.options.task,
            codec=self.run.codec,
            height=self.height,
            width=self.width,
            fps=self.run.fps,
            max_context_frames=self.process.max_context_frames,
            keep=self.options.kept_frames(),
        )
        contexts = reader.read(sources)
        if num_frames is None:
            return contexts
        given = max(len(context.frames) for context in contexts)
        if given >= num_frames:
            raise ConfigError(f"`num_frames` must exceed the {given} frames of the context, got {num_frames}")
        if self.options.task != "interpolation":
            return contexts
        return [replace(item, places=_spread(len(item.frames), num_frames - 1)) for item in contexts]

    def _predictor(self, numbers: Sequence[int]) -> NetworkPredictor:
        """The network as a predictor for these clips."""
        model, options = self.run.model, self.options
        requests = [self.requests[number] for number in numbers]
        class_labels, null_text = [request.class_label for request in requests], self.run.null_text
        half = self.device.type == "cuda" and self.run.config.precision == "bf16"
        settings: dict[str, Any] = {
            "texts": None if null_text is None else [self.texts[request.prompt] for request in requests],
            "null_text": null_text,
            "guidance": options.guidance,
            "rate_guidance": options.rate_guidance,
            "autocast_dtype": torch.bfloat16 if half else None,
        }
        if options.cache_refresh is None:
            return NetworkPredictor(model, class_labels, **settings)
        if not isinstance(model, FlowceptionDiT):
            raise ConfigError(f"`cache_refresh` requires FlowceptionDiT, got {type(model).__name__}; drop it")
        return CachedPredictor(model, class_labels, refresh_steps=options.cache_refresh, **settings)

    def _clips(self, numbers: Sequence[int], result: SampleResult) -> list[Clip]:
        """Decode a batch to clips."""
        latents = [frames.cpu() for frames in result.clips()]
        edges = result.cu_frames.tolist()
        clips = []
        for slot, (number, video) in enumerate(zip(numbers, self.run.codec.decode_many(latents), strict=True)):
            request, here = self.requests[number], slice(edges[slot], edges[slot + 1])
            born_at = result.born_at[here]
            clip = Clip(
                frames=np.asarray(video),
                latents=latents[slot],
                born_at=born_at,
                roles=tuple(Role(role) for role in result.roles[here].tolist()),
                task=self.options.task,
                prompt=request.prompt,
                class_label=None if request.class_label == NO_CLASS else request.class_label,
                class_name=self._class_name(request.class_label),
                seed=request.seed,
                evaluations=round(self.options.num_inference_steps * (1 + float(born_at.max()))),
                flops=None if result.clip_flops is None else float(result.clip_flops[slot]),
                capped=bool(result.capped[slot]),
                fps=self.run.fps or DEFAULT_FPS,
                num_inference_steps=self.options.num_inference_steps,
                time_shift=self.config.time_shift,
                step=self.run.step,
            )
            clips.append(clip)
        return clips

    def _class_name(self, label: int) -> str | None:
        names = self.run.meta.class_names
        return names[label] if 0 <= label < len(names) else None


def _spread(count: int, last: int) -> list[int]:
    """Spread keyframes evenly from 0 to ``last``, because a prescribed law needs their positions."""
    return [round(k * last / (count - 1)) for k in range(count)]


def choose_size(run: LoadedRun, requested: tuple[int, int] | None) -> tuple[int, int]:
    """The requested height and width in pixels, or the only size of the training set.

    Raises:
        ConfigError: If the training set has several sizes, or the codec cannot decode to the requested one.
    """
    stride, known = run.codec.spatial_stride, run.sizes_pixels
    named = ", ".join(f"{height}x{width}" for height, width in known) or "unknown"
    if requested is None:
        if len(known) != 1:
            raise ConfigError(
                f"the run was trained at {len(known)} sizes ({named}); choose one with `size` (height and width)"
            )
        return known[0]
    if any(side < 1 or side % stride for side in requested):
        raise ConfigError(
            f"`size` must be multiples of {stride} pixels for codec {run.codec.name}, got "
            f"{requested[0]}x{requested[1]} (trained sizes: {named})"
        )
    return requested
