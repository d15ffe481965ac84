"""Detect hangs: report which rank hangs, with stacks, and end the job. Also warns of long waits for data.

A collective waits forever for a rank that does not join it. Each rank therefore has two threads that use no
collectives:

* ``watch`` measures how long the main thread has made no progress. After ``guard.hang_timeout_s`` it prints the stacks
  of all threads and ends the process with ``EXIT_HUNG``. It touches no files, so hanging storage cannot block it.
* ``beat`` writes the rank's heartbeat (``training.distributed.heartbeats``). When a rank hangs, the lowest rank with a
  recent heartbeat reports which ranks are behind, with step, phase and line. The other ranks see the report and write
  their stacks too. Once all have, every rank exits. A rank that makes progress writes its heartbeat but reads no
  others.

A rank that cannot run at all (SIGSTOP, a dead node, a call that never releases the GIL) stops writing heartbeats, and
the other ranks name it. Time during which a process was stopped does not count, so a job that Slurm suspends and
resumes is not a hang.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from torch import nn

from flowception.files import write_atomically
from flowception.training.distributed import heartbeats
from flowception.training.distributed.collectives import Ranks, on_main
from flowception.training.distributed.gpu_hang import gpu_is_busy, write_flight_record
from flowception.training.distributed.heartbeats import Beat

EXIT_HUNG = 86
"""Exit code of every rank of a job that hung."""
_MOST_POLLS_A_GAP = 3
"""A longer gap between polls means that the process was stopped."""
_POLLS_A_BEAT = 6
"""Polls between heartbeats while there is progress, to limit the load on storage: every rank writes a file."""
_SILENT_POLLS = 24
"""Polls after which a heartbeat is no longer recent."""
_GRACE_POLLS = 20
"""Polls to wait for other ranks' stacks or report."""
_LEAST_JOIN_S = 5.0
"""Minimum time to wait for a thread to end."""


class _Progress(NamedTuple):
    """Progress of the main thread; a single object, so that the threads always see a consistent state."""

    turn: int
    """Phases started and ended."""
    phase: str
    step: int


