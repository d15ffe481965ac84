"""Check a shard set: read every clip, verify every checksum, and summarize the set.

    python data_prep/check_shards.py SET [--num-workers N] [--clips-per-pack K] [--cache-dir DIR]

SET is a value of ``data.path``: a folder of tars, a folder of an MDS set, or a URL.

Opening the set checks its description, the hash of the index, its keys, and the size of every shard. Then every clip's
headers, metadata, text, and latent frames are read and compared with their checksums and the index, and numbers must be
finite. The exit code is 1 if the set cannot be opened or a clip is bad, and 2 if the check itself fails, for example
because the disk of the cache is full.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from flowception.errors import DataError, FlowceptionError
from flowception.generation.load import codec_of
from flowception.progress import Progress
from flowception.shards.mds import MdsReader
from flowception.shards.open import open_set
from flowception.shards.reader import ShardReader
from flowception.shards.remote_cache import CacheConfig
from flowception.shards.schema import NO_CLASS

_CHUNK_CLIPS = 64
_BUDGET_STEP = 256
_VISIBLE_SHARE = 0.75
"""Mean fraction of visible frames of a clip when the clock is uniform on [0, 2] under the linear schedule."""
_SHOWN = 20


def check_clip(reader: ShardReader | MdsReader, row: int) -> str | None:
    """Reason why a clip is bad; None if it is good."""
    clip = reader.index.clips[row]
    try:
        about, text = reader.read_metadata(row), reader.read_text(row)
        latents = reader.read(row, np.arange(int(clip["frames"])))
    except DataError as error:
        return str(error)
    label = NO_CLASS if about.get("class_label") is None else about["class_label"]
    tokens = 0 if text is None else len(text)
    facts = {
        "key": (about.get("key"), reader.index.key(row)),
        "latents_shape": (about.get("latents_shape"), list(latents.shape)),
        "text tokens": ((about.get("text_shape") or [0])[0], tokens),
        "class_label": (label, int(clip["class_label"])),
    }
    for name, (listed, found) in facts.items():
        if listed != found:
            return f"clip {reader.index.key(row)}: {name} is {listed} in its metadata but {found} in the index and data"
    for name, values in (("latents", latents), ("text", text)):
        if values is not None and not bool(torch.isfinite(values).all()):
            return f"clip {reader.index.key(row)}: {name} must be finite, got NaN or infinity"
    return None


def _check_rows(path: str, cache: CacheConfig, rows: NDArray[np.int64]) -> list[tuple[int, str]]:
    reader = _reader(path, cache)
    found = ((int(row), check_clip(reader, int(row))) for row in rows)
    return [(row, reason) for row, reason in found if reason is not None]


_READERS: dict[str, ShardReader | MdsReader] = {}


def _reader(path: str, cache: CacheConfig) -> ShardReader | MdsReader:
    """The reader of this process, cached because opening a set of millions of clips takes seconds."""
    if path not in _READERS:
        _READERS[path] = open_set(path, cache)
    return _READERS[path]


def find_bad_clips(path: str, cache: CacheConfig, clips: int, num_workers: int) -> Iterator[tuple[int, str]]:
    """Check every clip.

    Args:
        path: Folder or URL of the set.
        cache: Cache of remote shards.
        clips: Number of clips in the set.
        num_workers: Reader processes; 0 reads in this process.

    Yields:
        Row and reason of each bad clip.
    """
    chunks = [np.arange(first, min(first + _CHUNK_CLIPS, clips)) for first in range(0, clips, _CHUNK_CLIPS)]
    check = partial(_check_rows, path, cache)
    with Progress(clips, "reading clips") as progress:
        if num_workers == 0:
            for chunk in chunks:
                yield from check(chunk)
                progress.advance(len(chunk))
        else:
            with ProcessPoolExecutor(num_workers) as pool:
                for chunk, bad in zip(chunks, pool.map(check, chunks)):
                    yield from bad
                    progress.advance(len(chunk))


def suggested_token_budget(reader: ShardReader | MdsReader, clips_per_pack: int) -> tuple[int, int]:
    """The token budget for packs of ``clips_per_pack`` clips on average, and the smallest that fits the longest clip.

    A clip counts its text and about 3/4 of its frames (``insertion_share`` 0.5, linear schedule, few start frames).
    """
    clips, null_text = reader.index.clips, reader.null_text
    text = np.maximum(clips["text_tokens"].astype(np.int64), 0 if null_text is None else len(null_text))
    frames = clips["frames"].astype(np.int64) * reader.index.tokens_per_frame
    mean = float((text + _VISIBLE_SHARE * frames).mean())
    least = int((text + frames).max())
    wanted = max(clips_per_pack * mean, least)
    return int(np.ceil(wanted / _BUDGET_STEP)) * _BUDGET_STEP, least


def describe(reader: ShardReader | MdsReader, clips_per_pack: int) -> str:
    """A summary of a set, for people."""
    meta, clips = reader.meta, reader.index.clips
    size = sum(shard.size_bytes for shard in meta.shards)
    lines = [
        f"{reader.folder}: {len(clips)} clips, {meta.latent_frames} latent frames, {len(meta.shards)} shards, "
        f"{size / 1e9:.3f} GB",
        f"codec {meta.codec}, {meta.latent_channels} channels, fingerprint {meta.codec_fingerprint[:16]}: "
        + _codec_state(reader),
    ]
    if meta.text_width is None:
        lines.append("text: none")
    else:
        null_text = reader.null_text
        lines.append(
            f"text: width {meta.text_width}, {_spread(clips['text_tokens'])} tokens per clip, "
            f"null text of {0 if null_text is None else len(null_text)}"
        )
    labels = Counter(clips["class_label"].tolist())
    unlabeled = labels.pop(NO_CLASS, 0)
    lines.append(f"classes: {len(labels)}; {unlabeled} clips without a class")
    lines.append("latent grid (rows x columns), tokens per frame, clips:")
    lines += [f"  {g['height']} x {g['width']}  {g['tokens']}  {g['clips']}" for g in meta.tokens_per_frame]
    lines.append("latent frames, clips:")
    lengths = sorted(Counter(clips["frames"].tolist()).items())
    most = max(count for _, count in lengths)
    lines += [f"  {frames:>4} {count:>8} {'#' * max(1, round(40 * count / most))}" for frames, count in lengths]
    budget, least = suggested_token_budget(reader, clips_per_pack)
    lines.append(f"token_budget: {budget} for about {clips_per_pack} clips per pack; the longest clip needs {least}")
    return "\n".join(lines)


def _codec_state(reader: ShardReader | MdsReader) -> str:
    """Whether the codec that made the set can be rebuilt here."""
    try:
        codec_of(reader.meta)
    except FlowceptionError as error:
        return f"cannot be rebuilt here ({error})"
    return "rebuilt here with the same fingerprint"


def _spread(values: NDArray[np.uint32]) -> str:
    return f"{int(values.min())} to {int(values.max())} (mean {float(values.mean()):.1f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Verify every clip of a shard set and summarize the set.")
    parser.add_argument("set", metavar="SET", help="folder or URL of the set")
    parser.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="reader processes (default: %(default)s)"
    )
    parser.add_argument(
        "--clips-per-pack",
        type=int,
        default=16,
        metavar="K",
        help="mean clips per pack for the suggested token budget (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-dir",
        default=CacheConfig.cache_dir,
        metavar="DIR",
        help="cache for remote shards (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.num_workers < 0 or arguments.clips_per_pack < 1:
        parser.error(
            f"--num-workers must be >= 0 and --clips-per-pack >= 1, got {arguments.num_workers} and "
            f"{arguments.clips_per_pack}"
        )
    cache = CacheConfig(cache_dir=arguments.cache_dir)
    try:
        reader = open_set(arguments.set, cache)
        print(describe(reader, arguments.clips_per_pack), flush=True)
        bad = list(find_bad_clips(arguments.set, cache, len(reader.index), arguments.num_workers))
    except DataError as error:
        print(f"BAD SET: {error}", file=sys.stderr)
        return 1
    except FlowceptionError as error:
        print(f"check_shards: error: {error}", file=sys.stderr)
        return 2
    for row, reason in bad[:_SHOWN]:
        print(f"BAD {reader.index.key(row)}: {reason}")
    if len(bad) > _SHOWN:
        print(f"and {len(bad) - _SHOWN} more")
    print(f"{len(reader.index) - len(bad)} of {len(reader.index)} clips are good, {len(bad)} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
