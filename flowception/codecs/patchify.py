"""The built-in codec: every patch of pixels becomes the channels of one latent cell.

It is lossless, even in bf16: a pixel is ``k / 127.5 - 1``, and the rounding error of bf16 below 1 is at most 1/512, a
quarter of the distance between adjacent values. One pixel frame is one latent frame.

Shape legend: ``n`` frames, ``p`` pixels along a patch, ``C = 3 p^2`` channels in the order (color, row, column).
"""

from __future__ import annotations

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from flowception.codecs.base import Codec, hash_description, pixels_to_unit, unit_to_pixels


class PatchifyCodec(Codec):
    """Lossless space-to-depth of pixels in [-1, 1], without normalization."""

    name = "patchify"
    temporal_stride = 1
    decodes_frame_by_frame = True

    def __init__(self, patch_size: int = 4) -> None:
        self.patch_size = self.spatial_stride = patch_size
        self.latent_channels = 3 * patch_size**2
        self.latent_mean = (0.0,) * self.latent_channels
        self.latent_std = (1.0,) * self.latent_channels

    def fingerprint(self) -> str:
        """Sha256 hex of the patch size and the layout's version."""
        return hash_description({"codec": self.name, "layout": 1, "patch_size": self.patch_size})

    def latent_frames(self, pixel_frames: int) -> int:
        """One latent frame per pixel frame."""
        return pixel_frames

    def pixel_frames(self, latent_frames: int) -> int:
        """One pixel frame per latent frame."""
        return latent_frames

    def usable_frames(self, pixel_frames: int) -> int:
        """Every number of frames is accepted."""
        return max(0, pixel_frames)

    def encode(self, video: Tensor | NDArray[np.uint8]) -> Tensor:
        """Pixels uint8 [n, H, W, 3] to latents float32 [n, 3 p^2, H / p, W / p]."""
        video = self._check_video(video)
        p = self.patch_size
        return rearrange(pixels_to_unit(video.cpu()), "n (h p) (w q) c -> n (c p q) h w", p=p, q=p).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, 3 p^2, h, w] to pixels uint8 [n, h p, w p, 3]."""
        self._check_latents(latents)
        p = self.patch_size
        return unit_to_pixels(rearrange(latents.cpu(), "n (c p q) h w -> n (h p) (w q) c", c=3, p=p, q=p)).contiguous()
