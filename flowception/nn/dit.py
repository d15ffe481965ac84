"""The Flowception DiT: a transformer over the visible frames of many clips in one pack.

    velocity, log_rate = model(pack)

Each token is modulated by its frame's time (AdaLN before attention, the MLP and the output). Each frame ends with an
insertion token that predicts the number of missing frames to its right. Text tokens share attention and MLP with the
latent tokens but have a separate modulation (docs/method.md; Flowception, arXiv 2512.11438).

Every module runs in every forward on every rank, as ZeRO-3 requires, even for a pack without text or of padding only.

Shape legend: ``T`` tokens, ``F`` frame slots, ``B`` clip slots, ``R`` text rows, ``C`` latent channels, ``d`` hidden
size, ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowception.errors import DataError
from flowception.nn.attention import Attend, BoundAttention, attention, bind
from flowception.nn.fused_ops import EAGER, FusedOps, compiled_ops, modulate
from flowception.nn.init import Gather, initialize
from flowception.nn.layers import (
    Embedding,
    Float32Linear,
    InsertionToken,
    Linear,
    RotaryNorm,
    SwiGLU,
    TimeEmbedding,
    grid_features,
)
from flowception.nn.presets import DiTConfig
from flowception.nn.rope import VideoRoPE
from flowception.nn.rows import Rows, clip_rows, frame_rows, take_rows
from flowception.packing.flops import ModelSpec
from flowception.packing.layout import ModelOutput, ModelRole, PackInput, PackLayout

MODULATIONS = 6
"""Shift, scale and gate of attention, shift, scale and gate of the MLP."""


class TokenEmbedding(nn.Module):
    """The input tokens of a pack.

    A latent token is a linear map of its noisy latent, condition latent and grid position, plus its frame's role. An
    insertion token is a learned vector plus counts and role. A text token is a linear map of its embedding.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.grid_embedding = spec.grid_embedding
        self.latent = Linear(spec.latent_inputs, spec.hidden_size, bias=False)
        self.role = Embedding(len(ModelRole), spec.hidden_size)
        self.insertion = InsertionToken(spec.hidden_size, spec.count_embedding)

    def forward(self, pack: PackInput, text: Tensor | None, rows: Rows) -> Tensor:
        """Pack, embedded text ``[R, d]`` and the rows of frames (and clips) to tokens ``[T, d]``.

        The dtype is that of the computation, so bfloat16 under autocast, even with float32 weights.
        """
        layout = pack.layout
        inputs = [pack.noisy, pack.condition]
        if self.grid_embedding:
            inputs.append(torch.where(layout.latent_mask.unsqueeze(1), grid_features(layout.token_position), 0.0))
        tokens: Tensor = self.latent(torch.cat(inputs, dim=-1).to(self.latent.weight.dtype))
        role = F.pad(self.role(pack.role), (0, 0, 0, len(rows.run_of_row) - len(pack.role)))  # zero for text
        tokens = (tokens + take_rows(role, rows)).to(tokens.dtype)
        insertion = self.insertion(layout.frame_rank, layout.clip_frames[layout.frame_clip])
        insertion = torch.where(layout.frame_valid.unsqueeze(1), insertion, 0.0)
        tokens = tokens.index_add(0, layout.insertion_token, insertion.to(tokens.dtype))
        return tokens if text is None else tokens.index_add(0, layout.text_token, text.to(tokens.dtype))


