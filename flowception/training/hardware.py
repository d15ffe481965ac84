"""Peak FLOP/s of a GPU, for model FLOPs utilization (MFU), and peak memory of a rank."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

GIB = 2**30
PEAK_TFLOPS_BF16: dict[str, float] = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "L40S": 362.0,
}
"""Dense bf16 matrix-multiply throughput by GPU name, TFLOP/s, from NVIDIA's data sheets (half of their figures with
sparsity). The longest matching name applies."""


class Peak(NamedTuple):
    """Peak throughput of a device."""

    tflops: float
    source: str
    """Origin of the figure."""


def gpu_peak(gpu_name: str) -> Peak | None:
    """The bf16 peak of a GPU; None if it is not in the table or is a MIG slice."""
    if "MIG" in gpu_name:
        return None
    for name in sorted(PEAK_TFLOPS_BF16, key=len, reverse=True):
        if re.search(r"\b" + name.replace(" ", r"\b.*\b") + r"\b", gpu_name):
            return Peak(PEAK_TFLOPS_BF16[name], f"{gpu_name}, dense bf16")
    return None


def find_peak(given_tflops: float | None, precision: str, device: torch.device) -> Peak | None:
    """The peak that MFU is relative to.

    Args:
        given_tflops: ``logging.peak_tflops``, which takes precedence.
        precision: ``bf16`` or ``fp32``; the table is for bf16.
        device: Device of the run.

    Returns:
        The peak of one rank; None if unknown, as on the CPU.
    """
    if given_tflops is not None:
        return Peak(given_tflops, "logging.peak_tflops")
    if device.type != "cuda" or precision != "bf16":
        return None
    return gpu_peak(torch.cuda.get_device_name(device))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: memory allocated by torch on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024 / GIB
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / GIB
