"""What every test begins with."""

import sys
from pathlib import Path

import pytest
import torch

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # for fake_cuda
    sys.path.insert(0, HERE)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws that name no generator are the same whatever ran before: other tests, in an order that xdist chooses."""
    torch.manual_seed(0)
