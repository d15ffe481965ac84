"""Worker side of the guard tests: runs where some clips poison the loss or the gradient."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial

import torch

from flowception.data.pack import Pack
from flowception.errors import DataError
from flowception.shards.reader import ShardReader
from flowception.training import step, trainer
from flowception.training.trainer import Trainer
from tests.training.workers import trainer_worker

run = partial(trainer_worker.run, model__num_layers=1)
"""One block, because guards do not depend on the number of blocks, but DeepSpeed's time does."""
HARMS = {  # what a poisonous clip adds to its pack's velocity loss, and what it multiplies the gradient by
    "loss": (math.nan, 1.0),
    "gradient": (0.0, math.nan),
    "spike": (0.0, 1e6),
    "both": (math.nan, math.nan),
}


class Harm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, added, factor):
        ctx.factor = factor
        return loss + added

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None, None


@contextmanager
def poisoned(keys, harm):
    """Corrupt every pack with one of these clips, unless the clip is padding."""
    keys, real_to, real_loss, packs = set(keys), Pack.to, step.velocity_loss_sum, []

    def to(pack, *arguments, **options):
        packs.append(pack)
        return real_to(pack, *arguments, **options)

    def velocity_loss_sum(*arguments):
        loss, pack = real_loss(*arguments), packs[-1]
        return Harm.apply(loss, *HARMS[harm]) if keys & set(pack.keys) - {bad.key for bad in pack.bad_clips} else loss

    Pack.to, step.velocity_loss_sum = to, velocity_loss_sum
    try:
        yield
    finally:
        Pack.to, step.velocity_loss_sum = real_to, real_loss


@contextmanager
def unreadable(keys):
    """Make these clips unreadable, however many a step has."""
    keys, real_read, real_note = set(keys), ShardReader.read_clip, trainer.note_bad_clips

    def read_clip(reader, row, frames):
        if reader.index.key(row) in keys:
            raise DataError("unreadable")
        return real_read(reader, row, frames)

    def note_bad_clips(state, batch, config):
        state.quarantine.update((key, "unreadable") for key in keys)

    ShardReader.read_clip, trainer.note_bad_clips = read_clip, note_bad_clips
    try:
        yield
    finally:
        ShardReader.read_clip, trainer.note_bad_clips = real_read, real_note


class Killed(Exception):
    pass


@contextmanager
def killed_after_rollback():
    """Kill the job right after its rollback."""
    real = Trainer._roll_back

    def roll_back(running, metrics):
        real(running, metrics)
        raise Killed

    Trainer._roll_back = roll_back
    try:
        yield
    except Killed:
        pass
    finally:
        Trainer._roll_back = real


ROLLS_BACK = {"guard__max_skipped_in_a_row": 3, "checkpoint__save_every_steps": 3}


def scenarios(folder, in_a_row, clips_in_a_row, rank_1):
    """All arguments except the folder are keys of clips."""
    result = {}
    with poisoned(in_a_row, "both"):
        result["rolled"] = run(folder, "rolled", **ROLLS_BACK)
    with unreadable(clips_in_a_row):
        result["oracle"] = run(folder, "oracle", **ROLLS_BACK)
    result |= harms(folder, rank_1, [(3, "fp32")])
    with poisoned(rank_1, "spike"):
        result["spike_stopped"] = run(folder, "spike_stopped", stop_after=1, **ONE_STEP)
        result["spike_resumed"] = run(folder, "spike_stopped", **ONE_STEP)
    return result


def hard_rollbacks(folder, in_a_row, hopeless, twice):
    """Rollbacks of runs that are stopped, killed, or poisoned again; all arguments but the folder are keys of clips."""
    result = {}
    with poisoned(in_a_row, "both"):
        result["stopped"] = run(folder, "stopped", stop_after=6, **ROLLS_BACK)
        result["resumed"] = run(folder, "stopped", **ROLLS_BACK)
        with killed_after_rollback():
            run(folder, "killed", **ROLLS_BACK)
        frequent = {"checkpoint__save_every_steps": 1, "checkpoint__keep_last": 2}
        result["tight"] = run(folder, "tight", **ROLLS_BACK | frequent)
    result["after_the_kill"] = run(folder, "killed", **ROLLS_BACK)
    after_two = ROLLS_BACK | {"guard__max_skipped_in_a_row": 2, "guard__max_rollbacks": 1}
    with poisoned(hopeless, "both"):
        result["hopeless"] = run(folder, "hopeless", **after_two)
    with poisoned(twice, "both"):
        result["twice"] = run(folder, "twice", **after_two)
    return result


ONE_STEP = {"max_steps": 5, "checkpoint__save_every_steps": 1, "checkpoint__keep_last": None}
ONE_STEP |= {"guard__spike_memory_steps": 2, "validation__every_steps": None, "guard__max_skipped_in_a_row": None}


def harms(folder, rank_1, settings):
    """One poisoned step for each harm and each (stage, precision)."""
    result = {}
    for stage, precision in settings:
        for harm in ("loss", "gradient", "spike"):
            name = f"{harm}-{stage}-{precision}"
            with poisoned(rank_1, harm):
                result[name] = run(folder, name, zero__stage=stage, precision=precision, **ONE_STEP)
    return result
