"""A trained run: load it, sample clips, or stream frames as they become final.

    run = flowception.load("demo/run")
    clips = run.sample(task="i2v", context=["first.png"], num=4)

The command line is a thin layer on top (``generation.generate``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flowception.errors import ConfigError
from flowception.flow import stream_frames
from flowception.generation.clip import Clip
from flowception.generation.context_source import ContextItem
from flowception.generation.load import LoadedRun, load_run
from flowception.generation.options import SampleOptions
from flowception.generation.sampling import ClipSampler
from flowception.generation.video import DEFAULT_FPS

Frame = NDArray[np.uint8]
ContextArgument = ContextItem | Sequence[ContextItem] | None


class Run:
    """A trained network with its run's settings, returned by ``flowception.load``.

    A clip depends only on the run, the options and its seed. It is the same alone or in a batch (up to rounding), and
    repeating a call reproduces it to the bit.
    """

    def __init__(self, loaded: LoadedRun) -> None:
        """Wrap the result of ``generation.load.load_run``."""
        self.loaded = loaded
        """Configuration, network with EMA weights, codec, description of the training set."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, step={self.step}, device={str(self.device)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.loaded.run_dir

    @property
    def step(self) -> int:
        """Optimizer step of the weights."""
        return self.loaded.step

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.loaded.model.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of class numbers; empty if the classes are unnamed."""
        return list(self.loaded.meta.class_names)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of the training clips, most frequent first."""
        return self.loaded.sizes_pixels

    @property
    def fps(self) -> float:
        """Frames per second of the training clips; 16 if the shards are unreachable or do not record it."""
        return self.loaded.fps or DEFAULT_FPS

    def sample(
        self,
        *,
        task: str = "t2v",
        context: ContextArgument = None,
        keep: Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        class_label: int | str | None = None,
        text_encoder: str | None = None,
        num: int = 1,
        seed: int = 0,
        num_inference_steps: int = 50,
        guidance: float | None = None,
        rate_guidance: float | None = None,
        insertion: str = "thinning",
        max_frames: int = 64,
        num_frames: int | None = None,
        cache_refresh: int | None = None,
        batch_size: int = 16,
        size: tuple[int, int] | None = None,
    ) -> list[Clip]:
        """Sample clips (arXiv 2512.11438; docs/method.md has the sampler).

        Time shift, start frames, insertion schedule, codec and frame rate come from the run, and so does the size if
        there is only one.

        Args:
            task: ``t2v``, ``i2v``, ``v2v`` (continuation), ``interpolation`` or ``completion``.
            context: One item or a list that clips cycle over: paths of images or videos, uint8 arrays or tensors
                [H, W, 3] (an image) or [n, H, W, 3] (a video at the run's frame rate), PIL images. ``i2v`` takes images
                (or the first frames of videos); ``v2v`` and ``completion`` take videos; ``interpolation`` takes videos,
                or two or more images: the keyframes of one clip, in order. Images are resized and cropped to the
                clip's size.
            keep: Latent frames of a context video to keep, counted from 0; None uses the task's default (``v2v`` the
                end, ``interpolation`` the first and last, ``completion`` the first and last quarter).
            prompt: One or more captions, for a run trained with text: clip i has prompt ``i % len(prompt)``.
            class_label: Class number or name, or ``"null"`` for none. None cycles over all classes for ``t2v`` and
                means no class for the other tasks.
            text_encoder: Folder or hub id of the T5 encoder; None uses the one named in the training set.
            num: Number of clips; with several prompts, clips per prompt.
            seed: Clip i has seed ``seed + i``.
            num_inference_steps: N, steps of a frame from noise to data; a clip takes N to 2 N evaluations.
            guidance: Scale of classifier-free guidance on the velocity; None or 1 is off.
            rate_guidance: The same for the insertion rate, in log space; None or 1 is off.
            insertion: ``thinning``, ``bernoulli`` (the paper's) or ``poisson``.
            max_frames: Cap on latent frames of a clip, context included.
            num_frames: Latent frames of a clip, context included. Only for runs with a prescribed delay law; other
                models choose the length themselves.
            cache_refresh: After the clock has ended, recompute the keys and values of finished frames only every this
                many steps: a faster approximation. None is exact.
            batch_size: Clips sampled at once.
            size: Height and width in pixels; None uses the run's.

        Returns:
            ``num`` clips, or ``num`` per prompt, in the order of i.

        Raises:
            ConfigError: If an option is out of range, contradicts another, or the run does not support it.
            DataError: If context cannot be read, or is not an image or video.
        """
        options = SampleOptions(
            task=task,
            context=context,
            keep=keep,
            prompt=prompt,
            class_label=class_label,
            text_encoder=text_encoder,
            num=num,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance=guidance,
            rate_guidance=rate_guidance,
            insertion=insertion,
            max_frames=max_frames,
            num_frames=num_frames,
            cache_refresh=cache_refresh,
            batch_size=batch_size,
            size=size,
        )
        sampler = ClipSampler(self.loaded, options)
        return [clip for numbers in sampler.batches for clip in sampler.sample(numbers)]

    def stream(
        self,
        *,
        task: str = "t2v",
        context: ContextArgument = None,
        keep: Sequence[int] | None = None,
        prompt: str | None = None,
        class_label: int | str | None = None,
        text_encoder: str | None = None,
        seed: int = 0,
        num_inference_steps: int = 50,
        guidance: float | None = None,
        rate_guidance: float | None = None,
        insertion: str = "thinning",
        max_frames: int = 64,
        num_frames: int | None = None,
        cache_refresh: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Iterator[Frame]:
        """Sample one clip and yield its frames from left to right, each as soon as it is final.

        A frame is final when it and all frames to its left are finished and no insertion can happen left of it. With
        the learned order, only leading context is therefore final before the clock ends, after N of up to 2 N
        evaluations. With delay law ``autoregressive``, frames become final one by one.

        If the codec's decoder mixes neighboring frames, such as LTX-Video's, only the complete clip can be decoded
        exactly, and all frames come at the end.

        Args:
            task: All arguments are as for ``sample``; the frames equal ``sample(num=1, ...)[0].frames``.
            context: As for ``sample``.
            keep: As for ``sample``.
            prompt: One caption.
            class_label: As for ``sample``; None means class 0 for ``t2v`` if the run has classes.
            text_encoder: As for ``sample``.
            seed: Seed of the clip.
            num_inference_steps: As for ``sample``.
            guidance: As for ``sample``.
            rate_guidance: As for ``sample``.
            insertion: As for ``sample``.
            max_frames: As for ``sample``.
            num_frames: As for ``sample``.
            cache_refresh: As for ``sample``.
            size: As for ``sample``.

        Returns:
            An iterator of uint8 [H, W, 3] RGB frames.

        Raises:
            ConfigError: If an option is out of range, contradicts another, or is not supported by the run. Raised by
                the call, not by the iterator.
            DataError: If context cannot be read, or is not an image or video.
        """
        options = SampleOptions(
            task=task,
            context=context,
            keep=keep,
            prompt=prompt,
            class_label=class_label,
            text_encoder=text_encoder,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance=guidance,
            rate_guidance=rate_guidance,
            insertion=insertion,
            max_frames=max_frames,
            num_frames=num_frames,
            cache_refresh=cache_refresh,
            size=size,
        )
        return _stream(ClipSampler(self.loaded, options))


def _stream(sampler: ClipSampler) -> Iterator[Frame]:
    """Decoded frames of the first clip, split only where the codec decodes them as in the full clip."""
    codec, waiting = sampler.run.codec, []
    for final in stream_frames(sampler.states([0])):
        if codec.decodes_frame_by_frame:
            yield from np.asarray(codec.decode(final.frames.cpu()))
        else:
            waiting.append(final.frames.cpu())
    if waiting:
        yield from np.asarray(codec.decode(torch.cat(waiting)))


def load(path: str | PathLike[str], *, step: int | None = None, device: str | torch.device | None = None) -> Run:
    """Load a trained run: EMA weights (verified by their hashes), codec and configuration.

    Args:
        path: A run directory written by ``train/main.py``.
        step: Optimizer step of the checkpoint; None uses the newest valid one.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None uses CUDA if available.

    Returns:
        The run, ready to sample.

    Raises:
        RunDirectoryError: If the folder does not exist or is not a run directory.
        CheckpointError: If no checkpoint is valid, or none has that step.
        ConfigError: If the device does not exist, or the run's ``config.yaml`` is damaged.
        DataError: If the codec is not the one that made the run's latents.
    """
    place = choose_device(device)
    # Kinds of folders are told apart only here; an exported folder will be recognized here.
    return Run(load_run(Path(path), step=step, device=place))


def choose_device(requested: str | torch.device | None) -> torch.device:
    """The requested device, or CUDA if available.

    Raises:
        ConfigError: If the device does not exist.
    """
    try:
        device = torch.device(requested or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"`device` must be a torch device such as cpu or cuda, got {requested}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"`device` is {requested}, but this machine has {count} CUDA devices; use cpu, or drop it")
    return device
