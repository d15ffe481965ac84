"""Table rows by token: their runs of tokens, and gradients summed over runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowception.nn.rows import Rows, clip_rows, frame_rows, sum_runs, take_rows
from flowception.packing.layout import ClipShape, PackShape, TokenKind, build_layout

PACKS = {
    "tight": ([ClipShape(2, 1, 2, 3), ClipShape(1, 2, 2, 1), ClipShape(3, 1, 1, 2)], None),
    "padded": (
        [ClipShape(2, 1, 2, 3), ClipShape(1, 2, 2), ClipShape(3, 1, 1, 2)],
        PackShape(token_budget=40, max_frames=9, max_clips=5, max_seqlen=12),
    ),
    "without text": ([ClipShape(2, 1, 2), ClipShape(1, 2, 2)], None),
    "all padding": ([], PackShape(token_budget=10, max_frames=3, max_clips=2, max_seqlen=4)),
}


@pytest.fixture(params=PACKS)
def layout(request):
    return build_layout(*PACKS[request.param])


def members(rows: Rows) -> list[list[int]]:
    """Tokens of each row's run."""
    offsets = rows.offsets.tolist()
    return [list(range(offsets[run], offsets[run + 1])) for run in rows.run_of_row.tolist()]


@pytest.mark.parametrize("with_text", [True, False])
def test_a_run_holds_the_tokens_that_take_its_row(layout, with_text):
    rows, kinds, frames = frame_rows(layout, with_text=with_text), layout.token_kind.tolist(), len(layout.frame_clip)
    counted = [TokenKind.LATENT, TokenKind.INSERTION] + [TokenKind.TEXT] * with_text
    expected = [[] for _ in range(frames + with_text * len(layout.clip_frames))]
    for token, (row, kind) in enumerate(zip(rows.row.tolist(), kinds, strict=True)):
        if kind in counted:
            expected[row].append(token)
            own = frames + layout.token_clip[token] if kind == TokenKind.TEXT else layout.token_frame[token]
            assert row == own
    assert members(rows) == expected
    assert rows.offsets.tolist() == sorted(rows.offsets.tolist())


def test_a_run_of_frames_is_a_clip(layout):
    rows = clip_rows(layout)
    frame_clip, valid = layout.frame_clip.tolist(), layout.frame_valid.tolist()
    expected = [
        [f for f in range(len(valid)) if valid[f] and frame_clip[f] == clip] for clip in range(len(members(rows)))
    ]
    assert members(rows) == expected
    assert torch.equal(rows.row, layout.frame_clip)


def weighted(layout, rows):
    """A table, and weights of its tokens that are zero for padding and for text that takes no row."""
    table = torch.randn(len(rows.run_of_row), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(rows.row), 3, dtype=torch.float64)
    for token in set(range(len(weight))) - {token for tokens in members(rows) for token in tokens}:
        weight[token] = 0.0
    return table, weight


@pytest.mark.parametrize("with_text", [True, False])
def test_gradient_of_take_rows_is_that_of_indexing_and_the_sum_over_runs(layout, with_text):
    rows = frame_rows(layout, with_text=with_text)
    table, weight = weighted(layout, rows)
    (ours,) = torch.autograd.grad((take_rows(table, rows) * weight).sum(), table)
    (expected,) = torch.autograd.grad((table[rows.row] * weight).sum(), table)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    by_runs = sum_runs(weight, rows.offsets).index_select(0, rows.run_of_row)  # as on CUDA
    torch.testing.assert_close(by_runs, expected, rtol=1e-6, atol=1e-6)


class Additions(TorchDispatchMode):
    """Notes the dtype of every sum by index (a CPU is exact in bfloat16 too, a GPU's atomic sum stops at 256)."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index_add_.default:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_gradients_are_added_up_in_float32():
    table = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = Rows(torch.zeros(1000, dtype=torch.int64), torch.tensor([0, 1000]), torch.tensor([0]))
    taken = take_rows(table, rows)
    with Additions() as additions:
        (gradient,) = torch.autograd.grad(taken.sum(), table)
    assert additions.dtypes == [torch.float32]
    assert gradient.dtype == torch.bfloat16
    assert gradient.item() == 1000.0
