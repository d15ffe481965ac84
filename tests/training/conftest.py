"""What several training tests share: runs in several processes, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from distributed_worker import run_distributed  # noqa: E402

WORKER = str(HERE / "small_engine.py")


@pytest.fixture(scope="session")
def stages():
    """The small model trained by two ranks under every stage: stage (as text) to result."""
    return run_distributed(WORKER, "train_every_stage", 2, steps=10)[0]


@pytest.fixture(scope="session")
def resumes(tmp_path_factory):
    """Uninterrupted and resumed training of two ranks: (folder, name to result)."""
    folder = tmp_path_factory.mktemp("resumes")
    return folder, run_distributed(WORKER, "train_and_resume", 2, folder=str(folder))[0]
