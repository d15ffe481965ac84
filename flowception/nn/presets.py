"""What a network is configured by, and the table of named sizes.

A block has ``24 d^2`` parameters: 4 for queries, keys, values and output, 8 for SwiGLU (hidden size 8/3 d), and twice
6 for the modulation of frames and of text; a network without text has no text modulation and ``18 d^2``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from flowception.errors import ConfigError
from flowception.nn.attention import check_backend
from flowception.nn.pattern import AttentionPattern
from flowception.packing.flops import ModelSpec

COMPILE = ("blocks", "leaves", "off")
"""What torch.compile may fuse."""
AUTO = "auto"
"""``activation_checkpointing`` for as few blocks as the memory of the devices allows."""
MLP_MULTIPLE = 32
"""The SwiGLU hidden size is a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named size."""

    num_layers: int
    hidden_size: int
    num_heads: int
    in_channels: int
    text_dim: int | None = None


PRESETS: dict[str, Preset] = {
    "toy": Preset(num_layers=4, hidden_size=128, num_heads=4, in_channels=48),
    "s": Preset(num_layers=12, hidden_size=384, num_heads=6, in_channels=48),
    "xl": Preset(num_layers=28, hidden_size=1152, num_heads=16, in_channels=128),
    "2b": Preset(num_layers=38, hidden_size=1536, num_heads=24, in_channels=128, text_dim=4096),
}
"""toy: a laptop's CPU. s: one GPU. xl: the size of DiT-XL. 2b: T5 text (4096 wide) and LTX latents (128 channels)."""


