"""Insertion schedules against autograd, their own inverse and numerical integrals."""

import pytest
import torch

from flowception.errors import ConfigError
from flowception.flow.schedule import CosineSchedule, LinearSchedule, PowerSchedule, build_schedule

SCHEDULES = [LinearSchedule(), PowerSchedule(0.5), PowerSchedule(2.0), PowerSchedule(3.0), CosineSchedule()]
INSIDE = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{type(s).__name__}{getattr(s, 'exponent', '')}")
def schedule(request):
    return request.param


def test_runs_from_zero_to_one_and_increases(schedule):
    ends = schedule.kappa(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [0.0, 1.0]
    assert (schedule.kappa(INSIDE).diff() > 0).all()


def test_derivative_is_that_of_autograd(schedule):
    t = INSIDE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.kappa(t).sum(), t) if not isinstance(schedule, LinearSchedule) else (None,)
    expected = torch.ones_like(INSIDE) if slope is None else slope
    torch.testing.assert_close(schedule.kappa_dot(INSIDE), expected)


def test_inverse_undoes_kappa(schedule):
    torch.testing.assert_close(schedule.inverse(schedule.kappa(INSIDE)), INSIDE)
    torch.testing.assert_close(schedule.kappa(schedule.inverse(INSIDE)), INSIDE)
    assert schedule.inverse(torch.zeros(1, dtype=torch.float64)) == 0


def test_hazard_is_minus_the_slope_of_log_survival(schedule):
    t = INSIDE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(-torch.log(1 - schedule.kappa(t)).sum(), t)
    torch.testing.assert_close(schedule.hazard(INSIDE), slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hazard_is_infinite_from_one_on_and_positive_before(schedule, dtype):
    before = torch.nextafter(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype))
    hazard = schedule.hazard(torch.cat([before, torch.tensor([1.0, 1.5], dtype=dtype)]))
    assert hazard.dtype == dtype
    assert hazard[0] > 1e5
    assert hazard[1:].tolist() == [float("inf")] * 2


def test_cosine_hazard_keeps_its_digits_near_one_in_float32():
    t = torch.tensor([0.0, 0.3, 0.9, 1 - 2.0**-20, 1 - 2.0**-24])
    torch.testing.assert_close(
        CosineSchedule().hazard(t).double(), CosineSchedule().hazard(t.double()), rtol=1e-6, atol=0
    )


def test_means_are_the_integrals(schedule):
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    kappa = schedule.kappa(grid)
    assert schedule.mean() == pytest.approx(kappa.mean().item(), abs=1e-6)
    assert schedule.mean_square() == pytest.approx(kappa.square().mean().item(), abs=1e-6)


@pytest.mark.parametrize("num_steps", [1, 7, 10, 25, 50])
def test_appearance_probabilities_multiply_to_survival(schedule, num_steps):
    survival = 1.0
    for step in range(num_steps - 1):
        survival *= 1 - schedule.appearance_probability(step, num_steps)
        clock = torch.tensor((step + 1) / num_steps, dtype=torch.float64)
        assert survival == pytest.approx(1 - schedule.kappa(clock).item(), abs=1e-12)
    assert schedule.appearance_probability(num_steps - 1, num_steps) == 1.0


def test_build_schedule():
    assert isinstance(build_schedule("linear"), LinearSchedule)
    assert isinstance(build_schedule("cosine"), CosineSchedule)
    assert build_schedule("power", 3.0).exponent == 3.0
    with pytest.raises(ConfigError, match="insertion_schedule must be one of linear.*'sqrt'"):
        build_schedule("sqrt")
    with pytest.raises(ConfigError, match="-1"):
        build_schedule("power", -1.0)
    with pytest.raises(ValueError, match="50"):
        LinearSchedule().appearance_probability(50, 50)
