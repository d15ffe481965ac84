"""What every test begins with."""

import logging

import pytest
import torch

from flowception.progress import show_log


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws that name no generator, and the number of threads, are the same whatever ran before.

    Other tests did, in an order that xdist chooses; some run programs that set threads for a whole process. Two threads
    that wait for each other on a busy machine make small tensors ten times slower.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _log_as_before():
    """A command that a test runs in this process may have put the package's log on the console."""
    loggers = [logging.getLogger(name) for name in ("flowception", "data_prep")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture
def console(capsys):
    """What is printed, the package's log with it."""
    show_log()
    return capsys
