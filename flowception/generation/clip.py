"""One generated clip: its pixels, its latents, and how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flowception.errors import ConfigError
from flowception.flow import Role
from flowception.generation.growth import Growth
from flowception.generation.video import Video, write_mp4, write_preview


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A generated clip.

    Shape legend: ``n`` pixel frames of ``H x W`` pixels, ``m`` latent frames ``C, h, w``. A codec that compresses time
    makes several pixel frames of a latent one. Clips come from ``Run.sample``.
    """

    frames: Video = field(repr=False)
    """uint8 ``[n, H, W, 3]``, RGB: decoded pixels."""
    latents: Tensor = field(repr=False)
    """float32 ``[m, C, h, w]`` on the CPU, normalized as the codec's."""
    born_at: Tensor = field(repr=False)
    """float64 ``[m]``: clock from 0 to 1 at which each latent frame was inserted; 0 for those there from the start."""
    roles: tuple[Role, ...] = field(repr=False)
    """Role of each latent frame: ``start``, ``free`` (inserted), ``context_active`` or ``context_passive`` (given)."""
    task: str
    """Such as ``t2v``."""
    prompt: str | None
    """Caption that was asked for."""
    class_label: int | None
    """Class that was asked for; None for none."""
    class_name: str | None
    """Its name, where the training set has names."""
    seed: int
    """The same seed, options and run make the same clip."""
    evaluations: int
    """Evaluations of the network until the clip was finished."""
    flops: float | None
    """Exact FLOPs spent on it; None if they were not counted."""
    capped: bool
    """Whether ``max_frames`` cut insertions."""
    fps: float
    """Frames per second of the training clips."""
    num_inference_steps: int
    """Steps that a frame took from noise to data, N."""
    time_shift: float
    """The run's time shift s."""
    step: int
    """Optimizer steps of the weights."""

    def save(self, path: str | Path, *, fps: float | None = None) -> None:
        """Write the pixels as a video file.

        Args:
            path: File to write: ``.mp4`` (H.264) or ``.gif`` (an animated preview, small clips enlarged). Its folder
                must exist.
            fps: Frames per second; None takes the clip's own.

        Raises:
            ConfigError: If the suffix is another one.
            DataError: If an mp4 cannot be written there.
        """
        path = Path(path)
        writers = {".mp4": write_mp4, ".gif": write_preview}
        if path.suffix.lower() not in writers:
            raise ConfigError(f"the file name of a clip must end in .mp4 or .gif, got {path.name}")
        writers[path.suffix.lower()](path, self.frames, fps=fps or self.fps)

    def growth(self) -> Growth:
        """The picture of how the clip grew: its latent frames against the clock, insertions marked.

        Returns:
            A picture with ``save(path)``.
        """
        asked = condition_of(self.prompt, self.class_name, self.class_label)
        parts = [self.task, asked, f"seed {self.seed}", f"{len(self.latents)} latent frames"]
        return Growth(
            born_at=tuple(self.born_at.tolist()),
            roles=self.roles,
            num_inference_steps=self.num_inference_steps,
            time_shift=self.time_shift,
            title=", ".join(part for part in parts if part) + f", {self.evaluations} evaluations",
        )


def condition_of(prompt: str | None, class_name: str | None, class_label: int | None) -> str:
    """What a clip was asked to show, in words; empty if nothing."""
    numbered = "" if class_label is None else f"class {class_label}"
    return " ".join((prompt or class_name or numbered).split())
