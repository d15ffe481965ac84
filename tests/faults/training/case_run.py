"""Run one case: the faulty attempts, then the same command until the run is complete, then all comparisons."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flowception.checkpoint.format import checkpoint_dir, checkpoints_dir, list_steps
from flowception.checkpoint.reader import hashes, verify
from flowception.errors import CheckpointError, FlowceptionError
from tests.faults.training.cases import Attempt, Case
from tests.faults.training.jobs import Job
from tests.faults.training.scene import SAVE_EVERY, STEPS, Scene, read_consumed, read_losses, steps_noted

_KILLED, _STOPPED, _REFUSED = -9, 85, 2
_EXIT_CODES = {"complete": 0, "unsaved": 2}
_MAX_RECOVERIES = 3
_MAX_LOST_STEPS = 2 * SAVE_EVERY
"""The fault can destroy the newest checkpoint just before the next one is due."""
_LOSS_TOLERANCE = 1e-4
_PLAIN_SETTING = (2, 3)
"""Ranks and stage of the reference for runs that change their world size."""
_RESUMED = re.compile(r"resuming \S+ at step (\d+)")


@dataclass
class Record:
    """Result of one case."""

    kind: str
    place: str
    world_sizes: list[int]
    stages: list[int]
    ranks: list[int]
    """Ranks with injected faults."""
    exit_codes: list[list[int]] = field(default_factory=list)
    """Exit codes of every start, by rank; a negative number is a signal."""
    resumed_steps: list[int | None] = field(default_factory=list)
    """Step where every start resumed; None is from scratch."""
    lost_steps: int = 0
    """Largest number of steps that a start had to repeat."""
    mismatches: list[str] = field(default_factory=list)
    """Differences from the uninterrupted run."""
    manual_steps: int = 0
    """Starts of the unchanged command, without faults, that did not complete the run."""
    unexpected: list[str] = field(default_factory=list)
    """Other failures: the fault did not happen, a wrong exit code, ..."""
    loss_difference: float = 0.0
    """Largest relative difference of a step's loss."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether there was no failure."""
        return not (self.mismatches or self.manual_steps or self.unexpected)


