"""Convert a set of webdataset tars to an MDS set, for pipelines that read MDS. Flowception trains on either.

    python data_prep/convert_shards.py --source SET --out FOLDER [--shard-bytes N]

The new set is complete or absent. It has the same clips in the same order with the same keys. Its shards have different
boundaries, so a run that shuffles by shards sees the clips in a different order. Needs mosaicml-streaming: ``make
setup-mds``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from flowception.errors import DataError, FlowceptionError
from flowception.shards.mds import write_mds
from flowception.shards.reader import ShardReader


def convert(source: Path, out: Path, shard_bytes: int) -> int:
    """Write ``source`` as an MDS set.

    Args:
        source: Folder of a set of tars.
        out: Folder to create.
        shard_bytes: Largest size of an MDS shard.

    Returns:
        The number of clips written.

    Raises:
        DataError: If ``out`` exists, or ``source`` is not a complete set.
    """
    if out.exists():
        raise DataError(f"{out} already exists; choose another folder or delete it")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed conversion
    partial.mkdir(parents=True)
    meta = write_mds(ShardReader(source), partial, shard_bytes)
    partial.rename(out)
    return meta.clips


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Convert a set of webdataset tars to an MDS set.")
    parser.add_argument("--source", type=Path, required=True, metavar="SET", help="folder of a set of tars")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to create")
    parser.add_argument(
        "--shard-bytes", type=int, default=2**26, metavar="N", help="largest shard size (default: 64 MiB)"
    )
    arguments = parser.parse_args()
    try:
        clips = convert(arguments.source, arguments.out, arguments.shard_bytes)
    except (FlowceptionError, OSError) as error:
        print(f"convert_shards: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {clips} clips to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
