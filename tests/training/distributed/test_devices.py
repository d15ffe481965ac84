import socket
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowception.errors import ConfigError
from flowception.training.distributed.devices import (
    RankDevice,
    check_devices,
    describe_devices,
    find_device,
    why_a_gpu_is_meant,
)
from tests.distributed_worker import run_distributed

WORKER = "tests.training.workers.devices_worker"
HOST = socket.gethostname()
NO_DRIVER = Path("/nowhere/version")


def see(monkeypatch, *uuids):
    """Simulate visible GPUs with these UUIDs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    properties = [types.SimpleNamespace(name="NVIDIA H100", uuid=uuid) for uuid in uuids]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties[number])


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "Slurm allocated GPUs (SLURM_GPUS_ON_NODE=8)"),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, "Slurm allocated GPUs (SLURM_GPUS_ON_NODE=8)"),
        ({"SLURM_GPUS_PER_TASK": "h100:1"}, "Slurm allocated GPUs (SLURM_GPUS_PER_TASK=h100:1)"),
        ({"SLURM_GPUS": "0", "SLURM_NTASKS": "2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"DS_ACCELERATOR": "cuda"}, "DS_ACCELERATOR=cuda"),
        ({"DS_ACCELERATOR": "cpu", "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}, None),
    ],
)
def test_evidence_that_a_gpu_is_meant(environment, reason):
    assert why_a_gpu_is_meant(environment, NO_DRIVER) == reason


def test_a_driver_means_a_gpu_unless_its_gpus_are_hidden(tmp_path):
    driver = tmp_path / "version"
    driver.touch()
    assert why_a_gpu_is_meant({}, driver) == f"the NVIDIA driver is installed ({driver})"
    assert why_a_gpu_is_meant({"CUDA_VISIBLE_DEVICES": ""}, driver) is None
    assert why_a_gpu_is_meant({"DS_ACCELERATOR": "cpu"}, driver) is None


def test_the_cpu_is_used_if_requested_or_if_no_gpu_is_meant(monkeypatch):
    see(monkeypatch)
    assert find_device(3, {"CUDA_VISIBLE_DEVICES": ""}) == RankDevice(host=HOST, device="cpu")
    device = find_device(3, {"CUDA_VISIBLE_DEVICES": "0"})
    assert device.device == ""
    assert device.problem.startswith(f"torch {torch.__version__}, built ")
    assert "although CUDA_VISIBLE_DEVICES=0; install a torch build" in device.problem
    assert "DS_ACCELERATOR=cpu" in device.problem

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old.\n Update it.")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert "finds no GPU (The NVIDIA driver on your system is too old. Update it), although CUDA_VISIBLE_DEVICES=0" in (
        find_device(0, {"CUDA_VISIBLE_DEVICES": "0"}).problem
    )
    see(monkeypatch, "a", "b")
    assert find_device(1, {"DS_ACCELERATOR": "cpu"}) == RankDevice(host=HOST, device="cpu")


def test_a_rank_uses_the_gpu_of_its_local_rank_or_the_only_visible_one(monkeypatch):
    see(monkeypatch, "a", "b")
    assert find_device(1, {}) == RankDevice(host=HOST, device="cuda:1", name="NVIDIA H100", uuid="b")
    assert "local rank 2 has no GPU: only 2 are visible" in find_device(2, {}).problem
    see(monkeypatch, "c")
    assert find_device(5, {}) == RankDevice(host=HOST, device="cuda:0", name="NVIDIA H100", uuid="c")


def gpus(nodes=2, each=4):
    numbers = [(f"node{node}", number) for node in range(nodes) for number in range(each)]
    return [
        RankDevice(host=host, device=f"cuda:{number}", name="NVIDIA H100", uuid=f"{host}-{number}")
        for host, number in numbers
    ]


def test_compatible_ranks_are_described():
    check_devices(gpus())
    assert describe_devices(gpus()) == "8 ranks on 2 nodes: cuda (NVIDIA H100) x 8"
    mixed = [*gpus(), replace(gpus()[0], name="NVIDIA A100", uuid="x")]
    check_devices(mixed)
    assert describe_devices(mixed) == "9 ranks on 2 nodes: cuda (NVIDIA H100) x 8, cuda (NVIDIA A100) x 1"
    one_visible = [replace(device, device="cuda:0") for device in gpus()]
    check_devices(one_visible)
    alone = [RankDevice(host="laptop", device="cpu")]
    check_devices(alone * 2)
    assert describe_devices(alone) == "1 rank on 1 node: cpu x 1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"device": "cpu", "name": "", "uuid": ""},
            "all ranks must use the same kind of device, got cpu on rank 6 (node1) and cuda on",
        ),
        ({"uuid": "node1-0"}, "ranks 4 and 6 on node1 see the same GPU, NVIDIA H100 node1-0"),
        ({"device": "", "problem": "torch finds no GPU"}, "rank 6 on node1: torch finds no GPU"),
    ],
)
def test_incompatible_ranks_are_an_error(changes, message):
    devices = gpus()
    devices[6] = replace(devices[6], **changes)
    with pytest.raises(ConfigError) as refused:
        check_devices(devices)
    assert str(refused.value).startswith(message)


def test_two_ranks_exchange_their_devices():
    expected = ["2 ranks on 1 node: cpu x 2, gloo", 2.0]
    assert run_distributed(WORKER, "meet", 2) == [expected, expected]


def test_all_ranks_fail_if_one_has_no_gpu():
    results = run_distributed(WORKER, "rank_1_of_a_node_without_a_working_driver", 3)
    assert results[0] == results[1] == results[2]
    message, on_all_ranks, joined = results[0]
    assert message.startswith(f"rank 1 on {HOST}: torch ")
    assert "finds no GPU" in message
    assert "although Slurm allocated GPUs (SLURM_GPUS_ON_NODE=8)" in message
    assert on_all_ranks
    assert not joined
