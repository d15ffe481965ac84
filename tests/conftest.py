"""What every test begins with."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for what tests of several packages share


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws that name no generator are the same whatever ran before: other tests, in an order that xdist chooses."""
    torch.manual_seed(0)
