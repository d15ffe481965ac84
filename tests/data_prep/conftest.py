"""Shared by the tests of the data_prep scripts, which are outside the package."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    from data_prep.make_toy import make_toy

    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder, clips=12, seed=3)
    return folder


@pytest.fixture
def write_counting_video():
    """Write a video whose frame k has gray level 8 k + 16, so that the level identifies the frame."""
    from flowception.codecs.video_file import write_video

    def write(path, frames, *, fps=10.0, height=16, width=16):
        levels = (np.arange(frames) * 8 + 16).astype(np.uint8)
        write_video(path, np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)), fps=fps)
        return path

    return write


@pytest.fixture
def frame_numbers():
    """Frame numbers of a counting video that a clip shows."""

    def read(frames):
        return np.round((np.asarray(frames, dtype=float).mean(axis=(1, 2, 3)) - 16) / 8).astype(int).tolist()

    return read
