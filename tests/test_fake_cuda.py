"""The fake CUDA device: what it must detect, and that it does not change numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from tests.fake_cuda import DEVICE, FakeCuda, content


@pytest.fixture
def x():
    """On the CPU."""
    return torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -6.0]])


CROSSINGS = {
    "item": (lambda x: x.sum().item(), ["wait: test (_local_scalar_dense)"]),
    "float": (lambda x: float(x.sum()), ["wait: test (_local_scalar_dense)"]),
    "bool": (lambda x: bool((x > 0).any()), ["wait: test (_local_scalar_dense)"]),
    "tolist": (lambda x: x[0].tolist(), ["wait: test (_local_scalar_dense)"] * 3),
    "boolean index": (lambda x: x[x > 0], ["wait: test (index)"]),
    "nonzero": (lambda x: x.nonzero(), ["wait: test (nonzero)"]),
    "where without values": (lambda x: torch.where(x > 0), ["wait: test (nonzero)"]),
    "masked_select": (lambda x: x.masked_select(x > 0), ["wait: test (masked_select)"]),
    "equal": (lambda x: torch.equal(x, x + 1), ["wait: test (equal)"]),
    "unique": (lambda x: x.unique(), ["wait: test (_unique2)"]),
    "bincount": (lambda x: (x > 0).long().flatten().bincount(), ["wait: test (bincount)"]),
    "repeat_interleave": (lambda x: torch.repeat_interleave(x[0].long().abs()), ["wait: test (repeat_interleave)"]),
    "to the host": (lambda x: x.cpu(), ["to host: test (_to_copy)"]),
    "numbers from the host": (lambda x: torch.tensor([1.0, 2.0], device=x.device), ["to device: test (_to_copy)"]),
    "an index from the host": (lambda x: x[:, torch.tensor([2, 0])], ["to device: test (index)"]),
    "without waiting": (
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        ["to device, non_blocking: test (_to_copy)"],
    ),
    "an index": (lambda x: x[:, torch.arange(2, device=x.device)], []),
    "a size that is known": (lambda x: x[0].repeat_interleave(torch.ones_like(x[0]).long(), output_size=3), []),
    "masks that keep the shape": (lambda x: torch.where(x > 0, x, 0.0).masked_fill(x < -2, 1.0), []),
    "constants": (lambda x: torch.zeros(3, device=x.device) + 2 * torch.full((3,), 4.0, device=x.device), []),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_what_crosses_is_written_down_and_numbers_stay(x, name):
    run, expected = CROSSINGS[name]
    with FakeCuda() as cuda:
        there = x.to(DEVICE)
        cuda.crossings.clear()
        result = run(there)
    assert cuda.crossings == expected
    for ours, plain in zip(torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(run(x))):
        if isinstance(plain, torch.Tensor):
            assert ours.device == (torch.device("cpu") if name == "to the host" else DEVICE)
            ours = content(ours)
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_a_number_put_where_a_mask_is_set_is_a_fill_and_numbers_are_not(x):
    with FakeCuda() as cuda:
        there = x.to(DEVICE)
        cuda.crossings.clear()
        there[there < 0] = 0.0
        assert cuda.crossings == []
        there[there > 2] = torch.ones(2, device=DEVICE)
    assert cuda.crossings == ["wait: test (index_put_)"]
    assert content(there).tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(2, 3).mul_(x),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: x.index_select(1, torch.tensor([0])),
        lambda x: torch.where(torch.tensor([True, False, True]), x, 0.0),
        lambda x: torch.ones(2)[x[0].long().clamp(0, 1)],
    ],
)
def test_mixed_devices_raise(x, mix):
    with FakeCuda(), pytest.raises((FakeTensorDeviceMismatchError, RuntimeError), match="same device|cuda"):
        mix(x.to(DEVICE))


def test_a_view_and_its_base_stay_one(x):
    with FakeCuda():
        there = x.to(DEVICE)
        there[0].add_(10.0)
        there.t()[1].zero_()
    assert content(there).tolist() == [[11.0, 0.0, 13.0], [0.0, 0.0, -6.0]]
    assert x[0, 0] == 1.0


def test_autocast_is_that_of_cuda(x):
    with FakeCuda():
        there = x.to(DEVICE)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert (there @ there.t()).dtype == torch.bfloat16
    assert torch.autocast("cpu")._enabled


@pytest.mark.parametrize(("waits", "keeps"), [(False, True), (True, False), (True, True)])
def test_another_stream_s_tensor_is_waited_for_and_its_memory_kept(x, waits, keeps):
    with FakeCuda():
        copying, computing = torch.cuda.Stream(DEVICE), torch.cuda.current_stream(DEVICE)
        with torch.cuda.stream(copying):
            there = x.to(DEVICE, non_blocking=True)
        if waits:
            computing.wait_stream(copying)
        if keeps:
            there.record_stream(computing)
        if waits and keeps:
            assert content(there + 1).equal(x + 1)
        else:
            with pytest.raises(RuntimeError, match="waited for" if keeps else "record_stream"):
                there + 1
        with torch.cuda.stream(copying):
            assert content(there + 1).equal(x + 1)


def test_nothing_is_left_behind(x):
    with FakeCuda():
        x.to(DEVICE)
    assert torch.is_grad_enabled()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            x.to(DEVICE)
