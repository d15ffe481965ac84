"""LTX-Video's autoencoder (0.9.5) through diffusers' ``AutoencoderKLLTXVideo``.

Latent frame 0 encodes pixel frame 0 alone; every other latent frame encodes 8 pixel frames. A clip has ``1 + 8 k``
pixel frames and ``1 + k`` latent frames, with 32 x 32 px per cell. Raw latents are normalized with the checkpoint's
statistics: ``z_norm = (z - mean) * scaling_factor / std``.

The decoder is not causal, and padding would change every decoded frame, so each clip is decoded alone. It is
conditioned on time: it expects a small amount of noise (``decode_noise_scale``) at ``decode_timestep``, as in the
diffusers pipeline. The noise has a fixed seed, so decoding is a function of the latents.

Shape legend: as in ``base``. In diffusers, a batch dimension comes first and channels precede frames:
``[1, C, n, h, w]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowception.codecs.base import Codec, CodecConfig, hash_description, pixels_to_unit, unit_to_pixels
from flowception.errors import CodecError, ConfigError, require

_DECODE_SEED = 0


class LTXCodec(Codec):
    """Wraps an ``AutoencoderKLLTXVideo``."""

    name = "ltx"

    def __init__(
        self,
        autoencoder: Any,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        decode_timestep: float = 0.05,
        decode_noise_scale: float = 0.025,
    ) -> None:
        """Wrap an autoencoder.

        Args:
            autoencoder: A diffusers ``AutoencoderKLLTXVideo`` with fp32 weights.
            device: Device of the computation.
            dtype: Precision of the computation. The fingerprint uses the fp32 weights.
            decode_timestep: Time input of a time-conditioned decoder.
            decode_noise_scale: Fraction of noise mixed into the latents for a time-conditioned decoder.
        """
        self._fingerprint = _fingerprint(autoencoder)
        config = autoencoder.config
        self.latent_channels = int(config.latent_channels)
        self.spatial_stride = int(autoencoder.spatial_compression_ratio)
        self.temporal_stride = int(autoencoder.temporal_compression_ratio)
        self.latent_mean = tuple(autoencoder.latents_mean.double().tolist())
        std = autoencoder.latents_std.double() / float(config.scaling_factor)
        self.latent_std = tuple(std.tolist())
        self.device, self.dtype = torch.device(device), dtype
        self.decode_timestep, self.decode_noise_scale = decode_timestep, decode_noise_scale
        self._time_conditioned = bool(config.timestep_conditioning)
        self._autoencoder = autoencoder.to(self.device, dtype).eval().requires_grad_(False)

    @classmethod
    def from_config(cls, config: CodecConfig, device: torch.device | str = "cpu") -> LTXCodec:
        """Load the autoencoder from a local folder or the hub.

        Raises:
            ConfigError: If ``codec.model`` is not set.
            CodecError: If it cannot be loaded.
        """
        if config.model is None:
            raise ConfigError(
                "codec.model must be set for codec.name=ltx, got null; "
                "set it to an autoencoder's folder, or a pipeline's folder or hub id"
            )
        diffusers = require("diffusers", extra="ltx")
        # A pipeline (local, or as published by Lightricks on the hub) has the autoencoder in the sub-folder `vae`.
        subfolder = None if (Path(config.model) / "config.json").is_file() else "vae"
        try:
            autoencoder = diffusers.AutoencoderKLLTXVideo.from_pretrained(
                config.model, subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise CodecError(
                f"cannot load an LTX autoencoder from codec.model {config.model!r} ({error}); set it to "
                "a folder with config.json and safetensors weights, or to a pipeline's folder or hub id"
            ) from error
        return cls(
            autoencoder,
            device=device,
            dtype=getattr(torch, config.dtype),
            decode_timestep=config.decode_timestep,
            decode_noise_scale=config.decode_noise_scale,
        )

    def fingerprint(self) -> str:
        """Sha256 hex of the autoencoder's configuration, weights and latent statistics."""
        return self._fingerprint

    def latent_frames(self, pixel_frames: int) -> int:
        """``1 + (pixel_frames - 1) / 8``."""
        if pixel_frames < 1 or (pixel_frames - 1) % self.temporal_stride:
            raise CodecError(
                f"the number of frames must be 1 + {self.temporal_stride} k for the ltx codec, got {pixel_frames}; use "
                f"for example {max(1, self.usable_frames(pixel_frames))}"
            )
        return 1 + (pixel_frames - 1) // self.temporal_stride

    def pixel_frames(self, latent_frames: int) -> int:
        """``1 + 8 (latent_frames - 1)``."""
        if latent_frames < 1:
            raise CodecError(f"the number of latent frames must be >= 1, got {latent_frames}")
        return 1 + (latent_frames - 1) * self.temporal_stride

    def usable_frames(self, pixel_frames: int) -> int:
        """The largest ``1 + 8 k`` up to ``pixel_frames``."""
        if pixel_frames < 1:
            return 0
        return 1 + (pixel_frames - 1) // self.temporal_stride * self.temporal_stride

    def encode(self, video: Tensor | NDArray[np.uint8]) -> Tensor:
        """Pixels uint8 [1 + 8 k, H, W, 3] to the normalized mean of the latents, float32 [1 + k, C, h, w]."""
        return self._encode_batch([self._check_video(video)])[0]

    def encode_many(self, videos: Sequence[Tensor | NDArray[np.uint8]]) -> list[Tensor]:
        """Encode many clips, those of equal shape in one batch. Memory grows with the size of a batch."""
        checked = [self._check_video(video) for video in videos]
        latents: list[Tensor] = list(checked)
        for shape in dict.fromkeys(video.shape for video in checked):
            alike = [place for place, video in enumerate(checked) if video.shape == shape]
            for place, encoded in zip(alike, self._encode_batch([checked[k] for k in alike]), strict=True):
                latents[place] = encoded
        return latents

    @torch.no_grad()
    def _encode_batch(self, videos: list[Tensor]) -> list[Tensor]:
        """Encode clips of one shape."""
        pixels = pixels_to_unit(torch.stack(videos).to(self.device)).permute(0, 4, 1, 2, 3).to(self.dtype)
        raw = self._autoencoder.encode(pixels).latent_dist.mode().float().transpose(1, 2)
        mean, std = self._statistics(raw)
        return list(((raw - mean) / std).cpu().contiguous().unbind(0))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents [1 + k, C, h, w] to pixels uint8 [1 + 8 k, H, W, 3]."""
        self._check_latents(latents)
        latents = latents.to(self.device, torch.float32)
        mean, std = self._statistics(latents)
        raw = (latents * std + mean).permute(1, 0, 2, 3)[None]
        time = None
        if self._time_conditioned:
            time = torch.full((1,), self.decode_timestep, device=self.device, dtype=self.dtype)
            generator = torch.Generator().manual_seed(_DECODE_SEED)
            noise = torch.randn(raw.shape, generator=generator).to(self.device)
            raw = (1.0 - self.decode_noise_scale) * raw + self.decode_noise_scale * noise
        video = self._autoencoder.decode(raw.to(self.dtype), time).sample[0]
        return unit_to_pixels(video.permute(1, 2, 3, 0)).cpu().contiguous()

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each [1, C, 1, 1]."""
        shape = (1, -1, 1, 1)
        return like.new_tensor(self.latent_mean).view(shape), like.new_tensor(self.latent_std).view(shape)


def _fingerprint(autoencoder: Any) -> str:
    """Sha256 over configuration, parameters and buffers (the latent statistics among them), by sorted name."""
    weights = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        flat = tensor.detach().to("cpu", torch.float32).contiguous()
        weights.update(f"{name}{tuple(flat.shape)}".encode())
        weights.update(memoryview(flat.view(-1).numpy()).cast("B"))
    config = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
    return hash_description({"codec": "ltx", "config": config, "weights": weights.hexdigest()})
