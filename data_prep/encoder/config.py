"""What ``encode_shards.py`` reads: a dataclass, filled from YAML and ``key=value`` words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from data_prep.encoder.filters import FilterRange
from flowception.codecs.base import Codec, CodecConfig
from flowception.codecs.text import TextEncoderConfig
from flowception.errors import ConfigError

SourceFormat = Literal["auto", "folder", "csv", "jsonl", "taichi", "realestate10k", "kinetics600", "openvid"]
"""How a source is laid out."""


@dataclass(kw_only=True)
class EncodeConfig:
    """One encoding job."""

    source: str = MISSING
    """Folder of videos, a ``.csv`` or ``.jsonl`` manifest, or the folder of a data set."""
    source_format: SourceFormat = "auto"
    """How the source is laid out, as ``data_prep/encoder/manifests/`` describes; ``auto`` tells a folder, a
    CSV and a JSONL."""
    split: str | None = None
    """Which part of a data set to encode; None is its training part."""
    filters: dict[str, FilterRange] = field(default_factory=dict)
    """Range by column of the manifest, or by ``duration_s, height, width, fps`` of the files' headers; for example
    ``{motion score: {min: 2}}``."""
    out: str = MISSING
    """Folder of the shard set."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """What turns pixels into latents."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """What turns captions into embeddings; ``text.model=null`` is nothing."""
    frame_folder_fps: float | None = None
    """Frames per second of videos that are folders of png or jpg frames, where the manifest has no column of this name.
    A ``folder`` source is searched for such folders only if it is given."""
    fps: float | None = None
    """Frames per second of the clips; None keeps every frame."""
    height: int | None = None
    """Pixels; videos are resized to cover height x width and cropped in the middle. None keeps the video's size."""
    width: int | None = None
    """Likewise."""
    max_pixels: int | None = None
    """Height x width at most: each video keeps its own shape and is resized, not cropped, to the nearest multiples of
    the codec's stride. Instead of ``height`` and ``width``."""
    min_frames: int = 1
    """Pixel frames; a video's last piece is dropped if it is shorter."""
    max_frames: int | None = None
    """Pixel frames; videos are cut into pieces of this length. None keeps a video whole."""
    min_motion: float | None = None
    """Mean absolute change of a pixel from frame to frame, 0 to 255, after resizing; pieces with less are dropped. None
    keeps all."""
    max_video_gib: float = 4.0
    """A video that takes more memory than this when it is decoded and cut is not read, with that reason. Each worker
    holds up to three."""
    videos_per_shard: int = 256
    """A shard is a fixed range of the manifest; also what is lost at most when the job is killed."""
    clips_per_batch: int = 1
    """Clips that go through the codec and the text encoder together, those of equal shape in one batch; more is faster
    on a GPU and takes its memory."""
    num_workers: int = 0
    """Processes that decode; 0 decodes in the main process."""
    decode_timeout_s: float = 3600.0
    """How long the others wait for one video; then its decoder is killed and the video listed as unreadable. Needs
    ``num_workers`` above 0."""
    device: str | None = None
    """Where the codec computes; None is CUDA where there is one."""
    part: int = 0
    """Which of ``num_parts`` jobs this is; it encodes every ``num_parts``-th shard."""
    num_parts: int = 1
    """Jobs that share one set, on machines that share its folder."""

    def __post_init__(self) -> None:
        for name in ("min_frames", "videos_per_shard", "num_parts", "clips_per_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        self._check_rates()
        self._check_size()
        if not self.max_video_gib > 0:
            raise ConfigError(f"max_video_gib is {self.max_video_gib}; give a number above 0")
        if not self.decode_timeout_s > 0:
            raise ConfigError(f"decode_timeout_s is {self.decode_timeout_s}; give a number of seconds above 0")
        if self.min_motion is not None and not 0 < self.min_motion <= 255:
            raise ConfigError(f"min_motion is {self.min_motion}; give a number above 0, at most 255, or null for off")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers is {self.num_workers}; give 0 or more")
        if not 0 <= self.part < self.num_parts:
            raise ConfigError(f"part is {self.part}; give 0 to num_parts - 1 = {self.num_parts - 1}")
        if self.max_frames is not None and self.max_frames < self.min_frames:
            raise ConfigError(f"max_frames is {self.max_frames}, below min_frames = {self.min_frames}")

    def _check_rates(self) -> None:
        for name, absent in (("fps", "keep every frame"), ("frame_folder_fps", "have no folders of frames")):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ConfigError(f"{name} is {rate}; give a positive number, or null to {absent}")

    def _check_size(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ConfigError(f"height is {self.height} and width is {self.width}; give both or neither")
        if self.max_pixels is not None and (self.height is not None or self.max_pixels < 1):
            raise ConfigError(
                f"max_pixels is {self.max_pixels} and height {self.height}; give a number of pixels, or both sides"
            )

    def check_codec(self, codec: Codec) -> None:
        """Refuse sizes that the codec cannot encode, saying the nearest that it can."""
        for name in ("height", "width"):
            size, stride = getattr(self, name), codec.spatial_stride
            if size is not None and (size < stride or size % stride):
                nearest = max(stride, round(size / stride) * stride)
                raise ConfigError(f"{name} is {size}; the {codec.name} codec needs a multiple of {stride}: {nearest}")
        if self.max_frames is not None:
            usable = codec.usable_frames(self.max_frames)
            if usable != self.max_frames:
                raise ConfigError(f"max_frames is {self.max_frames}; the {codec.name} codec accepts {usable}")
            if usable < self.min_frames:
                raise ConfigError(f"min_frames is {self.min_frames}; max_frames allows at most {usable}")
