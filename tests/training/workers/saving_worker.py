"""Worker side of the saving tests: a small model saved by two ranks while things go wrong."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch

from flowception.checkpoint import writer
from flowception.checkpoint.format import checkpoints_dir, list_steps
from flowception.training import checkpointer
from flowception.training.checkpointer import HostCopy, Saver
from flowception.training.distributed.collectives import gather_values
from flowception.training.resume import CheckpointConfig
from tests.training.workers.small_engine import make_engine, train

RANK = int(os.environ.get("RANK", 0))
PRINTED = io.StringIO()
checkpointer._PIECE_ELEMENTS = 64  # many buffers, and vectors longer than one


@contextmanager
def changed(owner, name, new):
    """``owner.name`` calls ``new(real, ...)``."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *arguments: new(real, *arguments))
    try:
        yield
    finally:
        setattr(owner, name, real)


def full(real, *arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def only_rank(rank, new):
    return lambda real, *arguments: new(real, *arguments) if rank == RANK else real(*arguments)


def names(run_dir):
    """Contents of the checkpoint folder once all ranks are done."""
    torch.distributed.barrier()
    folder = checkpoints_dir(run_dir)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    torch.distributed.barrier()
    return found


def finished(saver):
    """Wait for the save in progress of this rank only."""
    while saver._under_way is not None:
        saver.poll()
        time.sleep(0.005)


class Scene:
    """Savers of one small engine, and what this rank printed about them."""

    def __init__(self, folder, stage):
        self.folder, self.stage = Path(folder), stage
        self.ranks, self.engine, self.shards = make_engine(stage, "fp32", 2)

    def saver(self, name, **config):
        PRINTED.seek(0)
        PRINTED.truncate()
        return Saver(self.folder / name, CheckpointConfig(**config), self.shards)

    @property
    def reports(self):
        """Lines since the last saver was created; only rank 0 prints the result of a save."""
        lines = PRINTED.getvalue().splitlines()
        assert RANK == 0 or not lines, lines
        return lines

    def result(self, saver):
        """Final state of a saver, on every rank."""
        saved_step = saver.wait()
        metrics = saver.poll()
        saver.close()
        own = [saved_step, saver.failed_saves, saver.failure]
        assert all(other == own for other in gather_values(own))
        return {
            "saved_step": saved_step,
            "failure": saver.failure,
            "metrics": metrics,
            "reports": self.reports,
            "names": names(saver._run_dir),
        }


def snapshot(scene):
    """The state at step 2 saved at once, and in the background while the weights move on."""
    train(scene.ranks, scene.engine, scene.shards, [0, 1], 3)
    at_once = scene.saver("at_once")
    at_once.save(2, {"step": 2})
    at_once.close()
    may_write = threading.Event()

    def when_allowed(real, *arguments):
        assert may_write.wait(240)
        return real(*arguments)

    saver = scene.saver("background")
    with changed(writer, "write_slices", when_allowed):
        saver.begin(2, {"step": 2})
        train(scene.ranks, scene.engine, scene.shards, [2, 3], 3)
        nothing_yet = list_steps(scene.folder / "background")
        may_write.set()
        saver.wait()
    saver.save(4, {"step": 4})
    return scene.result(saver) | {"nothing_yet": nothing_yet}


def failing(scene, rank):
    """One rank's disk is full for the second of three saves."""
    saver = scene.saver(f"failing-{rank}", keep_last=2)
    saver.save(1, {})
    saver.save(2, {})
    with changed(writer, "write_slices", only_rank(rank, full)):
        saver.begin(3, {})
        middle = [saver.wait(), saver.failed_saves, saver.failure, list_steps(scene.folder / f"failing-{rank}")]
        names_then = names(scene.folder / f"failing-{rank}")
    saver.save(4, {})
    return scene.result(saver) | {"middle": middle, "names_then": names_then}


def no_room_for_words(scene):
    """Rank 1 cannot write anything, so rank 0 waits until its timeout."""
    saver = scene.saver("silent", save_timeout_s=0.2)
    with (
        changed(writer, "write_slices", only_rank(1, full)),
        changed(writer, "write_failure", only_rank(1, full)),
    ):
        if RANK == 1:
            saver.begin(1, {})
            finished(saver)
        torch.distributed.barrier()
        if RANK == 0:
            saver.begin(1, {})
        saver.wait()
    return scene.result(saver)


def late(scene):
    """Rank 1 starts to write after rank 0 has given up; the next save is complete and removes the leftovers."""
    saver = scene.saver("late", save_timeout_s=0.2)
    may_write = threading.Event()

    def when_allowed(real, *arguments):
        assert may_write.wait(240)
        return real(*arguments)

    with changed(writer, "make", only_rank(1, when_allowed)):
        saver.begin(1, {})
        if RANK == 0:
            finished(saver)
        torch.distributed.barrier()
        may_write.set()
        if RANK == 1:
            finished(saver)
    left = names(scene.folder / "late")
    saver._config.save_timeout_s = 60
    saver.begin(2, {})
    return scene.result(saver) | {"left": left}


def one_at_a_time(scene):
    """Three saves in a row with a slow rank 1: order of events on this rank."""
    events = []

    def slow(real, folder, *arguments):
        time.sleep(0.3 * RANK)
        real(folder, *arguments)
        events.append("written")

    def commit(real, folder, step, *arguments):
        result = real(folder, step, *arguments)
        events.append("committed")
        return result

    def fill(real, *arguments):
        events.append("copied")
        real(*arguments)

    saver = scene.saver("in_a_row")
    with changed(writer, "write_slices", slow), changed(writer, "commit", commit), changed(HostCopy, "fill", fill):
        for step in (1, 2, 3):
            saver.begin(step, {})
        result = scene.result(saver)
    return result | {"events": gather_values(events)}


def leftovers(scene):
    """A killed job's rank 1 had finished its part; this job's cannot write, and later the folder cannot be cleared."""
    run_dir = scene.folder / "leftovers"
    if RANK == 0:
        for attempt in ("killed-1", "replaced"):
            old = writer.make(writer.attempt_dir(run_dir, 1, attempt))
            for rank in (0, 1):
                writer.write_slices(old, rank, {}, {})
    torch.distributed.barrier()
    with changed(writer, "remove_leftovers", full):
        blind = scene.saver("leftovers")
        said = scene.reports
    with changed(writer, "write_slices", only_rank(1, full)):
        blind.begin(1, {})
        blind.wait()
    result = scene.result(blind) | {"said": said}
    scene.saver("leftovers").close()
    return result | {"cleared": names(run_dir)}


def kept(scene):
    saver = scene.saver("kept", keep_last=2, keep_every_steps=4)
    for step in range(0, 11):
        saver.begin(step, {})
    return scene.result(saver)


def cannot_prune(scene):
    saver = scene.saver("cannot_prune", keep_last=2)
    with changed(writer, "prune", full):
        saver.save(1, {})
    return scene.result(saver)


def leaving(scene):
    """Only rank 0 starts a save, as if rank 1 were gone, and exits."""
    saver = scene.saver("leaving", save_timeout_s=600)
    checkpointer._LEAVING_TIMEOUT_S, usual_s = 0.1, checkpointer._LEAVING_TIMEOUT_S
    if RANK == 0:
        saver.begin(1, {})
    saver.close()
    checkpointer._LEAVING_TIMEOUT_S = usual_s
    return {"reports": scene.reports, "names": names(scene.folder / "leaving")}


def scenarios(folder):
    with redirect_stdout(PRINTED):
        return _scenarios(folder)


def _scenarios(folder):
    result = {}
    for stage in (0, 1, 3):
        result[f"snapshot {stage}"] = snapshot(Scene(Path(folder, str(stage)), stage))
    scene = Scene(folder, 3)
    result["failing 0"], result["failing 1"] = failing(scene, 0), failing(scene, 1)
    for scenario in (no_room_for_words, late, one_at_a_time, leftovers, kept, cannot_prune, leaving):
        result[scenario.__name__] = scenario(scene)
    return result