class TextEmbedding(nn.Module):
    """Text embeddings as tokens, and their mean per clip as the condition of text modulation."""

    def __init__(self, text_dim: int, size: int) -> None:
        super().__init__()
        self.tokens = Linear(text_dim, size)
        self.pooled = Linear(size, size)

    def forward(self, text: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        """Text ``[R, D]`` to tokens ``[R, d]`` and pooled ``[B, d]`` (of zeros for clips without text)."""
        tokens = self.tokens(text.to(self.tokens.weight.dtype))
        clips = torch.arange(layout.clip_frames.shape[0], device=text.device).unsqueeze(1)
        member = (layout.token_clip[layout.text_token] == clips).to(tokens.dtype)
        mean = member @ tokens / member.sum(dim=1, keepdim=True).clamp(min=1)
        return tokens, self.pooled(mean)


class Block(nn.Module):
    """Attention and SwiGLU, each preceded by AdaLN and scaled by a gate that starts at zero."""

    def __init__(self, spec: ModelSpec, ops: FusedOps, compiled: bool) -> None:
        super().__init__()
        self.ops, self.compiled = ops, compiled
        size, head_dim = spec.hidden_size, spec.hidden_size // spec.num_heads
        self.head_shape = (spec.num_heads, head_dim)
        self.frame_modulation = Linear(size, MODULATIONS * size, zero=True)
        self.text_modulation = Linear(size, MODULATIONS * size, zero=True) if spec.text_modulation else None
        self.query_key_value = Linear(size, 3 * size, bias=False)
        self.query_norm, self.key_norm = RotaryNorm(head_dim, ops), RotaryNorm(head_dim, ops)
        self.attention_output = Linear(size, size, bias=False)
        self.mlp = SwiGLU(size, spec.mlp_hidden_size, ops)

    def forward(
        self,
        tokens: Tensor,
        frame_condition: Tensor,
        text_condition: Tensor | None,
        rows: Rows,
        rotations: Tensor,
        attention: BoundAttention,
    ) -> Tensor:
        """One block.

        Args:
            tokens: ``[T, d]``.
            frame_condition: ``[F, d]``.
            text_condition: ``[B, d]``; None for a network without text.
            rows: Modulation row of each token, among frames and, with text, clips.
            rotations: float32 ``[T, 1, d / H / 2, 2]``, from ``VideoRoPE``.
            attention: Attention within the pack's segments.

        Returns:
            ``[T, d]``.
        """
        compute = compiled_block(attention.in_graph) if self.compiled else Block.compute
        return compute(self, tokens, frame_condition, text_condition, rows, rotations, attention.attend)

    def compute(
        self,
        tokens: Tensor,
        frame_condition: Tensor,
        text_condition: Tensor | None,
        rows: Rows,
        rotations: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The computation of ``forward``, eager or compiled."""
        table = self.frame_modulation(frame_condition)
        if self.text_modulation is not None:
            table = torch.cat([table, self.text_modulation(text_condition)])
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.chunk(MODULATIONS, dim=-1)
        ops = self.ops
        attended = self._attention(ops.modulate(tokens, shift_1, scale_1, rows), rotations, attend)
        tokens = ops.add_gated(tokens, attended, gate_1, rows)
        return ops.add_gated(tokens, self.mlp(ops.modulate(tokens, shift_2, scale_2, rows)), gate_2, rows)

    def _attention(self, x: Tensor, rotations: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        query, key, value = (part.unflatten(-1, self.head_shape) for part in self.query_key_value(x).chunk(3, dim=-1))
        query, key = self.query_norm(query, rotations), self.key_norm(key, rotations)
        return self.attention_output(attend(query, key, value).flatten(1))


@lru_cache(maxsize=2)
def compiled_block(one_graph: bool) -> Callable[..., Tensor]:
    """``Block.compute`` under ``torch.compile``. All blocks of a process share one graph with gradients, one without.

    The function is compiled rather than the module, so that module hooks, which DeepSpeed uses to gather weights at
    ZeRO-3, stay outside the graph (blocks must be its leaf modules, ``training.distributed.zero``).

    Args:
        one_graph: Whether a graph break is an error.
    """
    compiled: Callable[..., Tensor] = torch.compile(Block.compute, fullgraph=one_graph)
    return compiled


class OutputHeads(nn.Module):
    """AdaLN by each frame's time, then the velocity of latent tokens and the log-rate of insertion tokens.

    Modulation and rate are computed in float32: bfloat16 values near 3 are 2^-6 apart, which is 1.6 % of the rate, and
    the rate must resolve counts.
    """

    def __init__(self, spec: ModelSpec, initial_log_rate: float) -> None:
        super().__init__()
        size = spec.hidden_size
        self.frame_modulation = Float32Linear(size, 2 * size, zero=True)
        self.velocity = Linear(size, spec.in_channels, zero=True)
        self.rate_hidden = Float32Linear(size, size)
        self.rate = Float32Linear(size, 1, zero=True, bias_value=initial_log_rate)

    def forward(self, tokens: Tensor, frame_condition: Tensor, layout: PackLayout) -> ModelOutput:
        """Tokens ``[T, d]`` and conditions ``[F, d]`` to the network's output; zero at unused positions."""
        shift, scale = self.frame_modulation(frame_condition).chunk(2, dim=-1)
        tokens = modulate(tokens.float(), shift, scale, frame_rows(layout, with_text=False))
        velocity = self.velocity(tokens.to(self.velocity.weight.dtype)).float()
        hidden = F.silu(self.rate_hidden(tokens.index_select(0, layout.insertion_token)))
        return ModelOutput(
            velocity=torch.where(layout.latent_mask.unsqueeze(1), velocity, 0.0),
            log_rate=torch.where(layout.frame_valid, self.rate(hidden).squeeze(1), 0.0),
        )


class FlowceptionDiT(nn.Module):
    """The network. Construct it, then call ``initialize``: constructors do not set weights.

    Args:
        config: Sizes and settings.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.spec = spec = config.spec()
        size = spec.hidden_size
        self.rope = VideoRoPE(size // spec.num_heads, config.frame_spacing, config.rope_base)
        self.attend: Attend = partial(attention, pattern=config.pattern(), backend=config.attention_backend)
        self.embedding = TokenEmbedding(spec)
        self.time_embedding = TimeEmbedding(size)
        self.text_embedding = None if spec.text_dim is None else TextEmbedding(spec.text_dim, size)
        self.class_embedding = Embedding(spec.num_classes + 1, size) if spec.num_classes else None
        ops = compiled_ops() if config.compile == "leaves" else EAGER
        compiled = config.compile == "blocks"
        self.blocks = nn.ModuleList(Block(spec, ops, compiled) for _ in range(spec.num_layers))
        self.heads = OutputHeads(spec, config.initial_log_rate or 0.0)

    def initialize(self, seed: int, gather: Gather | None = None) -> Self:
        """Set all weights from the seed and the parameter names; see ``flowception.nn.init``."""
        initialize(self, seed, gather)
        return self

    def forward(self, pack: PackInput, attends: Sequence[Attend] | None = None) -> ModelOutput:
        """Predict velocities and log-rates of a pack.

        Args:
            pack: On the device of the weights; latents in any float dtype.
            attends: Attention of each block, if cached keys and values are included
                (``flowception.generation.kv_cache``); None to attend only within the pack.

        Returns:
            float32 velocity ``[T, C]`` (zero except at latent tokens) and float32 log_rate ``[F]`` (zero in unused
            slots).

        Raises:
            DataError: If exactly one of pack and network has text.
        """
        layout = pack.layout
        self._check_text(pack)
        frame_condition = self.time_embedding(pack.time)
        text_tokens, text_condition = None, None
        if self.text_embedding is not None and pack.text is not None:
            text_tokens, text_condition = self.text_embedding(pack.text, layout)
        if self.class_embedding is not None:
            null = self.spec.num_classes
            classes = self.class_embedding(torch.where(pack.class_label < 0, null, pack.class_label))
            frame_condition = frame_condition + take_rows(classes, clip_rows(layout))
            text_condition = None if text_condition is None else text_condition + classes
        frame_condition = F.silu(frame_condition)
        text_condition = None if text_condition is None else F.silu(text_condition)
        rows = frame_rows(layout, with_text=text_tokens is not None)
        tokens = self.embedding(pack, text_tokens, rows)
        rotations = self.rope.rotations(layout)
        checkpointed = self.config.checkpointed_blocks() if torch.is_grad_enabled() else 0
        blocks = zip(self.blocks, self._bind(layout, tokens, attends), strict=True)
        for number, (block, bound) in enumerate(blocks):
            run = partial(checkpoint, block, use_reentrant=False) if number < checkpointed else block
            tokens = run(tokens, frame_condition, text_condition, rows, rotations, bound)
        return self.heads(tokens, frame_condition, layout)

    def _bind(self, layout: PackLayout, tokens: Tensor, attends: Sequence[Attend] | None) -> Sequence[BoundAttention]:
        """Attention of every block. The backend is chosen here, outside compiled code."""
        if attends is not None:
            return [BoundAttention(partial(attend, layout=layout), in_graph=False) for attend in attends]
        config = self.config
        if config.compile != "blocks":
            return [BoundAttention(partial(self.attend, layout=layout), in_graph=False)] * len(self.blocks)
        bound = bind(layout, tokens.device, tokens.dtype, config.pattern(), config.attention_backend)
        return [bound] * len(self.blocks)

    def _check_text(self, pack: PackInput) -> None:
        if pack.text is None and self.spec.text_dim is not None:
            raise DataError(
                f"the network was built with text_dim={self.spec.text_dim} but the pack has no text; "
                "pass text of shape [R, D] (R may be 0), or set model.text_dim=0"
            )
        if pack.text is not None and self.spec.text_dim is None:
            raise DataError("the pack has text but the network was built without it; set model.text_dim")
