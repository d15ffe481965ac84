"""What the package logs is seen."""

import logging

import torch

from flowception.nn.attention import choose_backend
from flowception.progress import show_log


def test_the_attention_backend_and_its_reason_are_shown_once(capsys):
    logger = logging.getLogger("flowception")
    level, handlers = logger.level, list(logger.handlers)
    choose_backend.cache_clear()
    try:
        logger.handlers.clear()
        show_log()
        show_log()
        for _ in range(2):
            choose_backend(torch.device("cpu"), torch.float32)
    finally:
        logger.handlers, logger.level = handlers, level
        choose_backend.cache_clear()
    shown = capsys.readouterr().out
    assert shown.count("attention backend: sdpa (variable-length kernels do not run on cpu") == 1
