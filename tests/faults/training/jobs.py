"""Training jobs whose ranks are forked from this process, after it has imported everything once.

A rank of ``train/main.py`` spends about ten seconds on imports and tenths of a second on a step of a toy model; a fork
takes milliseconds. A fork copies only one thread, so this process starts none: it creates no process group and computes
nothing with torch. A first job, also in a fork, shows what a job imports.

``tests/fork_server.py`` forks from a separate process and passes only JSON to it. Here a rank gets a function that
installs fault hooks in it before ``main``, so the process that holds these functions must do the forking.

Needs Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
_POLL_S = 0.005
_JOB_TIMEOUT_S = 240.0
_PORTS = (15_000, 20_000)
"""Below the range from which the kernel takes ports for connections, so that none of these is in the way; the tests'
own ports follow (``tests/ports.py``)."""
_PR_SET_PDEATHSIG = 1
_KILLED = -signal.SIGKILL


@dataclass
class Job:
    """Ranks of one run of ``train/main.py``."""

    pids: list[int]
    log: Path
    codes: dict[int, int] = field(default_factory=dict)
    """Exit code by rank, minus the signal's number after a signal, of the ranks that ended."""
    timed_out: bool = False

    def poll(self) -> bool:
        """Whether all ranks ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def kill(self) -> None:
        """SIGKILL to the ranks that live, and wait for their end."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
        while not self.poll():
            time.sleep(_POLL_S)

    def wait(self, grace_s: float = 2.0) -> list[int]:
        """Wait as ``srun --kill-on-bad-exit --wait`` does: after a rank's death the others have ``grace_s``.

        Returns:
            Exit codes by rank; minus the signal's number for a rank that a signal ended.
        """
        deadline = time.monotonic() + _JOB_TIMEOUT_S
        dying = False
        while not self.poll():
            if not dying and any(code < 0 or code == 1 for code in self.codes.values()):
                dying, deadline = True, time.monotonic() + grace_s
            if time.monotonic() > deadline:
                self.timed_out = not dying
                self.kill()
                break
            time.sleep(_POLL_S)
        return [self.codes[rank] for rank in range(len(self.pids))]


class JobServer:
    """Starts jobs by forking."""

    def __init__(self) -> None:
        self._main = _load_main()
        self._jobs: list[Job] = []

    def preload(self, words: Sequence[str], scratch: Path) -> None:
        """Import what a run of ``words`` imports; it runs once, on one rank.

        Raises:
            RuntimeError: If that run fails.
        """
        listing = scratch / "modules.json"
        job = self.start(words, 1, scratch / "preload.log", at_end=lambda: _list_modules(listing))
        if job.wait() != [0]:
            raise RuntimeError(f"the first job failed; see its log:\n{job.log.read_text()[-4000:]}")
        for name in json.loads(listing.read_text()):
            with contextlib.suppress(ImportError):  # modules that others make in memory are no files to import
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # a collection in a child would copy the pages of all that is shared

    def apart(self, action: Callable[[], None]) -> None:
        """Do something in a fork, because it may start threads.

        Raises:
            RuntimeError: If it fails; its traceback is on stderr.
        """
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                action()
                code = 0
            except BaseException:  # a fork must not continue as the server
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"{action} failed in a fork")

    def start(
        self,
        words: Sequence[str],
        world_size: int,
        log: Path,
        prepare: Callable[[int], None] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> Job:
        """Fork the ranks of one job.

        Args:
            words: Command line of ``train/main.py``.
            world_size: Ranks.
            log: Where the ranks' output is appended.
            prepare: Called in each rank with its number before ``main``.
            at_end: Called in each rank after it.

        Returns:
            The job; ``wait`` for it.

        Raises:
            RuntimeError: If this process has a second thread, which a fork would lose.
        """
        if (threads := len(os.listdir("/proc/self/task"))) != 1:
            raise RuntimeError(f"the server has {threads} threads and can fork with one only")
        port = _free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                self._be_rank(rank, world_size, port, words, log, prepare, at_end)
            pids.append(pid)
        job = Job(pids, log)
        self._jobs.append(job)
        return job

    def run(
        self,
        words: Sequence[str],
        world_size: int,
        log: Path,
        prepare: Callable[[int], None] | None = None,
        grace_s: float = 2.0,
    ) -> Job:
        """Run a job to its end, again if another process took its port meanwhile."""
        while True:
            before_bytes = log.stat().st_size if log.exists() else 0
            job = self.start(words, world_size, log, prepare)
            job.wait(grace_s)
            if "EADDRINUSE" not in log.read_text(errors="replace")[before_bytes:]:
                return job

    def close(self) -> None:
        """Kill jobs that are still running."""
        for job in self._jobs:
            job.kill()

    def _be_rank(
        self,
        rank: int,
        world_size: int,
        port: int,
        words: Sequence[str],
        log: Path,
        prepare: Callable[[int], None] | None,
        at_end: Callable[[], None] | None,
    ) -> None:
        """A forked child's whole life; it does not return."""
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends its ranks itself
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
            if prepare is not None:
                prepare(rank)
            code = self._main.main(list(words))
            if at_end is not None:
                at_end()
        except BaseException:  # what ends an interpreter with a traceback and exit code 1
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                self._main.leave(code)
            os._exit(code)


def _load_main() -> ModuleType:
    """``train/main.py`` as a module, with torch and deepspeed for one thread on the CPU."""
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    os.environ.pop("MASTER_PORT", None)
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("train_main", ROOT / "train" / "main.py")
    if spec is None or spec.loader is None:
        raise RuntimeError("train/main.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _list_modules(path: Path) -> None:
    path.write_text(json.dumps(sorted(name for name in sys.modules if name != "__main__")))


def _free_port() -> int:
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
