"""Configuration of ``encode_shards.py``: a dataclass, filled from YAML and ``key=value`` overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from data_prep.encoder.filters import FilterRange
from flowception.codecs.base import Codec, CodecConfig
from flowception.codecs.text import TextEncoderConfig
from flowception.errors import ConfigError
from flowception.ranges import check_ranges, integer, number, shown

SourceFormat = Literal["auto", "folder", "csv", "jsonl", "taichi", "realestate10k", "kinetics600", "openvid"]
"""Layouts of a source."""


@dataclass(kw_only=True)
class EncodeConfig:
    """One encoding job."""

    source: str = MISSING
    """Folder of videos, ``.csv`` or ``.jsonl`` manifest, or folder of a data set."""
    source_format: SourceFormat = "auto"
    """Layout of the source, described in ``data_prep/encoder/manifests/``; ``auto`` detects a folder, a CSV, and a
    JSONL."""
    split: str | None = None
    """Split of a data set to encode; None is its training split."""
    filters: dict[str, FilterRange] = field(default_factory=dict)
    """Ranges by manifest column, or by ``duration_s, height, width, fps`` from file headers. For example,
    ``{motion score: {min: 2}}``."""
    out: str = MISSING
    """Folder of the shard set."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """Codec that turns pixels into latents."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """Text encoder for captions; ``text.model=null`` for a set without text."""
    frame_folder_fps: float | None = None
    """Frames per second of videos that are folders of png or jpg frames, if the manifest has no column of this name. A
    ``folder`` source is searched for folders of frames only if this is set."""
    fps: float | None = None
    """Frames per second of the clips; None keeps every frame."""
    height: int | None = None
    """Pixels; videos are resized to cover height x width, then center-cropped. None keeps the video's size."""
    width: int | None = None
    """Pixels; set together with ``height``."""
    max_pixels: int | None = None
    """Largest height x width: each video keeps its own shape and is resized, not cropped, to the nearest multiples of
    the codec's stride. Use instead of ``height`` and ``width``."""
    min_frames: int = 1
    """Pixel frames; a video's last piece is dropped if it is shorter."""
    max_frames: int | None = None
    """Pixel frames; videos are cut into pieces of this length. None does not cut videos."""
    min_motion: float | None = None
    """Mean absolute change of a pixel from frame to frame, 0 to 255, after resizing. Pieces with less are dropped. None
    keeps all."""
    max_video_gib: float = 4.0
    """A video that takes more memory than this when decoded and cut is listed as unreadable. Each worker holds up to
    three videos."""
    videos_per_shard: int = 256
    """Videos per shard, a fixed range of the manifest. This is also the most work lost when a job is killed."""
    clips_per_batch: int = 1
    """Most clips per call of the codec and the text encoder, with clips of equal shape in one batch. More is faster on
    a GPU and takes more of its memory."""
    num_workers: int = 0
    """Decoding processes; 0 decodes in the main process."""
    decode_timeout_s: float = 3600.0
    """Longest wait for one video. Then its decoder is killed and the video is listed as unreadable. Needs
    ``num_workers`` above 0."""
    device: str | None = None
    """Device of the codec; None is CUDA if available, else the CPU."""
    part: int = 0
    """Index of this job among ``num_parts`` jobs; it encodes every ``num_parts``-th shard."""
    num_parts: int = 1
    """Number of jobs that share one set, on machines that share its folder."""

    def __post_init__(self) -> None:
        rules = {
            "min_frames": integer(at_least=1),
            "videos_per_shard": integer(at_least=1),
            "num_parts": integer(at_least=1),
            "clips_per_batch": integer(at_least=1),
            "fps": number(above=0).or_null("every frame"),
            "frame_folder_fps": number(above=0).or_null("no folders of frames"),
            "max_pixels": integer(at_least=1).or_null("off"),
            "height": integer(at_least=1).or_null("the video's"),
            "width": integer(at_least=1).or_null("the video's"),
            "max_video_gib": number(above=0, infinite=True),
            "decode_timeout_s": number(above=0),
            "min_motion": number(above=0, at_most=255).or_null("off"),
            "num_workers": integer(at_least=0),
            "part": integer(at_least=0),
            "max_frames": integer(at_least=1).or_null("whole videos"),
        }
        check_ranges("", self, rules)
        if (self.height is None) != (self.width is None):
            raise ConfigError(
                f"height and width must be given together, got {shown(self.height)} and {shown(self.width)}"
            )
        if self.max_pixels is not None and self.height is not None:
            raise ConfigError(
                f"max_pixels must be null if height and width are given, got {self.max_pixels} and "
                f"{self.height} x {self.width}"
            )
        if self.part >= self.num_parts:
            raise ConfigError(f"part must be less than num_parts, got {self.part} and {self.num_parts}")
        if self.max_frames is not None and self.max_frames < self.min_frames:
            raise ConfigError(f"max_frames must be at least min_frames, got {self.max_frames} and {self.min_frames}")

    def check_codec(self, codec: Codec) -> None:
        """Raise ``ConfigError`` for sizes that the codec cannot encode; the message has the nearest valid size."""
        for name in ("height", "width"):
            size, stride = getattr(self, name), codec.spatial_stride
            if size is not None and (size < stride or size % stride):
                nearest = max(stride, round(size / stride) * stride)
                raise ConfigError(
                    f"{name} must be a multiple of {stride} for the {codec.name} codec, such as {nearest}, got {size}"
                )
        if self.max_frames is not None:
            usable = codec.usable_frames(self.max_frames)
            if usable != self.max_frames:
                raise ConfigError(
                    f"max_frames must be a length that the {codec.name} codec accepts, such as {usable}, got "
                    f"{self.max_frames}"
                )
