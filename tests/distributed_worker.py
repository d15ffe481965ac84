"""Runs a function of a test module in several gloo processes.

``run_distributed`` starts them with the launcher's environment variables and returns each one's result (JSON). They
are forked from a process that has imported everything (``tests/fork_server.py``).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.fork_server import Forked, Server
from tests.ports import free_port

_MARK = "RESULT "


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def start_ranks(module: str, function: str, logs: list[Path], **arguments) -> list[Forked]:
    """Begin ``function(**arguments)`` of a module in as many processes as there are files for their output."""
    port, server = free_port(), Server.shared()
    words = (module, function, arguments)
    environments = [rank_environment(rank, len(logs), port) for rank in range(len(logs))]
    return [
        server.start(__name__, "call", *words, environment=environment, log=log)
        for environment, log in zip(environments, logs, strict=True)
    ]


def end_all(processes: list[Forked | subprocess.Popen]) -> None:
    """Kill those that live and wait for their end."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(60)


_ALONE = "import json, os, sys; from tests.distributed_worker import call; call(*json.loads(sys.argv[1])); os._exit(0)"


def start_interpreters(module: str, function: str, logs: list[Path], **arguments) -> list[subprocess.Popen]:
    """The same in new interpreters, for tests that measure memory: a fork shares its parent's."""
    port, words = free_port(), json.dumps([module, function, arguments])
    processes = []
    for rank, log in enumerate(logs):
        environment = rank_environment(rank, len(logs), port) | {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", _ALONE, words]
        with log.open("w") as stream:
            processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT))
    return processes


def run_distributed(
    module: str, function: str, world_size: int, *, timeout_s: float = 280, forked: bool = True, **arguments
):
    """Call ``function(**arguments)`` of a module in ``world_size`` processes; one result for each rank."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank_{rank}.log") for rank in range(world_size)]
        processes = (start_ranks if forked else start_interpreters)(module, function, logs, **arguments)
        try:
            codes = [process.wait(timeout_s) for process in processes]
        finally:
            end_all(processes)
        texts = [log.read_text() for log in logs]
    if any(codes):
        raise AssertionError(
            "\n".join(f"--- rank {r}, exit {c}\n{t[-4000:]}" for r, (c, t) in enumerate(zip(codes, texts)))
        )
    return [json.loads(next(x for x in t.splitlines() if x.startswith(_MARK))[len(_MARK) :]) for t in texts]


def run_on_two_ranks(module: str, function: str, **arguments):
    """The result of ``function(**arguments)`` in two processes, which must be the same on both."""
    results = run_distributed(module, function, 2, timeout_s=800, **arguments)
    assert results[0] == results[1], "ranks disagree"
    return results[0]


def call(module: str, function: str, arguments: dict) -> None:
    """In a rank: call, and print the result. The process leaves at once then, as ``train/main.py`` does."""
    result = getattr(importlib.import_module(module), function)(**arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    print(f"\n{_MARK}{json.dumps(result)}", flush=True)
