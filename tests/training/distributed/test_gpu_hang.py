import os
import subprocess
import sys
import types

import pytest
import torch
from torch.distributed.flight_recorder.components.loader import read_dump

from flowception.training.distributed import gpu_hang

GPU = torch.device("cuda", 1)


@pytest.mark.parametrize("done", [True, False])
def test_a_gpu_is_busy_while_the_training_stream_has_work(monkeypatch, done):
    asked = []
    stream = types.SimpleNamespace(query=lambda: done)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: asked.append(device) or stream)
    assert gpu_hang.gpu_is_busy(GPU) is not done
    assert not gpu_hang.gpu_is_busy(torch.device("cpu"))
    assert asked == [GPU]


def test_torch_s_own_reader_can_read_a_flight_record(monkeypatch, tmp_path):
    """Records of CPU process groups replace those of NCCL, which this torch may lack."""
    c10d = torch._C._distributed_c10d
    monkeypatch.setattr(c10d, "_dump_nccl_trace", c10d._dump_fr_trace, raising=False)
    gpu_hang.write_flight_record(tmp_path, 12)
    (path,) = tmp_path.iterdir()
    record = read_dump(gpu_hang.FLIGHT_RECORD, str(path))
    assert record["rank"] == 12
    assert "entries" in record


def test_a_torch_without_nccl_has_no_flight_record(monkeypatch, tmp_path):
    monkeypatch.delattr(torch._C._distributed_c10d, "_dump_nccl_trace", raising=False)
    gpu_hang.write_flight_record(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


NO_ANSWER = """
import ctypes
import torch
from flowception.training.distributed import gpu_hang
gpu_hang._CUDA_TIMEOUT_S = 0.2
torch._C._distributed_c10d._dump_nccl_trace = lambda: ctypes.PyDLL(None).sleep(1000)  # which holds the GIL
gpu_hang.write_flight_record(None, 0)
"""


def test_a_process_ends_if_cuda_does_not_respond():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", NO_ANSWER], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "write_flight_record" in done.stderr
