"""Cached keys and values: after the clock has ended, finished frames are no longer queries.

From clock 1 on no frame is inserted, and frames reach time 1 one after another. The plain sampler keeps computing
finished frames only so that the others can attend to them. This one caches their keys and values in every block, and
those of text and context. Only live (unfinished) frames run through the linear layers and serve as queries. They attend
to cached and new keys and values together.

This is an approximation: attention is bidirectional, so the keys of a finished frame would still change with the live
frames. Every ``refresh_steps`` steps, counted from the last step of the clock, all frames are therefore recomputed; 1
is the plain sampler. A frame that finishes between two refreshes keeps the keys and values of its last step.
``benchmarks/sampling.py`` measures the error and the savings.

Shape legend: ``T`` tokens of the full pack, ``Q`` live tokens, ``F`` frames, ``B`` clips, ``H`` heads, ``d`` head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowception.errors import ConfigError
from flowception.flow import Prediction, SamplerState
from flowception.generation.predictor import NetworkPredictor, velocity_frames
from flowception.nn.dit import FlowceptionDiT
from flowception.packing.layout import PackInput, PackLayout, PackShape, TokenKind
from flowception.ranges import integer


class KeyValueCache:
    """Keys and values of all tokens of a pack, in every block."""

    def __init__(self, num_blocks: int, attention: Callable[..., Tensor]) -> None:
        """Start empty; the first evaluation through ``attend`` must have every token live.

        Args:
            num_blocks: Number of blocks of the network.
            attention: The network's own attention, ``flowception.nn.attention.attention`` with its backend.
        """
        self.keys: list[Tensor] = [torch.empty(0)] * num_blocks
        self.values: list[Tensor] = [torch.empty(0)] * num_blocks
        self.attention = attention

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackLayout,
        *,
        block: int,
        full_layout: PackLayout,
        live_token: Tensor,
    ) -> Tensor:
        """Update the keys and values of the live tokens, then attend to the full clip.

        Args:
            query: ``[Q, H, d]``.
            key: ``[Q, H, d]``.
            value: ``[Q, H, d]``.
            layout: Layout of the live tokens.
            block: Index of the block.
            full_layout: Layout of all tokens.
            live_token: int64 ``[Q]``: indices of the live tokens among all tokens.

        Returns:
            ``[Q, H, d]``.
        """
        if len(live_token) == len(full_layout.token_kind):
            self.keys[block], self.values[block] = key, value.contiguous()
        else:
            self.keys[block].index_copy_(0, live_token, key)
            self.values[block].index_copy_(0, live_token, value)
        return self.attention(query, self.keys[block], self.values[block], layout, key_layout=full_layout)

    def keep(self, tokens: Tensor) -> None:
        """Keep only the tokens at these indices, int64."""
        self.keys = [key[tokens] for key in self.keys]
        self.values = [value[tokens] for value in self.values]

    def make_room(self, places: Tensor, tokens: int) -> None:
        """Move the cached tokens to new indices, int64, among more tokens; the others must be live next."""

        def spread(kept: Tensor) -> Tensor:
            return kept.new_zeros(tokens, *kept.shape[1:]).index_copy_(0, places, kept)

        self.keys, self.values = [spread(key) for key in self.keys], [spread(value) for value in self.values]


def narrow_pack(pack: PackInput, live: Tensor, *, with_text: bool) -> tuple[PackInput, Tensor]:
    """Restrict a tight pack to its live frames; frame ranks and frame counts remain those of the full pack.

    Args:
        pack: On the CPU, without padding.
        live: bool ``[F]``; every clip has a live frame.
        with_text: Whether text tokens are live.

    Returns:
        The restricted pack, and the indices of its tokens in the full pack, int64 ``[Q]``.
    """
    layout = pack.layout
    is_text = layout.token_kind == TokenKind.TEXT
    chosen = torch.where(is_text, with_text, live[layout.token_frame])
    places = torch.nonzero(chosen).flatten()
    token_number, frame_number = chosen.cumsum(0) - 1, live.cumsum(0) - 1
    lengths = torch.bincount(layout.token_clip[places], minlength=len(layout.clip_frames))
    text_token = token_number[layout.text_token] if with_text else layout.text_token[:0]
    narrow = PackLayout(
        shape=PackShape(
            token_budget=len(places),
            max_frames=int(live.sum()),
            max_clips=len(lengths),
            max_seqlen=int(lengths.max()),
        ),
        segment_lengths=tuple(lengths.tolist()),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
        token_kind=layout.token_kind[places],
        token_frame=torch.where(is_text, 0, frame_number[layout.token_frame])[places],
        token_clip=layout.token_clip[places],
        token_position=layout.token_position[places],
        text_token=text_token,
        insertion_token=token_number[layout.insertion_token[live]],
        frame_clip=layout.frame_clip[live],
        frame_rank=layout.frame_rank[live],
        frame_valid=layout.frame_valid[live],
        clip_frames=layout.clip_frames,
    )
    text = pack.text if pack.text is None or with_text else pack.text[:0]
    narrowed = replace(
        pack,
        layout=narrow,
        noisy=pack.noisy[places],
        condition=pack.condition[places],
        time=pack.time[live],
        role=pack.role[live],
        text=text,
    )
    return narrowed, places


class CachedPredictor(NetworkPredictor):
    """A ``NetworkPredictor`` that recomputes finished frames only every ``refresh_steps`` steps."""

    def __init__(
        self, model: FlowceptionDiT, class_labels: Sequence[int], *, refresh_steps: int, **settings: Any
    ) -> None:
        """Bind a model to the conditions of a batch.

        Args:
            model: In evaluation mode.
            class_labels: Class of each of the B clips; -1 for none.
            refresh_steps: Steps between evaluations of all frames, from the end of the clock on.
            **settings: As for ``NetworkPredictor``.
        """
        integer(at_least=1).or_null("no cache").check("`cache_refresh`", refresh_steps)
        if model.config.attention_pattern != "full":
            raise ConfigError(
                "`cache_refresh` requires a model with attention_pattern=full, got "
                f"attention_pattern={model.config.attention_pattern}; drop it"
            )
        super().__init__(model, class_labels, **settings)
        self.dit = model
        self.refresh_steps = refresh_steps
        self._cache: KeyValueCache | None = None
        self._step = -1
        self._clips = torch.empty(0, dtype=torch.bool)
        self._layout: PackLayout | None = None

    def refreshes(self, state: SamplerState) -> bool:
        """Whether this evaluation computes every frame."""
        steps_after_last = state.step - (state.last_birth_step - 1)
        return steps_after_last < 0 or steps_after_last % self.refresh_steps == 0

    def live_frames(self, state: SamplerState) -> Tensor:
        """Frames computed in this evaluation, bool [F]."""
        return super().live_frames(state) if self.refreshes(state) else state.moving

    def _evaluate(self, pack: PackInput, state: SamplerState) -> Prediction:
        if state.step < state.last_birth_step - 1:
            return super()._evaluate(pack, state)
        refresh = self.refreshes(state)
        cache = self._begin_step(pack.layout, state, refresh)
        live = self.live_frames(state)[state.unfinished_clips[state.frame_clip]]
        narrow, places = narrow_pack(pack, live.repeat(2) if self.guided else live, with_text=refresh)
        attend = partial(cache.attend, full_layout=pack.layout.to(self.device), live_token=places.to(self.device))
        attends = [partial(attend, block=block) for block in range(len(cache.keys))]
        output = self.dit(narrow.to(self.device), attends)
        return Prediction(velocity_frames(output.velocity, narrow.layout, state.frames), output.log_rate.float())

    def _begin_step(self, layout: PackLayout, state: SamplerState, refresh: bool) -> KeyValueCache:
        """The cache for this step: empty at a refresh, otherwise the last one without finished clips."""
        clips = state.unfinished_clips
        if refresh:
            self._cache = KeyValueCache(len(self.dit.blocks), self.dit.attend)
        elif self._cache is None or self._layout is None or self._step != state.step - 1:
            raise ValueError(
                f"step {state.step} needs the keys and values of step {state.step - 1}, the cache has those of step "
                f"{self._step}; evaluate every step from the clock's last ({state.last_birth_step - 1}) on"
            )
        else:
            halves = 2 if self.guided else 1
            if not torch.equal(clips, self._clips):
                stays = clips[self._clips].repeat(halves)
                self._cache.keep(torch.nonzero(stays[self._layout.token_clip]).flatten().to(self.device))
            if state.step == state.last_birth_step:  # the last insertions may just have happened
                old = (state.born_step < state.step)[clips[state.frame_clip]].repeat(halves)
                is_text = layout.token_kind == TokenKind.TEXT
                known = torch.nonzero(is_text | old[layout.token_frame]).flatten()
                self._cache.make_room(known.to(self.device), len(is_text))
        self._step, self._clips, self._layout = state.step, clips, layout
        return self._cache
