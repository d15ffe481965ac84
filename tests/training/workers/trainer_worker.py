"""Worker side of the trainer tests: complete runs on a tiny set, many in one process group."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import torch

from flowception.checkpoint import writer
from flowception.checkpoint.format import checkpoint_dir
from flowception.checkpoint.reader import SliceReader
from flowception.errors import CheckpointError, FlowceptionError
from flowception.training.config import load_config
from flowception.training.distributed.collectives import broadcast_object, on_main
from flowception.training.distributed.launch import init_distributed
from flowception.training.signals import StopFlag
from flowception.training.trainer import train
from tests.training.workers.toy_set import write_config

_RANKS = []


class StopAfter(StopFlag):
    """Simulate a signal to only the last rank in the given step."""

    def __init__(self, steps):
        super().__init__()
        self.steps_left = steps

    @property
    def is_set(self):
        self.steps_left -= 1
        return self.steps_left < 0 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def ranks():
    if not _RANKS:
        torch.set_num_threads(1)
        _RANKS.append(init_distributed())
    return _RANKS[0]


def run(folder, name, stop_after=None, data="shards", **changes):
    """One job in ``folder/name``; what it returned, or its error, which must be every rank's."""
    here = ranks()
    path = Path(folder, f"{name}.yaml")
    on_main(here, lambda: write_config(path, Path(folder, name), Path(folder, data), **changes) and None)
    stop = StopFlag() if stop_after is None else StopAfter(stop_after)
    try:
        return train(load_config([path]), here, stop)
    except FlowceptionError as error:
        if not error.on_all_ranks:
            raise
        return f"{type(error).__name__}: {error}"


def scenarios(folder):
    result = {"whole": run(folder, "whole")}
    result["stopped"] = run(folder, "stopped", stop_after=5)
    result["changed_plan"] = run(folder, "stopped", token_budget=120)
    result["changed_model"] = run(folder, "stopped", model__hidden_size=48)
    result["changed_codec"] = run(folder, "stopped", data="other_shards")
    result["resumed"] = run(folder, "stopped", model__activation_checkpointing="auto")  # of the machine's memory
    result["finished_again"] = run(folder, "stopped")
    result["locked"] = run(folder, "locked")
    result["init_from"] = run(folder, "init_from", init_from=str(Path(folder, "whole")), max_steps=1)
    result["init_from_nothing"] = run(folder, "nothing", init_from=str(Path(folder, "nowhere")), max_steps=1)
    result["init_from_codec"] = run(
        folder, "other_codec", data="other_shards", init_from=str(Path(folder, "whole")), max_steps=1
    )
    result["too_few_packs"] = run(folder, "few", packs_per_step=1)
    result["checkpointing"], result["said_checkpointing"] = run_and_listen(
        folder, "checkpointing", max_steps=3, model__activation_checkpointing="auto", memory_gib=1e-3
    )
    result["stage_2"] = run(folder, "stage_2", max_steps=6, zero__stage=2)
    result["bf16"] = run(folder, "bf16", max_steps=3, precision="bf16")
    result["workers"] = run(folder, "workers", max_steps=6, data__num_workers=1)
    result["bad_clip"] = run(folder, "bad_clip", data="bad_shards", max_steps=8)
    result["text"], result["said_text"] = run_and_listen(folder, "text", data="text_shards", max_steps=1)
    return result


def troubles(folder):
    """Runs with bad storage, beside those of ``scenarios``."""
    result = {}
    result["full_disk"], result["said_full_disk"] = run_with_full_disk(folder, 4, "full_disk", max_steps=8)
    result["full_at_stop"], result["said_full_at_stop"] = run_with_full_disk(folder, 2, "full_at_end", stop_after=1)
    result["full_at_end"], _ = run_with_full_disk(folder, 3, "full_at_end", max_steps=3)
    result["bad_last_step"] = run(folder, "bad_last_step", data="last_shards", max_steps=8)
    result["one_bad_clip_too_many"] = run(folder, "too_many", data="bad_shards", max_steps=8, data__max_bad_clips=0)
    result["dead_storage"] = run(folder, "dead_storage", data="dead_shards", data__max_bad_clips=None)
    result["unreadable_on_rank_1"] = run_with_a_bad_mount(folder)
    on_main(ranks(), lambda: copy_with_newest_damaged(Path(folder, "whole"), Path(folder, "damaged")))
    result["damaged"] = run(folder, "damaged", max_steps=10, checkpoint__keep_last=2)
    result["beyond"], result["said_beyond"] = run_and_listen(folder, "damaged", max_steps=9)
    return result


def run_and_listen(folder, name, stop_after=None, **changes):
    """What a job returned, and what rank 0 printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        returned = run(folder, name, stop_after, **changes)
    return returned, broadcast_object(said.getvalue())


def copy_with_newest_damaged(source, target):
    shutil.copytree(source, target)
    path = checkpoint_dir(target, 12) / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def run_with_a_bad_mount(folder):
    """Rank 1 verifies the run's checkpoint, and then cannot read its weights."""
    real = SliceReader.read

    def read(reader, kind, name, start=0, stop=None):
        if os.environ["RANK"] == "1":
            raise CheckpointError("the mount is gone")
        return real(reader, kind, name, start, stop)

    SliceReader.read = read
    try:
        return run(folder, "stopped")
    finally:
        SliceReader.read = real


def run_with_full_disk(folder, step, name, **changes):
    """Rank 1 cannot write its part of the checkpoint of a step, and none can be removed."""
    real, real_prune = writer.write_slices, writer.prune

    def prune(*arguments):
        raise PermissionError(13, "Permission denied")

    def write_slices(target, rank, *arguments):
        if rank == 1 and target.name.startswith(f"step_{step:08d}"):
            raise OSError(28, "No space left on device")
        real(target, rank, *arguments)

    writer.write_slices, writer.prune = write_slices, prune
    try:
        return run_and_listen(folder, name, **changes)
    finally:
        writer.write_slices, writer.prune = real, real_prune


def one_run(folder, name, **changes):
    return run(folder, name, **changes)
