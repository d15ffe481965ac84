"""Encode videos into shards of latents.

    python data_prep/encode_shards.py --config C [more.yaml ...] [key=value ...] [--status]

If it is killed, run the same command again: it continues at the first unfinished shard. ``unreadable.jsonl`` of the set
lists unreadable videos with the reason, and ``dropped.json`` counts pieces dropped by ``min_frames`` and
``min_motion``. The keys are in ``data_prep/encoder/config.py``. ``--status`` prints the progress of all jobs of the set
and encodes nothing. On a cluster: ``sbatch slurm/encode_shards.sh``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts import each other as data_prep.NAME


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the script's name; None for those of the process.

    Returns:
        Exit code: 0 for success, 2 for bad input.
    """
    parser = argparse.ArgumentParser(description="Encode videos into shards of latents.")
    parser.add_argument(
        "--config",
        nargs="+",
        required=True,
        metavar="C",
        help="YAML files (later ones override), then key=value overrides",
    )
    parser.add_argument("--status", action="store_true", help="print progress and exit")
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    # Imported here because decoding processes import this file again and need none of these.
    from data_prep.encoder.config import EncodeConfig
    from data_prep.encoder.encoder import ShardEncoder
    from data_prep.encoder.skipped import UNREADABLE_NAME
    from data_prep.encoder.status import read_status
    from flowception.config import load
    from flowception.errors import FlowceptionError
    from flowception.progress import show_log

    show_log()
    words = [*rest, *arguments.config]
    files = [word for word in words if "=" not in word]
    try:
        config = load(EncodeConfig, files, [word for word in words if "=" in word])
        if arguments.status:
            print(read_status(Path(config.out)).describe())
            return 0
        summary = ShardEncoder(config).run()
    except FlowceptionError as error:
        print(f"encode_shards: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{summary.clips} clips from {summary.videos} videos in {config.out}; {summary.unreadable} videos unreadable")
    for line in summary.dropped.lines():
        print(line)
    if summary.open_shards:
        print(f"{summary.open_shards} shards remain for other parts; the last part to end finishes the set")
    elif summary.unreadable:
        print(f"reasons are in {Path(config.out) / UNREADABLE_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
