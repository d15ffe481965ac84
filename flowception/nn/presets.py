"""What a network is configured by, and the table of named sizes.

A block has ``24 d^2`` parameters: 4 for queries, keys, values and output, 8 for SwiGLU (hidden size 8/3 d), and twice
6 for the modulation of frames and of text; a network without text has no text modulation and ``18 d^2``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowception.errors import ConfigError
from flowception.nn.attention import check_backend
from flowception.nn.pattern import AttentionPattern
from flowception.packing.flops import ModelSpec
from flowception.ranges import Rule, check_ranges, integer, number, one_of

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


_CHECKPOINTED_BLOCKS = Rule(
    f"true (all blocks), false (none), a number of blocks, or {AUTO} (as few as device memory allows)",
    lambda value: value == AUTO or isinstance(value, bool) or integer(at_least=0).holds(value),
)


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
        size = integer(at_least=1).or_null("the preset's")
        rules = {
            "compile": one_of(COMPILE),
            "preset": one_of(PRESETS).or_null("none, with every size given"),
            "in_channels": size,
            "hidden_size": size,
            "num_layers": size,
            "num_heads": size,
            "text_dim": integer(at_least=0, note="0 is none").or_null("the preset's"),
            "num_classes": integer(at_least=0, note="0 is none"),
            "activation_checkpointing": _CHECKPOINTED_BLOCKS,
            "frame_spacing": number(above=0),
            "rope_base": number(above=1),
            "initial_log_rate": number().or_null("the data's mean"),
        }
        check_ranges("model", self, rules)
        check_backend(self.attention_backend, self.pattern())

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
                f"model.activation_checkpointing must be a number of blocks here, got {given}; only the trainer "
                f"resolves {given} (training/estimate/recomputation.py), so set a number, true or false"
            )
        if given is True:
            return blocks
        if given > blocks:
            raise ConfigError(
                f"model.activation_checkpointing must be at most the number of blocks, or true for all, got {given} "
                f"and {blocks} blocks; lower it or set it to true"
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
            raise ConfigError(
                f"model.hidden_size must be a multiple of model.num_heads, got {hidden_size} and {num_heads}"
            )
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
            raise ConfigError(f"model.{name} must be set when model.preset is null; set one of the two")
        preset_value: int = getattr(PRESETS[self.preset], name)
        return preset_value
