"""What every test begins with."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws that name no generator are the same whatever ran before: other tests, in an order that xdist chooses."""
    torch.manual_seed(0)