class Watchdog:
    """Context manager that watches this rank."""

    def __init__(
        self,
        run_dir: str | Path,
        ranks: Ranks,
        *,
        hang_timeout_s: float | None,
        data_stall_warning_s: float | None,
        poll_s: float | None = None,
    ) -> None:
        """Create a watchdog; entering it starts the threads. Collective.

        Args:
            run_dir: The run directory.
            ranks: This rank.
            hang_timeout_s: Seconds without progress after which the job ends; None is off.
            data_stall_warning_s: Seconds in the phase ``data`` after which to warn; None is off.
            poll_s: Seconds between polls; None derives them from the timeouts.
        """
        self._folder, self._ranks = heartbeats.folder_of(run_dir), ranks
        self.hang_timeout_s, self.data_stall_warning_s = hang_timeout_s, data_stall_warning_s
        shortest = min((t for t in (self.hang_timeout_s, self.data_stall_warning_s) if t is not None), default=0.0)
        self._poll_s = poll_s if poll_s is not None else min(max(shortest / 20, 0.05), 5.0)
        self.waiting_for: Callable[[], str] = lambda: "the next batch"
        self._progress = _Progress(0, "between phases", 0)
        self._idle_s, self._polls, self._polls_hung = 0.0, 0, 0
        self._closing, self._hung, self._may_leave = threading.Event(), threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._watch, "watch"), (self._beat, "beat"))
        ]
        if shortest:
            on_main(ranks, lambda: heartbeats.begin(run_dir))

    @contextlib.contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Mark the block as a phase; afterwards the enclosing phase continues. Every rank runs the same phases.

        The start and the end of a phase count as progress.

        Args:
            name: start, plan, data, forward, backward, optimizer, validation, metrics, samples, save, rollback, close.
            step: Number of the step that starts; None keeps the current one.
        """
        around = self._progress.phase
        self._enter(name, step)
        try:
            yield
        finally:
            self._enter(around)

    @contextlib.contextmanager
    def each_forward(self, network: nn.Module, name: str) -> Iterator[None]:
        """Mark the block as a phase where every forward pass of a network counts as progress."""
        with self.phase(name):
            hook = network.register_forward_pre_hook(lambda module, inputs: self._enter(name))
            try:
                yield
            finally:
                hook.remove()

    def _enter(self, phase: str, step: int | None = None) -> None:
        turn, _, before = self._progress
        self._progress = _Progress(turn + 1, phase, before if step is None else step)

    def __enter__(self) -> Self:
        if self.hang_timeout_s is not None or self.data_stall_warning_s is not None:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hung.is_set():  # another rank has left and broken a collective; let the watch thread set the exit code
            threading.Event().wait()
        self._closing.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(_LEAST_JOIN_S, _GRACE_POLLS * self._poll_s))
        with contextlib.suppress(OSError):
            heartbeats.path_of(self._folder, self._ranks.rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        progress, warned, last = self._progress, -1, time.monotonic()
        while not self._closing.wait(self._poll_s):
            now = time.monotonic()
            awake_s, last = min(now - last, _MOST_POLLS_A_GAP * self._poll_s), now
            before, progress = progress, self._progress
            self._idle_s = self._idle_s + awake_s if progress.turn == before.turn else 0.0
            waits = progress.phase == "data" and progress.turn != warned
            if waits and _exceeds(self._idle_s, self.data_stall_warning_s):
                self._print(f"WARNING: no data for {self._idle_s:.0f} s; waiting for {self.waiting_for()}")
                warned = progress.turn
            if _exceeds(self._idle_s, self.hang_timeout_s) or self._hung.is_set():
                self._give_up()

    def _give_up(self) -> None:
        """Print the stacks, wait until all ranks have, and end the process."""
        _, phase, step = self._progress
        what = f"step {step}, {phase}, no progress for {self._idle_s:.0f} s"
        waits = f", waiting for {self.waiting_for()}" if phase == "data" else ""
        self._print(f"{what}{waits}\n{heartbeats.all_stacks()}")
        self._hung.set()
        self._may_leave.wait(3 * _GRACE_POLLS * self._poll_s)
        os._exit(EXIT_HUNG)

    def _print(self, text: str) -> None:
        """Write to file descriptor 2, because the main thread may hold the lock of ``sys.stderr``."""
        os.write(2, f"watchdog: rank {self._ranks.rank}: {text}\n".encode())

    def _beat(self) -> None:
        while not self._closing.wait(self._poll_s):
            try:
                self._beat_once()
            except (OSError, ValueError, TypeError) as error:
                self._print(f"cannot write or read heartbeats ({error})")

    def _beat_once(self) -> None:
        """Write this rank's heartbeat (rarely while there is progress); if a hang is suspected, act on the others'."""
        suspected = self._hung.is_set() or _exceeds(2 * self._idle_s, self.hang_timeout_s)
        self._polls += 1
        if not suspected and self._polls % _POLLS_A_BEAT != 1:
            return
        report, leave = self._folder / heartbeats.REPORT, self._folder / "leave"
        hung = self._hung.is_set()
        first, self._polls_hung = hung and not self._polls_hung, self._polls_hung + hung
        if first:
            heartbeats.stacks_of(self._folder, self._ranks.rank).write_text(heartbeats.all_stacks())
        self._write_heartbeat(hung, suspected and gpu_is_busy(self._ranks.device))
        if first:
            write_flight_record(self._folder, self._ranks.rank)
        if not suspected:
            return
        if leave.exists():
            self._may_leave.set()
        elif report.exists():
            self._hung.set()
            if self._is_reporter() and (self._all_stacks_written() or self._polls_hung > _GRACE_POLLS):
                leave.touch()
        elif self._is_reporter():
            self._report_a_hang(report)

    def _write_heartbeat(self, hung: bool, busy: bool) -> None:
        where, in_collective = heartbeats.main_thread()
        host, process = heartbeats.own_name()
        turn, phase, step = self._progress
        beat = Beat(
            rank=self._ranks.rank,
            time_s=time.time(),
            turn=turn,
            phase=phase,
            step=step,
            idle_s=self._idle_s,
            where=where,
            in_collective=in_collective,
            gpu_is_busy=busy,
            hung=hung,
            host=host,
            process=process,
        )
        heartbeats.write(self._folder, beat)

    def _is_silent(self, beat: Beat | None) -> bool:
        return beat is None or time.time() - beat.time_s > _SILENT_POLLS * self._poll_s

    def _is_reporter(self) -> bool:
        """Whether this is the lowest rank with a recent heartbeat."""
        lower = (heartbeats.read(self._folder, rank) for rank in range(self._ranks.rank))
        return all(self._is_silent(beat) for beat in lower)

    def _read_all(self) -> dict[int, Beat | None]:
        return {rank: heartbeats.read(self._folder, rank) for rank in range(self._ranks.world_size)}

    def _all_stacks_written(self) -> bool:
        return all(self._is_silent(beat) or (beat is not None and beat.hung) for beat in self._read_all().values())

    def _report_a_hang(self, path: Path) -> None:
        beats = self._read_all()
        if any(beat is not None and beat.hung for beat in beats.values()):
            silent = [rank for rank, beat in beats.items() if self._is_silent(beat)]
            text = heartbeats.report(beats, silent)
            self._print(f"{text}\nthe stacks of all ranks that could write them are in {self._folder}")
            write_atomically(path, text + "\n")


def _exceeds(value_s: float, limit_s: float | None) -> bool:
    return limit_s is not None and value_s > limit_s