class CaseRun:
    """One case in its own folder."""

    def __init__(self, scene: Scene, case: Case, folder: Path) -> None:
        self.scene, self.case, self.folder, self.run_dir = scene, case, folder, folder / "run"
        faulty = {injection.rank for attempt in case.attempts for injection in attempt.injections}
        sizes, stages = ([getattr(a, name) for a in case.attempts] for name in ("world_size", "stage"))
        self.record = Record(case.kind, case.place, sizes, stages, sorted(faulty))

    def run(self) -> Record:
        """Run the case; its folder is removed if it passed."""
        began = time.monotonic()
        self.folder.mkdir()
        first = self.case.attempts[0]
        if self.case.from_snapshot:
            self.scene.snapshot(first.world_size, first.stage, self.folder)
        if self.case.damage is not None:
            self.case.damage(self.run_dir)
        if self.case.two_jobs:
            self._run_two_jobs(first)
        else:
            for attempt in self.case.attempts:
                self._run_attempt(attempt)
        self._recover()
        if not self.record.manual_steps:
            self._compare()
        self.record.seconds = round(time.monotonic() - began, 2)
        if self.record.passed:
            shutil.rmtree(self.folder)
        return self.record

    def _note_job(self, job: Job, log_from: int = 0) -> list[int]:
        """Record how a job ended; returns its exit codes by rank."""
        codes = [job.codes[rank] for rank in range(len(job.pids))]
        found = _RESUMED.search(self._log(log_from))
        self.record.exit_codes.append(codes)
        self.record.resumed_steps.append(int(found[1]) if found else None)
        if job.timed_out:
            self._unexpected("ranks had to be killed: they neither made progress nor exited")
        return codes

    def _log(self, start: int = 0) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace")[start:] if path.exists() else ""

    def _unexpected(self, text: str) -> None:
        self.record.unexpected.append(text)

    def _run_attempt(self, attempt: Attempt) -> None:
        """One start with injected faults."""
        before = len(self._log())
        for note in self.folder.glob("fired-*"):
            note.unlink()
        job = self.scene.run(self.folder, attempt.world_size, attempt.stage, attempt.injections, attempt.grace_s)
        codes = self._note_job(job, before)
        for index, injection in enumerate(attempt.injections):
            if not (self.folder / f"fired-{index}").exists():
                self._unexpected(f"the fault at {injection.place} {injection.at} did not happen")
        if attempt.outcome == "killed":
            if codes[attempt.injections[0].rank] != _KILLED:
                self._unexpected(f"the rank was not killed: exit codes {codes}")
        elif attempt.outcome == "stopped":
            ended = set(codes) == {0} and attempt.injections[0].place.startswith("save:")
            if not ended:  # a save runs beside the steps, so a signal during it may be too late to stop the run
                self._check_stop(codes)
        elif set(codes) != {_EXIT_CODES[attempt.outcome]}:
            self._unexpected(f"exit codes {codes} in place of {_EXIT_CODES[attempt.outcome]}")
        expected = self.case.expected_resume
        if expected is not None and self.record.resumed_steps[0] != expected:
            self._unexpected(f"resumed at {self.record.resumed_steps[0]}, the newest good checkpoint is of {expected}")

    def _check_stop(self, codes: list[int]) -> None:
        """Check that a stopped run exited with 85, and that its newest checkpoint is good and of its last step."""
        if set(codes) != {_STOPPED}:
            self._unexpected(f"a stopped run must leave with {_STOPPED}: exit codes {codes}")
            return
        steps, last = list_steps(self.run_dir), len(read_losses(self.run_dir))
        if not steps or steps[-1] != last:
            self._unexpected(f"stopped after step {last}, checkpoints are of {steps}")
            return
        try:
            verify(checkpoint_dir(self.run_dir, last))
        except CheckpointError as error:
            self._unexpected(f"the checkpoint saved on a signal is not good: {error}")

    def _run_two_jobs(self, attempt: Attempt) -> None:
        """Pause one job in training, and check that the other is refused and the first is not affected."""
        command = self.scene.command(self.run_dir, attempt.stage)
        prepare = partial(self.scene.prepare, place=self.folder, injections=attempt.injections)
        logs = [self.folder / "log", self.folder / "second.log"]
        start = partial(self.scene.server.start, command, attempt.world_size, prepare=prepare)
        held = start(log=logs[0])
        if self.case.two_jobs == "later":
            self._wait_for_hold(held)
        other = start(log=logs[1])
        while not (held.poll() or other.poll()):
            time.sleep(0.01)
        if held.poll():
            held, other = other, held
        other.wait()
        if set(other.codes.values()) != {_REFUSED} or "is in use by process" not in other.log.read_text():
            self._unexpected(f"the second job was not refused: exit codes {other.codes}")
        self._wait_for_hold(held)
        if held.codes:
            self._unexpected(f"the first job was harmed: exit codes {held.codes}")
        (self.folder / "release").touch()
        held.wait()
        for job in (other, held):
            codes = self._note_job(job)
        if any(codes):
            self._unexpected(f"the first job did not complete: exit codes {codes}")

    def _wait_for_hold(self, job: Job) -> None:
        while not (self.folder / "fired-0").exists() and not job.poll():
            time.sleep(0.01)

    def _recover(self) -> None:
        """Repeat the same command until the run is complete."""
        last = self.case.attempts[-1]
        for _ in range(_MAX_RECOVERIES):
            if not any(self.record.exit_codes[-1]):
                break
            before, done = len(self._log()), steps_noted(self.run_dir)
            codes = self._note_job(self.scene.run(self.folder, last.world_size, last.stage), before)
            if any(codes):
                self.record.manual_steps += 1
            self.record.lost_steps = max(self.record.lost_steps, done - (self.record.resumed_steps[-1] or 0))
        if any(self.record.exit_codes[-1]):
            self._unexpected(f"the run never completed; last log line: {self._log().splitlines()[-1]}")

        if self.case.damage is None and self.record.lost_steps > _MAX_LOST_STEPS:
            self._unexpected(f"{self.record.lost_steps} steps were lost, more than {_MAX_LOST_STEPS}")

    def _compare(self) -> None:
        """Compare the completed run with the uninterrupted one."""
        last = self.case.attempts[-1]
        key = (last.world_size, last.stage) if self.case.same_size else _PLAIN_SETTING
        reference = self.scene.reference(*key)
        mismatches = self.record.mismatches
        try:
            found, losses = hashes(checkpoint_dir(self.run_dir, STEPS)), read_losses(self.run_dir)
        except (FlowceptionError, OSError, ValueError) as error:
            mismatches.append(f"the completed run cannot be read: {error}")
            return
        if self.case.same_size:
            mismatches += [f"{name} differ" for name, value in reference.hashes.items() if found[name] != value]
        if len(losses) != len(reference.losses):
            mismatches.append(f"metrics of {len(losses)} steps in place of {len(reference.losses)}")
        pairs = zip(losses, reference.losses)
        self.record.loss_difference = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
        if self.record.loss_difference > (0.0 if self.case.same_size else _LOSS_TOLERANCE):
            mismatches.append(f"losses differ by {self.record.loss_difference:.3g} relative")
        self._compare_consumed(reference.consumed)
        if left := [path.name for path in checkpoints_dir(self.run_dir).glob("*.tmp")]:
            self._note_left_over(left)

    def _compare_consumed(self, wanted: dict[Any, Any]) -> None:
        """Check that every pack of every start equals that of the uninterrupted run, and that none is missing."""
        consumed = read_consumed(self.folder)
        if different := sorted({place for place, content in consumed if wanted.get(place) != content}):
            self.record.mismatches.append(f"{len(different)} packs differ, the first at {different[0]}")
        if missing := sorted(wanted.keys() - {place for place, _ in consumed}):
            self.record.mismatches.append(f"{len(missing)} packs were never trained on, the first {missing[0]}")

    def _note_left_over(self, names: list[str]) -> None:
        """A folder that the next save removes may remain only if there was no later save."""
        if len(self.record.exit_codes) == 1:
            self._unexpected(f"left behind: {names}")
