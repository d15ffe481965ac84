"""RealEstate10K (Zhou et al.): camera trajectories over parts of YouTube videos.

    SOURCE/train/0000cc6d8b108390.txt ...    the video's URL, then one line per frame: microseconds and 18 numbers
    SOURCE/videos/5dRiJkvg2B0.mp4 ...        the videos, named by YouTube id (any video suffix)

``split`` is ``train`` (default) or ``test``. A clip is the part of its video from the first to the last frame of its
trajectory. There are no captions and no classes. Columns for filters: ``frames`` and ``seconds``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from data_prep.encoder.manifests.rows import VIDEO_SUFFIXES, SourceRows, files_below, read_text, require_path
from flowception.errors import DataError

FORMAT = "realestate10k"
_NUMBERS_PER_LINE = 19
_LAST_FRAME_S = 1e-3
"""Added to the last frame's time for the end of a clip, so that the frame is included."""


def read(source: Path, split: str | None) -> SourceRows:
    """Read one split.

    Raises:
        DataError: If the layout or a trajectory differs from the format.
    """
    split = split or "train"
    folder = require_path(source / split, FORMAT, "a folder of trajectories, one .txt per clip")
    videos = require_path(source / "videos", FORMAT, "a folder of videos named by YouTube id")
    path_of = {
        Path(name).stem: path for name, path in files_below(videos).items() if name.lower().endswith(VIDEO_SUFFIXES)
    }
    rows: list[dict[str, Any]] = []
    missing = []
    for trajectory in sorted(folder.glob("*.txt")):
        video, times = _read_trajectory(trajectory)
        if video not in path_of:
            missing.append(f"{split}/{trajectory.name} (video {video})")
            continue
        start, end = times[0] / 1e6, times[-1] / 1e6
        seconds = {"start_s": start, "end_s": end + _LAST_FRAME_S, "frames": len(times), "seconds": end - start}
        rows.append({"path": f"videos/{path_of[video]}", "key": f"{split}-{trajectory.stem}", **seconds})
    if not rows and not missing:
        raise DataError(f"source_format {FORMAT}: {folder} has no .txt files; expected one trajectory per clip")
    return SourceRows(rows, source, missing)


def _read_trajectory(path: Path) -> tuple[str, list[int]]:
    """YouTube id, and times of the frames in microseconds."""
    lines = read_text(path).splitlines()
    url = urlparse(lines[0].strip()) if lines else urlparse("")
    video = parse_qs(url.query).get("v", [url.path.rsplit("/", 1)[-1]])[0]
    times = []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        if not words:
            continue
        if len(words) != _NUMBERS_PER_LINE or not words[0].isdigit():
            raise DataError(f"{path}, line {number} must be microseconds and 18 numbers, got {len(words)} words")
        times.append(int(words[0]))
    if not video or not times or any(b <= a for a, b in zip(times, times[1:])):
        raise DataError(f"{path} must have a YouTube URL and frames at increasing times, got {len(times)} frames")
    return video, times
