"""Noising, targets and the time shift."""

import pytest
import torch

from flowception.flow.path import interpolate, shift_time, velocity_target


def test_the_target_is_the_slope_of_the_path():
    x_0, x_1 = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda time: interpolate(x_0, x_1, time), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(velocity_target(x_0, x_1), slope)


def test_ends_of_the_path():
    x_0, x_1 = torch.randn(2, 4, 3)
    assert torch.equal(interpolate(x_0, x_1, torch.zeros(4)), x_0)
    assert torch.equal(interpolate(x_0, x_1, torch.ones(4)), x_1)
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
        interpolate(x_0, x_1[:, :2], torch.ones(4))


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_shift(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_time(t, shift)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert shifted[50].item() == pytest.approx(1 / (1 + shift))
    # The odds t / (1 - t) shrink by s.
    torch.testing.assert_close(shifted[1:-1] / (1 - shifted[1:-1]) * shift, t[1:-1] / (1 - t[1:-1]))
