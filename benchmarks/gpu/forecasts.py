"""Forecasts of GPU performance, made before a GPU was available, for comparison with measurements.

A roofline of one block of the recipe: T = 16,384 tokens, d = 1536, 24 heads, a pack of about 15 clips of up to 1,363
tokens. Assumed: matrix products at 650 TFLOP/s, FlashAttention-2 at 300 forward and 230 backward, FlashAttention-3 at
400 and 320, memory at 4.3 TB/s, as on an H200. None of these values was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

ASSUMED = (
    "matrix products at 650 TFLOP/s, FlashAttention-2 at 300 forward and 230 backward, FlashAttention-3 at 400 and\n"
    "320, memory at 4.3 TB/s"
)
PEAK_TFLOPS = 989.0
"""Of an H100 or H200, dense bfloat16."""
PACK_TFLOP = 119.7
"""Forward and backward of a pack, exact, without recomputation."""
BLOCKS = 38


@dataclass(frozen=True)
class Part:
    """One part of a block."""

    name: str
    forward_ms: float
    backward_ms: float


PARTS = (
    Part("matrix products", 1.43, 2.86),
    Part("attention, FlashAttention-2", 0.38, 1.24),
    Part("elementwise, eager", 0.79, 2.3),
    Part("elementwise, compiled leaves", 0.26, 0.9),
    Part("attention's tiles of empty segments", 0.12, 0.36),
)
"""Elementwise backward includes the ``index_add_`` of modulation gradients, 0.6 and 0.4 ms."""


@dataclass(frozen=True)
class Change:
    """The recipe after one more change."""

    number: int
    name: str
    ms_per_pack: float
    arm: str | None
    """The arm of check 10 that measures it, if there is one; all arms include change 3."""
    empty_tiles: int
    """Forward passes over a block's empty tiles (2 with recomputation); 0 from change 3 on."""

    @property
    def mfu(self) -> float:
        """MFU on an H200."""
        return PACK_TFLOP / (self.ms_per_pack / 1e3) / PEAK_TFLOPS

    @property
    def ms_with_change_3(self) -> float:
        """The same without the tiles of empty segments, as the code is now."""
        forward, backward = PARTS[-1].forward_ms, PARTS[-1].backward_ms
        return self.ms_per_pack - BLOCKS * (self.empty_tiles * forward + (backward if self.empty_tiles else 0.0))


CHANGES = (
    Change(0, "`compile: off`, every block checkpointed", 473.0, "compile off, all blocks checkpointed", 2),
    Change(1, "`compile: leaves`", 377.0, "leaves compiled, all blocks checkpointed", 2),
    Change(2, "no checkpointing", 293.0, "leaves compiled, fewest checkpointed", 1),
    Change(3, "attention over the pack's actual segments only", 271.0, None, 0),
    Change(4, "FlashAttention-3, if its package is installed", 254.0, None, 0),
    Change(
        5,
        "`compile: blocks`, modulation gradients summed by segments",
        238.0,
        "blocks compiled, fewest checkpointed",
        0,
    ),
)
"""Each change includes those before it. A sixth change, less host work, is forecast to keep 2 to 5 from being
host-bound."""

PEERS = (
    ("NeMo, DiT-7B, H100", 0.482, "arXiv 2503.12964"),
    ("Aquarius, 2B and 13.4B", 0.36, "arXiv 2505.10584"),
    ("Wan-14B, 128 H100, Megatron-Bridge", 0.329, "its own figures"),
    ("llm-foundry, a language model of this width, H100", 0.404, "its own figures"),
)
"""Published fractions of 989 TFLOP/s in bfloat16, with FLOPs as counted by their authors."""
