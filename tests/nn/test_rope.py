from __future__ import annotations

import numpy as np
import pytest
import torch

from flowception.errors import ConfigError
from flowception.nn import ClipShape, PackShape, build_layout
from flowception.nn.rope import VideoRoPE, rotate


def test_space_moves_along_the_diagonal_of_time_and_text_continues_it():
    positions = VideoRoPE(16, frame_spacing=3.0, base=100.0).positions(build_layout([ClipShape(2, 1, 2, 2)]))
    text = [[-2, -2, -2], [-1, -1, -1]]
    first = [[0, 0, -0.5], [0, 0, 0.5], [0, 0, 0]]
    second = [[3, 3, 2.5], [3, 3, 3.5], [3, 3, 3]]
    assert positions.tolist() == text + first + second


def test_time_uses_the_lowest_frequencies_and_rows_and_columns_alternate_in_the_others():
    rope = VideoRoPE(16, frame_spacing=2.0, base=100.0)
    assert rope.axis.tolist() == [1, 2, 1, 2, 1, 2, 0, 0]
    assert rope.frequency[[0, 4]] == pytest.approx([1.0, 0.1], rel=1e-15)
    assert (np.diff(rope.frequency) < 0).all()


def test_angles_worked_example():
    layout = build_layout([ClipShape(2, 1, 2)])
    rotations = VideoRoPE(8, frame_spacing=2.0, base=16.0).rotations(layout)
    cosine, sine = rotations[4, 0].unbind(-1)  # frame 1, row 0, column 0.5: (t, y, x) = (2, 2, 2.5)
    torch.testing.assert_close(torch.atan2(sine, cosine), torch.tensor([2.0, 2.5 / 2, 2.0 / 4, 2.0 / 8]))
    torch.testing.assert_close(cosine.square() + sine.square(), torch.ones(4))


def test_rotation_turns_pairs_and_keeps_scores_of_equal_distance():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16, generator=generator)
    layout = build_layout([ClipShape(6, 2, 2)])
    rotations = VideoRoPE(16, 2.0, 100.0).rotations(layout)
    scores = torch.einsum("qhd,khd->qk", rotate(query.expand(30, 1, 16), rotations), rotate(key, rotations[:1]))
    later = torch.einsum("qhd,khd->qk", rotate(query.expand(30, 1, 16), rotations), rotate(key, rotations[10:11]))
    torch.testing.assert_close(scores[:20], later[10:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[:20], scores[10:], atol=1e-3)


@pytest.mark.parametrize("compiling", [False, True])
def test_rotation_is_its_formula_in_both_forms(compiling, monkeypatch):
    """The complex product of eager mode and the real one for Inductor, and their gradients."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    generator = torch.Generator().manual_seed(1)
    heads = torch.randn(12, 3, 16, generator=generator, requires_grad=True)
    weight = torch.randn(12, 3, 16, generator=generator)
    rotations = VideoRoPE(16, 2.0, 100.0).rotations(build_layout([ClipShape(2, 1, 5)]))
    cosine, sine = rotations.double().unbind(-1)
    x, y = heads.double()[..., ::2], heads.double()[..., 1::2]
    expected = torch.stack([x * cosine - y * sine, x * sine + y * cosine], dim=-1).flatten(-2)
    turned = rotate(heads, rotations)
    torch.testing.assert_close(turned.double(), expected, rtol=0.0, atol=1e-6)
    ours, exact = (torch.autograd.grad((out * weight).sum(), heads)[0] for out in (turned, expected))
    torch.testing.assert_close(ours, exact, rtol=0.0, atol=1e-6)


def test_rotations_of_a_clip_do_not_depend_on_what_else_is_in_the_pack():
    rope, clip = VideoRoPE(16, 2.0, 100.0), ClipShape(3, 2, 3, 2)
    alone = rope.rotations(build_layout([clip]))
    others = [ClipShape(5, 4, 1, 3), clip, ClipShape(1, 6, 6)]
    shape = PackShape(token_budget=120, max_frames=12, max_clips=4, max_seqlen=40)
    together = rope.rotations(build_layout(others, shape))
    start = others[0].tokens
    assert torch.equal(together[start : start + clip.tokens], alone)


def test_a_frame_keeps_its_positions_when_frames_come_after_it():
    rope = VideoRoPE(16, 2.0, 100.0)
    short, long = (rope.rotations(build_layout([ClipShape(frames, 2, 3, 2)])) for frames in (2, 7))
    assert torch.equal(long[: len(short)], short)


@pytest.mark.parametrize("head_dim", [6, 9])
def test_a_head_too_narrow_or_odd_is_rejected(head_dim):
    with pytest.raises(ConfigError, match=f"must be even and >= 8, got {head_dim}"):
        VideoRoPE(head_dim, 2.0, 100.0)


def test_constants_go_to_a_device_once():
    rope, layout = VideoRoPE(16, 2.0, 100.0), build_layout([ClipShape(3, 2, 3, 2)])
    rope.rotations(layout)
    first = rope._constants(torch.device("cpu"))
    rope.rotations(layout)
    assert all(again is once for again, once in zip(rope._constants(torch.device("cpu")), first, strict=True))
    assert [part.dtype for part in first] == [torch.float32, torch.int64]
