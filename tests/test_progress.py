"""The package's log is shown: all of it on rank 0, and rank-specific lines on other ranks."""

import logging

import pytest
import torch

from flowception.nn.attention import choose_backend
from flowception.progress import EVERY_RANK, show_log

logger = logging.getLogger("flowception.some.module")


def test_the_attention_backend_and_its_reason_are_shown_once(capsys):
    choose_backend.cache_clear()
    try:
        show_log()
        show_log()
        for _ in range(2):
            choose_backend(torch.device("cpu"), torch.float32)
    finally:
        choose_backend.cache_clear()
    shown = capsys.readouterr().out
    assert shown.count("attention backend: sdpa (variable-length kernels do not run on cpu") == 1


@pytest.mark.parametrize(
    ("rank", "shown"),
    [
        (0, ["told", "WARNING: worse", "told by this rank", "WARNING: worse here", "ERROR: worst"]),
        (3, ["told by this rank", "WARNING: worse here", "ERROR: worst"]),
    ],
)
def test_a_rank_prints_its_own_lines_and_rank_0_everything(rank, shown, capsys):
    show_log(rank)
    logger.debug("not even on rank 0")
    logger.info("told")
    logger.warning("worse")
    logger.info("told by %s", "this rank", extra=EVERY_RANK)
    logger.warning("worse here", extra=EVERY_RANK)
    logger.error("worst")
    printed = capsys.readouterr()
    assert printed.out.splitlines() == shown
    assert printed.err == ""


def test_a_log_can_be_kept_out_of_a_commands_output(capsys):
    show_log()
    show_log(stream="stderr")
    logger.warning("worse")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "WARNING: worse\n")


def test_a_package_that_configures_the_root_logger_repeats_no_line(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()])
    show_log()
    logger.warning("worse")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("WARNING: worse\n", "")
