"""What ``encode_shards.py`` reads: a dataclass, filled from YAML and ``key=value`` words."""

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
"""How a source is laid out."""


@dataclass(kw_only=True)
class EncodeConfig:
    """One encoding job."""

    source: str = MISSING
    """Folder of videos, a ``.csv`` or ``.jsonl`` manifest, or the folder of a data set."""
    source_format: SourceFormat = "auto"
    """How the source is laid out, as ``data_prep/encoder/manifests/`` describes; ``auto`` tells a folder, a CSV and a
    JSONL."""
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
            "max_video_gib": number(above=0),
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
        """Refuse sizes that the codec cannot encode, saying the nearest that it can."""
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
