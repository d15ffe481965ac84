"""Select the device of each rank, and check that the ranks are compatible, before any collective.

A rank uses the CPU only if nothing indicates that a GPU is meant. Otherwise an old driver or a torch built without CUDA
would silently train on the CPU for weeks. Ranks share their devices through the rendezvous store, so that all of them
fail together. Otherwise a node whose ranks use gloo would leave the others waiting in NCCL.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed import PrefixStore, Store

from flowception.errors import ConfigError

_DRIVER = Path("/proc/driver/nvidia/version")
_SLURM_GPUS = (
    "SLURM_GPUS",
    "SLURM_GPUS_ON_NODE",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_JOB_GPUS",
    "SLURM_STEP_GPUS",
)
_NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last one is from Slurm."""


@dataclass(frozen=True, kw_only=True)
class RankDevice:
    """Device of a rank."""

    host: str
    device: str
    """torch device string, such as ``cuda:3``; empty if the rank has none."""
    name: str = ""
    """Name of the GPU."""
    uuid: str = ""
    """UUID of the GPU."""
    problem: str = ""
    """Why the rank cannot compute."""

    @property
    def kind(self) -> str:
        """``cuda`` or ``cpu``."""
        return self.device.split(":")[0]


def why_a_gpu_is_meant(environment: Mapping[str, str], driver: Path = _DRIVER) -> str | None:
    """Return the evidence that this process should use a GPU; None if there is none.

    Args:
        environment: Environment variables.
        driver: A file that the NVIDIA driver creates.

    Returns:
        A phrase for an error message.
    """
    if environment.get("DS_ACCELERATOR") == "cpu":
        return None
    if environment.get("DS_ACCELERATOR") == "cuda":
        return "DS_ACCELERATOR=cuda"
    for name in _SLURM_GPUS:
        if environment.get(name, "0") not in ("", "0"):
            return f"Slurm allocated GPUs ({name}={environment[name]})"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return None if visible in _NO_GPU else f"CUDA_VISIBLE_DEVICES={visible}"
    return f"the NVIDIA driver is installed ({driver})" if driver.exists() else None


def find_device(local_rank: int, environment: Mapping[str, str] = os.environ) -> RankDevice:
    """Find this rank's device: the GPU of its local rank, the only visible GPU, or the CPU if no GPU is meant.

    Args:
        local_rank: Number of this rank on its node.
        environment: Environment variables.

    Returns:
        The device, or a ``problem`` if there is no suitable one.
    """
    host = socket.gethostname()
    if environment.get("DS_ACCELERATOR") == "cpu":
        return RankDevice(host=host, device="cpu")
    if not torch.cuda.is_available():
        reason = why_a_gpu_is_meant(environment)
        if reason is None:
            return RankDevice(host=host, device="cpu")
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        text = (
            f"torch {torch.__version__}, built {built}, finds no GPU ({_cuda_error()}), although {reason}; install a "
            "torch build that matches the driver (see `nvidia-smi` and `flowception doctor`), or set "
            "DS_ACCELERATOR=cpu to train on the CPU"
        )
        return RankDevice(host=host, device="", problem=text)
    count = torch.cuda.device_count()
    if 1 < count <= local_rank:
        text = f"local rank {local_rank} has no GPU: only {count} are visible; start one rank per GPU"
        return RankDevice(host=host, device="", problem=text)
    number = local_rank if count > 1 else 0
    properties = torch.cuda.get_device_properties(number)
    return RankDevice(
        host=host, device=f"cuda:{number}", name=properties.name, uuid=str(getattr(properties, "uuid", ""))
    )


def _cuda_error() -> str:
    """The error of CUDA's initialization, such as a driver that is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return "CUDA starts but finds no device"


def share_devices(own: RankDevice, rank: int, world_size: int, store: Store) -> list[RankDevice]:
    """Exchange the devices of all ranks through the rendezvous store. Returns them in rank order."""
    store = PrefixStore("flowception/devices", store)
    store.set(str(rank), json.dumps(asdict(own)))
    if rank == 0:
        store.set("all", json.dumps([json.loads(store.get(str(other))) for other in range(world_size)]))
    devices = [RankDevice(**found) for found in json.loads(store.get("all"))]
    store.set(f"{rank} has read", "")
    if rank == 0:  # rank 0 hosts the store and may exit soon
        store.wait([f"{other} has read" for other in range(world_size)])
    return devices


def check_devices(devices: Sequence[RankDevice]) -> None:
    """Check that all ranks can compute together.

    Raises:
        ConfigError: If they cannot, with the first offending rank and its node.
    """
    for rank, device in enumerate(devices):
        if device.problem:
            raise ConfigError(f"rank {rank} on {device.host}: {device.problem}")
    usual = Counter(device.kind for device in devices).most_common(1)[0][0]
    users: dict[str, int] = {}
    for rank, device in enumerate(devices):
        if device.kind != usual:
            raise ConfigError(
                f"all ranks must use the same kind of device, got {device.kind} on rank {rank} ({device.host}) and "
                f"{usual} on most ranks; run `flowception doctor` on that node, or set DS_ACCELERATOR=cpu on all ranks "
                "or none"
            )
        other = users.setdefault(device.uuid, rank) if device.uuid else rank
        if other != rank:
            raise ConfigError(
                f"ranks {other} and {rank} on {device.host} see the same GPU, {device.name} {device.uuid}; start one "
                "rank per GPU"
            )


def describe_devices(devices: Sequence[RankDevice]) -> str:
    """Describe the devices, such as '8 ranks on 2 nodes: cuda (NVIDIA H100) x 8'."""
    nodes = len({device.host for device in devices})
    counts = Counter(f"{device.kind} ({device.name})" if device.name else device.kind for device in devices)
    kinds = ", ".join(f"{kind} x {count}" for kind, count in counts.items())
    return f"{len(devices)} rank{'s' * (len(devices) > 1)} on {nodes} node{'s' * (nodes > 1)}: {kinds}"
