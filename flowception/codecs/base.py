"""The codec interface: pixels to normalized latents and back.

A codec processes one clip at a time. ``usable_frames`` defines the numbers of pixel frames it accepts, and
``fingerprint`` identifies latents that can be mixed.

Shape legend: ``n_px`` pixel frames of ``H x W`` pixels, ``n`` latent frames of ``C`` channels on an ``h x w`` grid.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception.errors import CodecError
from flowception.ranges import check_ranges, integer, number


@dataclass(kw_only=True)
class CodecConfig:
    """The codec and its settings."""

    name: Literal["patchify", "ltx"] = "patchify"
    """``patchify`` (lossless, needs nothing) or ``ltx`` (LTX-Video 0.9.5's autoencoder, needs the extra ``ltx``)."""
    patch_size: int = 4
    """patchify: pixels along the side of a patch."""
    model: str | None = None
    """ltx: an autoencoder's folder, or the folder or hub id of a pipeline with a sub-folder ``vae``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """ltx: precision of the computation."""
    decode_timestep: float = 0.05
    """ltx: time input of the decoder, which removes the remaining noise."""
    decode_noise_scale: float = 0.025
    """ltx: fraction of noise mixed into the latents before decoding; 0 for none. The noise is the same in every
    call."""

    def __post_init__(self) -> None:
        share = number(at_least=0, below=1)
        rules = {"patch_size": integer(at_least=1), "decode_timestep": share, "decode_noise_scale": share}
        check_ranges("codec", self, rules)


class Codec(ABC):
    """Converts clips of pixels to normalized latents and back."""

    name: str
    """Name in ``CodecConfig`` and in a shard set's ``meta.json``."""
    latent_channels: int
    """C."""
    spatial_stride: int
    """Pixels along the side of one latent cell."""
    temporal_stride: int
    """Pixel frames per latent frame (in some codecs the first latent frame is a single pixel frame)."""
    decodes_frame_by_frame: bool = False
    """Whether a latent frame decodes to the same pixels regardless of its neighbors, so it can be decoded alone."""
    latent_mean: tuple[float, ...]
    """[C]: mean of the raw latents, subtracted by ``encode`` and added by ``decode``."""
    latent_std: tuple[float, ...]
    """[C]: standard deviation of the raw latents, divided out by ``encode`` and restored by ``decode``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Sha256 hex of everything that determines the meaning of a latent: codec, settings and weights."""

    @abstractmethod
    def latent_frames(self, pixel_frames: int) -> int:
        """Number of latent frames of ``pixel_frames``, which must be a number that the codec accepts."""

    @abstractmethod
    def pixel_frames(self, latent_frames: int) -> int:
        """Number of pixel frames that ``latent_frames`` decode to."""

    @abstractmethod
    def usable_frames(self, pixel_frames: int) -> int:
        """The largest number of pixel frames up to ``pixel_frames`` that the codec accepts; 0 if there is none."""

    @abstractmethod
    def encode(self, video: Tensor | NDArray[np.uint8]) -> Tensor:
        """Encode one clip.

        Args:
            video: uint8 [n_px, H, W, 3], RGB.

        Returns:
            Normalized latents, float32 [n, C, h, w] on the CPU.

        Raises:
            CodecError: If the codec does not accept the dtype, the shape or the number of frames.
        """

    def encode_many(self, videos: Sequence[Tensor | NDArray[np.uint8]]) -> list[Tensor]:
        """Encode several clips. A codec may override this to batch clips of equal shape.

        Args:
            videos: uint8 [n_px_i, H_i, W_i, 3] each.

        Returns:
            Latents of each clip, equal to those of ``encode`` up to the rounding of batched arithmetic.
        """
        return [self.encode(video) for video in videos]

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode one clip.

        Args:
            latents: Normalized latents [n, C, h, w], any floating dtype.

        Returns:
            uint8 [n_px, H, W, 3], RGB, on the CPU.

        Raises:
            CodecError: If the shape is wrong.
        """

    def decode_many(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Decode several clips one by one: a decoder that mixes frames must not see other clips or padding.

        Args:
            clips: Latents [n_i, C, h_i, w_i] of each clip.

        Returns:
            Video of each clip, equal to that of ``decode``.
        """
        return [self.decode(latents) for latents in clips]

    def _check_video(self, video: Tensor | NDArray[np.uint8]) -> Tensor:
        """The clip as a tensor; raises an error that lists what the codec accepts."""
        video = torch.as_tensor(video)
        if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3:
            raise CodecError(
                f"video for the {self.name} codec must be uint8 [frames, height, width, 3], "
                f"got {video.dtype} {tuple(video.shape)}"
            )
        frames, height, width, _ = video.shape
        if frames == 0 or self.usable_frames(frames) != frames:
            raise CodecError(
                f"the {self.name} codec cannot encode {frames} frames; cut the clip to {self.usable_frames(frames)}"
            )
        if height % self.spatial_stride or width % self.spatial_stride or height == 0 or width == 0:
            raise CodecError(
                f"frame height and width must be multiples of {self.spatial_stride} px for the {self.name} codec, "
                f"got {height} x {width}; resize or crop the video"
            )
        return video

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels or latents.shape[0] == 0:
            raise CodecError(
                f"latents for the {self.name} codec must have shape [frames, {self.latent_channels}, height, width], "
                f"frames >= 1, got {tuple(latents.shape)}"
            )


def hash_description(description: dict[str, object]) -> str:
    """Sha256 hex of a JSON description, keys sorted."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def pixels_to_unit(video: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return video.to(torch.float32) / 127.5 - 1.0


def unit_to_pixels(values: Tensor) -> Tensor:
    """Round values in [-1, 1] to uint8 pixels. Values outside, even infinities, are clipped; NaN becomes 0."""
    return ((values.float().nan_to_num(-1.0) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
