"""Fixtures shared by several training tests: runs in several processes, made once."""

from __future__ import annotations

import pytest

from tests.distributed_worker import run_distributed

WORKER = "tests.training.workers.small_engine"


@pytest.fixture(scope="session")
def stages():
    """The small model trained by two ranks at every stage: stage (as text) to result."""
    return run_distributed(WORKER, "train_every_stage", 2, steps=10)[0]


@pytest.fixture(scope="session")
def resumes(tmp_path_factory):
    """Uninterrupted and resumed training of two ranks: (folder, name to result)."""
    folder = tmp_path_factory.mktemp("resumes")
    return folder, run_distributed(WORKER, "train_and_resume", 2, folder=str(folder))[0]