def _check_choice(key: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ConfigError(f"model.{key} is {value!r}; choose one of {', '.join(choices)}")


@dataclass(kw_only=True)
class DiTConfig:
    """The Flowception DiT. A size that is None comes from the preset."""

    backbone: str = "dit"
    """Name in ``nn.build.BACKBONES``."""
    preset: str | None = "toy"
    """Name in ``PRESETS``; None if every size is given."""
    in_channels: int | None = None
    """C: channels of a latent, fixed by the codec."""
    hidden_size: int | None = None
    """d: width of a token."""
    num_layers: int | None = None
    """Blocks."""
    num_heads: int | None = None
    """Attention heads; ``hidden_size / num_heads`` must be even and at least 8."""
    text_dim: int | None = None
    """Width of a text embedding; 0 for no text whatever the preset says."""
    num_classes: int = 0
    """Classes of clips, beside the null class; 0 for none."""
    frame_spacing: float = 2.0
    """Rotary positions from one frame to the next."""
    rope_base: float = 100.0
    """Ratio of the highest to the lowest rotary frequency."""
    count_embedding: bool = True
    """Whether insertion tokens carry their frame's rank and the number of visible frames."""
    grid_embedding: bool = True
    """Whether latent tokens carry their row and column. Rotary positions are relative: without this the network must
    infer where in the frame a token lies."""
    initial_log_rate: float | None = None
    """Bias the rate head starts with, the log of the data's mean missing count per site; None lets the trainer compute
    it from the plan."""
    attention_pattern: str = "full"
    """Which tokens of a clip see each other: full, causal (own and earlier frames) or window (near frames). Text is
    seen by all; unless the pattern is full, it sees text alone."""
    attention_window_frames: int | None = None
    """K: a token of the window pattern sees frames at most K away; None for the other patterns."""
    attention_backend: str = "auto"
    """auto, sdpa, flex, varlen or flash. varlen and flash have the full pattern only, flex needs CUDA."""
    compile: bool | str = "off"
    """What torch.compile fuses in training: ``blocks`` (each block as one graph, the fastest), ``leaves`` (only what a
    block computes between its matrix products: norms, modulation, rotation, SwiGLU, gates), or ``off``. The first steps
    take longer; needs Triton on a GPU and a C++ compiler on a CPU."""
    activation_checkpointing: bool | int | str = False
    """Blocks that are computed again in the backward pass instead of kept: true for all, false for none, how many,
    counted from the first, or ``auto``: as few as fit ``memory_gib``, decided at every start. Fewer cost less time and
    more memory; ``--dry-run`` says how much of both."""

    def __post_init__(self) -> None:
        self.compile = self.compile or "off"  # YAML takes the word off for false
        _check_choice("compile", self.compile, COMPILE)
        if self.preset is not None:
            _check_choice("preset", self.preset, PRESETS)
        for name in ("in_channels", "hidden_size", "num_layers", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name} is {value}; give at least 1, or null to take the preset's")
        for name in ("text_dim", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"model.{name} is {value}; give 0 for none, or the number")
        check_backend(self.attention_backend, self.pattern())
        self._check_recomputation()
        if self.frame_spacing <= 0:
            raise ConfigError(f"model.frame_spacing is {self.frame_spacing}; give a positive number")
        if self.rope_base <= 1:
            raise ConfigError(f"model.rope_base is {self.rope_base}; give a number above 1")

    def _check_recomputation(self) -> None:
        blocks = self.activation_checkpointing
        if blocks != AUTO and (isinstance(blocks, str) or blocks < 0):
            raise ConfigError(
                f"model.activation_checkpointing is {blocks}; give true for all blocks, false for none, how many, or "
                f"{AUTO} for as few as the memory of the devices allows"
            )

    def pattern(self) -> AttentionPattern:
        """Which tokens see each other."""
        return AttentionPattern(self.attention_pattern, self.attention_window_frames)

    def checkpointed_blocks(self) -> int:
        """How many blocks, the first ones, are computed again in the backward pass.

        The first, because the backward pass comes to them last: what the others kept is free by then, and what the one
        at work keeps for a moment adds nothing to the peak.

        Raises:
            ConfigError: If there are fewer blocks than that, or the number is still to be found.
        """
        blocks, given = self._size("num_layers"), self.activation_checkpointing
        if isinstance(given, str):
            raise ConfigError(
                f"model.activation_checkpointing is {given} and the network is about to be trained without a number; "
                "the trainer finds one (training/estimate/recomputation.py), elsewhere give one"
            )
        if given is True:
            return blocks
        if given > blocks:
            raise ConfigError(
                f"model.activation_checkpointing is {given} and the network has {blocks} blocks; give at most that, or "
                "true for all"
            )
        return int(given)

    def resolved(self) -> DiTConfig:
        """The same network with every size written out and no preset."""
        spec = self.flop_spec()
        return replace(
            self,
            preset=None,
            in_channels=spec.in_channels,
            hidden_size=spec.hidden_size,
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            text_dim=spec.text_dim or 0,
        )

    def flop_spec(self) -> ModelSpec:
        """Every size of the network, known.

        Raises:
            ConfigError: If a size is given neither here nor by the preset, or sizes do not go together.
        """
        hidden_size, num_heads = self._size("hidden_size"), self._size("num_heads")
        if hidden_size % num_heads:
            raise ConfigError(f"model.hidden_size {hidden_size} is not a multiple of model.num_heads {num_heads}")
        if self.activation_checkpointing != AUTO:
            self.checkpointed_blocks()  # refuses more than there are
        text_dim = self.text_dim
        if text_dim is None and self.preset is not None:
            text_dim = PRESETS[self.preset].text_dim
        return ModelSpec(
            hidden_size=hidden_size,
            num_layers=self._size("num_layers"),
            num_heads=num_heads,
            in_channels=self._size("in_channels"),
            mlp_hidden_size=MLP_MULTIPLE * round(8 * hidden_size / 3 / MLP_MULTIPLE),
            text_dim=text_dim or None,
            num_classes=self.num_classes,
            count_embedding=self.count_embedding,
            grid_embedding=self.grid_embedding,
            attention_pattern=self.attention_pattern,
            attention_window_frames=self.attention_window_frames,
        )

    def _size(self, name: str) -> int:
        value: int | None = getattr(self, name)
        if value is not None:
            return value
        if self.preset is None:
            raise ConfigError(f"model.{name} is not set and there is no model.preset to take it from; give one")
        preset_value: int = getattr(PRESETS[self.preset], name)
        return preset_value
