"""The network's configuration and the table of presets.

A block has ``24 d^2`` parameters: 4 for queries, keys, values and output, 8 for SwiGLU (hidden size 8/3 d), 6 for the
modulation of frames and 6 for that of text. A network without text has no text modulation, so ``18 d^2``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowception.errors import ConfigError
from flowception.nn.attention import check_backend
from flowception.nn.pattern import AttentionPattern
from flowception.packing.flops import ModelSpec
from flowception.ranges import Rule, check_ranges, integer, number, one_of

COMPILE = ("blocks", "leaves", "off")
"""Values of ``model.compile``."""
AUTO = "auto"
"""Value of ``activation_checkpointing`` that checkpoints as few blocks as device memory allows."""
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
    """Width of a text embedding; 0 for no text, overriding the preset."""
    num_classes: int = 0
    """Number of classes, excluding the null class; 0 for none."""
    frame_spacing: float = 2.0
    """Distance in rotary position between adjacent frames."""
    rope_base: float = 100.0
    """Ratio of the highest to the lowest rotary frequency."""
    count_embedding: bool = True
    """Whether insertion tokens encode their frame's rank and the number of visible frames."""
    grid_embedding: bool = True
    """Whether latent tokens encode their row and column. Rotary positions are relative, so without this the network
    must infer a token's position in the frame."""
    initial_log_rate: float | None = None
    """Initial bias of the rate head: the log of the data's mean missing count per site. None: the trainer computes it
    from the plan."""
    attention_pattern: str = "full"
    """Which tokens of a clip see each other: full, causal (own and earlier frames) or window (nearby frames). All
    tokens see the text; unless the pattern is full, text sees only text."""
    attention_window_frames: int | None = None
    """K: with the window pattern, a token sees frames at most K away; None for the other patterns."""
    attention_backend: str = "auto"
    """auto, sdpa, flex, varlen or flash. varlen and flash support only the full pattern; flex needs CUDA."""
    compile: bool | str = "off"
    """What torch.compile fuses in training: ``blocks`` (each block as one graph, the fastest), ``leaves`` (only the
    operations between a block's matrix products: norms, modulation, rotation, SwiGLU, gates), or ``off``. The first
    steps take longer. Needs Triton on a GPU and a C++ compiler on a CPU."""
    activation_checkpointing: bool | int | str = False
    """Blocks whose activations are recomputed in the backward pass: true for all, false for none, a number counted from
    the first block, or ``auto``: as few as fit ``memory_gib``, decided at every start. Fewer take less time and more
    memory; ``--dry-run`` reports both."""

    def __post_init__(self) -> None:
        self.compile = self.compile or "off"  # YAML reads the word off as false
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
        """Number of leading blocks whose activations are recomputed in the backward pass.

        The first blocks, because the backward pass reaches them last: the activations of the others are free by then,
        so the recomputed activations do not add to the peak.

        Raises:
            ConfigError: If there are fewer blocks, or the setting is ``auto`` and not yet resolved.
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
        """The same network with every size explicit and no preset."""
        spec = self.spec()
        return replace(
            self,
            preset=None,
            in_channels=spec.in_channels,
            hidden_size=spec.hidden_size,
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            text_dim=spec.text_dim or 0,
        )

    def spec(self) -> ModelSpec:
        """The network's resolved sizes.

        Raises:
            ConfigError: If a size is set neither here nor by the preset, or sizes are inconsistent.
        """
        hidden_size, num_heads = self._size("hidden_size"), self._size("num_heads")
        if hidden_size % num_heads:
            raise ConfigError(
                f"model.hidden_size must be a multiple of model.num_heads, got {hidden_size} and {num_heads}"
            )
        if self.activation_checkpointing != AUTO:
            self.checkpointed_blocks()  # raises if there are fewer blocks
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
