"""Boundaries and positions, compared with worked examples."""

from __future__ import annotations

import pytest
import torch

from flowception.nn import ClipShape, PackShape, TokenKind, build_layout

LATENT, INSERTION, TEXT, PADDING = (int(kind) for kind in TokenKind)
CLIPS = [ClipShape(2, 1, 2, 1), ClipShape(1, 2, 1, 0)]
SHAPE = PackShape(token_budget=20, max_frames=5, max_clips=3, max_seqlen=7)


def test_tokens_of_a_clip_are_text_then_frames_each_with_its_insertion_token():
    layout = build_layout(CLIPS)
    first = [TEXT, LATENT, LATENT, INSERTION, LATENT, LATENT, INSERTION]
    assert layout.token_kind.tolist() == [*first, LATENT, LATENT, INSERTION]
    assert layout.token_frame.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert layout.token_clip.tolist() == [0] * 7 + [1] * 3
    assert layout.insertion_token.tolist() == [3, 6, 9]
    assert layout.frame_clip.tolist() == [0, 0, 1]
    assert layout.frame_rank.tolist() == [0, 1, 0]
    assert layout.clip_frames.tolist() == [2, 1]
    assert layout.text_token.tolist() == [0]


def test_positions_are_rank_and_centered_row_and_column():
    position = build_layout([ClipShape(2, 2, 3, 2)]).token_position
    assert position[:2].tolist() == [[-2, 0, 0], [-1, 0, 0]]
    frame = [[-0.5, -1], [-0.5, 0], [-0.5, 1], [0.5, -1], [0.5, 0], [0.5, 1], [0, 0]]
    assert position[2:9].tolist() == [[0, *where] for where in frame]
    assert position[9:].tolist() == [[1, *where] for where in frame]


def test_padding_is_cut_into_segments_no_longer_than_the_longest_clip():
    layout = build_layout(CLIPS, SHAPE)
    assert layout.segment_lengths == (7, 3, 7, 3)
    assert layout.cu_seqlens.tolist() == [0, 7, 10, 17, 20]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.token_kind[10:].tolist() == [PADDING] * 10
    assert layout.frame_valid.tolist() == [True] * 3 + [False] * 2
    assert layout.text_token.tolist() == [0]


@pytest.mark.parametrize("clips", [[], CLIPS, [ClipShape(1, 1, 1)] * 3])
def test_shapes_do_not_depend_on_the_content(clips):
    layout, empty = build_layout(clips, SHAPE), build_layout([], SHAPE)
    for name, value in vars(empty).items():
        if isinstance(value, torch.Tensor) and name not in ("cu_seqlens", "text_token"):
            assert getattr(layout, name).shape == value.shape, name
            assert getattr(layout, name).dtype == value.dtype, name
    assert sum(layout.segment_lengths) == SHAPE.token_budget
    assert layout.cu_seqlens.diff().tolist() == list(layout.segment_lengths)
    assert len(layout.text_token) == sum(clip.text_tokens for clip in clips)
    assert layout.max_seqlen == max(layout.segment_lengths)


@pytest.mark.parametrize("name", ["token_budget", "max_frames", "max_clips", "max_seqlen"])
def test_clips_that_do_not_fit_are_refused_by_name(name):
    tight = vars(PackShape.tight(CLIPS))
    build_layout(CLIPS, PackShape(**tight))
    with pytest.raises(ValueError, match=f"{name} must be >= {tight[name]} for .*, got {tight[name] - 1}"):
        build_layout(CLIPS, PackShape(**{**tight, name: tight[name] - 1}))


def test_to_moves_every_tensor():
    moved = build_layout(CLIPS).to("meta")
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert moved.segment_lengths == (7, 3)
