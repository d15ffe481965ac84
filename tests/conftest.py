"""What every test begins with."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws that name no generator, and the number of threads, are the same whatever ran before.

    Other tests did, in an order that xdist chooses; some run programs that set threads for a whole process. Two threads
    that wait for each other on a busy machine make small tensors ten times slower.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
