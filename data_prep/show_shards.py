"""Inspect a shard set: decode some of its clips into one image, one row per clip.

    python data_prep/show_shards.py SET --num N --out FILE.png [--seed S] [--cache-dir DIR]

SET is a value of ``data.path``: a folder of tars, a folder of an MDS set, or a URL.

The clips are spread evenly over the set, or drawn at random with ``--seed``. Each row has the clip's key, length, size,
class, and caption. Long clips show frames spread over their length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowception.errors import FlowceptionError
from flowception.generation.load import codec_of
from flowception.generation.video import write_contact_sheet
from flowception.shards.open import open_set
from flowception.shards.remote_cache import CacheConfig

_CAPTION_LENGTH = 60
_KEY_LENGTH = 40


def choose_rows(clips: int, num: int, seed: int | None) -> NDArray[np.int64]:
    """Increasing rows to show: spread evenly, or drawn without replacement if a seed is given."""
    num = min(num, clips)
    if seed is None:
        return np.unique(np.linspace(0, clips - 1, num).round().astype(np.int64))
    return np.sort(np.random.default_rng(seed).choice(clips, num, replace=False)).astype(np.int64)


def show(
    path: str, num: int, out: Path, seed: int | None = None, device: str = "cpu", cache: CacheConfig | None = None
) -> list[str]:
    """Decode clips and write the image.

    Args:
        path: Folder or URL of the set.
        num: Most clips to show.
        out: Image to write.
        seed: Seed for drawing the clips; None spreads them evenly.
        device: Device of the codec.
        cache: Cache of remote shards.

    Returns:
        The rows' labels.

    Raises:
        FlowceptionError: If the set or a clip cannot be read, or its codec cannot be built.
    """
    reader = open_set(path, cache)
    codec = codec_of(reader.meta, device)
    rows = choose_rows(len(reader.index), num, seed)
    frames = reader.index.clips["frames"]
    videos = [np.asarray(codec.decode(reader.read(int(row), np.arange(int(frames[row]))))) for row in rows]
    labels = [_label(reader.read_metadata(int(row)), reader.meta.class_names) for row in rows]
    write_contact_sheet(out, videos, labels)
    return labels


def _label(about: dict[str, Any], class_names: Sequence[str]) -> str:
    label = about.get("class_label")
    named = "" if label is None else class_names[label] if label < len(class_names) else f"class {label}"
    caption = " ".join(str(about.get("caption", "")).split())
    shortened = caption if len(caption) <= _CAPTION_LENGTH else caption[: _CAPTION_LENGTH - 3] + "..."
    size = f"{about.get('pixel_frames')} x {about.get('pixel_height')} x {about.get('pixel_width')}"
    return "  ".join(part for part in (str(about.get("key"))[-_KEY_LENGTH:], size, named, shortened) if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Decode some clips of a shard set to a contact sheet.")
    parser.add_argument("set", metavar="SET", help="folder or URL of the set")
    parser.add_argument("--num", type=int, required=True, metavar="N", help="number of clips, at least 1")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="image to write")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="draw the clips at random (default: spread evenly over the set)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="device of the codec (default: %(default)s)")
    parser.add_argument(
        "--cache-dir",
        default=CacheConfig.cache_dir,
        metavar="DIR",
        help="cache for remote shards (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.num < 1 or (arguments.seed is not None and arguments.seed < 0):
        parser.error(f"--num must be >= 1 and --seed >= 0, got {arguments.num} and {arguments.seed}")
    try:
        cache = CacheConfig(cache_dir=arguments.cache_dir)
        labels = show(arguments.set, arguments.num, arguments.out, arguments.seed, arguments.device, cache)
    except (FlowceptionError, OSError, ValueError) as error:
        print(f"show_shards: error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*labels, f"wrote {arguments.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
