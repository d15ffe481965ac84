"""One generated clip: its pixels, its latents, and how it was generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flowception.errors import ConfigError
from flowception.flow import Role
from flowception.generation.growth import Growth
from flowception.generation.video import Video, write_mp4, write_preview
from flowception.ranges import number


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A generated clip.

    Shape legend: ``n`` pixel frames of ``H x W`` pixels, ``m`` latent frames of ``C, h, w``. With a codec that
    compresses time, one latent frame decodes to several pixel frames. ``Run.sample`` returns clips.
    """

    frames: Video = field(repr=False)
    """uint8 ``[n, H, W, 3]``, RGB: decoded pixels."""
    latents: Tensor = field(repr=False)
    """float32 ``[m, C, h, w]`` on the CPU, normalized by the codec."""
    born_at: Tensor = field(repr=False)
    """float64 ``[m]``: clock from 0 to 1 at which each latent frame was inserted; 0 for initial frames."""
    roles: tuple[Role, ...] = field(repr=False)
    """Role of each latent frame: ``start``, ``free`` (inserted), ``context_active`` or ``context_passive`` (given)."""
    task: str
    """Task name, such as ``t2v``."""
    prompt: str | None
    """Requested caption."""
    class_label: int | None
    """Requested class; None for none."""
    class_name: str | None
    """Name of the class, if the training set names its classes."""
    seed: int
    """The same seed, options and run reproduce the clip."""
    evaluations: int
    """Network evaluations until the clip was finished."""
    flops: float | None
    """Exact FLOPs spent on the clip; None if not counted."""
    capped: bool
    """Whether ``max_frames`` stopped insertions."""
    fps: float
    """Frames per second of the training clips."""
    num_inference_steps: int
    """N, the number of steps each frame took from noise to data."""
    time_shift: float
    """The run's time shift s."""
    step: int
    """Optimizer step of the weights."""

    def save(self, path: str | Path, *, fps: float | None = None) -> None:
        """Write the pixels as a video file.

        Args:
            path: File to write: ``.mp4`` (H.264) or ``.gif`` (an animated preview, small clips enlarged). Its folder
                must exist.
            fps: Frames per second; None uses the clip's.

        Raises:
            ConfigError: If the suffix is neither of these, or ``fps`` is not positive.
            DataError: If the file cannot be written there.
        """
        path = Path(path)
        writers = {".mp4": write_mp4, ".gif": write_preview}
        if path.suffix.lower() not in writers:
            raise ConfigError(f"the file name of a clip must end in .mp4 or .gif, got {path.name}")
        if fps is not None:
            number(above=0).check("`fps`", fps)
        writers[path.suffix.lower()](path, self.frames, fps=self.fps if fps is None else fps)

    def growth(self) -> Growth:
        """Plot how the clip grew: its latent frames against the clock, with insertions marked.

        Returns:
            The plot, with ``save(path)``.
        """
        condition = condition_of(self.prompt, self.class_name, self.class_label)
        parts = [self.task, condition, f"seed {self.seed}", f"{len(self.latents)} latent frames"]
        return Growth(
            born_at=tuple(self.born_at.tolist()),
            roles=self.roles,
            num_inference_steps=self.num_inference_steps,
            time_shift=self.time_shift,
            title=", ".join(part for part in parts if part) + f", {self.evaluations} evaluations",
        )


def condition_of(prompt: str | None, class_name: str | None, class_label: int | None) -> str:
    """The requested prompt or class as text; empty if there is none."""
    numbered = "" if class_label is None else f"class {class_label}"
    return " ".join((prompt or class_name or numbered).split())
