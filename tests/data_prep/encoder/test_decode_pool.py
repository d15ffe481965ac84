import multiprocessing
import os
import time
from pathlib import Path

import pytest

from data_prep.encoder import decode_pool
from data_prep.encoder.clip_cutter import CutSettings, cut_video
from data_prep.encoder.decode_pool import CRASHED, HUNG, decode_videos
from flowception.errors import DataError

CRASHING_DECODER = """
import os
from flowception.errors import DataError
def decode(path, settings):
    if path.name == "killer":
        os._exit(11)
    if path.name == "broken":
        raise DataError("cannot read it")
    return [path.name]
"""

HANGING_DECODER = """
import os, threading
def decode(path, settings):
    if path.name == "hanger":
        (path.parent / f"{os.getpid()}.hanging").touch()
        threading.Event().wait()
    return [path.name]
"""


def test_without_workers(tmp_path, write_counting_video):
    good, bad = write_counting_video(tmp_path / "a.mp4", 2), tmp_path / "missing.mp4"
    found = list(decode_videos([(path, CutSettings()) for path in (bad, good, bad)], 0))
    assert "missing.mp4" in found[0]
    assert len(found[1].clips[0].frames) == 2
    assert isinstance(found[2], str)


def test_a_video_that_crashes_its_decoder_affects_no_other(tmp_path, monkeypatch):
    (tmp_path / "crashing_decoder.py").write_text(CRASHING_DECODER)
    monkeypatch.syspath_prepend(str(tmp_path))
    from crashing_decoder import decode

    names = ["a", "killer", "broken", "b", "c"]
    found = list(decode_videos([(Path(name), CutSettings()) for name in names], 2, decode))
    assert found == [["a"], f"killer: {CRASHED}", "cannot read it", ["b"], ["c"]]


def test_a_video_that_hangs_its_decoder_is_listed_and_the_decoder_killed(tmp_path, monkeypatch):
    """The second wait ends once the decoder hangs, as if it had timed out; the other waits need no timeout."""
    (tmp_path / "hanging_decoder.py").write_text(HANGING_DECODER)
    monkeypatch.syspath_prepend(str(tmp_path))
    from hanging_decoder import decode

    wait_for, timeouts = decode_pool.wait_for, []

    def wait(futures, timeout):
        timeouts.append(timeout)
        if len(timeouts) != 2:
            wait_for(futures)
            return
        while not list(tmp_path.glob("*.hanging")):
            time.sleep(0.01)

    monkeypatch.setattr(decode_pool, "wait_for", wait)
    videos = [(tmp_path / name, CutSettings()) for name in ("a", "hanger", "b", "c")]
    found = list(decode_videos(videos, 2, decode, timeout_s=1234.0))
    assert found == [["a"], f"{tmp_path / 'hanger'}: {HUNG}", ["b"], ["c"]]
    assert timeouts == [1234.0] * 4
    (hanging,) = tmp_path.glob("*.hanging")
    while int(hanging.stem) in [process.pid for process in multiprocessing.active_children()]:
        time.sleep(0.01)


def test_other_errors_are_not_swallowed():
    def bug(path, settings):
        raise RuntimeError("a bug, not a bad video")

    with pytest.raises(RuntimeError, match="a bug"):
        list(decode_videos([(Path(os.devnull), CutSettings())], 0, bug))
    with pytest.raises(DataError):
        cut_video(Path(os.devnull), CutSettings())
