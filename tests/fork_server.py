"""A process that has imported torch, DeepSpeed and the package once, and forks the processes that tests ask for.

An interpreter that imports all that a rank of a training job needs works five to ten seconds before its first line; a
fork costs hundredths of one. ``Server.shared()`` is one for the whole pytest process, started when first asked. What it
forks has an environment, output and exit code of its own as a started interpreter has. A fork copies one thread only,
so the server computes nothing: process groups and threads begin in the children. Needs Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "setuptools",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor.experimental",
    "flowception.cli",
    "flowception.codecs.video_file",
    "flowception.evaluation.oracles.gaussian",
    "flowception.generation.generate",
    "flowception.generation.training_sampler",
    "flowception.training.trainer",
)
"""What a rank of a training job imports, now or when DeepSpeed first needs it."""
_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 240.0


class Forked:
    """A process that the server forked; the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, server: Server, pid: int):
        self._server, self.pid = server, pid

    def poll(self) -> int | None:
        """Exit code, minus the signal's number after a signal; None while it lives."""
        self._server.listen(0)
        return self._server.codes.get(self.pid)

    def wait(self, timeout: float) -> int:
        """Exit code when it has ended; ``subprocess.TimeoutExpired`` if it has not by then."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
            self._server.listen(deadline - time.monotonic())
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to it, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        self.send_signal(signal.SIGKILL)


class Server:
    """Starts the server's process and asks it for forks."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        """Exit codes by process, of those that ended."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the server
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        self._unread = b""
        self._pids: list[int] = []
        atexit.register(self.close)

    @staticmethod
    @functools.cache
    def shared() -> Server:
        """The pytest process's one."""
        return Server()

    def start(self, module: str, function: str, *arguments: Any, environment: Mapping[str, str], log: Path) -> Forked:
        """Fork a process that calls ``function(*arguments)`` of a module.

        Args:
            module: Its name; a child that needs one that is not preloaded imports it.
            function: Its exit code is what this returns.
            arguments: Whatever JSON holds.
            environment: All of the child's.
            log: Where its output is appended.
        """
        request = [module, function, arguments, dict(environment), os.getcwd(), str(log)]
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._pids:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the fork server gave no process within {_START_TIMEOUT_S:.0f} s")
            self.listen(1.0)
        return Forked(self, self._pids.pop(0))

    def start_python(self, words: Sequence[object], environment: Mapping[str, str], log: Path) -> Forked:
        """Fork what ``python WORDS`` is in the repository's folder: a script, or ``-m`` and a module, and arguments."""
        return self.start(__name__, "_interpret", [str(word) for word in words], environment=environment, log=log)

    def listen(self, timeout_s: float) -> None:
        """Take in what the server says, waiting for its first word if it says nothing now."""
        while select.select([self._process.stdout], [], [], max(timeout_s, 0))[0]:
            heard = os.read(self._process.stdout.fileno(), 65536)
            if not heard:
                self._errors.seek(0)
                raise RuntimeError(f"the fork server ended:\n{self._errors.read()[-4000:]}")
            *lines, self._unread = (self._unread + heard).split(b"\n")
            for pid, *code in map(json.loads, lines):
                if code:
                    self.codes[pid] = code[0]
                else:
                    self._pids.append(pid)
            timeout_s = 0

    def close(self) -> None:
        """End the server, and its children with it."""
        self._process.kill()
        self._process.wait()


def run_python(words: Sequence[object], environment: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
    """What ``python WORDS`` does in the repository's folder, in a fork: exit code, and output with errors.

    Args:
        words: A script or ``-m`` and a module, then arguments.
        environment: All of the process's.
        timeout_s: How long it may take.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = Server.shared().start_python(words, environment, log)
        try:
            return process.wait(timeout_s), log.read_text()
        finally:
            process.kill()


def _interpret(words: list[str]) -> object:
    """In a fork: what the interpreter does with its command line."""
    os.chdir(ROOT)
    is_module, name = words[0] == "-m", words[1] if words[0] == "-m" else words[0]
    sys.argv = words[1:] if is_module else words
    sys.path.insert(0, str(ROOT) if is_module else str(Path(name).resolve().parent))
    code: object = None
    try:
        if is_module:
            sys.modules.pop(name, None)  # preloaded or not: it runs as the main module
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    return code


def _live(request: list[Any], replies: int) -> None:
    """A forked child's whole life; it does not return."""
    code: object = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(replies)
        module, function, arguments, environment, folder, log = request
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
            os.set_inheritable(target, True)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        code = getattr(importlib.import_module(module), function)(*arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:  # what ends an interpreter with a traceback and exit code 1
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _serve(requests: IO[bytes], replies: int) -> None:
    """Fork what is asked for and tell of every end, until nobody asks any more."""
    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of all that is shared
    children: dict[int, int] = {}
    unread = b""
    while True:
        for ready in select.select([requests, *children], [], [])[0]:
            if ready is not requests:
                pid = children.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.write(replies, json.dumps([pid, code]).encode() + b"\n")
                continue
            heard = os.read(requests.fileno(), 65536)
            if not heard:
                return
            *lines, unread = (unread + heard).split(b"\n")
            for line in lines:
                if (threads := len(os.listdir("/proc/self/task"))) != 1:
                    raise RuntimeError(f"the server has {threads} threads and can fork with one only")
                pid = os.fork()
                if pid == 0:
                    _live(json.loads(line), replies)
                children[os.pidfd_open(pid)] = pid
                os.write(replies, json.dumps([pid]).encode() + b"\n")


def main() -> None:
    replies = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no reply
    _serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
