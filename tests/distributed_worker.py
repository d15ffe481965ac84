"""Runs a function of a test module in several gloo processes.

``python distributed_worker.py MODULE FUNCTION ARGUMENTS`` is what each process runs; ``run_distributed`` starts
them with the launcher's environment variables and hands back what each returned (JSON).
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a process of its own finds tests.* there

from tests.ports import free_port  # noqa: E402

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


def run_distributed(module: str, function: str, world_size: int, *, timeout_s: float = 280, **arguments):
    """Call ``function(**arguments)`` of a module in ``world_size`` processes; one result for each rank."""
    port = free_port()
    command = [sys.executable, __file__, module, function, json.dumps(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank_{rank}.log") for rank in range(world_size)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                environment = rank_environment(rank, world_size, port)
                processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout_s) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = [log.read_text() for log in logs]
    if any(codes):
        raise AssertionError(
            "\n".join(f"--- rank {r}, exit {c}\n{t[-4000:]}" for r, (c, t) in enumerate(zip(codes, texts)))
        )
    return [json.loads(next(x for x in t.splitlines() if x.startswith(_MARK))[len(_MARK) :]) for t in texts]


def main() -> None:
    module, function, arguments = sys.argv[1:4]
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    print(f"\n{_MARK}{json.dumps(result)}", flush=True)
    os._exit(0)  # as train/main.py does: a thread of gloo may not survive the interpreter's own ending


if __name__ == "__main__":
    main()
