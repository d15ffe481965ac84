"""Gathers table rows by token, with gradients that are summed deterministically.

A frame's tokens are modulated by its row of a table, so the row's gradient is a sum over the frame's tokens. On CUDA,
``index_add_`` does this with atomics, in arbitrary order. The tokens of a row are contiguous, however, so each run of
tokens can be summed separately, in a fixed order.

Shape legend: ``T`` tokens, ``R`` rows of a table, ``U`` runs, ``n`` width of a row, ``F`` frame slots, ``B`` clip
slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowception.packing.layout import PackLayout, TokenKind


class Rows(NamedTuple):
    """The table row of each token, and the run of tokens of each row."""

    row: Tensor
    """int64 [T]."""
    offsets: Tensor
    """int64 [U + 1]: run u is tokens ``offsets[u]`` to ``offsets[u + 1]``. Tokens after the last run are padding: they
    read an arbitrary row and contribute no gradient."""
    run_of_row: Tensor
    """int64 [R]: the run of each row; an empty run if no token uses the row."""


def frame_rows(layout: PackLayout, *, with_text: bool) -> Rows:
    """The row of each token in a table of frames, followed by clips if text tokens use their clip's row.

    The runs of a clip are its text and its frames, in order. Unused slots are empty runs at the end.

    Args:
        layout: Layout of the pack.
        with_text: Whether the table is ``[F + B, n]`` instead of ``[F, n]``. If not, text tokens have no gradient.
    """
    kind, frames, clips = layout.token_kind, len(layout.frame_clip), len(layout.clip_frames)
    runs = frames + clips
    first_frame = layout.clip_frames.cumsum(0) - layout.clip_frames
    is_text = kind == TokenKind.TEXT
    in_clip = torch.where(is_text, first_frame[layout.token_clip], layout.token_frame + 1)
    run = torch.where(kind == TokenKind.PADDING, runs, layout.token_clip + in_clip)
    numbers = torch.arange(runs + 1, device=run.device)
    clip = torch.where(layout.frame_valid, layout.frame_clip, clips - 1)
    run_of_row = clip + numbers[:frames] + 1
    row = layout.token_frame
    if with_text:
        row = torch.where(is_text, frames + layout.token_clip, row)
        run_of_row = torch.cat([run_of_row, numbers[:clips] + first_frame])
    return Rows(row, torch.searchsorted(run, numbers), run_of_row)


def clip_rows(layout: PackLayout) -> Rows:
    """The row of each frame in a table of clips ``[B, n]``, with frames in the role of tokens."""
    offsets = F.pad(layout.clip_frames.cumsum(0), (1, 0))
    return Rows(layout.frame_clip, offsets, torch.arange(len(layout.clip_frames), device=offsets.device))


def sum_runs(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each run of tokens: ``[T, n]`` and int64 ``[U + 1]`` to ``[U, n]``, without a device synchronization."""
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True)


def _sum_rows(values: Tensor, row: Tensor, offsets: Tensor, run_of_row: Tensor) -> Tensor:
    """Float32 ``[T, n]`` to ``[R, n]``. On a CPU ``index_add_`` is sequential, and faster than summing runs."""
    if values.device.type != "cpu":
        return sum_runs(values, offsets).index_select(0, run_of_row)
    total = torch.zeros(run_of_row.shape[0], values.shape[1])
    return total.index_add_(0, row, values)


_sum_rows_whole = torch.library.custom_op("flowception::sum_rows", _sum_rows, mutates_args=())
"""The same as an opaque operator for ``torch.compile``, which would otherwise lower it to atomic sums."""


@_sum_rows_whole.register_fake
def _(values: Tensor, row: Tensor, offsets: Tensor, run_of_row: Tensor) -> Tensor:
    return values.new_empty(run_of_row.shape[0], values.shape[1])


class _TakeRows(torch.autograd.Function):
    """Gathers rows of a table; the gradients of a row are summed in float32, even if they are bfloat16."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor, offsets: Tensor, run_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(row, offsets, run_of_row)
        return table.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        sum_rows = _sum_rows_whole if torch.compiler.is_compiling() else _sum_rows
        return sum_rows(gradient.float(), *ctx.saved_tensors).to(gradient.dtype), None, None, None


def take_rows(table: Tensor, rows: Rows) -> Tensor:
    """``table[rows.row]``: table ``[R, n]`` to ``[T, n]``."""
    taken: Tensor = _TakeRows.apply(table, *rows)
    return taken
