"""Encode context images and videos to the clean latents that a clip is generated from.

| task | files | ``--keep``: latent frames of a video, counted from 0 |
|---|---|---|
| ``i2v`` | images, or videos (first frame only) | |
| ``v2v`` | videos | consecutive frames to continue; default: the end, up to the longest context of training |
| ``interpolation`` | images (keyframes in order), or videos | the keyframes; default: the first and last |
| ``completion`` | videos | the frames to keep; default: the first and last quarter |

All images of ``interpolation`` form one context. Otherwise each file is a context, and clips cycle over them. Videos
are resampled to the training frame rate. An image in the middle of a clip is repeated to the number of pixel frames
that one latent covers (the first latent covers one).

Shape legend: ``n`` pixel frames, ``H`` and ``W`` pixels, ``L`` latent frames of a video, ``C, h, w`` of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, cat

from flowception.codecs import Codec
from flowception.codecs.video_file import cover_and_crop
from flowception.errors import ConfigError, DataError
from flowception.flow import TASKS, Context, ProcessConfig, Role, context_probability, task_number
from flowception.generation.context_source import ContextSource
from flowception.generation.video import Video

VIDEO_TASKS = ("v2v", "interpolation", "completion")
"""Tasks that can keep selected frames of a context video."""


def parse_keep(word: str) -> tuple[int, ...]:
    """Parse the value of ``--keep``.

    Args:
        word: Numbers and inclusive ranges, such as ``0-3,8-11``.

    Returns:
        Unique frame numbers in ascending order.

    Raises:
        ConfigError: If the value has any other form.
    """
    kept: set[int] = set()
    for part in word.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ConfigError(
                f"--keep must be latent frames and ranges, counted from 0, such as 0-3,8-11, got {word!r}"
            )
        kept.update(range(first, last + 1))
    return tuple(sorted(kept))


def check_context(task: str, sources: Sequence[ContextSource], keep: tuple[int, ...] | None) -> None:
    """Check that sources and kept frames fit the task, before anything is loaded.

    Raises:
        ConfigError: If sources are missing or too many, or ``keep`` does not fit the task.
        DataError: If a file is missing or has no image.
    """
    if task == "t2v" and sources:
        raise ConfigError(
            "`task` t2v takes no `context`; drop it, or set `task` to i2v, v2v, interpolation or completion"
        )
    if task != "t2v" and not sources:
        raise ConfigError(f"`task` {task} needs `context` with at least one {'video' if task != 'i2v' else 'image'}")
    for source in sources:
        source.first_frame()
    images = sum(source.is_image for source in sources) if task in VIDEO_TASKS else 0
    if task == "interpolation" and 0 < images < max(2, len(sources)):
        raise ConfigError(
            "`context` of `task` interpolation must be two or more images (keyframes in order) or only videos, got "
            f"{images} images and {len(sources) - images} videos"
        )
    if task == "completion" and images:
        raise ConfigError("`context` of `task` completion must be only videos, got an image")
    if keep is not None:
        _check_keep(task, keep, images)


def _check_keep(task: str, keep: tuple[int, ...], images: int) -> None:
    if task not in VIDEO_TASKS or (task == "interpolation" and images):
        raise ConfigError(
            "`keep` selects frames of context videos for `task` v2v, interpolation or completion; drop it"
        )
    if task == "v2v" and len(keep) != keep[-1] - keep[0] + 1:
        raise ConfigError(f"`keep` must be consecutive for `task` v2v, such as 0-3, got a gap after frame {_gap(keep)}")
    if task == "interpolation" and len(keep) < 2:
        raise ConfigError(f"`keep` must be at least two keyframes for `task` interpolation, got only frame {keep[0]}")


def _gap(keep: tuple[int, ...]) -> int:
    return next(a for a, b in zip(keep, keep[1:]) if b != a + 1)


@dataclass(frozen=True, kw_only=True)
class ContextReader:
    """Reads a task's context for one run."""

    task: str
    codec: Codec
    height: int
    """Pixel height of the clips to generate."""
    width: int
    """Pixel width of the clips to generate."""
    fps: float | None
    """Training frame rate; None keeps a video's own."""
    max_context_frames: int
    """Longest context of training, in latent frames."""
    keep: tuple[int, ...] | None = None
    """Latent frames of a video to keep; None uses the task's default."""

    def read(self, sources: Sequence[ContextSource]) -> list[Context]:
        """Read the contexts that clips cycle over.

        Args:
            sources: Sources accepted by ``check_context``.

        Returns:
            One context per source, or a single context of all images for interpolation.

        Raises:
            DataError: If a source cannot be read, is too short, or leaves no frame to generate.
        """
        if self.task == "i2v":
            return [Context(frames=self._image(source, first=True)) for source in sources]
        if self.task == "interpolation" and sources[0].is_image:
            latents = [self._image(source, first=number == 0) for number, source in enumerate(sources)]
            return [_keyframes(cat(latents))]
        read = {"v2v": self._continuation, "interpolation": self._interpolation, "completion": self._completion}
        return [read[self.task](source, self._video(source)) for source in sources]

    def _image(self, source: ContextSource, *, first: bool) -> Tensor:
        """Encode an image as the first or a later latent of a clip, [1, C, h, w]."""
        image = cover_and_crop(source.first_frame(), self.height, self.width)
        repeats = 1 if first else self.codec.pixel_frames(2)
        return self.codec.encode(np.repeat(image[None], repeats, axis=0))[-1:].float()

    def _video(self, source: ContextSource) -> Video:
        """Read a video at the training frame rate and size, uint8 [n, H, W, 3]."""
        frames = source.frames(self.fps)
        return np.stack([cover_and_crop(frame, self.height, self.width) for frame in frames])

    def _latent_frames(self, source: ContextSource, video: Video) -> int:
        """Number of latent frames L, checked against ``keep``."""
        usable = self.codec.usable_frames(len(video))
        count = self.codec.latent_frames(usable) if usable else 0
        if count == 0 or (self.keep is not None and self.keep[-1] >= count):
            requested = "" if self.keep is None else f", but `keep` requests latent frame {self.keep[-1]} (from 0)"
            change = "" if self.keep is None else " or change `keep`"
            raise DataError(
                f"{source.name} has {len(video)} frames, which encode to {count} latent frames{requested}; give a "
                f"longer video{change}"
            )
        return count

    def _run(self, video: Video, first: int, last: int) -> Tensor:
        """Latents ``first`` to ``last``, encoded as a separate clip whose first latent is one pixel frame."""
        end = self.codec.pixel_frames(last + 1)
        return self.codec.encode(video[end - self.codec.pixel_frames(last - first + 1) : end]).float()

    def _continuation(self, source: ContextSource, video: Video) -> Context:
        count = self._latent_frames(source, video)
        if self.keep is not None:
            return Context(frames=self._run(video, self.keep[0], self.keep[-1]))
        given = min(count, self.max_context_frames)
        return Context(frames=self.codec.encode(video[len(video) - self.codec.pixel_frames(given) :]).float())

    def _interpolation(self, source: ContextSource, video: Video) -> Context:
        count = self._latent_frames(source, video)
        keep = self.keep or (0, count - 1)
        if count < 2:
            raise DataError(f"{source.name} has one latent frame, `task` interpolation needs two; give a longer video")
        return _keyframes(self._run(video, keep[0], keep[-1])[[k - keep[0] for k in keep]])

    def _completion(self, source: ContextSource, video: Video) -> Context:
        count = self._latent_frames(source, video)
        quarter = max(1, count // 4)
        keep = self.keep or (*range(quarter), *range(count - quarter, count))
        if len(set(keep)) >= count:
            raise DataError(
                f"{source.name} has {count} latent frames, all of them kept; give a longer video or shorten `keep`"
            )
        latents = self._run(video, 0, count - 1)
        return Context(
            frames=latents[list(keep)],
            active=[k + 1 not in keep and k + 1 < count for k in keep],
            num_start_frames=0,
            begins_with_start=keep[0] > 0,
        )


def _keyframes(latents: Tensor) -> Context:
    """Context of keyframes: all active except the last, no start frames."""
    return Context(frames=latents, active=[True] * (len(latents) - 1) + [False], num_start_frames=0)


def untrained(task: str, contexts: Sequence[Context], process: ProcessConfig, max_frames: int) -> str | None:
    """Describe how a request differs from anything seen in training; None if it does not.

    Args:
        task: Name of the task.
        contexts: Contexts of the clips.
        process: The run's process.
        max_frames: Longest clip to consider.
    """
    shares = process.task_probabilities()
    if not shares[task_number(task)]:
        trained = ", ".join(law.name for law, share in zip(TASKS, shares) if share)
        return f"the run was not trained on {task}, only on {trained}; expect poor clips"
    for context in contexts:
        given = [Role.START] * context.begins_with_start + [Role(role) for role in context.roles().tolist()]
        if not any(context_probability(task, given, n, process) for n in range(1, max_frames + 1)):
            return (
                f"{task} was never trained with a context like this, of {len(context.frames)} frames; see "
                "max_context_frames, max_keyframes and max_cuts in the run's config.yaml"
            )
    return None
