"""The network as a predictor: pack a sampler state, run the model, return velocity and insertion rate.

With classifier-free guidance, one pack holds the conditional and the unconditional version of every clip, so that a
step is a single model call. Finished clips are skipped, and FLOPs are counted (``flops``).

Shape legend: ``F`` visible frames of all clips, ``B`` clips, ``T`` tokens, ``C, H, W`` shape of a latent frame,
``L, D`` text tokens and their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from flowception.data.pack import model_role
from flowception.flow import Prediction, SamplerState, guide
from flowception.flow.loss import rate_from_log
from flowception.packing.flops import ModelSpec, clip_flops
from flowception.packing.layout import ClipShape, PackInput, PackLayout, build_layout, latent_tokens
from flowception.shards.schema import NO_CLASS


class NetworkPredictor:
    """Predicts velocity and insertion rate for the states of one batch of clips."""

    def __init__(
        self,
        model: nn.Module,
        class_labels: Sequence[int],
        *,
        texts: Sequence[Tensor] | None = None,
        null_text: Tensor | None = None,
        guidance: float | None = None,
        rate_guidance: float | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        """Bind a model to the conditions of a batch.

        Args:
            model: ``model(pack) -> ModelOutput``, in evaluation mode; its ``spec`` has the sizes that determine FLOPs.
            class_labels: Class of each of the B clips; -1 for none.
            texts: [L, D] per clip, for a model with text; None otherwise.
            null_text: [L, D] of an unconditional clip, for guidance of a model with text.
            guidance: Scale of classifier-free guidance on the velocity; None is off.
            rate_guidance: Guidance scale on the insertion rate, in log space; None is off.
            autocast_dtype: Lower precision for the model; None keeps its own.
        """
        self.model = model
        self.class_labels = torch.tensor(list(class_labels), dtype=torch.int64)
        self.texts = list(texts) if texts is not None else None
        self.null_text = null_text
        self.guidance = 1.0 if guidance is None else guidance
        self.rate_guidance = 1.0 if rate_guidance is None else rate_guidance
        self.autocast_dtype = autocast_dtype
        self.device = next(model.parameters()).device
        if self.guided and texts is not None and null_text is None:
            raise ValueError("guidance of a text model needs null_text, the text of an unconditional clip")

    @property
    def guided(self) -> bool:
        """Whether a step also evaluates the unconditional clips."""
        return (self.guidance, self.rate_guidance) != (1.0, 1.0)

    @torch.no_grad()
    def __call__(self, state: SamplerState) -> tuple[Tensor, Tensor]:
        """Evaluate the model once.

        Args:
            state: The sampler's state of all B clips.

        Returns:
            Velocity [F, C, H, W] and rate [F], on the state's device; zero for skipped frames.
        """
        pack = self.build_pack(state)
        # Packs change shape at every step, and compiled blocks would recompile for each.
        with self._autocast(), torch.compiler.set_stance("force_eager"):
            prediction = self._evaluate(pack, state)
        if self.guided:
            half = len(prediction.log_rate) // 2
            prediction = guide(
                Prediction(prediction.velocity[:half], prediction.log_rate[:half]),
                Prediction(prediction.velocity[half:], prediction.log_rate[half:]),
                self.guidance,
                self.rate_guidance,
            )
        velocity, rate = torch.zeros_like(state.frames), state.frames.new_zeros(len(state.frames))
        live = torch.nonzero(self.live_frames(state)).flatten().to(velocity.device)  # a mask would force a device sync
        velocity[live] = prediction.velocity.to(velocity)
        rate[live] = rate_from_log(prediction.log_rate).to(rate)
        return velocity, rate

    def _evaluate(self, pack: PackInput, state: SamplerState) -> Prediction:
        """The model's prediction for the live frames (twice as many when guided), on its device."""
        output = self.model(pack.to(self.device))
        return Prediction(velocity_frames(output.velocity, pack.layout, state.frames), output.log_rate.float())

    def live_frames(self, state: SamplerState) -> Tensor:
        """Frames computed in this evaluation, bool [F]: those of unfinished clips."""
        return state.unfinished_clips[state.frame_clip]

    def flops(self, state: SamplerState) -> Tensor:
        """Exact FLOPs per clip of evaluating the state, float64 [B]; both halves when guided.

        Text tokens are computed only in evaluations that compute every frame of their clip.
        """
        spec = cast(ModelSpec, self.model.spec)
        live = torch.bincount(state.frame_clip[self.live_frames(state)], minlength=len(state.clip_frames))
        texts = [torch.tensor([0] * len(live) if self.texts is None else [len(text) for text in self.texts])]
        if self.guided:
            texts.append(torch.full_like(live, 0 if self.null_text is None else len(self.null_text)))
        height, width = state.frames.shape[-2:]
        total = torch.zeros(len(live), dtype=torch.float64)
        for text in texts:
            counted = clip_flops(
                spec,
                state.clip_frames.numpy(),
                height,
                width,
                text.numpy(),
                live_frames=live.numpy(),
                live_text_tokens=torch.where(live == state.clip_frames, text, 0).numpy(),
            )
            total += torch.where(live > 0, torch.from_numpy(counted), 0.0)
        return total

    def build_pack(self, state: SamplerState) -> PackInput:
        """Pack the state tightly on the CPU: unfinished clips, followed by their unconditional versions when guided.

        A context frame is clean in both halves of the input, and its entry of ``state.times`` is the clock
        (docs/method.md). Unconditional means the same as in training (``data.pack``): null class, and null text at its
        actual length.
        """
        clips = state.unfinished_clips
        if len(clips) != len(self.class_labels):
            raise ValueError(
                f"the state has {len(clips)} clips, the predictor has {len(self.class_labels)} class labels"
            )
        here, clip_frames = clips[state.frame_clip], state.clip_frames[clips]
        frames, condition = state.frames.cpu().float()[here], state.condition.cpu().float()[here]
        time, role = state.times.float()[here], model_role(state.roles[here])
        labels = self.class_labels[clips]
        texts = None if self.texts is None else [self.texts[clip] for clip in torch.nonzero(clips).flatten().tolist()]
        grid = (int(frames.shape[-2]), int(frames.shape[-1]))
        if self.guided:
            clip_frames = clip_frames.repeat(2)
            frames, condition, time, role = (x.repeat(2, *[1] * (x.ndim - 1)) for x in (frames, condition, time, role))
            labels = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
            texts = texts + [self.null_text] * len(texts) if texts is not None and self.null_text is not None else None
        lengths = [len(text) for text in texts] if texts is not None else [0] * len(labels)
        shapes = [ClipShape(int(n), *grid, length) for n, length in zip(clip_frames, lengths, strict=True)]
        layout = build_layout(shapes)
        return PackInput(
            layout=layout,
            noisy=_frame_tokens(frames, layout),
            condition=_frame_tokens(condition, layout),
            time=time,
            role=role,
            class_label=labels,
            text=torch.cat(texts) if texts is not None else None,
        )

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def _frame_tokens(frames: Tensor, layout: PackLayout) -> Tensor:
    """Place latent frames [F, C, H, W] at the latent tokens of a pack, [T, C]; zero elsewhere."""
    tokens = frames.new_zeros(len(layout.token_kind), frames.shape[1])
    tokens[layout.latent_mask] = latent_tokens(frames)
    return tokens


def velocity_frames(velocity: Tensor, layout: PackLayout, like: Tensor) -> Tensor:
    """Convert the latent tokens of a pack [T, C], with its layout on the CPU, to frames [F, C, H, W]."""
    _, channels, height, width = like.shape
    latent = torch.nonzero(layout.latent_mask).flatten()
    tokens = velocity[latent.to(velocity.device)].float()
    return tokens.view(-1, height * width, channels).transpose(1, 2).reshape(-1, channels, height, width)
