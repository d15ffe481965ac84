"""A trained run as an object: load it, sample clips, or stream frames while they become final.

    run = flowception.load("runs/demo")
    clips = run.sample(task="i2v", context=["first.png"], num=4)

The command line is a thin layer on it (``generation.generate``).
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
    """A trained network and all that its run says of it. ``flowception.load`` makes it.

    A clip depends on the run, the options and its seed alone: it is the same alone or in a batch (to rounding), and
    the same to the bit when asked for again.
    """

    def __init__(self, loaded: LoadedRun) -> None:
        """Wrap what ``generation.load.load_run`` gives."""
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
        """Optimizer steps of the weights."""
        return self.loaded.step

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.loaded.model.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers; empty if they have none."""
        return list(self.loaded.meta.class_names)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of the training clips, the most frequent first."""
        return self.loaded.sizes_pixels

    @property
    def fps(self) -> float:
        """Frames per second of the training clips; 16 where the shards are out of reach or do not say."""
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
        """Sample clips (arXiv 2512.11438; DESIGN.md section 2 has the sampler).

        Time shift, start frames, insertion schedule, codec, frame rate and, if there is only one, the size are the
        run's.

        Args:
            task: ``t2v``, ``i2v``, ``v2v`` (continuation), ``interpolation`` or ``completion``.
            context: What clips are given, one item or a list that clips cycle over: paths of images or videos, uint8
                arrays or tensors [H, W, 3] (an image) or [n, H, W, 3] (a video at the run's frame rate), PIL images.
                ``i2v`` takes images (or first frames of videos); ``v2v`` and ``completion`` videos; ``interpolation``
                two or more images, which are one clip's keyframes in order, or videos. Pictures are resized and
                cropped to the clip's size.
            keep: Latent frames of a context video that are given, counted from 0; None takes the task's default
                (``v2v`` the end, ``interpolation`` the first and the last, ``completion`` both outer quarters).
            prompt: A caption, or several: clip i has prompt ``i % len(prompt)``. For a run trained with text.
            class_label: Number or name of a class, or ``"null"`` for none. None cycles over all classes for ``t2v``
                and is none for the other tasks.
            text_encoder: Folder or hub id of the T5 encoder; None takes the one that the training set names.
            num: Clips; of each prompt, where several are given.
            seed: Clip i has seed ``seed + i``.
            num_inference_steps: N, steps that a frame needs from noise to data; a clip takes N to 2 N evaluations.
            guidance: Scale of classifier-free guidance on the velocity, 1 is none; None is off.
            rate_guidance: The same for the insertion rate, in log space.
            insertion: ``thinning``, ``bernoulli`` (the paper's) or ``poisson``.
            max_frames: Cap on latent frames of a clip, given ones included.
            num_frames: Latent frames of a clip, given ones included, for a run of a prescribed delay law only: other
                runs choose the length themselves.
            cache_refresh: After the clock's end, compute the keys and values of finished frames anew only every so
                many steps: faster, an approximation. None is exact.
            batch_size: Clips sampled at once.
            size: Height and width in pixels; None takes the run's.

        Returns:
            ``num`` clips, or ``num`` for each prompt, in the order of their numbers i.

        Raises:
            ConfigError: If an option is out of range, contradicts another, or the run does not allow it.
            DataError: If context cannot be read, or is not a picture.
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
        """Sample one clip and hand out its frames from left to right, each as soon as it is final.

        A frame is final when it and every frame to its left are finished and no insertion can come left of it. So with
        the learned order nothing but leading context comes before the clock's end, after N of up to 2 N evaluations;
        a run of delay law ``autoregressive`` hands out frame by frame.

        A codec whose decoder mixes neighboring frames, such as LTX-Video's, can decode a clip exactly only as a whole:
        with such a run all frames come at the end.

        Args:
            task: This and all others as for ``sample``; the frames are those of ``sample(num=1, ...)[0].frames``.
            context: As for ``sample``.
            keep: As for ``sample``.
            prompt: One caption.
            class_label: As for ``sample``; None is class 0 for ``t2v`` with a run that has classes.
            text_encoder: As for ``sample``.
            seed: The clip's.
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
            ConfigError: If an option is out of range, contradicts another, or the run does not allow it; at once.
            DataError: If context cannot be read, or is not a picture.
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
    """Frames of the first clip, in runs that the codec decodes as in the whole clip."""
    codec, waiting = sampler.run.codec, []
    for final in stream_frames(sampler.states([0])):
        if codec.decodes_frame_by_frame:
            yield from np.asarray(codec.decode(final.frames.cpu()))
        else:
            waiting.append(final.frames.cpu())
    if waiting:
        yield from np.asarray(codec.decode(torch.cat(waiting)))


def load(path: str | PathLike[str], *, step: int | None = None, device: str | torch.device | None = None) -> Run:
    """Load a trained run: its EMA weights, verified by their hashes, its codec and its configuration.

    Args:
        path: A run directory, as ``train/main.py`` writes it.
        step: Optimizer step of the checkpoint; None takes the newest valid one.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes CUDA where there is one.

    Returns:
        The run, ready to sample.

    Raises:
        RunDirectoryError: If the folder does not exist or is not a run directory.
        CheckpointError: If there is no valid checkpoint, or not that step's.
        ConfigError: If this machine does not have the device.
        DataError: If the codec here is not the one that made the run's latents.
    """
    place = choose_device(device)
    # The one place to tell kinds of folders apart: an exported folder (DESIGN_2.md section 10) will be recognized here.
    return Run(load_run(Path(path), step=step, device=place))


def choose_device(wanted: str | torch.device | None) -> torch.device:
    """The device that was asked for, or CUDA where there is one.

    Raises:
        ConfigError: If this machine does not have it.
    """
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"`device` must be a torch device such as cpu or cuda, got {wanted}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"`device` is {wanted}, but this machine has {count} CUDA devices; use cpu, or drop it")
    return device
