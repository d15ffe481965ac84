"""A process that has imported torch, DeepSpeed and the package once, and forks processes for tests.

Importing what a rank of a training job needs takes five to ten seconds; a fork takes hundredths of a second.
``Server.shared()`` is the server of the whole pytest process, started at the first request. A forked process has its
own environment, output and exit code, like a new interpreter. A fork copies only one thread, so the server computes
nothing; process groups and threads start in the children. Needs Linux.
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
"""Modules that a rank of a training job imports at its start or when DeepSpeed first needs them."""
_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 240.0


class Forked:
    """A process that the server forked, with the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, server: Server, pid: int):
        self._server, self.pid = server, pid

    def poll(self) -> int | None:
        """Exit code, or minus the signal's number; None while it runs."""
        self._server.listen(0)
        return self._server.codes.get(self.pid)

    def wait(self, timeout: float) -> int:
        """Wait for its exit code.

        Raises:
            subprocess.TimeoutExpired: If it is still running after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
            self._server.listen(deadline - time.monotonic())
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal if it is running."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL if it is running."""
        self.send_signal(signal.SIGKILL)


class Server:
    """The server's process, and requests to it."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        """Exit codes of the processes that ended, by process id."""
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
        """The server of this pytest process."""
        return Server()

    def start(
        self,
        module: str,
        function: str,
        *arguments: Any,
        environment: Mapping[str, str],
        log: Path,
        errors: Path | None = None,
    ) -> Forked:
        """Fork a process that calls ``function(*arguments)`` of a module.

        Args:
            module: Name of a module; the child imports it if it is not preloaded.
            function: Name of a function; the child exits with its result.
            arguments: Values that JSON can represent.
            environment: The child's complete environment.
            log: File to which its output is appended.
            errors: File for stderr, if it is a separate one.
        """
        request = [module, function, arguments, dict(environment), os.getcwd(), str(log), str(errors or log)]
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._pids:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the fork server forked nothing within {_START_TIMEOUT_S:.0f} s")
            self.listen(1.0)
        return Forked(self, self._pids.pop(0))

    def start_python(
        self, words: Sequence[object], environment: Mapping[str, str], log: Path, errors: Path | None = None
    ) -> Forked:
        """Fork a process that does what ``python WORDS`` does in the repository's folder."""
        argv = [str(word) for word in words]
        return self.start(__name__, "_interpret", argv, environment=environment, log=log, errors=errors)

    def listen(self, timeout_s: float) -> None:
        """Read the server's replies, waiting up to ``timeout_s`` for the first."""
        while select.select([self._process.stdout], [], [], max(timeout_s, 0))[0]:
            received = os.read(self._process.stdout.fileno(), 65536)
            if not received:
                self._errors.seek(0)
                raise RuntimeError(f"the fork server ended:\n{self._errors.read()[-4000:]}")
            *lines, self._unread = (self._unread + received).split(b"\n")
            for pid, *code in map(json.loads, lines):
                if code:
                    self.codes[pid] = code[0]
                else:
                    self._pids.append(pid)
            timeout_s = 0

    def close(self) -> None:
        """Kill the server, which also kills its children."""
        self._process.kill()
        self._process.wait()


def run_python(
    words: Sequence[object], environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Do what ``subprocess.run`` does with ``python WORDS`` in the repository's folder, in a fork.

    Args:
        words: A script, or ``-m`` and a module, then arguments.
        environment: The process's complete environment.
        timeout_s: Seconds after which it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "stdout"), Path(folder, "stderr")
        process = Server.shared().start_python(words, environment, out, errors)
        try:
            code = process.wait(timeout_s)
            return subprocess.CompletedProcess(words, code, out.read_text(), errors.read_text())
        finally:
            process.kill()


def _interpret(words: list[str]) -> object:
    """In a fork: do what the interpreter does with its command line."""
    os.chdir(ROOT)
    is_module, name = words[0] == "-m", words[1] if words[0] == "-m" else words[0]
    sys.argv = words[1:] if is_module else words
    sys.path.insert(0, str(ROOT) if is_module else str(Path(name).resolve().parent))
    code: object = None
    try:
        if is_module:
            sys.modules.pop(name, None)  # it runs as the main module, preloaded or not
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    return code


def _live(request: list[Any], replies: int) -> None:
    """The complete run of a forked child; does not return."""
    code: object = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(replies)
        module, function, arguments, environment, folder, *logs = request
        output, errors = (os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for log in logs)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (errors, 2)):
            os.dup2(source, target)
            os.set_inheritable(target, True)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        code = getattr(importlib.import_module(module), function)(*arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:  # an interpreter would end with a traceback and exit code 1
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _serve(requests: IO[bytes], replies: int) -> None:
    """Fork what is requested and report every exit, until stdin is closed."""
    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the shared pages
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
            received = os.read(requests.fileno(), 65536)
            if not received:
                return
            *lines, unread = (unread + received).split(b"\n")
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
    os.dup2(2, 1)  # imports that print must not write to the replies
    _serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
